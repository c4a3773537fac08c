"""Attention over the blocks of the pool: the plan of one forward of the engine.

A forward computes one packed row of tokens, ``(1, T)``: *segments* of consecutive tokens, each of
one request, those that decode (one token) first. The plan stores the row's keys and values in the
blocks of their requests, then lets every token see its request's tokens up to itself. All decoding
tokens attend in one batched call; prompts go one by one, in blocks of queries.

Shapes: T tokens of the row, R decoding requests, S key slots, N query heads, K key/value heads,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from puna.lm.engine.pool import KVPool
from puna.model.attention import QUERY_BLOCK_TOKENS, attend, plan_attention


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request in a packed row.

    Attributes:
        blocks: The request's blocks; they have room for these tokens.
        start: Position of the first of them.
        n_tokens: How many.
    """

    blocks: Int32[np.ndarray, " blocks"]
    start: int
    n_tokens: int

    @property
    def stop(self) -> int:
        """Position after the last of them: the tokens that its last query sees."""
        return self.start + self.n_tokens


class PagedAttention:
    """An :class:`~puna.model.attention.AttentionPlan` over the pool's blocks.

    Args:
        pool: Where keys and values stand.
        segments: The row, decoding ones (``n_tokens == 1``, ``start > 0``) first.
        n_padding: Tokens at the row's end that belong to no request: they are not stored, and what
            they see is zero.

    Attributes:
        positions_BT: Position of every token of the row in its request, (1, T).
    """

    def __init__(self, pool: KVPool, segments: Sequence[Segment], n_padding: int = 0) -> None:
        self._pool, self._device = pool, pool.keys[0].device
        is_decode = [s.n_tokens == 1 and s.start > 0 for s in segments]
        self._n_decode = next((i for i, one in enumerate(is_decode) if not one), len(segments))
        self._decode = segments[: self._n_decode]
        self._prefill = segments[self._n_decode :]
        positions = torch.cat([torch.arange(s.start, s.stop) for s in segments])
        owner = torch.repeat_interleave(
            torch.arange(len(segments)), torch.tensor([s.n_tokens for s in segments])
        )
        table = torch.from_numpy(block_table([s.blocks for s in segments])).long()
        size = pool.block_tokens
        slots_T = table[owner, positions // size] * size + positions % size
        padded = F.pad(positions, (0, n_padding))
        self.positions_BT: Int[Tensor, "1 tokens"] = padded.unsqueeze(0).to(self._device)
        self._n_padding = n_padding
        self._slots_T = slots_T.to(self._device)
        if self._decode:
            lengths = torch.tensor([s.stop for s in self._decode])
            decode_RB = table[: self._n_decode, : -(-int(lengths.max()) // size)]
            self._decode_blocks = decode_RB.flatten().to(self._device)
            visible_RS = torch.arange(decode_RB.shape[1] * size) < lengths.unsqueeze(1)
            self._visible_R11S = visible_RS[:, None, None].to(self._device)
        self._prefill_blocks = [
            table[self._n_decode + i, : pool.blocks_for(s.stop)].to(self._device)
            for i, s in enumerate(self._prefill)
        ]
        # Of prompts that begin here: they see no more than themselves.
        self._fresh = {
            n: plan_attention(n, self._device)
            for n in {s.n_tokens for s in self._prefill if s.start == 0}
        }
        self._mask_QS = _query_block_mask(self._prefill, self._device)

    def __call__(
        self,
        q_BTND: Float[Tensor, "1 tokens heads head_dim"],
        k_BSKD: Float[Tensor, "1 tokens kv_heads head_dim"],
        v_BSKD: Float[Tensor, "1 tokens kv_heads head_dim"],
        layer: int = 0,
    ) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Store the layer's new keys and values and return the weighted values of each query."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        n_stored = len(self._slots_T)
        keys.flatten(0, 1).index_copy_(0, self._slots_T, k_BSKD[0, :n_stored])
        values.flatten(0, 1).index_copy_(0, self._slots_T, v_BSKD[0, :n_stored])
        parts = []
        n = self._n_decode
        if n:
            k_RSKD, v_RSKD = (
                x.index_select(0, self._decode_blocks).view(n, -1, *x.shape[2:])
                for x in (keys, values)
            )
            out_RND = attend(q_BTND[0, :n].unsqueeze(1), k_RSKD, v_RSKD, self._visible_R11S)
            parts.append(out_RND.transpose(0, 1))
        at = n
        for segment, blocks in zip(self._prefill, self._prefill_blocks, strict=True):
            rows = slice(at, at + segment.n_tokens)
            at += segment.n_tokens
            if segment.start == 0:
                plan = self._fresh[segment.n_tokens]
                parts.append(plan(q_BTND[:, rows], k_BSKD[:, rows], v_BSKD[:, rows]))
                continue
            k_BSKD_all, v_BSKD_all = (
                x.index_select(0, blocks).flatten(0, 1)[: segment.stop].unsqueeze(0)
                for x in (keys, values)
            )
            parts += self._continue(segment, q_BTND[:, rows], k_BSKD_all, v_BSKD_all)
        if self._n_padding:
            parts.append(torch.zeros_like(q_BTND[:, n_stored:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _continue(
        self, segment: Segment, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor
    ) -> list[Tensor]:
        """Attend in blocks of queries, each over the keys before its end; bounds the mask."""
        parts = []
        for first in range(0, segment.n_tokens, QUERY_BLOCK_TOKENS):
            last = min(first + QUERY_BLOCK_TOKENS, segment.n_tokens)
            n_keys = segment.start + last
            left = self._mask_QS.shape[1] - QUERY_BLOCK_TOKENS - (segment.start + first)
            mask = self._mask_QS[: last - first, left : left + n_keys]
            parts.append(
                attend(q_BTND[:, first:last], k_BSKD[:, :n_keys], v_BSKD[:, :n_keys], mask)
            )
        return parts


def block_table(
    rows: Sequence[Int32[np.ndarray, " blocks"]],
) -> Int32[np.ndarray, "rows blocks"]:
    """Return the blocks of several requests as one table, each padded with its own first block.

    Its own, because masked slots are read: another request's may hold a NaN.
    """
    table = np.empty((len(rows), max(len(row) for row in rows)), np.int32)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
        table[place, len(row) :] = row[0]
    return table


def _query_block_mask(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """Return the mask of a full block of queries over the most keys that any segment has.

    Query i of a block whose first query is at position p sees keys 0..p+i: everything left of the
    block, a triangle inside it. Masks of fewer keys are its right part.
    """
    size = QUERY_BLOCK_TOKENS
    longest = max((s.stop for s in segments if s.start), default=0)
    if not longest:
        return torch.empty(0, 0, dtype=torch.bool, device=device)
    triangle = torch.ones(size, size, dtype=torch.bool, device=device).tril_()
    before = torch.ones(size, longest, dtype=torch.bool, device=device)
    return torch.cat((before, triangle), dim=1)
