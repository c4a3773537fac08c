"""Conversion: lossless between formats, never half-written, float16 only past the guard."""

import importlib.util
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from puna.cli.model import model as model_command
from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.lm.convert import Options, convert
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.hf import save_hf
from puna.model.formats.layout import to_interleaved
from puna.model.formats.load import load_model
from puna.model.formats.meta_save import save_meta
from puna.model.llama import Llama
from puna.model.testing import huge_weight_llama, overflowing_llama

BASE = {
    "vocab_size": 64, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96,
    "max_seq_len": 8192,
}  # fmt: skip
FAMILY = {
    "2": LlamaConfig(**{**BASE, "n_kv_heads": 4, "max_seq_len": 4096}, rope_theta=10_000.0),
    "2-long": LlamaConfig(**BASE, rope_theta=10_000.0, rope_scaling=LinearScaling(factor=2.0)),
    "3": LlamaConfig(**BASE),
    "3.1": LlamaConfig(**{**BASE, "max_seq_len": 131072}, rope_scaling=RopeScaling()),
    "3.2": LlamaConfig(
        **{**BASE, "max_seq_len": 131072}, rope_scaling=RopeScaling(factor=32.0),
        tie_embeddings=True,
    ),
}  # fmt: skip
RANKS = Path(importlib.util.find_spec("llama_models").submodule_search_locations[0]) / (
    "llama3/tokenizer.model"
)


def save(path, config, dtype=torch.float32):
    state = {name: value.to(dtype) for name, value in Llama(config).state_dict().items()}
    save_hf(path, config, state, dtype=dtype, bos_id=1, eos_ids=[2, 3], pad_id=4)
    return state


@pytest.fixture
def source(tmp_path):
    save(tmp_path / "in", FAMILY["3"])
    return tmp_path / "in"


def assert_holds(path, config, state):
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    found = dict(checkpoint.tensors())
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_there_and_back_is_bitwise(config, dtype, tmp_path):
    state = save(tmp_path / "hf", config, dtype)
    seen = []
    done = convert(
        tmp_path / "hf", tmp_path / "meta", Options("meta", n_shards=2),
        seen.append, lambda name, n: seen.append((name, n)),
    )  # fmt: skip
    assert done.lossless
    assert done.dtype == str(dtype).removeprefix("torch.")
    assert done.n_tensors == len(state)
    assert seen[0] == done.bytes_in == sum(t.nbytes for t in state.values())
    assert [name for name, _ in seen[1:]] == list(state)
    assert_holds(tmp_path / "meta", config, state)
    back = convert(tmp_path / "meta", tmp_path / "back", Options("hf", max_shard_bytes=30_000))
    assert back.lossless
    assert_holds(tmp_path / "back", config, state)
    again = convert(tmp_path / "back", tmp_path / "one", Options("hf"))
    assert again.bytes_out == (tmp_path / "one" / "model.safetensors").stat().st_size
    one, first = (tmp_path / name / "model.safetensors" for name in ("one", "hf"))
    assert hash_file(one) == hash_file(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_by_way_of_gguf_is_bitwise_too(config, dtype, tmp_path):
    state = save(tmp_path / "hf", config, dtype)
    done = convert(tmp_path / "hf", tmp_path / "a.gguf", Options("gguf"))
    assert done.lossless
    assert done.bytes_out == (tmp_path / "a.gguf").stat().st_size
    # norms lie there in float32, but fit the type of the matrices
    meta = convert(tmp_path / "a.gguf", tmp_path / "meta", Options("meta", n_shards=2))
    assert (meta.dtype, meta.lossless) == (done.dtype, True)
    assert_holds(tmp_path / "meta", config, state)
    convert(tmp_path / "meta", tmp_path / "b.gguf", Options("gguf"))
    back = convert(tmp_path / "b.gguf", tmp_path / "back", Options("hf"))
    assert back.lossless
    assert_holds(tmp_path / "back", config, state)


def test_norms_that_do_not_fit_keep_the_file_in_float32(tmp_path):
    model = Llama(FAMILY["3"])
    with torch.no_grad():
        model.norm.weight[5] += 1e-6
    from puna.model.formats.gguf import save_gguf

    save_gguf(tmp_path / "a.gguf", model.config, model.state_dict(), dtype="bfloat16")
    done = convert(tmp_path / "a.gguf", tmp_path / "out", Options("hf"))
    assert (done.dtype, done.lossless) == ("float32", True)
    found = dict(open_checkpoint(tmp_path / "out").tensors())
    assert torch.equal(found["norm.weight"], model.norm.weight)
    done = convert(tmp_path / "a.gguf", tmp_path / "rounded", Options("hf", dtype="bfloat16"))
    assert not done.lossless


def test_packed_weights_are_unpacked_exactly(source, tmp_path):
    packed = convert(source, tmp_path / "q.gguf", Options("gguf", dtype="Q8_0"))
    assert not packed.lossless
    assert packed.bytes_out < packed.bytes_in / 3
    done = convert(tmp_path / "q.gguf", tmp_path / "out", Options("hf"))
    assert (done.dtype, done.lossless) == ("float32", True)
    unpacked, found = (
        dict(open_checkpoint(tmp_path / name).tensors()) for name in ("q.gguf", "out")
    )
    assert all(torch.equal(unpacked[name], found[name]) for name in unpacked)
    original = Llama(FAMILY["3"]).state_dict()
    assert all((found[name] - original[name]).abs().max() < 0.01 for name in found)
    ids = open_checkpoint(tmp_path / "out").special_ids
    assert (ids.bos_id, ids.eos_ids[0], ids.pad_id) == (1, 2, 4)


class OneAtATime:
    """A checkpoint that checks that the tensor before is gone when the next one is asked for."""

    def __init__(self, checkpoint):
        self._checkpoint = checkpoint
        for name in ("kind", "path", "config", "stored", "special_ids", "notes"):
            setattr(self, name, getattr(checkpoint, name))

    def tensors(self, names=None):
        alive = None
        for name in names or self.stored:
            assert alive is None or alive() is None, name
            fresh = next(tensor for _, tensor in self._checkpoint.tensors([name])).clone()
            alive = weakref.ref(fresh) if fresh.ndim == 2 else None
            yield name, fresh
            del fresh


@pytest.mark.parametrize("options", [Options("hf"), Options("meta", n_shards=2), Options("gguf")])
def test_one_tensor_at_a_time_is_in_memory(source, tmp_path, monkeypatch, options):
    def opened(path, **_):
        return OneAtATime(open_checkpoint(path))

    monkeypatch.setattr("puna.lm.convert.open_checkpoint", opened)
    out = tmp_path / ("out.gguf" if options.to == "gguf" else "out")
    convert(source, out, options)
    model = load_model(OneAtATime(open_checkpoint(out)), dtype=torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16


def test_rounding_is_said(source, tmp_path):
    done = convert(source, tmp_path / "out", Options("meta", dtype="bfloat16"))
    assert not done.lossless
    state = {k: v.bfloat16() for k, v in Llama(FAMILY["3"]).state_dict().items()}
    assert_holds(tmp_path / "out", FAMILY["3"], state)


def test_mixed_types_become_float32(tmp_path):
    from safetensors.torch import load_file, save_file

    state = save(tmp_path / "in", FAMILY["3"], torch.bfloat16)
    weights = tmp_path / "in" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, weights)
    done = convert(tmp_path / "in", tmp_path / "out", Options("meta"))
    assert done.lossless
    assert done.dtypes == {"bfloat16": len(state) - 1, "float32": 1}
    found = dict(open_checkpoint(tmp_path / "out").tensors())
    assert torch.equal(found["norm.weight"], tensors["model.norm.weight"])


def test_special_ids_and_the_tokenizer_come_along(tmp_path):
    source, shape = tmp_path / "in", {"vocab_size": 128_256, "dim": 16, "tie_embeddings": True}
    save(source, FAMILY["3"].model_copy(update=shape))
    shutil.copy(RANKS, source / "tokenizer.model")
    done = convert(source, tmp_path / "meta", Options("meta"))
    assert done.tokenizer
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == RANKS.read_bytes()
    convert(source, tmp_path / "hf", Options("hf"))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    ids = open_checkpoint(tmp_path / "hf").special_ids
    assert (ids.bos_id, ids.pad_id) == (1, 4)  # what the files say goes before the tokenizer
    assert ids.eos_ids[:2] == (2, 3)
    assert {128001, 128009} < set(ids.eos_ids)
    back = convert(tmp_path / "meta", tmp_path / "back", Options("hf"))
    assert back.tokenizer
    assert open_checkpoint(tmp_path / "back").special_ids.bos_id == 128000


def test_a_tokenizer_of_another_model_is_not_passed_on(source, tmp_path):
    shutil.copy(RANKS, source / "tokenizer.model")
    with pytest.raises(PunaError, match="128256 ids, the model's vocabulary only 64"):
        convert(source, tmp_path / "out", Options("hf"))


def test_a_tokenizer_that_meta_has_no_file_for_is_kept_as_it_is(source, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "<|end_of_text|>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<|end_of_text|>"])
    words.save(str(source / "tokenizer.json"))
    done = convert(source, tmp_path / "out", Options("meta"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert any("instead of Meta's file" in note for note in done.notes)


# ------------------------------------------------------------------------------- the target


def test_what_stands_at_the_target_stays_unless_it_is_to_be_replaced(source, tmp_path):
    out = tmp_path / "out"
    save(out, FAMILY["2"])
    (out / "old.txt").write_text("old")
    before = hash_file(out / "model.safetensors")
    with pytest.raises(PunaError, match="exists already"):
        convert(source, out, Options("meta"))
    assert hash_file(out / "model.safetensors") == before
    convert(source, out, Options("meta", overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == ["consolidated.00.pth", "params.json"]
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", Options("meta"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in", "out"]


def test_only_a_checkpoint_is_ever_replaced(source, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(PunaError, match="is no checkpoint: it is not replaced"):
        convert(source, precious, Options("hf", overwrite=True))
    for place in (source, source / "inside", tmp_path):
        with pytest.raises(PunaError, match="lie one in the other"):
            convert(source, place, Options("hf", overwrite=True))
    with pytest.raises(PunaError, match="nowhere does not exist"):
        convert(source, tmp_path / "nowhere" / "out", Options("hf"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    source, tmp_path, monkeypatch, to, overwrite
):
    out = tmp_path / "out"
    if overwrite:
        save(out, FAMILY["2"])
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def full(name, _):
        if name.startswith("layers.1"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        convert(source, out, Options(to, overwrite=overwrite), on_tensor=full)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    monkeypatch.setattr("puna.lm.convert_target.commit_dir", lambda *_: full("layers.1", 0))
    with pytest.raises(OSError, match="No space"):
        convert(source, out, Options(to, overwrite=overwrite))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if overwrite:
        assert open_checkpoint(out).config == FAMILY["2"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    source, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("puna.lm.convert_target.shutil.disk_usage", lambda _: usage)
    with pytest.raises(PunaError, match=r"needs \d.* KiB, the disk has 1000 B left"):
        convert(source, tmp_path / "out", Options("hf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out", Options("hf", dtype="Q8_0"), "hf checkpoints cannot hold Q8_0"),
        ("out", Options("hf", dtype="int4"), "dtype 'int4' is not known"),
        ("out", Options("gguf"), "does not fit --to gguf"),
        ("out.gguf", Options("hf"), "does not fit --to hf"),
        ("out.gguf", Options("gguf", dtype="float16"), "float16 is not written to GGUF"),
        ("out", Options("hf", n_shards=2), "--shards is for --to meta"),
        ("out", Options("meta", max_shard_bytes=9), "--max-shard-size is for --to hf"),
        ("out", Options("meta", n_shards=3), "n_heads = 4 cannot be cut into 3 shards"),
        ("out", Options("meta", rope_factor=8.0), "--rope-factor is for Meta checkpoints"),
    ],
)
def test_impossible_wishes_are_refused(source, tmp_path, out, options, message):
    with pytest.raises(PunaError, match=message):
        convert(source, tmp_path / out, options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_wrong_layout_is_not_passed_on(tmp_path):
    from tests.unit.test_model_probe import CONFIG, changed, trained

    state = changed(trained(), ("wq.weight", "wk.weight"), lambda w: to_interleaved(w, 64))
    save_hf(tmp_path / "in", CONFIG, state)
    with pytest.raises(PunaError, match="left out the reordering"):
        convert(tmp_path / "in", tmp_path / "out", Options("meta"))
    convert(tmp_path / "in", tmp_path / "out", Options("meta", probe=False))


def test_values_that_are_not_finite_are_not_passed_on(tmp_path):
    model = Llama(FAMILY["3"])
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 4] = float("nan")
    save_hf(tmp_path / "in", FAMILY["3"], model.state_dict())
    with pytest.raises(PunaError, match=r"layers\.1\.mlp\.down_proj\.weight .* nan at \[3, 4\]"):
        convert(tmp_path / "in", tmp_path / "out", Options("meta"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("craft", [overflowing_llama, huge_weight_llama])
def test_float16_needs_the_guards_consent_or_force(craft, tmp_path):
    model = craft()
    save_hf(tmp_path / "in", model.config, model.state_dict(), dtype=torch.bfloat16)
    with pytest.raises(PunaError, match=r"not safe in float16: .*layers\."):
        convert(tmp_path / "in", tmp_path / "out", Options("hf", dtype="float16"))
    assert not (tmp_path / "out").exists()
    done = convert(tmp_path / "in", tmp_path / "out", Options("hf", dtype="float16", force=True))
    report = json.loads((tmp_path / "out" / "fp16_guard.json").read_text())
    assert report["safe"] is False
    assert any("not safe in float16" in note for note in done.notes)


def test_float16_of_a_tame_model_passes_without_a_report(source, tmp_path):
    done = convert(source, tmp_path / "out", Options("hf", dtype="float16"))
    assert any("safe in float16" in note for note in done.notes)
    assert not (tmp_path / "out" / "fp16_guard.json").exists()
    back = convert(tmp_path / "out", tmp_path / "back", Options("meta", dtype="float16"))
    assert back.lossless  # stored like that already: nothing to ask
    assert not any("safe" in note for note in back.notes)


# ------------------------------------------------------------------------------ the command


def run(*arguments):
    return CliRunner().invoke(model_command, ["convert", *map(str, arguments)])


def test_the_command_says_what_it_did(source, tmp_path):
    done = run(source, tmp_path / "meta", "--to", "meta", "--shards", 2)
    assert done.exit_code == 0, done.output
    assert "21 (21 x float32 -> float32; every value is what it was)" in done.stdout
    assert "note: there is no tokenizer" in done.stdout
    done = run(tmp_path / "meta", tmp_path / "hf", "--to", "hf", "--json", "--dtype", "bfloat16",
               "--max-shard-size", "20KB")  # fmt: skip
    values = json.loads(done.stdout)
    assert values["dtype_in"] == {"float32": 21}
    assert (values["dtype_out"], values["lossless"], values["tensors"]) == ("bfloat16", False, 21)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2


def test_the_factor_of_a_scaled_checkpoint_is_asked_for(tmp_path):
    save_meta(tmp_path / "in", FAMILY["3.2"], Llama(FAMILY["3.2"]).state_dict())
    params = json.loads((tmp_path / "in" / "params.json").read_text())
    params.pop("rope_scaling")
    (tmp_path / "in" / "params.json").write_text(json.dumps(params))
    with pytest.raises(PunaError, match="--rope-factor 32"):
        convert(tmp_path / "in", tmp_path / "out", Options("hf"))
    done = run(tmp_path / "in", tmp_path / "out", "--to", "hf", "--rope-factor", 32)
    assert done.exit_code == 0, done.output
    assert open_checkpoint(tmp_path / "out").config == FAMILY["3.2"]


@pytest.mark.parametrize("size", ["5 parsecs", "GB", "-1GB", "0"])
def test_sizes_that_are_none_are_refused(source, tmp_path, size):
    done = run(source, tmp_path / "out", "--to", "hf", "--max-shard-size", size)
    assert done.exit_code == 2
    assert "is no size such as 5GB" in done.output
