"""Checkpoint formats over random shapes, shards and damage."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling, meta_ffn_dim
from puna.model.formats.checkpoint import open_checkpoint
from puna.model.formats.hf import save_hf
from puna.model.formats.layout import to_interleaved, to_rotate_half
from puna.model.formats.load import load_model
from puna.model.formats.meta_params import Measured, Params, params_of
from puna.model.formats.meta_save import save_meta
from puna.model.llama import Llama

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
SLOW = settings(max_examples=40, deadline=None)


@st.composite
def configs(draw):
    n_kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 2, 4]))
    theta = draw(st.sampled_from([10_000.0, 500_000.0]))
    scalings = st.sampled_from([None, RopeScaling(factor=32.0), LinearScaling(factor=3.0)])
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 4)) * 24,
        dim=n_heads * 2 * draw(st.integers(1, 4)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=draw(st.integers(1, 4)) * 12,
        max_seq_len=draw(st.sampled_from([100, 4096, 8192])),
        rope_theta=theta,
        rope_scaling=draw(scalings),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tie_embeddings=draw(st.booleans()),
    )


def assert_holds(path, config, state):
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    found = dict(checkpoint.tensors())
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@given(configs(), st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from(["float32", "bfloat16"]))
@SLOW
def test_meta_folders_are_lossless_for_every_possible_number_of_shards(config, n_shards, dtype):
    kind = getattr(torch, dtype)
    state = {name: value.to(kind) for name, value in Llama(config).state_dict().items()}
    copies = max(n_shards // config.n_kv_heads, 1)
    sizes = (config.n_heads, config.ffn_dim, config.vocab_size, config.n_kv_heads * copies)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        if any(size % n_shards for size in sizes):
            with pytest.raises(PunaError, match="cannot be cut into"):
                save_meta(folder, config, state, n_shards=n_shards, dtype=kind)
            assert not folder.exists()
        else:
            save_meta(folder, config, state, n_shards=n_shards, dtype=kind)
            assert_holds(folder, config, state)


@given(configs(), st.integers(1, 60_000))
@SLOW
def test_hugging_face_folders_are_lossless_for_every_size_of_file(config, max_shard_bytes):
    state = Llama(config).state_dict()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder, config, state.items(), max_shard_bytes=max_shard_bytes)
        assert_holds(folder, config, state)
        largest = max(value.nbytes for value in state.values())
        for file in folder.glob("*.safetensors"):
            header = int.from_bytes(file.read_bytes()[:8], "little")
            assert file.stat().st_size - 8 - header <= max(max_shard_bytes, largest)


@given(st.integers(2, 9000), st.integers(1, 40_000), st.integers(2, 130_000), st.booleans())
@settings(max_examples=300, deadline=None)
def test_params_give_back_any_width(dim, ffn_dim, vocab_size, tied):
    config = LlamaConfig(
        vocab_size=vocab_size, dim=2 * dim, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=ffn_dim,
        max_seq_len=77, tie_embeddings=tied,
    )  # fmt: skip
    values = json.loads(json.dumps(params_of(config)))
    multiplier = values.get("ffn_dim_multiplier")
    assert meta_ffn_dim(2 * dim, values["multiple_of"], multiplier) == ffn_dim
    measured = Measured(vocab_size, ffn_dim, config.kv_dim, tied)
    assert Params(Path("params.json"), values).config(measured) == config


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_the_two_orders_undo_each_other(heads, half, columns):
    w = torch.arange(heads * 2 * half * columns).view(-1, columns)
    assert torch.equal(to_interleaved(to_rotate_half(w, 2 * half), 2 * half), w)
    moved = to_rotate_half(w, 2 * half)
    for pair in range(half):  # rows 2i and 2i + 1 come to i and i + half
        assert torch.equal(moved[pair], w[2 * pair])
        assert torch.equal(moved[pair + half], w[2 * pair + 1])


CONFIG = LlamaConfig(
    vocab_size=12, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=6, max_seq_len=8192
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("formats")
    state = Llama(CONFIG).state_dict()
    save_hf(base / "hf", CONFIG, state)
    save_meta(base / "meta", CONFIG, state, dtype=torch.float32)
    return {"hf": base / "hf" / "model.safetensors", "meta": base / "meta" / "consolidated.00.pth"}


@given(st.sampled_from(["hf", "meta"]), st.data())
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_is_a_clear_error_or_harmless(folders, kind, data):
    """Whatever happens to the bytes: no exception but ours, no model of another shape."""
    path = folders[kind]
    content = path.read_bytes()
    damaged = bytearray(content)
    cut = data.draw(st.none() | st.integers(0, len(content)), "cut")
    if cut is not None:
        damaged = damaged[:cut]
    assume(damaged)
    for _ in range(data.draw(st.integers(0, 4), "flips")):
        # mostly where the structure is: at the beginning, and in the directory of an archive
        at = data.draw(st.integers(0, min(len(damaged), 4000) - 1), "at")
        at = -1 - at if data.draw(st.booleans(), "from the end") else at
        damaged[at] = data.draw(st.integers(0, 255), "value")
    model, message = None, ""
    try:
        path.write_bytes(damaged)
        model = load_model(path.parent)
    except PunaError as error:
        message = error.message
    finally:
        path.write_bytes(content)
    if model is None:
        assert str(path.parent) in message
    else:
        assert model.config == CONFIG
        assert all(math.isfinite(float(value.sum())) for value in model.state_dict().values())
