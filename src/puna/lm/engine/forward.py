"""Running a step's work through the model: what is packed together, and what is computed how.

Shapes: T tokens of a packed row, C dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from puna.lm.engine.paged import PagedAttention, Segment
from puna.lm.engine.pool import KVPool
from puna.lm.engine.sample import token_logprobs
from puna.lm.engine.sequence import Sequence, Work
from puna.model.llama import Llama

_LOGPROB_ROWS = 64  # rows of logits that exist at once for the logprobs of a prompt


@dataclass(frozen=True)
class Result:
    """What a forward says about one sequence.

    Attributes:
        sequence: Whose.
        logits_V: Of its last known token, float32; None while its prompt is not all computed.
        best_id: The most likely token; meaningless without logits.
        is_finite: Whether all logits that were computed are.
    """

    sequence: Sequence
    logits_V: Float[Tensor, " vocab"] | None
    best_id: int
    is_finite: bool


class Forward:
    """Computes work items; keys and values go to the pool.

    Args:
        model: On any device.
        pool: Has room for the work's tokens.
        backend: See :class:`puna.lm.engine.engine.Engine`.
        batch_invariant: Compute nothing of one request together with another one's by kernels whose
            sums depend on the number of rows.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        backend: Literal["auto", "torch"],
        batch_invariant: bool,
    ) -> None:
        self._model, self._pool = model, pool
        self._is_invariant = batch_invariant
        self._device = model.output_weight.device

    def run(self, work: Items[Work]) -> list[Result]:
        """Compute all items; one result per item whose sequence is to choose a token or failed."""
        results: list[Result] = []
        for group in self._groups(work):
            results += self._packed(group)
        return results

    def _groups(self, work: Items[Work]) -> Iterator[Items[Work]]:
        if self._is_invariant:
            yield from ([item] for item in work)
        else:
            yield work

    def _packed(self, work: Items[Work]) -> list[Result]:
        """One packed row through PyTorch."""
        segments = [
            Segment(item.sequence.blocks, item.sequence.n_computed, item.n_tokens) for item in work
        ]
        plan = PagedAttention(self._pool, segments)
        tokens = [id_ for item in work for id_ in item.ids]
        tokens_BT = torch.tensor([tokens], device=self._device)
        hidden_TC = self._model.hidden(tokens_BT, plan.positions_BT, plan=plan)[0]
        starts, at = [], 0
        for item in work:
            starts.append(at)
            at += item.n_tokens
        failed = [
            item.sequence
            for item, start in zip(work, starts, strict=True)
            if not self._add_prompt_logprobs(item, hidden_TC[start : start + item.n_tokens])
        ]
        lasts = [
            (item.sequence, start + item.n_tokens - 1)
            for item, start in zip(work, starts, strict=True)
            if item.is_last and item.sequence not in failed
        ]
        results = [Result(sequence, None, 0, False) for sequence in failed]
        if lasts:
            logits_RV = self._model.logits(hidden_TC[[row for _, row in lasts]])
            results += rate([sequence for sequence, _ in lasts], logits_RV)
        return results

    def _add_prompt_logprobs(self, item: Work, hidden_TC: Tensor) -> bool:
        """Append the logprobs of the prompt's tokens after these; False when one is not finite."""
        sequence = item.sequence
        if sequence.prompt_logprobs is None or sequence.is_decoding:
            return True
        first = sequence.n_computed + 1
        following = sequence.ids[first : first + item.n_tokens]
        for start in range(0, len(following), _LOGPROB_ROWS):
            ids = following[start : start + _LOGPROB_ROWS]
            logits_TV = self._model.logits(hidden_TC[start : start + len(ids)])
            if not bool(torch.isfinite(logits_TV).all()):
                return False
            sequence.prompt_logprobs += token_logprobs(
                logits_TV, ids, sequence.request.logprobs or 0
            )
        return True


def rate(sequences: Items[Sequence], logits_RV: Float[Tensor, "rows vocab"]) -> list[Result]:
    """Find the most likely token of each row, and rows that are not finite."""
    lowest_R, highest_R = logits_RV.aminmax(dim=-1)
    finite = (lowest_R.isfinite() & highest_R.isfinite()).tolist()
    best = logits_RV.argmax(-1).tolist()
    return [
        Result(sequence, logits_RV[row], best[row], finite[row])
        for row, sequence in enumerate(sequences)
    ]
