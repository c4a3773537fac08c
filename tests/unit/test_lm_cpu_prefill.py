"""The compiled prefill in bfloat16: kernels against numpy, logits against float32, bits."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from puna.data.kernels.buffers import kernel
from puna.lm.cpu import prefill as prefills
from puna.lm.cpu.decoder import CpuDecoder
from puna.lm.cpu.lanewise import gate_pairs, pack_pairs
from puna.lm.cpu.prefill import CpuPrefill, is_fast
from puna.lm.cpu.vectors import MULTIPLIES_PAIRS
from puna.lm.engine.engine import Engine
from puna.lm.engine.pool import KVPool
from puna.lm.engine.types import Request
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.llama import Llama
from puna.model.sampling import Sampling

pairs_only = pytest.mark.skipif(
    not MULTIPLIES_PAIRS, reason="the processor does not multiply pairs of bfloat16"
)


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 53, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
             "ffn_dim": 96, "max_seq_len": 4096}  # fmt: skip
    return LlamaConfig(**{**shape, **changes})


def small_model(shape: LlamaConfig, dtype=torch.bfloat16) -> Llama:
    model = Llama(shape, dtype=dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.rand(len(weight)) + 0.5)
    return model


def widened(model: Llama) -> Llama:
    wide = Llama(model.config).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def ids_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 53, n).tolist()


class Cached:
    """A prefill with requests that own scattered blocks."""

    def __init__(self, model: Llama, n_threads: int = 2, block_tokens: int = 8) -> None:
        self.prefill = CpuPrefill(CpuDecoder(model, n_threads))
        self.pool = KVPool(model.config, torch.bfloat16, "cpu", 1 << 16, block_tokens)
        self.source = np.random.default_rng(0)
        self.blocks: dict[int, np.ndarray] = {}
        self.lengths: dict[int, int] = {}

    def step(self, work: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Compute tokens of some requests in one call; return their states, all of them."""
        spans = []
        for request, ids in work:
            if request not in self.blocks:
                taken = self.pool.take(3 * self.pool.blocks_for(700))
                self.source.shuffle(taken)
                self.blocks[request], self.lengths[request] = np.array(taken, np.int32), 0
            spans.append((ids, self.lengths[request], self.blocks[request]))
            self.lengths[request] += len(ids)
        states = self.prefill.forward(spans, self.pool)
        return [states.of(number).clone() for number in range(len(work))]


def logits_of(model: Llama, ids: list[int]) -> torch.Tensor:
    """Logits of the last token."""
    cached = Cached(model)
    blocks = np.array(cached.pool.take(cached.pool.blocks_for(len(ids))), np.int32)
    states = cached.prefill.forward([(ids, 0, blocks)], cached.pool)
    return cached.prefill.logits(states, [0])[0]


def paired(x_NI: np.ndarray) -> np.ndarray:
    """Tokens in vectors of 16, pairs of bfloat16 as int32 (vectors, pairs, 16)."""
    short = (x_NI.view(np.uint32) >> 16).astype(np.uint16)
    vectors = short.reshape(-1, 16, x_NI.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(vectors).view(np.int32)[..., 0]


def cut(x: np.ndarray) -> np.ndarray:
    """Only the bits that bfloat16 has."""
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pairs_only
@pytest.mark.parametrize("size", [2, 14, 16, 64, 100, 576])
def test_products_of_any_shape(size):
    from puna.lm.cpu.pairs import _multiply_pairs

    source = np.random.default_rng(size)
    for n_rows in (1, 2, 5, 6, 9, 16, 17, 27):
        x_NI = cut(source.standard_normal((7 * 16, size)))
        w_OI = cut(source.standard_normal((n_rows, size)))
        stored = (w_OI.view(np.uint32) >> 16).astype(np.uint16)
        want = (x_NI.astype(np.float64) @ w_OI.T.astype(np.float64)).reshape(7, 16, n_rows)
        given, whole = paired(x_NI), None
        for n in (7, 4, 3, 2, 1):
            out = np.full((n, n_rows + 1, 16), 7, np.float32)
            for adds in (0, 1):
                _multiply_pairs.ctypes(
                    stored.ctypes.data, stored.strides[0], n_rows, given.ctypes.data,
                    given.strides[0], n, size // 2, out.ctypes.data, out.strides[0], adds,
                )  # fmt: skip
                if not adds:
                    first = out[:, :-1].copy()
                    np.testing.assert_allclose(
                        first.transpose(0, 2, 1), want[:n], rtol=1e-4, atol=1e-4
                    )
                    whole = first if whole is None else whole
                    assert np.array_equal(first, whole[:n])  # the same bits for any number
            assert np.array_equal(out[:, :-1], first + first)
            assert (out[:, -1] == 7).all()


def unpaired(pairs: np.ndarray) -> torch.Tensor:
    """(pairs, 16) int32 as bfloat16 (features, 16)."""
    short = np.ascontiguousarray(pairs).view(np.int16).reshape(-1, 16, 2).transpose(0, 2, 1)
    return torch.from_numpy(short.reshape(-1, 16).copy()).view(torch.bfloat16)


def test_features_are_rounded_as_pytorch_rounds_them():
    @kernel
    def pack(x, factors, out):
        pack_pairs(x.ctypes.data, len(out), factors.ctypes.data, out.ctypes.data)

    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x7F7FFFFF, 1], np.uint32)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 1e-41], np.float32)
    source = np.random.default_rng(0).standard_normal(16 * 8).astype(np.float32)
    x = np.concatenate([ties.view(np.float32), edges, source])[: 16 * 8].reshape(8, 16)
    x[7, 3] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # a NaN that rounding would carry
    out = np.zeros((4, 16), np.int32)
    pack(x, np.ones(16, np.float32), out)
    want = torch.from_numpy(x).bfloat16()
    assert torch.equal(unpaired(out)[:7].view(torch.int16), want[:7].view(torch.int16))
    assert unpaired(out)[7, 3].isnan()


def test_gates():
    @kernel
    def gate(x, up, out):
        gate_pairs(x.ctypes.data, up.ctypes.data, len(out), out.ctypes.data)

    x = np.linspace(-100, 100, 160, dtype=np.float32).reshape(10, 16)
    up = np.random.default_rng(0).standard_normal((10, 16)).astype(np.float32)
    out = np.zeros((5, 16), np.int32)
    gate(x, up, out)
    want = torch.nn.functional.silu(torch.from_numpy(x)) * torch.from_numpy(up)
    torch.testing.assert_close(unpaired(out).float(), want, rtol=2**-8, atol=1e-30)


SHAPES = {
    "grouped": {},
    "all heads, tied": {"n_kv_heads": 4, "tie_embeddings": True},
    "one head, scaled": {
        "n_kv_heads": 1, "rope_scaling": RopeScaling(factor=8.0, original_max_seq_len=32)
    },
    "no multiples of 16": {"dim": 36, "n_heads": 3, "n_kv_heads": 3, "ffn_dim": 50},
    "wide heads": {"dim": 200, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 34, "vocab_size": 53},
}  # fmt: skip


@pairs_only
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_nearer_to_float32_than_those_of_pytorch(name):
    model = small_model(config(**SHAPES[name]))
    wide = widened(model)
    ours, theirs = [], []
    for n in (1, 5, 16, 63, 64, 65, 150):
        ids = ids_of(n, n)
        with torch.inference_mode():
            want = wide(torch.tensor([ids]))[0, -1]
            theirs.append((model(torch.tensor([ids]))[0, -1] - want).abs().max())
        ours.append((logits_of(model, ids) - want).abs().max())
    assert max(ours) < 0.08
    assert sum(ours) < sum(theirs)


@pairs_only
@pytest.mark.parametrize("group", [1, 3])
def test_bits_do_not_depend_on_company_cuts_or_threads(group):
    model = small_model(config(n_heads=6, n_kv_heads=6 // group, dim=96))
    prompts = [ids_of(n, n) for n in (5, 1, 64, 130, 16, 2, 33, 200)]
    alone = []
    for prompt in prompts:
        cached = Cached(model, n_threads=1)
        cuts = [prompt[at : at + 37] for at in range(0, len(prompt), 37)]
        alone.append(torch.cat([cached.step([(0, part)])[0] for part in cuts]))
    for n_threads in (1, 2, 5):
        together = Cached(model, n_threads).step(list(enumerate(prompts)))
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got, want)


@pairs_only
def test_later_tokens_do_not_reach_earlier_ones():
    model = small_model(config())
    prompt = ids_of(40)
    want = Cached(model).step([(0, prompt)])[0]
    got = Cached(model).step([(0, [*prompt[:29], *ids_of(11, 9)])])[0]
    assert torch.equal(got[:29], want[:29])
    assert not torch.equal(got[29:], want[29:])


@pairs_only
def test_it_sees_parameters_change_in_place():
    model = small_model(config())
    cached = Cached(model)
    before = cached.step([(0, ids_of(20))])[0]
    with torch.no_grad():
        model.layers[1].attention.wo.weight.mul_(0.5)
        model.layers[0].ffn_norm.weight.mul_(3)
    after = cached.step([(1, ids_of(20))])[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, Cached(model).step([(0, ids_of(20))])[0])


@pairs_only
@pytest.mark.parametrize("where", ["tok_embeddings", "layers.1.attention.wk", "layers.0.ffn_norm"])
def test_what_is_not_a_number_reaches_the_logits(where):
    model = small_model(config())
    with torch.no_grad():
        model.get_submodule(where).weight[:2] = torch.nan
    assert logits_of(model, [1] * 20).isnan().any()


def test_which_models_are_fast():
    def is_so(model: Llama) -> bool:
        return is_fast(CpuDecoder(model))

    assert is_so(small_model(config())) == prefills.PAYS
    assert not is_so(small_model(config(), torch.float32))
    assert not is_so(small_model(config(ffn_dim=33)))
    assert not is_so(small_model(config(dim=36, n_heads=6, n_kv_heads=3)))  # heads of 6


def generated(engine: Engine, requests: list[Request]) -> dict[str, list]:
    events: dict[str, list] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def asked(n: int) -> Request:
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    return Request(f"{n}", ids_of(n, n), sampling, logprobs=1, prompt_logprobs=n % 2 == 0)


@pairs_only
def test_an_engine_gives_the_same_bits_whatever_runs_beside(monkeypatch):
    monkeypatch.setattr(prefills, "PAYS", True)
    model = small_model(config())
    requests = [asked(n) for n in (1, 2, 11, 12, 30, 64, 65, 130)]
    engine = Engine(model, chunk_tokens=64)
    assert engine.batch_invariant
    together = generated(engine, requests)
    for request in requests:
        name = request.request_id
        assert together[name] == generated(Engine(model, chunk_tokens=64), [request])[name]


def test_without_the_instruction_pytorch_computes_long_prompts(monkeypatch):
    monkeypatch.setattr(prefills, "PAYS", False)
    model = small_model(config())
    wide = widened(model)
    engine = Engine(model)
    assert engine._forward._prefill is None
    assert not engine.batch_invariant
    packed = engine._forward._packed
    rows: list[int] = []
    monkeypatch.setattr(
        engine._forward, "_packed",
        lambda work: rows.append(sum(item.n_tokens for item in work)) or packed(work),
    )  # fmt: skip
    request = replace(asked(151), prompt_logprobs=False)
    events = generated(engine, [request])["151"]
    assert rows == [151]
    ids = [*request.prompt_ids, *(event.token for event in events)]
    with torch.inference_mode():
        logprobs = wide(torch.tensor([ids]))[0].log_softmax(-1)
    for place, event in enumerate(events, 151):
        want = logprobs[place - 1, event.token].item()
        assert event.logprob.logprob == pytest.approx(want, abs=0.06)


def test_numba_that_compiles_for_another_processor_does_not_use_the_instruction():
    code = "from puna.lm.cpu.vectors import MULTIPLIES_PAIRS; print(MULTIPLIES_PAIRS)"
    for changes in ({"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **changes}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == "False"
