"""The fused loops give what plain PyTorch gives, forward and backward, in both precisions."""

from __future__ import annotations

import pytest
import torch

from puna.model.attention import MaskPlan, document_mask
from puna.model.config import LlamaConfig
from puna.model.llama import FeedForward, RMSNorm
from puna.model.rope import Rotation
from puna.train.config import MemoryConfig, ParallelConfig
from puna.train.fused import attention
from puna.train.fused.attention import plan_fused
from puna.train.fused.fuse import FusedRotation, fuse
from puna.train.loss import cross_entropy_sum
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.world import World
from puna.train.precision import Precision
from tests.unit.test_train_memory import MODEL, WORLD, batch

# Relative to the norm: fp32 differs in the order of sums, bf16 by two or three roundings to
# 8 bits (of scores or logits, of their gradients, of the result).
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(_TOLERANCE))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(fused, plain, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Compare with plain PyTorch in fp32 on the same (rounded) inputs."""
    rounded = [x.to(dtype) for x in inputs]
    results = []
    for function, given in ((fused, rounded), (plain, [x.float() for x in rounded])):
        leaves = [x.clone().requires_grad_() for x in given]
        out = function(*leaves)
        out.backward(noise(*out.shape, seed=9).to(out.dtype))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        error = (got.float() - expected).norm() / expected.norm()
        assert error < _TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("width", [24, 64, 200])
def test_norm(width, dtype):
    plain, norm = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
    fuse(norm)

    def call(module):
        return lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,))

    check(call(norm), call(plain), [noise(3, 300, width), noise(width, seed=1)], dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(7, 16), (2, 7, 16)])
def test_rotation(shape, dtype):
    angles = noise(*shape)
    cos, sin = angles.cos(), angles.sin()
    x = [noise(2, 7, 3, 32)]
    check(FusedRotation(cos, sin).apply, Rotation(cos, sin).apply, x, dtype)


@DTYPES
def test_feed_forward(dtype):
    def call(fused: bool):
        layer = FeedForward(MODEL)
        if fused:
            fuse(layer)

        def run(x, w1, w2, w3):
            return torch.func.functional_call(
                layer, {"w1.weight": w1, "w2.weight": w2, "w3.weight": w3}, (x,)
            )

        return run

    weights = [noise(24, 16, seed=1), noise(16, 24, seed=2), noise(24, 16, seed=3)]
    check(call(True), call(False), [noise(2, 9, 16), *weights], dtype)


DOCUMENTS = {
    "one": torch.zeros(2, 300, dtype=torch.int32),
    "many": torch.arange(300).expand(2, 300) // torch.tensor([[7], [130]]),
    "short rows": torch.zeros(3, 5, dtype=torch.int32),
}


@DTYPES
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("n_shared", [1, 3])
def test_attention_inside_documents(n_shared, name, dtype):
    docs_BT = DOCUMENTS[name]
    shape = tuple(docs_BT.shape)
    inputs = [
        noise(*shape, 2 * n_shared, 16), noise(*shape, 2, 16, seed=1), noise(*shape, 2, 16, seed=2)
    ]  # fmt: skip
    check(plan_fused(shape[1], docs_BT), MaskPlan(document_mask(docs_BT)), inputs, dtype)


def test_attention_sees_nothing_of_another_document():
    docs_BT = DOCUMENTS["many"]
    q, k, v = noise(2, 300, 2, 16), noise(2, 300, 2, 16, seed=1), noise(2, 300, 2, 16, seed=2)
    plan = plan_fused(300, docs_BT)
    before = plan(q, k, v)
    k[1, 130:260], v[1, 130:260] = 1e4, -1e4
    after = plan(q, k, v)
    assert torch.equal(before[1, :130], after[1, :130])
    assert torch.equal(before[1, 260:], after[1, 260:])
    assert torch.equal(before[0], after[0])


@DTYPES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss(z_loss, dtype):
    labels_BT = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))

    def plain(hidden, weight):
        logits = (hidden @ weight.T).float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels_BT.flatten(), reduction="sum")
        return (loss + z_loss * logits.logsumexp(1).square().sum()).to(hidden.dtype)

    def fused(hidden, weight):
        loss = cross_entropy_sum(
            hidden, weight, labels_BT, dtype=dtype, chunk_tokens=33, z_loss=z_loss
        )
        return loss.to(dtype)

    check(fused, plain, [noise(2, 50, 32), noise(300, 32, seed=1)], dtype)


@DTYPES
def test_the_same_bits_with_any_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr("puna.train.fused.rows._MIN_ELEMENTS", 1)
    found = []
    for n_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        found.append(_gradients(dtype))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _gradients(dtype: torch.dtype, memory: MemoryConfig | None = None) -> list[torch.Tensor]:
    model = ParallelModel(
        MODEL, 32, 4, 1, WORLD, ParallelConfig(), Precision(dtype, "test"), memory=memory
    )
    model.fill_random(0)
    model.forward_backward(batch())
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_selective_recomputation_keeps_the_result_of_attention(monkeypatch):
    calls = []
    blocks = attention._blocks

    def counted(*args):
        calls.append(1)
        return blocks(*args)

    monkeypatch.setattr(attention, "_blocks", counted)
    _gradients(torch.bfloat16)
    plain = len(calls)
    calls.clear()
    _gradients(torch.bfloat16, MemoryConfig(recompute="selective"))
    assert len(calls) == plain == 2 * MODEL.n_layers
    calls.clear()
    _gradients(torch.bfloat16, MemoryConfig(recompute="full"))
    assert len(calls) == 3 * MODEL.n_layers


def test_a_world_on_the_meta_device_computes_as_before():
    config = LlamaConfig(
        vocab_size=11, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=8
    )
    world = World(0, 1, torch.device("cpu"), 1, None)
    model = ParallelModel(
        config, 8, 1, 1, world, ParallelConfig(), Precision(torch.float32, "test")
    )
    block = model.stages[0].blocks[0].to("meta")
    out = block.feed_forward(torch.empty(1, 8, 16, device="meta"))
    assert out.is_meta
    assert block.ffn_norm(torch.empty(1, 8, 16, device="meta")).is_meta
