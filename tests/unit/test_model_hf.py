"""Hugging Face folders: lossless, read by transformers, and strict about everything wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.hf import HFCheckpoint, hf_name, save_hf
from puna.model.formats.hf_config import config_from_hf, config_to_hf, read_hf_config
from puna.model.formats.load import load_model
from puna.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=64,
    rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=16),
)  # fmt: skip
FAMILY = {
    "2": CONFIG.model_copy(
        update={"n_kv_heads": 4, "rope_scaling": None, "rope_theta": 10_000.0}
    ),
    "2-linear": CONFIG.model_copy(
        update={"n_kv_heads": 4, "rope_scaling": LinearScaling(factor=2.5), "rope_theta": 10_000.0}
    ),
    "3": CONFIG.model_copy(update={"rope_scaling": None}),
    "3.1": CONFIG,
    "3.2": CONFIG.model_copy(
        update={"rope_scaling": RopeScaling(factor=32.0, original_max_seq_len=8),
                "tie_embeddings": True}
    ),
}  # fmt: skip
TIED = CONFIG.model_copy(update={"tie_embeddings": True, "rope_scaling": None})


@pytest.fixture(params=[CONFIG, TIED], ids=["untied", "tied"])
def model(request):
    return Llama(request.param)


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "model", CONFIG, Llama(CONFIG).state_dict())
    return tmp_path / "model"


def rewrite(folder, change):
    """Apply ``change`` to the tensors of a saved folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def split_in_two(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7],
             "model-00002-of-00002.safetensors": names[7:]}  # fmt: skip
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(parts)


def assert_same(first: Llama, second: Llama):
    assert first.config == second.config
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert theirs[name].requires_grad


def test_round_trip_is_bitwise_and_byte_deterministic(model, tmp_path):
    save_hf(tmp_path / "a", model.config, model.state_dict(), bos_id=1, eos_ids=[2, 3])
    again = load_model(tmp_path / "a")
    assert_same(model, again)
    save_hf(tmp_path / "b", again.config, again.state_dict(), bos_id=1, eos_ids=[2, 3])
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "b" / name)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json",
    }  # fmt: skip


def test_transformers_loads_our_folder_with_equal_logits(model, tmp_path):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_hf(tmp_path, model.config, model.state_dict(), bos_id=1, eos_ids=[2, 3], pad_id=4)
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.generation_config.eos_token_id == [2, 3]
    assert peer.generation_config.bos_token_id == 1
    assert peer.dtype == torch.float32
    tokens_BT = torch.arange(36).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_transformers_agrees_on_every_family_in_several_files(config, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Llama(config)
    save_hf(tmp_path, config, model.state_dict(), max_shard_bytes=4000, bos_id=1, eos_ids=[2])
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = torch.arange(36).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path)(tokens_BT), peer(tokens_BT).logits, rtol=1e-5, atol=1e-5
        )


def test_we_load_a_folder_of_transformers(tmp_path):
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM

    peer = LlamaForCausalLM(PeerConfig(**config_to_hf(CONFIG))).eval()
    peer.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    model = load_model(tmp_path)
    assert model.config == CONFIG
    tokens_BT = torch.arange(36).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, rtol=1e-4, atol=1e-4)


def test_dtype_is_the_files_unless_asked_for(model, tmp_path):
    save_hf(tmp_path, model.config, model.state_dict(), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).norm.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_checkpoint_in_several_files(folder):
    whole = load_model(folder)
    parts = split_in_two(folder)
    assert_same(whole, load_model(folder))
    with pytest.raises(PunaError, match="checkpoint in several files"):
        save_hf(folder, CONFIG, whole.state_dict())
    (folder / parts[1]).unlink()
    with pytest.raises(PunaError, match=rf"{parts[1]} is missing"):
        load_model(folder)


def test_an_index_may_not_leave_its_folder_or_repeat_a_tensor(folder):
    parts = split_in_two(folder)
    tensors = load_file(folder / parts[0]) | load_file(folder / parts[1])
    save_file(tensors, folder / parts[1], metadata={"format": "pt"})
    with pytest.raises(PunaError, match=r"tensor .* is in .* and in"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    with pytest.raises(PunaError, match="outside the folder"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(PunaError, match="no weight_map"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing[\s\S]*tie_word_embedd"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            r"tensor model\.layers\.2\.mlp\.up_proj\.weight does not belong",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(41, 16)}),
            r"embed_tokens\.weight has shape \[41, 16\], config\.json asks for \[40, 16\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
            r"model\.norm\.weight is stored as I8",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(PunaError, match=message):
        load_model(folder)


def test_buffers_of_old_files_are_no_surplus(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.ones(2)}))
    assert load_model(folder).config == CONFIG


def test_a_tied_file_may_repeat_the_head_only_as_it_is(tmp_path):
    model = Llama(TIED)
    save_hf(tmp_path, TIED, model.state_dict())
    head = model.output_weight.detach().clone()
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    assert_same(model, load_model(tmp_path))
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": head + 1}))
    with pytest.raises(PunaError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_model(tmp_path)


def test_shards_fill_up_to_the_limit_in_the_order_of_the_model(model, tmp_path):
    state = model.state_dict()
    save_hf(tmp_path, model.config, state.items(), max_shard_bytes=5000, dtype=torch.float16)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    tensors = [load_file(file) for file in files]
    sizes = [sum(t.nbytes for t in one.values()) for one in tensors]
    assert max(sizes) <= 5000
    for size, following in zip(sizes, tensors[1:], strict=False):
        first = next(hf_name(name) for name in state if hf_name(name) in following)
        assert size + following[first].nbytes > 5000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    for file, one in zip(files, tensors, strict=True):
        assert {k for k, v in index["weight_map"].items() if v == file.name} == set(one)
    names = [name for one in tensors for name in one]
    assert len(names) == len(set(names)) == len(state)
    wide = {name: tensor.half() for name, tensor in state.items()}
    found = dict(HFCheckpoint(tmp_path).tensors())
    assert all(torch.equal(found[name], wide[name]) for name in state)
    with pytest.raises(PunaError, match="holds another checkpoint"):
        save_hf(tmp_path, model.config, state, max_shard_bytes=3000)
    whole = tmp_path / "whole"
    save_hf(whole, model.config, state, max_shard_bytes=10**9)
    assert (whole / "model.safetensors").is_file()
    with pytest.raises(PunaError, match="holds another checkpoint"):
        save_hf(whole, model.config, state, max_shard_bytes=5000)


def test_our_file_is_the_one_of_the_safetensors_library(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert hash_file(folder / "model.safetensors") == hash_file(tmp_path / "theirs")


def test_streams_are_checked_as_they_come(tmp_path):
    state = Llama(CONFIG).state_dict()
    pairs = list(state.items())
    for wrong in (pairs[:-1], [*pairs, pairs[0]], [("extra", torch.ones(1)), *pairs]):
        with pytest.raises(ValueError, match="do not fit the configuration"):
            save_hf(tmp_path, CONFIG, iter(wrong))
        assert not (tmp_path / "config.json").exists()
        assert not list(tmp_path.glob(".*"))


def test_opening_imports_no_torch_and_reads_no_weight(folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from puna.model.formats.checkpoint import open_checkpoint\n"
        f"checkpoint = open_checkpoint(Path({str(folder)!r}))\n"
        "assert len(checkpoint.stored) == 21 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_table_says_where_everything_is(folder):
    stored = HFCheckpoint(folder).stored
    one = stored["layers.1.attention.wk.weight"]
    assert one.stored_name == "model.layers.1.self_attn.k_proj.weight"
    assert (one.shape, one.dtype, one.n_bytes) == ((8, 16), "float32", 512)
    assert one.files == (folder / "model.safetensors",)
    assert list(stored) == list(Llama(CONFIG).state_dict())


def test_special_ids_come_from_both_files(folder):
    values = {"eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(values))
    edit_config(folder, eos_token_id=7, bos_token_id=5, pad_token_id=-1)
    ids = HFCheckpoint(folder).special_ids
    assert (ids.bos_id, ids.eos_ids, ids.pad_id) == (1, (2, 3, 7), None)
    edit_config(folder, eos_token_id="</s>")
    with pytest.raises(PunaError, match="eos_token_id = '</s>' is no token id"):
        HFCheckpoint(folder)


def test_values_that_are_not_finite_are_refused(folder):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")

    rewrite(folder, spoil)
    with pytest.raises(PunaError, match=r"up_proj\.weight holds 1 values .* nan at \[2, 3\]"):
        load_model(folder)
    large = {name: torch.full_like(t, 3e38) for name, t in Llama(CONFIG).state_dict().items()}
    save_hf(folder, CONFIG, large)  # finite, though their sum is not
    load_model(folder)


def test_lost_grouped_query_attention_is_called_by_its_name(folder):
    edit_config(folder, num_key_value_heads=1)
    with pytest.raises(PunaError, match=r"k_proj\.weight .* \(2 key/value heads instead of 1\)"):
        load_model(folder)
    save_hf(folder, FAMILY["2"], Llama(FAMILY["2"]).state_dict())
    edit_config(folder, num_key_value_heads=2)
    with pytest.raises(PunaError, match="grouped-query attention was lost"):
        load_model(folder)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(PunaError, match="pickles, which can run code"):
        load_model(folder)


def header_of(path, change):
    """Give a file another header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + size]))
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + size :])


def entry(**changes):
    """Change the entry of one tensor."""
    return lambda h: {**h, "model.norm.weight": {**h["model.norm.weight"], **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(shape=[17]), r"model\.norm\.weight of shape \[17\] cannot have 64 bytes"),
        (entry(shape=[-16]), "lacks dtype, shape"),
        (entry(shape="16"), "lacks dtype, shape"),
        (entry(dtype=3), "lacks dtype, shape"),
        (entry(data_offsets=[0, 64]), "do not follow"),
        (entry(data_offsets=[64, 0]), "cannot have -64 bytes"),
        (entry(data_offsets=[0]), "lacks dtype, shape"),
        (lambda h: {**h, "model.norm.weight": 3}, "is no table"),
        (lambda h: {k: v for k, v in h.items() if k != "model.norm.weight"}, "should end|follow"),
        (lambda h: [h], "no table of tensors"),
        (lambda h: b"[" * 200_000, "no valid JSON"),
        (lambda h: b'{"a": {}, "a": {}}', "there twice"),
        (lambda h: b"\xff\xfe", "no valid JSON"),
        (lambda h: b"", "no valid JSON"),
    ],
)
def test_hostile_headers_are_one_clear_error(folder, change, message):
    header_of(folder / "model.safetensors", change)
    with pytest.raises(PunaError, match=rf"model\.safetensors is damaged: .*({message})"):
        load_model(folder)


def test_a_huge_header_is_refused_before_it_is_read(folder):
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # sparse
    with pytest.raises(PunaError, match="a header of 1000000000 bytes, more than the format"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "header"])
def test_damaged_weights_are_one_clear_error(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "garbage": b"not a checkpoint at all" * 20,
            "header": content[:8] + b"\xff" * 40 + content[48:],
        }[damage]
    )
    with pytest.raises(PunaError, match=r"model\.safetensors is damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "dim: Input should be a valid integer"),
        ({"num_attention_heads": 3}, "dim=16 is not a multiple of n_heads=3"),
        ({"head_dim": 8}, "head_dim = 8 is not hidden_size / num_attention_heads = 4"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq"),
        ({"rope_scaling": 8}, "rope_scaling = 8 is not an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_configs_of_other_models_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(PunaError, match=message):
        load_model(folder)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(PunaError, match=r"holds no model: no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PunaError, match="no valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(PunaError, match="holds list, not an object"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    with pytest.raises(PunaError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)


def test_both_rope_spellings_and_old_defaults_are_read():
    values = config_to_hf(CONFIG)
    assert config_from_hf(values) == CONFIG
    rope = {"rope_theta": values.pop("rope_theta"), **values.pop("rope_scaling")}
    assert config_from_hf({**values, "rope_parameters": rope}) == CONFIG
    # a file from before grouped-query attention and rope_theta
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        values.pop(key)
    old = config_from_hf(values)
    assert (old.n_kv_heads, old.rope_theta, old.rope_scaling) == (4, 10_000.0, None)
    assert not old.tie_embeddings


def test_an_interrupted_save_leaves_no_loadable_folder(folder, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    before = hash_file(folder / "model.safetensors")
    monkeypatch.setattr("puna.model.formats.hf.SafetensorsWriter.put", fail)
    with pytest.raises(OSError, match="No space"):
        save_hf(folder, CONFIG, Llama(CONFIG).state_dict())
    assert hash_file(folder / "model.safetensors") == before
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(PunaError, match=r"holds no model: no config\.json"):
        load_model(folder)


def test_saving_parameters_of_another_model_is_a_fault(tmp_path):
    with pytest.raises(ValueError, match="do not fit the configuration"):
        save_hf(tmp_path, TIED, Llama(CONFIG).state_dict())
    assert not list(tmp_path.iterdir())


def test_parts_of_one_buffer_can_be_saved(tmp_path):
    model = Llama(TIED)
    buffer = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    state, start = {}, 0
    for name, parameter in model.named_parameters():
        state[name] = buffer[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    save_hf(tmp_path, TIED, state)
    assert_same(model, load_model(tmp_path))


def test_tensors_can_be_streamed_by_our_names(folder):
    config = read_hf_config(folder)
    streamed = dict(HFCheckpoint(folder).tensors())
    expected = Llama(config).state_dict()
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in expected)
    assert hf_name("layers.11.feed_forward.w2.weight") == "model.layers.11.mlp.down_proj.weight"
