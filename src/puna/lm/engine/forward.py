"""Running a step's work through the model: what is packed together, and what is computed how.

Shapes: T tokens of a packed row, C dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from puna.lm.engine.paged import PagedAttention, Segment, block_table
from puna.lm.engine.pool import KVPool
from puna.lm.engine.sample import token_logprobs
from puna.lm.engine.sequence import Sequence, Work
from puna.model.llama import Llama

if TYPE_CHECKING:
    from puna.lm.cpu.between import BetweenProducts
    from puna.lm.cpu.decoder import CpuDecoder
    from puna.lm.cpu.prefill import CpuPrefill

FEW_TOKENS = {torch.float32: 128, torch.bfloat16: 48, torch.int8: 256}
"""Prompt tokens that the compiled step computes no slower than PyTorch, by dtype of matrices.

Where they cross differs from processor to processor (float32: 100 tokens to over 512)."""
FEWEST_PREFILLED = 12
"""Prompt tokens that the compiled prefill, where there is one, computes no slower than the step."""
_CHEAPLY_INVARIANT = (torch.float32, torch.int8)  # in bfloat16 PyTorch gains too much by packing
NEAR_TOKENS = 768
"""Beyond this position the keys no longer stay in the processor's cache between tokens, and several
tokens of one request are better computed by PyTorch, which reads the keys once for all of them."""
_ROUND_ROWS = 32
"""oneDNN, which multiplies bfloat16 on a CPU, compiles a kernel for every shape it meets (1 ms) and
keeps a thousand of them (0.6 MiB each): rows are filled up to a multiple of this, fewer to a power
of two."""
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
            sums depend on the number of rows. None: where it costs less than a tenth.

    Attributes:
        is_invariant: Whether this is so.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        backend: Literal["auto", "torch"],
        batch_invariant: bool | None,
    ) -> None:
        self._model, self._pool = model, pool
        self._device = model.norm.weight.device
        self._decoder: CpuDecoder | None = None
        self._prefill: CpuPrefill | None = None
        self._between: BetweenProducts | None = None
        if backend == "auto":
            self._decoder = _decoder_of(model)
        if self._decoder is not None:
            self._prefill = _prefill_of(self._decoder)
            self._between = _between_of(model, self._decoder)
        weight = model.layers[0].get_submodule("attention.wq").weight
        assert isinstance(weight, Tensor)
        self._few_tokens = FEW_TOKENS[weight.dtype] if self._decoder else 0
        is_float32 = model.norm.weight.dtype == torch.float32
        self._round_rows = self._device.type == "cpu" and not is_float32
        is_cheap = self._decoder is not None and (
            self._prefill is not None or weight.dtype in _CHEAPLY_INVARIANT
        )
        self.is_invariant = is_cheap if batch_invariant is None else batch_invariant

    def run(self, work: Items[Work]) -> list[Result]:
        """Compute all items; one result per item whose sequence is to choose a token or failed."""
        results: list[Result] = []
        few, rest = self._split(work)
        if few:
            results += self._compiled(few)
        if rest and self._prefill is not None:
            return results + self._prefilled(rest)
        if rest:
            # One packed forward, or one for each.
            for group in [[item] for item in rest] if self.is_invariant else [rest]:
                results += self._packed(group)
        return results

    def _split(self, work: Items[Work]) -> tuple[list[Work], list[Work]]:
        """Return what the compiled step computes, and what the compiled prefill or PyTorch does."""
        if self._decoder is None:
            return [], list(work)
        few = [item for item in work if self._is_few(item)]
        if self._prefill is not None:
            return few, [item for item in work if item not in few]
        n_prompt_tokens = sum(item.n_tokens for item in few if item.n_tokens > 1)
        if not self.is_invariant and n_prompt_tokens > self._few_tokens:
            # Packed together they are many, and PyTorch is faster.
            few = [item for item in few if item.n_tokens == 1]
        return few, [item for item in work if item not in few]

    def _is_few(self, item: Work) -> bool:
        """Look at the item alone: its bits must not depend on what else is computed."""
        sequence = item.sequence
        if sequence.prompt_logprobs is not None and not sequence.is_decoding:
            return False
        is_near = sequence.n_computed + item.n_tokens <= NEAR_TOKENS
        most = self._few_tokens if self._prefill is None else FEWEST_PREFILLED - 1
        return item.n_tokens == 1 or (item.n_tokens <= most and is_near)

    def _compiled(self, work: Items[Work]) -> list[Result]:
        """One call of the compiled step, whose rows do not depend on each other."""
        assert self._decoder is not None
        tokens_N = np.array([id_ for item in work for id_ in item.ids], np.int64)
        lengths = [item.n_tokens for item in work]
        firsts = [item.sequence.n_computed for item in work]
        positions_N = np.concatenate(
            [np.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)]
        )
        tables_NM = block_table([item.sequence.blocks for item in work]).repeat(lengths, 0)
        ends = np.cumsum(lengths) - 1
        rows_R = ends[[item.is_last for item in work]]
        logits_RV = self._decoder.forward(tokens_N, positions_N, tables_NM, self._pool, rows_R)
        return rate([item.sequence for item in work if item.is_last], logits_RV)

    def _prefilled(self, work: Items[Work]) -> list[Result]:
        """One call of the compiled prefill, whose tokens do not depend on each other either."""
        assert self._prefill is not None
        items = [(item.ids, item.sequence.n_computed, item.sequence.blocks) for item in work]
        states = self._prefill.forward(items, self._pool)
        failed = [
            item.sequence
            for number, item in enumerate(work)
            if item.sequence.prompt_logprobs is not None
            and not self._add_prompt_logprobs(item, self._normed(states.of(number)))
        ]
        lasts = [
            number
            for number, item in enumerate(work)
            if item.is_last and item.sequence not in failed
        ]
        results = [Result(sequence, None, 0, False) for sequence in failed]
        logits_RV = self._prefill.logits(states, lasts)
        return results + rate([work[number].sequence for number in lasts], logits_RV)

    def _normed(self, x_TC: Tensor) -> Tensor:
        return self._model.norm(x_TC).to(self._model.norm.weight.dtype)

    def _packed(self, work: Items[Work]) -> list[Result]:
        """One packed row through PyTorch."""
        segments = [
            Segment(item.sequence.blocks, item.sequence.n_computed, item.n_tokens) for item in work
        ]
        tokens = [id_ for item in work for id_ in item.ids]
        n_padding = self._n_padding(len(tokens))
        plan = PagedAttention(self._pool, segments, n_padding)
        tokens_BT = torch.tensor([tokens + [0] * n_padding], device=self._device)
        if self._between is not None:
            hidden_TC = self._between.hidden(tokens_BT, plan)
        else:
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
            logits_RV = self._logits(hidden_TC[[row for _, row in lasts]])
            results += rate([sequence for sequence, _ in lasts], logits_RV)
        return results

    def _logits(self, hidden_RC: Tensor) -> Tensor:
        n_rows = len(hidden_RC)
        padded_RC = F.pad(hidden_RC, (0, 0, 0, self._n_padding(n_rows)))
        return self._model.logits(padded_RC)[:n_rows]

    def _n_padding(self, n_rows: int) -> int:
        """Return how many rows are missing to a round number."""
        if not self._round_rows:
            return 0
        if n_rows <= _ROUND_ROWS:
            return (1 << (n_rows - 1).bit_length()) - n_rows
        return -n_rows % _ROUND_ROWS

    def _add_prompt_logprobs(self, item: Work, hidden_TC: Tensor) -> bool:
        """Append the logprobs of the prompt's tokens after these; False when one is not finite."""
        sequence = item.sequence
        if sequence.prompt_logprobs is None or sequence.is_decoding:
            return True
        first = sequence.n_computed + 1
        following = sequence.ids[first : first + item.n_tokens]
        for start in range(0, len(following), _LOGPROB_ROWS):
            ids = following[start : start + _LOGPROB_ROWS]
            logits_TV = self._logits(hidden_TC[start : start + len(ids)])
            if not bool(torch.isfinite(logits_TV).all()):
                return False
            sequence.prompt_logprobs += token_logprobs(
                logits_TV, ids, sequence.request.logprobs or 0
            )
        return True


def _decoder_of(model: Llama) -> CpuDecoder | None:
    if model.norm.weight.device.type != "cpu":
        return None
    from puna.lm.cpu.decoder import CpuDecoder, is_supported

    return CpuDecoder(model) if is_supported(model) else None


def _prefill_of(decoder: CpuDecoder) -> CpuPrefill | None:
    from puna.lm.cpu.prefill import CpuPrefill, is_fast

    return CpuPrefill(decoder) if is_fast(decoder) else None


def _between_of(model: Llama, decoder: CpuDecoder) -> BetweenProducts:
    from puna.lm.cpu.between import BetweenProducts

    return BetweenProducts(model, decoder.n_threads)


def rate(sequences: Items[Sequence], logits_RV: Float[Tensor, "rows vocab"]) -> list[Result]:
    """Find the most likely token of each row, and rows that are not finite."""
    if logits_RV.device.type == "cpu":
        # Not PyTorch: its threads would still spin when those of the compiled step begin again.
        rows = logits_RV.numpy()
        best = rows.argmax(axis=1).tolist()
        highest_R = rows[np.arange(len(rows)), best]  # a NaN, where there is one
        finite = (np.isfinite(highest_R) & np.isfinite(rows.min(axis=1))).tolist()
    else:
        lowest_R, highest_R = logits_RV.aminmax(dim=-1)
        finite = (lowest_R.isfinite() & highest_R.isfinite()).tolist()
        best = logits_RV.argmax(-1).tolist()
    return [
        Result(sequence, logits_RV[row], best[row], finite[row])
        for row, sequence in enumerate(sequences)
    ]
