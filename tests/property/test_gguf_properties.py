"""GGUF over random blocks, key-values, shapes and damage; the gguf library is the reference."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as library_dequantize
from gguf.quants import quantize as library_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from puna.core.errors import PunaError
from puna.core.gguf import GGML_TYPES, GGUFWriter, Skipped, read_gguf
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.gguf import GGUFCheckpoint, save_gguf
from puna.model.formats.gguf_blocks import PIECE_VALUES, READABLE, dequantize, quantize_q8_0
from puna.model.names import parameter_shapes

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bit for bit, NaNs of any kind alike."""
    ours_np = ours.numpy()
    np.testing.assert_array_equal(np.isnan(ours_np), np.isnan(theirs))
    numbers = ~np.isnan(theirs)
    np.testing.assert_array_equal(ours_np[numbers].view(np.uint32), theirs[numbers].view(np.uint32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the library's, of infinite scales
@given(st.data(), st.sampled_from(sorted(READABLE)), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=400, deadline=None)
def test_any_blocks_are_unpacked_as_the_library_does(
    data: st.DataObject, name: str, rows: int, blocks: int
) -> None:
    """Scales are any 16 bits: zeros, denormals, infinities and NaN among them."""
    _, _, size = GGML_TYPES[name]
    raw = data.draw(hnp.arrays(np.uint8, (rows, blocks * size)))
    theirs = library_dequantize(raw, gguf.GGMLQuantizationType[name])
    assert_same_bits(dequantize(torch.from_numpy(raw), name), theirs)


@pytest.mark.parametrize("name", sorted(READABLE))
def test_pieces_of_a_large_matrix_are_put_together(name: str) -> None:
    _, block, size = GGML_TYPES[name]
    rows, blocks = 7, 2 * PIECE_VALUES // (7 * block) + 3
    raw = np.random.default_rng(3).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = library_dequantize(raw, gguf.GGMLQuantizationType[name])
    assert_same_bits(dequantize(torch.from_numpy(raw), name), theirs)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96])),
        elements=st.one_of(
            st.floats(-8e6, 8e6, width=32),
            st.floats(-1, 1, width=32),
            st.floats(-(2**-20), 2**-20, width=32),
        ),
    ),
    st.sampled_from([1, 150]),
)
@settings(max_examples=300, deadline=None)
def test_q8_0_is_the_librarys(values: np.ndarray, repeats: int) -> None:
    values = np.tile(values, (repeats, 1))
    ours = quantize_q8_0(torch.from_numpy(values)).numpy()
    with np.errstate(all="ignore"):
        theirs = library_quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(ours.shape)
    scales = theirs[:, :2].copy().view(np.float16)[:, 0]
    np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
    # Where the scale is zero the numbers mean nothing; the library's come from a division by zero.
    np.testing.assert_array_equal(ours[scales != 0, 2:], theirs[scales != 0, 2:])
    assert not ours[scales == 0, 2:][np.abs(values).reshape(-1, 32)[scales == 0].max(1) == 0].any()


def test_halves_are_rounded_away_from_zero() -> None:
    values = torch.zeros(1, 32)
    values[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])  # the scale is 1
    packed = quantize_q8_0(values)[0]
    assert packed[2:9].view(torch.int8).tolist() == [127, 1, 2, 3, -1, -2, -3]
    assert float(packed[:2].view(torch.float16)) == 1.0


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
WHOLE = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    TEXTS, st.booleans(), FLOATS, st.integers(-(2**63), 2**64 - 1),
    st.lists(TEXTS, max_size=5), st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(FLOATS, min_size=1, max_size=5), st.lists(WHOLE, max_size=5),
)  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(
    st.dictionaries(NAMES.map("k.{}".format), VALUES, max_size=6),
    st.dictionaries(
        NAMES,
        st.tuples(
            st.lists(st.integers(1, 4), max_size=3).map(tuple),
            st.sampled_from(["F32", "F16", "BF16"]),
        ),
        max_size=5,
    ),
    st.sampled_from([None, 1, 8, 64]),
)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], str]],
    alignment: int | None,
) -> None:
    if alignment is not None:
        metadata = metadata | {"general.alignment": alignment}
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    writer = GGUFWriter(file, metadata, [(n, s, kind) for n, (s, kind) in tensors.items()])
    contents = {}
    for name, (shape, kind) in tensors.items():
        contents[name] = rng.bytes(GGML_TYPES[kind][2] * int(np.prod(shape)))
        writer.write(contents[name])
    raw = file.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        path.write_bytes(raw)
        found, short = read_gguf(path), read_gguf(path, skip_arrays=True)
    assert found.metadata == metadata
    assert list(found.tensors) == list(tensors)
    for name, one in found.tensors.items():
        assert (one.shape, one.type_name) == tensors[name]
        assert raw[one.offset_bytes : one.offset_bytes + one.n_bytes] == contents[name]
        assert one.offset_bytes % (alignment or 32) == 0
    assert short.tensors == found.tensors
    assert short.metadata == {
        key: Skipped(len(value)) if isinstance(value, list) else value
        for key, value in metadata.items()
    }


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    n_heads = n_kv_heads * draw(st.sampled_from([1, 2, 4]))
    # A file holds a float32: of the decimals that mean the same one, the shortest comes back.
    factors = st.one_of(st.integers(10, 640).map(lambda n: n / 10), st.integers(8, 512).map(float))
    scalings = st.one_of(
        st.none(),
        st.builds(LinearScaling, factor=factors),
        st.builds(
            RopeScaling,
            factor=factors,
            low_freq_factor=st.sampled_from([0.5, 1.0, 2.0]),
            high_freq_factor=st.sampled_from([4.0, 7.5]),
            original_max_seq_len=st.integers(1, 20_000),
        ),
    )
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 40)),
        dim=n_heads * 2 * draw(st.integers(1, 4)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=draw(st.integers(1, 40)),
        max_seq_len=draw(st.integers(1, 2**31)),
        rope_theta=draw(st.sampled_from([10_000.0, 500_000.0, 1e6])),
        rope_scaling=draw(scalings),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tie_embeddings=draw(st.booleans()),
    )


def random_state(config: LlamaConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }


@given(configs(), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=100, deadline=None)
def test_files_are_lossless_for_every_shape(config: LlamaConfig, dtype: Any) -> None:
    kind = getattr(torch, dtype)
    state = {
        name: value if value.ndim == 1 else value.to(kind)
        for name, value in random_state(config).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        save_gguf(path, config, state, dtype=dtype)
        checkpoint = GGUFCheckpoint(path)
        found = dict(checkpoint.tensors())
        assert checkpoint.config == config
        assert list(found) == list(state)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


SMALL = LlamaConfig(
    vocab_size=12, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=64,
    rope_scaling=RopeScaling(),
)  # fmt: skip


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    words = {"tokenizer.ggml.tokens": ["a", "bc", "ü"], "tokenizer.ggml.scores": [0.5, -1.0]}
    save_gguf(path, SMALL, random_state(SMALL), dtype="Q8_0", metadata=words)
    return path


def read_all(path: Path) -> GGUFCheckpoint:
    read_gguf(path)  # with its arrays
    checkpoint = GGUFCheckpoint(path)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors()}
    assert found == parameter_shapes(checkpoint.config)
    return checkpoint


def test_a_file_that_ends_anywhere_is_a_clear_error(small_file: Path, tmp_path: Path) -> None:
    raw = small_file.read_bytes()
    path = tmp_path / "cut.gguf"
    header = min(one.offset_bytes for one in read_gguf(small_file).tensors.values())
    last = max(one.offset_bytes + one.n_bytes for one in read_gguf(small_file).tensors.values())
    for end in [*range(header + 1), *range(header + 1, last, 97), last - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(PunaError) as caught:
            read_all(path)
        assert str(path) in caught.value.message, end
    path.write_bytes(raw[:last])  # without the padding behind the last tensor
    assert read_all(path).config == SMALL


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_a_clear_error_or_harmless(small_file: Path, data: st.DataObject) -> None:
    """Whatever happens to the bytes of the header: no exception but ours."""
    damaged = bytearray(small_file.read_bytes())
    header = min(one.offset_bytes for one in read_gguf(small_file).tensors.values())
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        at = data.draw(st.integers(0, header - 8), "at")
        if data.draw(st.booleans(), "eight bytes"):
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            damaged[at : at + 8] = number.to_bytes(8, "little")
        else:
            damaged[at] = data.draw(st.integers(0, 255), "value")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.gguf"
        path.write_bytes(damaged)
        message = str(path)
        try:
            read_all(path)
        except PunaError as error:
            message = error.message
        assert str(path) in message
