"""The compiled step against the plain model, kernels against numpy, threads under stress."""

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.data.kernels.buffers import kernel
from puna.lm.cpu import attention, matmul, pages
from puna.lm.cpu import crew as crews
from puna.lm.cpu import decoder as decoders
from puna.lm.cpu.attention import SPAN_KEYS
from puna.lm.cpu.crew import Crew, crew_of
from puna.lm.cpu.decoder import CpuDecoder, is_supported
from puna.lm.cpu.elementwise import exp, narrow
from puna.lm.cpu.intrinsics import BFLOAT16, FLOAT32, INT8
from puna.lm.cpu.products import BLOCK, words_of
from puna.lm.cpu.step import forward
from puna.lm.engine.pool import KVPool
from puna.lm.quant import quantize_int8
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.llama import Llama

KINDS = ("float32", "bfloat16", "int8")
# fp32 sums in another order; with bfloat16 keys and values are rounded when they are stored; int8
# weights are multiplied by activations that are rounded to 16 bits
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.08, "int8": 1e-3}
SCALED = RopeScaling(factor=8.0, original_max_seq_len=32)


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 53, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
             "ffn_dim": 96, "max_seq_len": 4096}  # fmt: skip
    return LlamaConfig(**{**shape, **changes})


def small_model(kind: str, shape: LlamaConfig) -> Llama:
    model = Llama(shape, dtype=torch.bfloat16 if kind == "bfloat16" else None).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.rand(len(weight)) + 0.5)
    if kind == "int8":
        quantize_int8(model)
    return model


def expected(model: Llama, ids: list[int]) -> torch.Tensor:
    """Logits of the model's own forward in float32."""
    with torch.inference_mode():
        wide = model
        if model.norm.weight.dtype == torch.bfloat16:
            wide = Llama(model.config)
            wide.load_state_dict(model.state_dict())
        return wide(torch.tensor([ids]))[0]


class Cached:
    """A decoder with requests that own scattered blocks."""

    def __init__(self, model: Llama, n_threads: int = 2, block_tokens: int = 8) -> None:
        self.decoder = CpuDecoder(model, n_threads)
        self.pool = KVPool(model.config, model.norm.weight.dtype, "cpu", 1 << 20, block_tokens)
        self.source = np.random.default_rng(0)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def reserve(self, request: int, n_tokens: int) -> None:
        taken = self.pool.take(3 * self.pool.blocks_for(n_tokens))
        self.source.shuffle(taken)
        keep = self.pool.blocks_for(n_tokens)
        self.pool.give_back(taken[keep:])
        self.blocks[request], self.lengths[request] = taken[:keep], 0

    def step(self, work: list[tuple[int, list[int]]], rows=None) -> torch.Tensor:
        """Compute tokens of some requests in one call."""
        tokens, positions, tables = [], [], []
        most = max(len(self.blocks[request]) for request, _ in work)
        for request, ids in work:
            first = self.lengths[request]
            tokens += ids
            positions += range(first, first + len(ids))
            row = self.blocks[request] + [-1] * (most - len(self.blocks[request]))
            tables += [row] * len(ids)
            self.lengths[request] += len(ids)
        return self.decoder.forward(
            np.array(tokens), np.array(positions), np.array(tables, np.int32), self.pool, rows
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 4, "tie_embeddings": True},
        {"n_kv_heads": 1, "rope_scaling": SCALED},
        {"dim": 36, "n_heads": 6, "n_kv_heads": 3, "ffn_dim": 50, "tie_embeddings": True},
        {"dim": 200, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 33, "vocab_size": 7},
    ],
    ids=["grouped", "all heads, tied", "one head, scaled", "no multiples of 16", "wide heads"],
)
def test_logits_are_those_of_the_model(kind, changes):
    model = small_model(kind, config(**changes))
    ids = {r: torch.randint(0, model.config.vocab_size, (n,)).tolist() for r, n in
           ((0, 1), (1, 30), (2, 47))}  # fmt: skip
    cached = Cached(model)
    for request, tokens in ids.items():
        cached.reserve(request, len(tokens))
    rows = {request: [] for request in ids}
    source = np.random.default_rng(1)
    while any(len(rows[r]) < len(ids[r]) for r in ids):
        work = []
        for request, tokens in ids.items():
            n = min(int(source.integers(0, 9)), len(tokens) - len(rows[request]))
            if n:
                work.append((request, tokens[len(rows[request]) : len(rows[request]) + n]))
        if work:
            logits = iter(cached.step(work))
            for request, tokens in work:
                rows[request] += [next(logits) for _ in tokens]
    for request, tokens in ids.items():
        want = expected(model, tokens)
        got = torch.stack(rows[request])
        torch.testing.assert_close(got, want, atol=TOLERANCE[kind], rtol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_long_contexts_are_cut_into_spans(kind):
    model = small_model(kind, config(max_seq_len=2 * SPAN_KEYS + 100, n_layers=1))
    n = 2 * SPAN_KEYS + 40
    ids = torch.randint(0, 53, (n,)).tolist()
    cached = Cached(model, block_tokens=24)  # spans end inside of blocks
    cached.reserve(0, n)
    got = torch.cat([cached.step([(0, ids[at : at + 64])]) for at in range(0, n, 64)])
    torch.testing.assert_close(got, expected(model, ids), atol=TOLERANCE[kind], rtol=0)


def test_the_number_of_spans_is_bounded():
    n = attention.SPAN_KEYS * attention.MOST_SPANS
    span_keys = attention.span_keys.py_func
    assert [span_keys(k) for k in (1, n, n + 1, 2 * n, 2 * n + 1)] == [512, 512, 1024, 1024, 1536]
    for k in (1, 511, 512, 513, n, n + 1, 100_000):
        assert -(-k // span_keys(k)) <= attention.MOST_SPANS


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_company_or_threads(kind):
    model = small_model(kind, config(n_heads=6, n_kv_heads=2, dim=96))
    prompts = [torch.randint(0, 53, (n,)).tolist() for n in (5, 1, 64, 13, 8, 2, 33, 21, 3)]
    alone = []
    for prompt in prompts:
        cached = Cached(model, n_threads=1)
        cached.reserve(0, len(prompt))
        alone.append(torch.cat([cached.step([(0, [token])]) for token in prompt]))
    for n_threads in (1, 2, 5):
        cached = Cached(model, n_threads)
        for request, prompt in enumerate(prompts):
            cached.reserve(request, len(prompt))
        together = cached.step(list(enumerate(prompts)))
        assert torch.equal(together, torch.cat(alone))


def test_only_the_wanted_rows_get_logits():
    model = small_model("float32", config())
    cached = Cached(model)
    cached.reserve(0, 9)
    assert cached.step([(0, [1, 2, 3])], np.array([], np.int64)).shape == (0, 53)
    got = cached.step([(0, [4, 5, 6])], np.array([2, 0]))
    want = expected(model, [1, 2, 3, 4, 5, 6])[[5, 3]]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_it_sees_parameters_change_in_place():
    model = small_model("float32", config())
    cached = Cached(model)
    cached.reserve(0, 4)
    cached.step([(0, [1, 2])])
    with torch.no_grad():
        model.norm.weight.mul_(2)
        model.layers[0].ffn_norm.weight.mul_(3)
        model.layers[1].attention.wo.weight.mul_(0.5)
    cached.lengths[0] = 0
    torch.testing.assert_close(
        cached.step([(0, [1, 2])]), expected(model, [1, 2]), atol=1e-4, rtol=0
    )


def test_arguments_may_be_views_and_read_only():
    model = small_model("float32", config())
    cached = Cached(model)
    cached.reserve(0, 4)
    want = cached.step([(0, [1, 2])])
    compiled = len(forward.signatures)
    tokens, positions = np.array([1, 9, 2, 9])[::2], np.array([0, 1], np.int32)
    table = np.broadcast_to(np.array(cached.blocks[0], np.int64), (2, len(cached.blocks[0])))
    assert torch.equal(cached.decoder.forward(tokens, positions, table, cached.pool), want)
    assert len(forward.signatures) == compiled  # nothing was compiled anew for them


@pytest.mark.parametrize("where", ["tok_embeddings", "layers.1.attention.wk", "norm", "output"])
def test_what_is_not_a_number_reaches_the_logits(where):
    model = small_model("float32", config())
    with torch.no_grad():
        model.get_submodule(where).weight[:2] = torch.nan
    cached = Cached(model)
    cached.reserve(0, 2)
    assert cached.step([(0, [1, 1])]).isnan().any(dim=1).all()


def test_which_models_are_supported():
    assert all(is_supported(small_model(kind, config())) for kind in KINDS)
    half = Llama(config()).half()
    mixed = Llama(config())
    mixed.layers[1].attention.wq.bfloat16()
    turned = Llama(config())
    turned.layers[0].attention.wq.weight = torch.nn.Parameter(torch.randn(64, 64).T)
    for model in (half, mixed, turned, Llama(config(), device="meta")):
        assert not is_supported(model)
        with pytest.raises(ValueError, match="needs a CPU model"):
            CpuDecoder(model)


def test_shapes_are_checked_before_memory_is_read():
    model = small_model("float32", config())
    model.layers[1].feed_forward.w3.weight = torch.nn.Parameter(torch.randn(95, 64))
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w3\.weight .*\(95, 64\)"):
        CpuDecoder(model)


def test_a_model_is_freed_with_its_decoder():
    model = small_model("float32", config())
    cached = Cached(model)
    cached.reserve(0, 2)
    cached.step([(0, [1, 2])])
    watched = weakref.ref(model)
    del model, cached
    gc.collect()
    assert watched() is None


def test_a_thread_that_never_runs_holds_nobody_up(monkeypatch):
    model = small_model("float32", config())
    cached = Cached(model, n_threads=4)
    cached.reserve(0, 9)
    want = cached.step([(0, [1, 2, 3])])

    class Lonely:
        def run(self, task):
            task(2)

    monkeypatch.setattr(decoders, "crew_of", lambda n: Lonely())
    cached.lengths[0] = 0
    assert torch.equal(cached.step([(0, [1, 2, 3])]), want)


def test_a_crew_runs_every_number_once_and_again():
    crew = Crew(4)
    for _ in range(50):
        seen: list[int] = []
        crew.run(seen.append)
        assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_crew_survives_errors(number, error):
    crew = Crew(3)

    def fail(thread):
        if thread == number:
            raise error("here")

    with pytest.raises(error, match="here"):
        crew.run(fail)
    seen: list[int] = []
    crew.run(seen.append)
    assert sorted(seen) == [0, 1, 2]


def test_a_forked_process_gets_a_crew_of_its_own(monkeypatch):
    monkeypatch.setattr(crews, "_crews", {})
    mine = crew_of(2)
    assert crew_of(2) is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert crew_of(2) is not mine


def stored(values_OI: np.ndarray, kind: int) -> np.ndarray:
    if kind == BFLOAT16:
        return (values_OI.view(np.uint32) >> 16).astype(np.uint16)
    return (values_OI * 30).clip(-127, 127).astype(np.int8) if kind == INT8 else values_OI


def widened(stored_OI: np.ndarray, kind: int) -> np.ndarray:
    if kind == BFLOAT16:
        return (stored_OI.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored_OI.astype(np.float64)


def narrowed(x_NI: np.ndarray) -> np.ndarray:
    out_NB = np.full((len(x_NI), words_of(x_NI.shape[1])), 99, np.int16)
    narrow(x_NI, len(x_NI), out_NB)
    return out_NB


def rounded(x_NI: np.ndarray) -> np.ndarray:
    """What 16 bits keep of tokens."""
    out_NI, largest = np.empty(x_NI.shape), np.float32(32767)
    for first in range(0, x_NI.shape[1], BLOCK):
        part_NI = x_NI[:, first : first + BLOCK]
        tops_N1 = np.abs(part_NI).max(axis=1, keepdims=True)
        integers_NI = np.rint(part_NI * (largest / tops_N1)).astype(np.float64)
        out_NI[:, first : first + BLOCK] = integers_NI * (tops_N1 / largest)
    return out_NI


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16, INT8])
@pytest.mark.parametrize("size", [1, 7, 16, 31, 32, 33, 64, 100, 576, BLOCK, BLOCK + 100])
def test_products_of_any_shape(kind, size):
    source = np.random.default_rng(size)
    for n_rows in (1, 2, 3, 4, 5, 9):
        x_NI = source.standard_normal((15, size + 3)).astype(np.float32)
        w_OI = stored(source.standard_normal((n_rows, size)).astype(np.float32), kind)
        scales_O = source.random(n_rows).astype(np.float32) if kind == INT8 else None
        want, given = x_NI[:, :size] @ widened(w_OI, kind).T, x_NI
        if scales_O is not None:
            given = narrowed(x_NI[:, :size].copy())
            want = rounded(x_NI[:, :size]) @ widened(w_OI, kind).T * scales_O
        whole = None
        for n in (15, 8, 7, 4, 3, 2, 1):
            out_NO = np.full((n, n_rows + 2), 7, np.float32)
            before = out_NO.copy()
            for adds in (0, 1):
                matmul._multiply.ctypes(
                    kind, w_OI.ctypes.data, w_OI.strides[0],
                    0 if scales_O is None else scales_O.ctypes.data, n_rows, 4096,
                    given.ctypes.data, given.strides[0], n, size, out_NO.ctypes.data,
                    out_NO.strides[0], adds,
                )  # fmt: skip
                if not adds:
                    first = out_NO[:, :n_rows].copy()
                    np.testing.assert_allclose(first, want[:n], rtol=1e-5, atol=1e-3)
                    whole = first if whole is None else whole
                    assert np.array_equal(first, whole[:n])  # the same bits for any number
            # Blocks are added one by one, and so rounded once more.
            atol = 1e-3 if size > BLOCK and kind == INT8 else 0
            np.testing.assert_allclose(out_NO[:, :n_rows], first + first, rtol=0, atol=atol)
            assert np.array_equal(out_NO[:, n_rows:], before[:, n_rows:])


def test_sums_of_integers_do_not_overflow():
    size = 2 * BLOCK + 64
    x_NI, w_OI = np.full((3, size), -4, np.float32), np.full((2, size), -127, np.int8)
    given, scales_O = narrowed(x_NI), np.array([1, 2], np.float32)
    out_NO = np.empty((3, 2), np.float32)
    matmul._multiply.ctypes(
        INT8, w_OI.ctypes.data, size, scales_O.ctypes.data, 2, 4096, given.ctypes.data,
        given.strides[0], 3, size, out_NO.ctypes.data, 8, 0,
    )  # fmt: skip
    np.testing.assert_allclose(out_NO, np.tile(scales_O * 4 * 127 * size, (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rounded_values_that_are_not_finite_show(bad):
    x_NI = np.ones((2, 40), np.float32)
    x_NI[1, 37] = bad
    given, scale_O = narrowed(x_NI), np.ones(1, np.float32)
    w_OI, out_NO = np.zeros((1, 40), np.int8), np.empty((2, 1), np.float32)
    matmul._multiply.ctypes(
        INT8, w_OI.ctypes.data, 40, scale_O.ctypes.data, 1, 4096, given.ctypes.data,
        given.strides[0], 2, 40, out_NO.ctypes.data, 4, 0,
    )  # fmt: skip
    assert out_NO[0] == 0
    assert np.isnan(out_NO[1])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-31, 1e-30, 1e-29, 1.0, 3e38])
def test_values_of_any_size_are_rounded(value):
    x_NI = np.array([[value, -value, value / 2]], np.float32)
    words = narrowed(x_NI)[0]
    scale, got = words[:2].view(np.float32)[0], words[32:35].astype(np.float64)
    np.testing.assert_allclose(got * scale, x_NI[0], rtol=4e-5, atol=2.0**-100)


def test_exponentials():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)

    @kernel
    def exponentiate(values):
        for i in range(len(values)):
            values[i] = exp(values[i])

    got = x.copy()
    exponentiate(got)
    want = np.exp(x.astype(np.float64))
    assert np.abs(got / want - 1).max() < 2e-7
    edges = np.array([-1e30, -np.inf, 0, np.nan, np.inf], np.float32)
    exponentiate(edges)
    assert edges[:3].tolist() == pytest.approx([0, 0, 1], abs=1e-37)
    assert np.isnan(edges[3])
    assert edges[4] > 1e38


def huge_bytes(tensor: torch.Tensor) -> int:
    """Memory in large pages of the mapping that holds a tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) << 10
    return 0


def test_pages_of_large_weights_are_merged_where_the_system_can():
    weights = torch.ones(100 << 20, dtype=torch.uint8)
    before = huge_bytes(weights) if pages._SETTINGS.exists() else 0
    thread = pages.merge_pages([weights])
    if thread is None:
        pytest.skip("the system has no large pages, or forbids them")
    thread.join()
    assert weights.eq(1).all()
    if before == huge_bytes(weights):
        pytest.skip("the system had no large pages to give")
    assert huge_bytes(weights) > before


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_pages_stay_where_the_system_does_not_want(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_SETTINGS", tmp_path)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert pages.merge_pages([torch.empty(100 << 20, dtype=torch.uint8)]) is None


def test_pages_of_small_models_stay():
    assert pages.merge_pages([torch.ones(1000)]) is None
