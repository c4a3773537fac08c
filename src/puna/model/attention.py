"""Who sees whom: causal attention over whole rows and packed documents.

A *plan* is made once per forward and shared by all layers. All plans give the same numbers as
softmax(q k^T / sqrt(D)) v under their mask; they differ in speed:

- :class:`CausalPlan`: one fused call, ``is_causal``.
- :class:`MaskPlan`: one fused call with a boolean mask; computes also what the mask hides.
- :class:`PiecesPlan`: one call per document, long documents cut into blocks of queries that only
  touch the keys before them. On a CPU the fused kernel skips nothing in short rows, so this is up
  to twice as fast; on a GPU the many small calls would be slower.
- :class:`BlocksPlan`: one call of PyTorch's flex attention, which skips the blocks of keys that no
  query of a block sees; for GPUs, where it is compiled.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

AttentionKind = Literal["auto", "causal", "mask", "pieces", "blocks"]

QUERY_BLOCK_TOKENS = 128
_BLOCKED_FROM_TOKENS = 192  # below this one block is as fast
_BLOCKED_BELOW_TOKENS = 1024  # from here on the kernel itself skips what causality hides
_MIN_MEAN_DOCUMENT_TOKENS = 16  # shorter documents: the calls cost more than the hidden half


class AttentionPlan(Protocol):
    """Computes attention of one layer."""

    def __call__(
        self,
        q_BTND: Float[Tensor, "batch tokens heads head_dim"],
        k_BSKD: Float[Tensor, "batch keys kv_heads head_dim"],
        v_BSKD: Float[Tensor, "batch keys kv_heads head_dim"],
        layer: int = 0,
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Return the weighted values of each query.

        Args:
            q_BTND: Rotated queries.
            k_BSKD: Rotated keys.
            v_BSKD: Values.
            layer: Which layer asks, for plans that keep keys and values per layer.
        """
        ...


@dataclass(frozen=True)
class CausalPlan:
    """Each token sees itself and the tokens before it in its row."""

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each query (B, T, N, D)."""
        return attend(q_BTND, k_BSKD, v_BSKD, causal=True)


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """A token sees the keys that the mask marks.

    Attributes:
        mask: Boolean, broadcastable to (B, N, T, S).
    """

    mask: Bool[Tensor, "*shape"]

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each query (B, T, N, D)."""
        return attend(q_BTND, k_BSKD, v_BSKD, mask=self.mask)


@dataclass(frozen=True, eq=False)
class PiecesPlan:
    """Causal attention inside consecutive pieces of tokens, each piece computed on its own.

    Attributes:
        lengths: Tokens of each piece, in order, over the rows laid end to end (their sum is B * T);
            None: every row is one piece.
        triangle: Boolean lower triangle, at least as large as the longest blocked piece.
    """

    lengths: tuple[int, ...] | None
    triangle: Bool[Tensor, "size size"]
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each query (B, T, N, D)."""
        if self.lengths is None:
            return _join(self._piece(q_BTND, k_BSKD, v_BSKD))
        rows = [
            x.flatten(0, 1).unsqueeze(0).split(self.lengths, 1) for x in (q_BTND, k_BSKD, v_BSKD)
        ]
        parts = [part for q, k, v in zip(*rows, strict=True) for part in self._piece(q, k, v)]
        return _join(parts).view(q_BTND.shape)

    def _piece(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        n_tokens = q.shape[1]
        if not _is_blocked(n_tokens):
            return [attend(q, k, v, causal=True)]
        parts = []
        for start in range(0, n_tokens, QUERY_BLOCK_TOKENS):
            stop = min(start + QUERY_BLOCK_TOKENS, n_tokens)
            mask = self._bias(q.dtype)[start:stop, :stop]
            parts.append(attend(q[:, start:stop], k[:, :stop], v[:, :stop], mask=mask))
        return parts

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """Added to the scores; made of the triangle once, and not by the kernel in each call."""
        if dtype not in self._biases:
            zeros = torch.zeros(self.triangle.shape, dtype=dtype, device=self.triangle.device)
            self._biases[dtype] = zeros.masked_fill_(~self.triangle, float("-inf"))
        return self._biases[dtype]


@dataclass(frozen=True, eq=False)
class BlocksPlan:
    """A token sees the keys that a mask over blocks marks, by flex attention.

    On a CPU PyTorch has no gradient for it.

    Attributes:
        mask: Of 128 x 128 tokens per block.
    """

    mask: BlockMask

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each query (B, T, N, D)."""
        out_BNTD = _flex_attention(q_BTND.device.type)(
            q_BTND.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            block_mask=self.mask,
            enable_gqa=q_BTND.shape[2] != k_BSKD.shape[2],
        )
        return out_BNTD.transpose(1, 2)


def plan_blocks(
    at_T: Int[Tensor, " tokens"], n_keys: int, doc_ids_BS: Int[Tensor, "batch keys"] | None = None
) -> BlocksPlan:
    """Make a plan that computes causal attention block by block.

    Args:
        at_T: Places in the row of the tokens whose queries are asked, in any order.
        n_keys: Tokens of a row, S.
        doc_ids_BS: Documents of whole rows: tokens see only tokens of the same run of equal ids.
            None: a row is one document.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def is_before(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return at_T[query] >= key

    if doc_ids_BS is None:
        return BlocksPlan(
            create_block_mask(is_before, None, None, len(at_T), n_keys, device=at_T.device)  # type: ignore[arg-type]
        )
    runs_BS = _starts(doc_ids_BS).cumsum(-1)

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = at_T[query]
        return (place >= key) & (runs_BS[row, place] == runs_BS[row, key])

    n_rows = len(doc_ids_BS)
    return BlocksPlan(
        create_block_mask(is_visible, n_rows, None, len(at_T), n_keys, device=at_T.device)  # type: ignore[arg-type]
    )


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it computes every block, and keeps all scores: only to compare with.
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def plan_attention(
    n_tokens: int,
    device: torch.device,
    doc_ids_BT: Int[Tensor, "batch tokens"] | None = None,
    kind: AttentionKind = "auto",
) -> AttentionPlan:
    """Make the plan of a forward over whole rows.

    Args:
        n_tokens: Tokens per row, T.
        device: Where the model runs.
        doc_ids_BT: A document is a run of equal ids inside a row; tokens see only their own
            document. None: a row is one document.
        kind: ``auto`` picks by device and document lengths; the others force one plan (``causal``
            only without documents).

    Raises:
        ValueError: ``causal`` with documents.
    """
    if kind == "blocks" or (kind == "auto" and doc_ids_BT is not None and device.type == "cuda"):
        return plan_blocks(torch.arange(n_tokens, device=device), n_tokens, doc_ids_BT)
    if doc_ids_BT is None:
        pieces = kind == "pieces" or (
            kind == "auto" and device.type == "cpu" and _is_blocked(n_tokens)
        )
        if pieces:
            return PiecesPlan(None, _triangle(n_tokens, device))
        return MaskPlan(_triangle(n_tokens, device)) if kind == "mask" else CausalPlan()
    if kind == "causal":
        raise ValueError("attention kind 'causal' cannot keep packed documents apart")
    if kind == "pieces" or (kind == "auto" and device.type == "cpu"):
        lengths = document_lengths(doc_ids_BT)
        if set(lengths) == {n_tokens}:  # every row is one document: fewer and larger calls
            return plan_attention(n_tokens, device, None, kind)
        long_enough = doc_ids_BT.numel() >= _MIN_MEAN_DOCUMENT_TOKENS * len(lengths)
        if kind == "pieces" or long_enough:
            longest = max((n for n in lengths if _is_blocked(n)), default=1)
            return PiecesPlan(lengths, _triangle(longest, device))
    return MaskPlan(document_mask(doc_ids_BT))


def document_lengths(doc_ids_BT: Int[Tensor, "batch tokens"]) -> tuple[int, ...]:
    """Return the lengths of the runs of equal ids, rows laid end to end (a row ends a run)."""
    starts_BT = _starts(doc_ids_BT)
    bounds = [*torch.nonzero(starts_BT.flatten()).flatten().tolist(), doc_ids_BT.numel()]
    return tuple(stop - start for start, stop in itertools.pairwise(bounds))


def document_mask(doc_ids_BT: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch 1 tokens tokens"]:
    """Return the block mask: key j is visible to query i when j <= i and both are in one run."""
    runs_BT = _starts(doc_ids_BT).cumsum(-1)
    same_BTT = runs_BT.unsqueeze(-1) == runs_BT.unsqueeze(-2)
    return (same_BTT & _triangle(doc_ids_BT.shape[-1], doc_ids_BT.device)).unsqueeze(1)


def attend(
    q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v of every query by one fused call.

    Args:
        q_BTND: Queries (B, T, N, D).
        k_BSKD: Keys (B, S, K, D); N / K queries share one.
        v_BSKD: Values, shaped like the keys.
        mask: Broadcastable to (B, N, T, S): which keys a query sees, or numbers in the queries'
            dtype that are added to the scores; None for all.
        causal: Query i sees keys 0..i; instead of a mask.
    """
    out_BNTD = F.scaled_dot_product_attention(
        q_BTND.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BTND.shape[2] != k_BSKD.shape[2],
    )
    return out_BNTD.transpose(1, 2)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _is_blocked(n_tokens: int) -> bool:
    return _BLOCKED_FROM_TOKENS <= n_tokens < _BLOCKED_BELOW_TOKENS


def _triangle(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_()


def _starts(doc_ids_BT: Tensor) -> Tensor:
    starts_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return starts_BT
