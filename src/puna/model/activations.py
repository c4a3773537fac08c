"""What training keeps between forward and backward pass, counted from the configuration; no torch.

Counted is what autograd keeps of a layer, parameters apart, in elements per token (C width, K
width of all keys, F feed-forward width, N heads)::

    none        two norms (see below), 2 C queries and attention's result, 2 K keys and values,
                4 F feed-forward, N + 2 float32 of softmax and norms
    selective   C input, 2 C queries and attention's result, 2 K, C after attention, 2 F, N
    full        C input

A norm keeps its input and the normalised input, and the matrices after it keep what they multiply:
3 C in float32. Mixed precision keeps the input in float32, in bfloat16 the normalised input, and
the input of the matrices once; or once per matrix where weights are float32 and cast for each
product (one process; sharded parameters arrive as bfloat16). These casts of the weights are kept,
too.

With tensor parallel the tokens of norms and residual stream are shared, and the columns of all that
is inside attention and feed-forward; with context parallel each rank has its own tokens, and the
keys and values of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import PunaError
from puna.core.units import format_bytes
from puna.model.accounting import dtype_bytes
from puna.model.config import LlamaConfig

Recompute = Literal["none", "selective", "full"]
"""What of a layer is computed again in the backward pass."""

_N_BLOCKED = range(192, 1024)
"""Row lengths that attention on a CPU cuts into blocks, whose results it joins into a copy."""


def joins_pieces(seq_len: int, device: str) -> bool:
    """Tell whether attention joins its result from pieces; documents alone make it do so, too."""
    return device == "cpu" and seq_len in _N_BLOCKED


@dataclass(frozen=True)
class Shape:
    """Where and how a layer is computed.

    Attributes:
        n_tokens: Of this rank in one forward pass: rows times their tokens, after context parallel.
        dtype: Of the matrix products.
        tp: Ranks that share matrices.
        cp: Ranks that share rows.
        casts_weights: Weights are float32 and cast for each product.
        joins: Attention joins its result from pieces.
    """

    n_tokens: int
    dtype: str = "float32"
    tp: int = 1
    cp: int = 1
    casts_weights: bool = False
    joins: bool = False

    @property
    def is_mixed(self) -> bool:
        """The products are narrower than the weights."""
        return self.dtype != "float32"


def layer_bytes(config: LlamaConfig, kind: Recompute, shape: Shape) -> int:
    """Bytes that one layer keeps of one forward pass.

    Args:
        config: The model.
        kind: What is computed again.
        shape: Of the pass.

    Raises:
        PunaError: Unknown dtype.
    """
    c, s, width = config, shape, dtype_bytes(shape.dtype)
    dim, keys, inner = c.dim, 2 * c.kv_dim * s.cp, c.ffn_dim
    if kind == "full":
        return s.n_tokens * dim * width // s.tp
    if kind == "selective":
        # Under tensor parallel what attention gives is kept before and after it is summed.
        after = dim + dim // s.tp if s.tp > 1 else dim
        per_token = width * (dim // s.tp + after + (2 * dim + keys + 2 * inner) // s.tp)
        return s.n_tokens * (per_token + 4 * c.n_heads // s.tp)
    norms = 2 * _norm_bytes(dim, s) // s.tp
    # Three matrices follow the first norm, two the second.
    inputs = width * dim * (5 if s.is_mixed and s.casts_weights else 2)
    attention = width * (2 * dim + (dim if s.joins else 0) + keys) // s.tp
    per_token = norms + inputs + attention + 4 * width * inner // s.tp + 4 * c.n_heads // s.tp
    weights = 2 * dim * dim + 2 * c.kv_dim * dim + 3 * dim * inner
    casts = width * weights // s.tp if s.is_mixed and s.casts_weights else 0
    return s.n_tokens * per_token + casts


def head_bytes(config: LlamaConfig, shape: Shape) -> int:
    """Bytes that the last norm and the loss keep: the loss its gradients, computed beforehand."""
    norm = _norm_bytes(config.dim, shape) // shape.tp
    width = 4 if shape.casts_weights else dtype_bytes(shape.dtype)  # the norm's weight decides
    states = width * config.dim
    return shape.n_tokens * (norm + states) + 4 * config.vocab_size * config.dim // shape.tp


def _norm_bytes(dim: int, shape: Shape) -> int:
    """Bytes per token that a norm keeps, its result not counted."""
    if not shape.is_mixed:
        return 2 * 4 * dim + 4
    return (4 + dtype_bytes(shape.dtype)) * dim + 4


def fit_layers(
    config: LlamaConfig, passes: Sequence[tuple[int, Shape]], fixed: int, budget: int
) -> list[Recompute]:
    """Choose what is computed again, as little as the budget allows.

    Layers become ``selective`` one by one, the first ones first; when all are and it is not enough,
    they become ``full``. Selective costs a part of a layer's forward pass, full all of it.

    Args:
        config: The model.
        passes: Per layer of this rank: forward passes whose backward pass is to come, at most, and
            their shape.
        fixed: Bytes that are kept in any case.
        budget: Bytes that may be kept in all.

    Raises:
        PunaError: Even with all layers recomputed it is not enough; says what is.
    """
    chosen: list[Recompute] = ["none"] * len(passes)
    total = fixed + sum(n * layer_bytes(config, "none", shape) for n, shape in passes)
    steps: tuple[Recompute, ...] = ("selective", "full")
    for kind in steps:
        for layer, (n, shape) in enumerate(passes):
            if total <= budget:
                return chosen
            before = layer_bytes(config, chosen[layer], shape)
            total += n * (layer_bytes(config, kind, shape) - before)
            chosen[layer] = kind
    if total > budget:
        raise PunaError(
            f"activations need {format_bytes(total)} with all layers recomputed, the budget is "
            f"{format_bytes(budget)}",
            "lower micro_batch or seq_len, raise memory.budget_gib, or share the model among more "
            "ranks (parallel.tp, parallel.cp)",
        )
    return chosen
