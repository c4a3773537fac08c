"""The estimate of what training keeps, against what autograd keeps: byte for byte, mostly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.units import MIB
from puna.model.activations import (
    Recompute,
    Shape,
    fit_layers,
    head_bytes,
    joins_pieces,
    layer_bytes,
)
from puna.model.attention import plan_attention
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.model.rope import Rotation, RotationTable
from puna.train import recompute as recompute_module
from puna.train.loss import cross_entropy_sum
from puna.train.recompute import recompute

WIDE = LlamaConfig(
    vocab_size=512, dim=128, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=320, max_seq_len=1024
)
PLAIN = LlamaConfig(
    vocab_size=512, dim=192, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=512, max_seq_len=1024
)
B = 2


class Kept:
    """Counts the memory behind all tensors that it is shown, each once."""

    def __init__(self, *known: Tensor) -> None:
        self._known = {self._address(x) for x in known}
        self._seen: dict[int, Tensor] = {}

    def add(self, x: Tensor) -> Tensor:
        if self._address(x) not in self._known:
            self._seen[self._address(x)] = x  # kept alive: no address comes twice
        return x

    @property
    def n_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._seen.values())

    @staticmethod
    def _address(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()


@pytest.fixture
def watch_policy(monkeypatch):
    """Show what selective recomputation keeps beside what autograd keeps."""
    kept: list[Kept] = []
    make = recompute_module._policy

    def watched(n_inner):
        decide = make(n_inner)

        def look(context, op, *args, **kwargs):
            decision = decide(context, op, *args, **kwargs)
            if decision.name == "MUST_SAVE" and not context.is_recompute:
                outputs = context.op_output
                for x in outputs if isinstance(outputs, tuple) else (outputs,):
                    if isinstance(x, Tensor) and x.is_floating_point():
                        kept[0].add(x)
            return decision

        return look

    monkeypatch.setattr(recompute_module, "_policy", watched)
    return kept


@pytest.mark.parametrize("config", [WIDE, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("n_tokens", [128, 512, 1024])
def test_a_layer_keeps_what_the_estimate_says(config, dtype, casts, kind, n_tokens, watch_policy):
    model = Llama(config)
    if not casts:
        model.to(getattr(torch, dtype))
    block, device = model.layers[0], torch.device("cpu")
    plan = plan_attention(n_tokens, device)
    table = RotationTable(config).at(n_tokens, None, device)
    rows = torch.arange(n_tokens).expand(B, n_tokens)
    rotation = Rotation(table.cos[rows], table.sin[rows])
    kept = Kept(*model.parameters(), *rotation.wide)
    watch_policy.append(kept)
    recompute(block, kind)
    x_BTC = torch.randn(B, n_tokens, config.dim).to(getattr(torch, dtype)).requires_grad_()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda x: x), mixed:
        block(x_BTC, rotation, plan)
    shape = Shape(
        B * n_tokens, dtype, casts_weights=casts, joins=joins_pieces(n_tokens, "cpu")
    )  # fmt: skip
    # What is missing are the masks of blocked attention, which all layers share.
    tolerance = 0.1 if shape.joins else 1e-9
    assert layer_bytes(config, kind, shape) == pytest.approx(kept.n_bytes, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_keeps_what_the_estimate_says(dtype):
    model, n_tokens = Llama(PLAIN), 256
    kept = Kept(*model.parameters())
    h_BTC = torch.randn(B, n_tokens, PLAIN.dim).to(getattr(torch, dtype)).requires_grad_()
    labels_BT = torch.randint(0, PLAIN.vocab_size, (B, n_tokens))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda x: x), mixed:
        cross_entropy_sum(
            model.norm(h_BTC), model.output_weight, labels_BT, dtype=getattr(torch, dtype)
        )
    shape = Shape(B * n_tokens, dtype, casts_weights=True)
    gradient = 4 * model.output_weight.numel()  # scaled in place, so kept apart from autograd
    assert head_bytes(PLAIN, shape) == pytest.approx(kept.n_bytes + gradient, rel=0.05)


def test_no_more_layers_are_recomputed_than_the_budget_asks_for():
    shape = Shape(4096)
    kinds: list[Recompute] = ["none", "selective", "full"]
    none, selective, full = (layer_bytes(PLAIN, kind, shape) for kind in kinds)
    passes = [(1, shape)] * 4
    assert fit_layers(PLAIN, passes, 0, 4 * none) == ["none"] * 4
    assert fit_layers(PLAIN, passes, 0, 4 * none - 1) == ["selective"] + ["none"] * 3
    assert fit_layers(PLAIN, passes, 7, 4 * selective + 7) == ["selective"] * 4
    assert fit_layers(PLAIN, passes, 7, 4 * selective) == ["full"] + ["selective"] * 3
    assert fit_layers(PLAIN, passes, 0, 4 * full) == ["full"] * 4
    with pytest.raises(PunaError, match="lower micro_batch"):
        fit_layers(PLAIN, passes, 1, 4 * full)


def test_recomputing_saves_what_its_documentation_says():
    """About half of the memory, then the input alone: a Llama 3 8B layer in bfloat16."""
    llama = LlamaConfig(
        vocab_size=128_256, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14_336,
        max_seq_len=8192,
    )  # fmt: skip
    shape = Shape(8192, "bfloat16")
    kinds: list[Recompute] = ["none", "selective", "full"]
    kept = [layer_bytes(llama, kind, shape) / MIB for kind in kinds]
    assert kept[1] / kept[0] == pytest.approx(0.47, abs=0.01)
    assert kept[2] == 64
