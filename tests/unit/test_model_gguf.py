"""GGUF checkpoints: every block format, round trips, peers, and files that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import smollm2_path

from puna.core.errors import PunaError
from puna.core.gguf import GGML_TYPES, GGUFWriter, read_gguf
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.gguf import GGUFCheckpoint, gguf_name, save_gguf
from puna.model.formats.gguf_blocks import READABLE, dequantize, quantize_q8_0
from puna.model.formats.gguf_config import ROPE_FREQS
from puna.model.formats.load import load_model
from puna.model.llama import Llama
from puna.model.names import parameter_shapes

SHAPES: dict[str, dict[str, Any]] = {
    "llama2": {"rope_theta": 10_000.0},
    "gqa": {"n_kv_heads": 2},
    "tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "linear": {"rope_scaling": LinearScaling(factor=4.0)},
    "llama3.1": {"rope_scaling": RopeScaling(), "max_seq_len": 131_072},
    "llama3.2": {"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True},
}


def make_config(**values: Any) -> LlamaConfig:
    defaults = {"vocab_size": 96, "dim": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2,
                "ffn_dim": 160, "max_seq_len": 256}  # fmt: skip
    return LlamaConfig(**(defaults | values))


def write_table(path: Path, source: Path, change: dict[str, Any], drop: str = "") -> Path:
    """Write a file again with other key-values or without a tensor."""
    file = read_gguf(source)
    data = source.read_bytes()
    metadata = {k: v for k, v in (file.metadata | change).items() if v is not None}
    tensors = [t for t in file.tensors.values() if t.name != drop]
    with path.open("wb") as out:
        writer = GGUFWriter(out, metadata, [(t.name, t.shape, t.type_name) for t in tensors])
        for tensor in tensors:
            writer.write(data[tensor.offset_bytes :][: tensor.n_bytes])
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = make_config(n_kv_heads=1)
    save_gguf(tmp_path / "m.gguf", config, Llama(config).state_dict())
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("name", sorted(READABLE))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_are_those_of_the_gguf_library(name, seed):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as peer

    _, block, size = GGML_TYPES[name]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales overflow and are not finite
        wanted = peer(raw, GGMLQuantizationType[name])
    found = dequantize(torch.from_numpy(raw.flatten()), name, (3, 2 * block)).numpy()
    assert np.array_equal(np.isnan(wanted), np.isnan(found))
    same = ~np.isnan(wanted)
    assert np.array_equal(wanted.view(np.uint32)[same], found.view(np.uint32)[same])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 60.0]))
def test_rounding_to_q8_0_is_that_of_the_gguf_library(seed, scale):
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as peer

    values = np.random.default_rng(seed).normal(size=(4, 96)).astype(np.float32) * scale
    values = np.where(values > scale, np.round(values), values).astype(np.float32)
    with np.errstate(all="ignore"):
        wanted = peer(values, GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantize_q8_0(torch.from_numpy(values)).numpy(), wanted.flatten())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_round_trip_keeps_every_bit(tmp_path, name, dtype):
    config = make_config(**SHAPES[name])
    model = Llama(config, dtype=getattr(torch, dtype))
    model.init_weights(3)
    save_gguf(tmp_path / "m.gguf", config, model.state_dict(), dtype=dtype)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config == config
    assert list(checkpoint.stored) == list(parameter_shapes(config))
    for key, tensor in load_model(checkpoint).state_dict().items():
        assert torch.equal(tensor.float(), model.state_dict()[key].float()), key


def test_q8_0_is_close(tmp_path):
    config = make_config()
    model = Llama(config)
    save_gguf(tmp_path / "m.gguf", config, model.state_dict(), dtype="Q8_0")
    read = load_model(tmp_path / "m.gguf")
    for key, tensor in read.state_dict().items():
        wanted = model.state_dict()[key]
        assert (tensor - wanted).abs().max() <= wanted.abs().max() / 127


@pytest.mark.filterwarnings("ignore")  # of the peer
@pytest.mark.parametrize("name", ["llama2", "gqa", "tied"])
def test_transformers_reads_it_and_computes_the_same(tmp_path, name):
    from transformers import AutoModelForCausalLM

    config = make_config(**SHAPES[name])
    model = Llama(config)
    save_gguf(tmp_path / "m.gguf", config, model.state_dict())
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    tokens_BT = torch.randint(config.vocab_size, (2, 40))
    with torch.inference_mode():
        assert (model(tokens_BT) - peer(tokens_BT).logits).abs().max() <= 1e-5


def test_scaling_of_llama_3_1_is_stored_as_llama_cpp_stores_it(tmp_path):
    scaling = RopeScaling(factor=32.0)
    config = make_config(dim=256, n_heads=2, rope_scaling=scaling, max_seq_len=131_072)
    save_gguf(tmp_path / "m.gguf", config, Llama(config).state_dict())
    file = read_gguf(tmp_path / "m.gguf")
    entry = file.tensors[ROPE_FREQS]
    raw = (tmp_path / "m.gguf").read_bytes()[entry.offset_bytes :][: entry.n_bytes]
    divisors = np.frombuffer(raw, np.float32)
    assert divisors.shape == (64,)
    assert divisors[0] == 1.0
    assert divisors[-1] == 32.0
    assert (np.diff(divisors) >= 0).all()


def test_real_model_is_read_as_the_gguf_library_reads_it():
    from gguf import GGUFReader
    from gguf.quants import dequantize as peer

    checkpoint = GGUFCheckpoint(smollm2_path())
    assert checkpoint.config == LlamaConfig(
        vocab_size=49_152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536,
        max_seq_len=8192, rope_theta=100_000.0, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    assert sum(stored.n_elements for stored in checkpoint.stored.values()) == 134_515_008
    assert (checkpoint.special_ids.bos_id, checkpoint.special_ids.eos_ids) == (1, (2,))
    reader = {tensor.name: tensor for tensor in GGUFReader(smollm2_path()).tensors}
    names = ["tok_embeddings.weight", "layers.7.attention.wv.weight", "norm.weight",
             "layers.29.feed_forward.w2.weight", "layers.3.attention.wk.weight"]  # fmt: skip
    for name, tensor in checkpoint.tensors(names):
        stored = reader[gguf_name(name)]
        wanted = torch.from_numpy(peer(stored.data, stored.tensor_type).copy())
        if "wk" in name:
            wanted = wanted.view(3, 32, 2, 576).transpose(1, 2).reshape(192, 576)
        assert torch.equal(tensor, wanted.view(tensor.shape)), name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3'"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_q.weight is missing"),
        ({"llama.block_count": 1}, "blk.1"),
        ({"llama.attention.head_count_kv": 2}, "has shape"),
        ({"llama.attention.head_count": 3}, "not a multiple of n_heads"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.embedding_length": "wide"}, "dim"),
    ],
)
def test_wrong_key_values_are_named(tmp_path, saved, change, what):
    path = write_table(tmp_path / "wrong.gguf", saved, change)
    with pytest.raises(PunaError) as caught:
        GGUFCheckpoint(path)
    assert what in caught.value.message
    assert str(path) in caught.value.message


def test_missing_tensor_is_named(tmp_path, saved):
    path = write_table(tmp_path / "wrong.gguf", saved, {}, drop="blk.1.ffn_up.weight")
    with pytest.raises(PunaError, match=r"blk\.1\.ffn_up\.weight is missing"):
        GGUFCheckpoint(path)


def test_divisors_of_no_known_scaling_are_refused(tmp_path):
    config = make_config(rope_scaling=RopeScaling(), max_seq_len=131_072)
    path = tmp_path / "m.gguf"
    save_gguf(path, config, Llama(config).state_dict())
    entry = read_gguf(path).tensors[ROPE_FREQS]
    with path.open("r+b") as file:
        file.seek(entry.offset_bytes)
        file.write(np.linspace(1, 3, 32, dtype=np.float32).tobytes())
    with pytest.raises(PunaError, match=r"not that of Llama 3\.1"):
        GGUFCheckpoint(path)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, saved):
    entry = read_gguf(saved).tensors["blk.0.ffn_up.weight"]
    with saved.open("r+b") as file:
        file.seek(entry.offset_bytes + 40)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(PunaError, match=r"blk\.0\.ffn_up\.weight holds 1 values"):
        load_model(saved)


def test_rows_that_are_no_whole_blocks_are_refused_before_a_file_exists(tmp_path):
    config = make_config(dim=48, n_heads=3, n_kv_heads=3)
    with pytest.raises(PunaError, match="Q8_0 blocks have 32"):
        save_gguf(tmp_path / "m.gguf", config, Llama(config).state_dict(), dtype="Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_model_leave_no_file(tmp_path):
    config = make_config()
    state = Llama(make_config(n_layers=1)).state_dict()
    with pytest.raises(ValueError, match="comes where"):
        save_gguf(tmp_path / "m.gguf", config, iter(state.items()))
    assert list(tmp_path.iterdir()) == []
