"""GGUF checkpoints: against the gguf library and transformers, and on the real SmolLM2."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as library_dequantize
from gguf.quants import quantize as library_quantize
from peers import smollm2_path
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.gguf import GGUFWriter, n_bytes_of, read_gguf
from puna.model.config import PRESETS, LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import SpecialIds, open_checkpoint
from puna.model.formats.gguf import GGUFCheckpoint, gguf_name, save_gguf
from puna.model.formats.gguf_blocks import READABLE
from puna.model.formats.gguf_config import ROPE_FREQS, rope_divisors
from puna.model.formats.layout import to_rotate_half
from puna.model.formats.load import load_model
from puna.model.llama import Llama
from puna.model.names import parameter_shapes

CONFIG = LlamaConfig(
    vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=160, max_seq_len=512,
    rope_theta=10_000.0,
)  # fmt: skip
TIED = CONFIG.model_copy(update={"tie_embeddings": True, "norm_eps": 1e-6})
LLAMA2 = CONFIG.model_copy(update={"n_kv_heads": 4})
CONFIGS = {"grouped": CONFIG, "tied": TIED, "all heads": LLAMA2}


def state_of(config: LlamaConfig) -> dict[str, Tensor]:
    """Weights large enough for logits that mean something, norms that are not all one."""
    torch.manual_seed(5)
    return {
        name: 1 + 0.1 * torch.randn(shape) if len(shape) == 1 else 0.1 * torch.randn(shape)
        for name, shape in parameter_shapes(config).items()
    }


def save(path: Path, config: LlamaConfig = CONFIG, **options: Any) -> Path:
    save_gguf(path, config, state_of(config), **options)
    return path


def rewrite(
    path: Path, *, metadata: Mapping[str, Any] = {}, drop: tuple[str, ...] = (),
    tensors: Mapping[str, tuple[tuple[int, ...], str, bytes]] = {},
) -> Path:  # fmt: skip
    """Write a file again with other key-values or tensors; None removes a key."""
    file, raw = read_gguf(path), path.read_bytes()
    content = {
        name: (one.shape, one.type_name, raw[one.offset_bytes : one.offset_bytes + one.n_bytes])
        for name, one in file.tensors.items()
        if name not in drop
    } | dict(tensors)
    values = {k: v for k, v in {**file.metadata, **metadata}.items() if v is not None}
    with path.open("wb") as out:
        writer = GGUFWriter(out, values, [(n, s, t) for n, (s, t, _) in content.items()])
        for _, _, data in content.values():
            writer.write(data)
    return path


# --- written and read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_bitwise(name: str, dtype: str, tmp_path: Path) -> None:
    config, state = CONFIGS[name], state_of(CONFIGS[name])
    if dtype == "bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
    save_gguf(tmp_path / "a.gguf", config, state.items(), dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.kind == "gguf"
    assert checkpoint.config == config
    found = dict(checkpoint.tensors())
    assert list(found) == list(state) == list(checkpoint.stored)
    for key, tensor in found.items():
        is_norm = tensor.ndim == 1
        assert tensor.dtype == (torch.float32 if is_norm else getattr(torch, dtype))
        assert checkpoint.stored[key].dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(tensor, state[key].to(tensor.dtype)), key


def test_the_library_reads_the_rows_of_q_and_k_interleaved(tmp_path: Path) -> None:
    state = state_of(CONFIG)
    path = save(tmp_path / "a.gguf", dtype="bfloat16", metadata={"general.name": "small"})
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.name"].contents() == "small"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    theirs = {
        one.name: torch.from_numpy(library_dequantize(one.data, one.tensor_type).copy())
        for one in reader.tensors
    }
    assert theirs.keys() == {gguf_name(name) for name in state}
    for name, tensor in state.items():
        expected = tensor if tensor.ndim == 1 else tensor.bfloat16().float()
        if name.endswith(("wq.weight", "wk.weight")):
            head = expected.view(-1, 16, 64)  # pairs (i, i + 8) lie at rows 2i, 2i + 1
            expected = torch.stack((head[:, :8], head[:, 8:]), dim=2).reshape(-1, 64)
        assert torch.equal(theirs[gguf_name(name)], expected), name


def test_q8_0_is_the_librarys(tmp_path: Path) -> None:
    state = state_of(CONFIG)
    path = save(tmp_path / "a.gguf", dtype="Q8_0")
    reader = {one.name: one for one in gguf.GGUFReader(path).tensors}
    ours = dict(GGUFCheckpoint(path).tensors())
    for name, tensor in state.items():
        one = reader[gguf_name(name)]
        if tensor.ndim == 1:
            assert torch.equal(ours[name], tensor)
            continue
        assert one.tensor_type == gguf.GGMLQuantizationType.Q8_0
        expected = library_quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
        values = torch.from_numpy(library_dequantize(expected, one.tensor_type))
        assert torch.equal(ours[name], values), name
        if not name.endswith(("wq.weight", "wk.weight")):  # those have their rows elsewhere
            assert np.array_equal(one.data, expected), name


def test_q8_0_refuses_what_it_cannot_hold_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    for value, shown in ((1e7, "1e+07"), (float("nan"), "nan"), (float("inf"), "inf")):
        state = state_of(CONFIG)
        state["layers.1.attention.wo.weight"][3, 40] = value
        with pytest.raises(PunaError, match=r"blk\.1\.attn_output\.weight") as caught:
            save_gguf(path, CONFIG, state, dtype="Q8_0")
        assert f"magnitude {shown} does not fit" in caught.value.message
    narrow = CONFIG.model_copy(update={"ffn_dim": 100})
    with pytest.raises(PunaError, match=r"ffn_down\.weight has rows of 100 values"):
        save_gguf(path, narrow, state_of(narrow), dtype="Q8_0")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parameters_of_another_model_or_order_are_not_written(tmp_path: Path) -> None:
    state = state_of(CONFIG)
    for wrong in (
        {k: v for k, v in state.items() if k != "norm.weight"},
        state | {"more": torch.ones(1)},
        state | {"norm.weight": torch.ones(65)},
        reversed(state.items()),
        list(state.items())[:-1],
    ):
        with pytest.raises(ValueError, match="parameter"):
            save_gguf(tmp_path / "a.gguf", CONFIG, wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "Q8_0"])
def test_one_tensor_lives_at_a_time(dtype: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf", dtype=dtype)
    tensors: Iterator[tuple[str, Tensor]] = GGUFCheckpoint(path).tensors()
    before: weakref.ref[Tensor] | None = None
    count = 0
    for _, tensor in tensors:
        assert before is None or before() is None
        before = weakref.ref(tensor)
        del tensor
        count += 1
    assert count == len(parameter_shapes(CONFIG))


def test_single_tensors_are_read_by_name(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(save(tmp_path / "a.gguf"))
    names = ["norm.weight", "layers.1.attention.wk.weight"]
    state = state_of(CONFIG)
    for (name, tensor), expected in zip(checkpoint.tensors(names), names, strict=True):
        assert name == expected
        assert torch.equal(tensor, state[name])


# --- special tokens


@pytest.mark.parametrize(
    ("ids", "metadata", "found"),
    [
        (SpecialIds(), {}, SpecialIds()),
        (SpecialIds(1, (2,), 0), {}, SpecialIds(1, (2,), 0)),
        (SpecialIds(5, (7, 8, 9), None), {}, SpecialIds(5, (7, 8, 9), None)),
        (SpecialIds(5, (7, 8, 9, 10), 3), {}, SpecialIds(5, (7, 8, 9), 3)),
        (SpecialIds(5, (7, 9), 3), {"bos": 6, "eos": 9, "eot": 9}, SpecialIds(6, (9, 7), 3)),
    ],
)
def test_special_ids_are_kept(
    ids: SpecialIds, metadata: dict[str, int], found: SpecialIds, tmp_path: Path
) -> None:
    given = {f"tokenizer.ggml.{key}_token_id": value for key, value in metadata.items()}
    path = save(tmp_path / "a.gguf", special_ids=ids, metadata=given)
    assert GGUFCheckpoint(path).special_ids == found


# --- RoPE


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b"])
def test_divisors_are_those_of_transformers(preset: str) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PRESETS.get(preset)
    scaling = config.rope_scaling
    assert isinstance(scaling, RopeScaling)
    theirs = HFConfig(
        hidden_size=config.dim, num_attention_heads=config.n_heads,
        max_position_embeddings=config.max_seq_len,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": config.rope_theta, "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain = config.rope_theta**-exponents
    ours = torch.tensor(rope_divisors(config, scaling), dtype=torch.float64)
    torch.testing.assert_close(ours, plain / scaled.double(), rtol=1e-5, atol=0)


OWN = [f"puna.rope.scaling.{name}" for name in ("factor", "low_freq_factor", "high_freq_factor")]
CONTEXT = "llama.rope.scaling.original_context_length"
FOREIGN = dict.fromkeys([*OWN, CONTEXT])
"""Removes what only puna writes."""


def scaled(scaling: RopeScaling | LinearScaling | None, theta: float = 500_000.0) -> LlamaConfig:
    # head_dim 16: at base 500,000 the longest wavelength is 600,000 tokens
    return CONFIG.model_copy(update={"rope_scaling": scaling, "rope_theta": theta})


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(factor=8.0),
        RopeScaling(factor=32.0),
        RopeScaling(factor=2.7, original_max_seq_len=4096),
        LinearScaling(factor=4.0),
        LinearScaling(factor=2.5),
        None,
    ],
)
def test_scaling_is_found_in_files_of_others(
    scaling: RopeScaling | LinearScaling | None, tmp_path: Path
) -> None:
    config = scaled(scaling)
    path = rewrite(save(tmp_path / "a.gguf", config), metadata=FOREIGN)
    assert (ROPE_FREQS in read_gguf(path).tensors) == isinstance(scaling, RopeScaling)
    assert GGUFCheckpoint(path).config == config


@pytest.mark.parametrize(
    "config",
    [
        scaled(RopeScaling(factor=3.0, low_freq_factor=2, high_freq_factor=9)),
        scaled(RopeScaling(factor=8.0, original_max_seq_len=777)),
        scaled(RopeScaling(factor=8.0), theta=50.0),  # no wavelength is long enough to show it
    ],
)
def test_any_scaling_of_our_own_comes_back(config: LlamaConfig, tmp_path: Path) -> None:
    assert GGUFCheckpoint(save(tmp_path / "a.gguf", config)).config == config


def divisors(values: Any) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    data = np.asarray(values, dtype=np.float32)
    return {ROPE_FREQS: (data.shape, "F32", data.tobytes())}


GOOD = rope_divisors(scaled(None), RopeScaling(factor=8.0))


@pytest.mark.parametrize(
    ("values", "metadata", "message"),
    [
        ([2.0] * 8, {}, "is not that of Llama 3.1"),
        ([float("nan")] * 8, {}, "is not that of Llama 3.1"),
        ([0.5] * 8, {}, "is not that of Llama 3.1"),
        (GOOD[:-1], {}, "is not that of Llama 3.1"),
        ([*GOOD, 8.0], {}, "is not that of Llama 3.1"),
        ([], {}, "is not that of Llama 3.1"),
        ([1.0] * 20_000, {}, "not a few values of F32"),
        (GOOD, {"factor": 4.0, "type": "linear"}, "scaled twice"),
        (GOOD, {"factor": 4.0}, "scaled twice"),
        (GOOD, {"type": "yarn"}, "type is 'yarn'"),
        (GOOD, {"original_context_length": "8k"}, "is '8k', not a whole number"),
        (GOOD, {"original_context_length": 0}, "greater than or equal to 1"),
    ],
)
def test_other_divisors_are_refused(
    values: list[float], metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.gguf", scaled(None))
    keys = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    rewrite(path, metadata=keys, tensors=divisors(values))
    with pytest.raises(PunaError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in caught.value.message


def test_own_numbers_that_the_divisors_contradict_are_not_believed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf", scaled(RopeScaling(factor=8.0)))
    rewrite(path, metadata={OWN[0]: 4.0})
    assert GGUFCheckpoint(path).config.rope_scaling == RopeScaling(factor=8.0)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"scaling.factor": 4.0}, LinearScaling(factor=4.0)),  # linear unless a type is given
        ({"scaling.factor": 4}, LinearScaling(factor=4.0)),
        ({"scale_linear": 2.0}, LinearScaling(factor=2.0)),
        ({"scale_linear": 2.0, "scaling.factor": 3.0}, LinearScaling(factor=3.0)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.type": "linear"}, None),
    ],
)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(
    metadata: dict[str, Any], found: LinearScaling | None, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.gguf")
    rewrite(path, metadata={f"llama.rope.{key}": value for key, value in metadata.items()})
    assert GGUFCheckpoint(path).config.rope_scaling == found


# --- what is no Llama, or damaged


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3', not 'llama'"),
        ({"general.architecture": None}, "None, not 'llama'"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.block_count": 2**32 - 1}, "is 4294967295, but the file has only 21 tensors"),
        ({"llama.block_count": 3}, r"tensor blk\.2\.attn_q\.weight is missing"),
        ({"llama.block_count": 1}, r"tensor blk\.1\.attn_q\.weight does not belong"),
        ({"llama.block_count": True}, "is True, not a whole number"),
        ({"llama.embedding_length": 64.0}, r"is 64\.0, not a whole number"),
        ({"llama.embedding_length": "64"}, "is '64', not a whole number"),
        ({"llama.attention.head_count": [4, 4]}, "<list of 2 values>, not a whole number"),
        ({"llama.attention.head_count": 0}, "n_heads: Input should be greater"),
        ({"llama.attention.head_count": 5}, "not a multiple of n_heads=5"),
        ({"llama.attention.head_count_kv": 4}, r"attn_k\.weight has shape \[32, 64\]"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta"),
        ({"llama.rope.freq_base": float("inf")}, "rope_theta"),
        ({"llama.rope.freq_base": False}, "is False, not a number"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8, not"),
        ({"llama.attention.key_length": 128}, "key_length is 128, not"),
        ({"llama.rope.scaling.type": "yarn"}, "type is 'yarn'"),
        ({"llama.rope.scaling.type": ["linear"]}, "type is <list of 1 values>"),
        ({"llama.rope.scaling.factor": "4"}, "is '4', not a number"),
        ({"llama.rope.scaling.factor": 0.5}, "factor: Input should be greater"),
        ({"llama.expert_count": 8}, "mixture of experts"),
    ],
)
def test_other_headers_are_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = rewrite(save(tmp_path / "a.gguf"), metadata=metadata)
    with pytest.raises(PunaError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in caught.value.message
    assert caught.value.fix


BIAS = {"blk.0.attn_q.bias": ((64,), "F32", bytes(256))}


@pytest.mark.parametrize(
    ("drop", "tensors", "message"),
    [
        (("blk.1.ffn_up.weight",), {}, r"blk\.1\.ffn_up\.weight is missing\n"),
        (("blk.1.ffn_up.weight", "blk.1.ffn_norm.weight"), {}, r"is missing \(and 1 more\)"),
        (("token_embd.weight",), {}, r"token_embd\.weight is missing"),
        ((), BIAS, r"blk\.0\.attn_q\.bias does not belong"),
        ((), {"output_norm.weight": ((1, 64), "F32", bytes(256))}, r"has shape \[1, 64\]"),
        ((), {"token_embd.weight": ((64,), "F32", bytes(256))}, r"token_embd\.weight is missing"),
        (("output.weight",), {"output.weight": ((97, 64), "F16", bytes(97 * 128))}, "97, 64"),
    ],
)
def test_other_tables_are_refused(
    drop: tuple[str, ...], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = rewrite(save(tmp_path / "a.gguf"), drop=drop, tensors=tensors)
    with pytest.raises(PunaError, match=message):
        GGUFCheckpoint(path)


def test_a_block_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dim": 256, "n_heads": 8})
    shape = (256, 256)
    other = {"blk.0.attn_q.weight": (shape, "Q2_K", bytes(n_bytes_of("Q2_K", shape)))}
    path = rewrite(save(tmp_path / "a.gguf", config), tensors=other)
    with pytest.raises(PunaError, match=r"attn_q\.weight is stored as Q2_K") as caught:
        GGUFCheckpoint(path)
    assert caught.value.fix
    assert set(READABLE) <= set(caught.value.fix.replace(",", "").split())


def test_nan_is_read_and_refused_only_where_a_model_is_made(tmp_path: Path) -> None:
    state = state_of(CONFIG)
    state["layers.0.attention.wv.weight"][5, 7] = float("nan")
    save_gguf(tmp_path / "a.gguf", CONFIG, state)
    found = dict(GGUFCheckpoint(tmp_path / "a.gguf").tensors())
    assert found["layers.0.attention.wv.weight"].isnan().nonzero().tolist() == [[5, 7]]
    with pytest.raises(PunaError, match=r"blk\.0\.attn_v\.weight holds 1 values") as caught:
        load_model(tmp_path / "a.gguf")
    assert "[5, 7]" in caught.value.message


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf")
    checkpoint = GGUFCheckpoint(path)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(PunaError, match="ends inside a tensor"):
        list(checkpoint.tensors())


# --- peers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "Q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written(name: str, dtype: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = CONFIGS[name]
    path = save(tmp_path / "a.gguf", config, dtype=dtype)
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens_BT = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        ours, expected = load_model(path)(tokens_BT), theirs(tokens_BT).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_smollm2_is_what_it_says() -> None:
    checkpoint = GGUFCheckpoint(smollm2_path())
    assert checkpoint.config == LlamaConfig(
        vocab_size=49_152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536,
        max_seq_len=8192, rope_theta=100_000.0, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    assert sum(one.n_elements for one in checkpoint.stored.values()) == 134_515_008
    assert checkpoint.special_ids == SpecialIds(bos_id=1, eos_ids=(2,), pad_id=2)
    dtypes = [one.dtype for one in checkpoint.stored.values()]
    assert {kind: dtypes.count(kind) for kind in dtypes} == {
        "Q8_0": 1, "Q4_1": 210, "float32": 61,
    }  # fmt: skip


@pytest.mark.xdist_group("real_model")
def test_every_tensor_of_smollm2_is_the_librarys() -> None:
    path = smollm2_path()
    header, raw = read_gguf(path, skip_arrays=True).tensors, np.memmap(path, np.uint8, "r")
    checkpoint = GGUFCheckpoint(path)
    for name, tensor in checkpoint.tensors():
        one = header[gguf_name(name)]
        data = raw[one.offset_bytes : one.offset_bytes + one.n_bytes]
        kind = gguf.GGMLQuantizationType[one.type_name]
        theirs = library_dequantize(data.reshape(one.shape[0], -1), kind).reshape(one.shape)
        expected = torch.from_numpy(np.asarray(theirs).copy())
        if name.endswith(("wq.weight", "wk.weight")):
            expected = to_rotate_half(expected, checkpoint.config.head_dim)
        assert torch.equal(tensor, expected), name


@pytest.mark.slow
@pytest.mark.xdist_group("real_model")
@pytest.mark.filterwarnings("ignore")
def test_logits_of_smollm2_are_those_of_transformers() -> None:
    from peers import transformers_model

    path = smollm2_path()
    checkpoint = GGUFCheckpoint(path)
    model = Llama(checkpoint.config, device="meta")
    model.load_state_dict({n: t.clone() for n, t in checkpoint.tensors()}, assign=True)
    tokens_BT = torch.randint(49_152, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.eval()(tokens_BT)
        theirs = transformers_model(path)(tokens_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
