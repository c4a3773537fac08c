"""Prompts in bfloat16 on a CPU that multiplies it: prepares a call of the compiled forward."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from puna.lm.cpu.crew import crew_of
from puna.lm.cpu.decoder import CpuDecoder
from puna.lm.cpu.intrinsics import BFLOAT16, LANES
from puna.lm.cpu.structures import (
    GATE_ROWS,
    GATE_VECTORS,
    KEY_BLOCK,
    PROGRESS_COLUMNS,
    STAGES_PER_PROMPT_LAYER,
    Prompt,
    PromptBuffers,
)
from puna.lm.cpu.vectors import MULTIPLIES_PAIRS, MULTIPLIES_TILES

if TYPE_CHECKING:
    from puna.lm.engine.pool import KVPool

Span = tuple[Items[int], int, Int32[np.ndarray, " blocks"]]
"""Consecutive tokens of one request: ids, the position of the first, the request's blocks."""


PAYS = MULTIPLIES_PAIRS and not MULTIPLIES_TILES
"""Whether it is faster than PyTorch: 1.7 times with pairs of bfloat16, 0.4 times beside AMX."""


@dataclass(frozen=True)
class States:
    """What the layers gave for the tokens of one call; valid until the next.

    Attributes:
        x_VC16: The residual stream, 16 tokens in a vector.
        owners_V: Span of each vector.
        counts: Tokens of each span.
    """

    x_VC16: np.ndarray
    owners_V: np.ndarray
    counts: np.ndarray

    def of(self, number: int) -> Float[Tensor, "tokens dim"]:
        """Return those of one span's tokens."""
        x_VC16 = torch.from_numpy(self.x_VC16[: len(self.owners_V)])[self.owners_V == number]
        return x_VC16.transpose(1, 2).flatten(0, 1)[: self.counts[number]]

    def last_of(self, numbers: Items[int]) -> Float[np.ndarray, "spans dim"]:
        """Return those of the last token of some spans."""
        # It also fills up the last vector.
        ends = np.searchsorted(self.owners_V, numbers, side="right") - 1
        return self.x_VC16[ends, :, -1]


def is_fast(decoder: CpuDecoder) -> bool:
    """Tell whether a model's prompts can be computed here.

    Its parameters are bfloat16, its sizes make pairs, and the processor multiplies them better than
    PyTorch would.
    """
    s, weights = decoder.shape, decoder.weights
    is_even = s.dim % 2 == 0 and s.ffn_dim % 2 == 0 and s.head_dim % 4 == 0
    return PAYS and weights.kind == weights.norm_kind == BFLOAT16 and is_even


class CpuPrefill:
    """Computes prompts from a model's own bfloat16 parameters, in place.

    Products are of bfloat16 values, sums and the residual stream float32: nearer to a forward in
    float32 than PyTorch's in bfloat16. A token's results have the same bits whatever other tokens
    share the call, wherever its prompt is cut, and for any number of threads; they are not those
    of :class:`puna.lm.cpu.decoder.CpuDecoder`, which rounds less.

    Args:
        decoder: Of the same model; see :func:`is_fast`.
    """

    def __init__(self, decoder: CpuDecoder) -> None:
        # Compiles for the instruction: must not be imported without it.
        from puna.lm.cpu.prompt import compute_prompt

        self._compute = compute_prompt
        self._decoder = decoder
        self._buffers: PromptBuffers | None = None
        self._n_vectors = self._n_blocks = 0

    def forward(self, spans: Items[Span], pool: KVPool) -> States:
        """Compute tokens and store their keys and values.

        Args:
            spans: At least one, each with at least one token, of different requests; the tokens
                before each have been computed, and its blocks have room.
            pool: Keys and values, bfloat16, on the CPU.
        """
        decoder = self._decoder
        prompt = self._prompt(spans)
        buffers = self._fitting(len(prompt.owners_V), len(prompt.block_owners_B))
        buffers.progress_T[:] = 0
        cache = decoder.cache_of(pool)
        crew_of(decoder.n_threads).run(
            lambda thread: self._compute(
                thread, decoder.weights, decoder.shape, cache, prompt, buffers
            )
        )
        counts = np.array([len(ids) for ids, _, _ in spans])
        return States(buffers.x_VC16, prompt.owners_V, counts)

    def logits(self, states: States, numbers: Items[int]) -> Float[Tensor, "spans vocab"]:
        """Return the logits of the last token of some spans, float32."""
        return self._decoder.logits(states.last_of(numbers))

    def _prompt(self, spans: Items[Span]) -> Prompt:
        counts = np.array([len(ids) for ids, _, _ in spans])
        n_vectors = -(-counts // LANES)
        owners_V = np.repeat(np.arange(len(spans)), n_vectors)
        within_V = np.arange(len(owners_V)) - np.repeat(n_vectors.cumsum() - n_vectors, n_vectors)
        index_V16 = LANES * within_V[:, None] + np.arange(LANES)
        index_V16 = np.minimum(index_V16, counts[owners_V][:, None] - 1)
        ids_N = np.concatenate([np.asarray(ids, np.int64) for ids, _, _ in spans])
        first_token = counts.cumsum() - counts
        starts = np.array([start for _, start, _ in spans])
        positions_V16 = index_V16 + starts[owners_V][:, None]
        cos_VH16, sin_VH16 = (
            np.ascontiguousarray(x.numpy().transpose(0, 2, 1))
            for x in self._decoder.rotation_at(positions_V16)
        )
        n_keys_R = starts + counts
        n_blocks = -(-n_keys_R // KEY_BLOCK)
        tables_RM = np.zeros((len(spans), max(len(blocks) for _, _, blocks in spans)), np.int32)
        for row_M, (_, _, blocks) in zip(tables_RM, spans, strict=True):
            row_M[: len(blocks)] = blocks
        return Prompt(
            ids_N[first_token[owners_V][:, None] + index_V16],
            positions_V16,
            np.minimum(counts[owners_V] - LANES * within_V, LANES),
            owners_V,
            cos_VH16,
            sin_VH16,
            tables_RM,
            n_keys_R,
            n_blocks.cumsum() - n_blocks,
            np.repeat(np.arange(len(spans)), n_blocks),
        )

    def _fitting(self, n_vectors: int, n_blocks: int) -> PromptBuffers:
        """Return buffers that are large enough; they grow and stay."""
        if self._buffers is None or n_vectors > self._n_vectors or n_blocks > self._n_blocks:
            self._n_vectors = max(n_vectors, self._n_vectors)
            # A long prompt has more of them with every cut.
            self._n_blocks = max(1 << (n_blocks - 1).bit_length(), self._n_blocks)
            self._buffers = self._new_buffers()
        return self._buffers

    def _new_buffers(self) -> PromptBuffers:
        s, v, b = self._decoder.shape, self._n_vectors, self._n_blocks
        threads, group = self._decoder.n_threads, s.n_heads // s.n_kv_heads
        n_layers = len(self._decoder.weights.addresses_L7)
        n_qkv = (s.n_heads + 2 * s.n_kv_heads) * s.head_dim
        factors_216 = np.ones((2, LANES), np.float32)
        factors_216[1] = 1 / np.sqrt(s.head_dim)
        floats = {
            "x_VC16": (v, s.dim),
            "qkv_VQ16": (v, n_qkv),
            "both_P2VF16": (threads, 2, GATE_VECTORS, GATE_ROWS),
            "scores_PGS16": (threads, group, KEY_BLOCK),
            "mixed_PGD16": (threads, group, s.head_dim),
            "state_PG316": (threads, group, 3),
        }
        pairs = {
            "normed_VC16": (v, s.dim // 2),
            "query_VQ16": (v, n_qkv // 2),
            "gate_VF16": (v, s.ffn_dim // 2),
            "weights_PGS16": (threads, group, KEY_BLOCK // 2),
            "visible_P16": (threads,),
        }
        shorts = {
            "keys_BKSD": (b, s.n_kv_heads, KEY_BLOCK, s.head_dim),
            "values_BKDS": (b, s.n_kv_heads, s.head_dim, KEY_BLOCK),
        }
        return PromptBuffers(
            progress_T=np.zeros((1 + STAGES_PER_PROMPT_LAYER * n_layers) * PROGRESS_COLUMNS, int),
            eps_1=np.array([self._decoder.weights.eps], np.float32),
            factors_216=factors_216,
            **{name: np.empty((*shape, LANES), np.float32) for name, shape in floats.items()},
            **{name: np.empty((*shape, LANES), np.int32) for name, shape in pairs.items()},
            **{name: np.empty(shape, np.int16) for name, shape in shorts.items()},
        )
