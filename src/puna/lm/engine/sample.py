"""Choosing the next token of one request from its logits.

The order is that of transformers: repetition penalty, presence and frequency penalties,
temperature, top-k, top-p, min-p. Each truncation keeps the set that transformers keeps (ties at the
k-th logit are kept), drawn from with the same renormalised probabilities.

Every request has its own generator and draws exactly one number per token, so its draws depend on
its seed and its history alone. Random numbers are drawn on the CPU: equal anywhere.

Sorting a vocabulary of 128,000 for every token would cost more than a small model. Only candidates
near the largest logit are sorted, in ranges that widen until they provably hold the whole kept set,
or the place the draw falls on; the last range is the whole vocabulary.

Shapes: V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from puna.lm.engine.types import TokenLogprob
from puna.model.sampling import Sampling

_WIDTHS = (4.0, 9.0, 16.0, math.inf)  # nats below the largest scaled logit
_SMALLEST_TEMPERATURE = 1e-30  # still a normal float32


class Sampler:
    """The choice of one request: its settings, its generator, what it has seen.

    Args:
        sampling: How to choose.
        prompt_ids: Count as seen for the repetition penalty.
        vocab_size: V.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._generator = (
            torch.Generator().manual_seed(sampling.seed) if sampling.temperature > 0 else None
        )
        self._seen = self._counts = None
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[list(prompt_ids)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.zeros(vocab_size, dtype=np.float32)

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the most likely token whatever was seen."""
        return self._generator is None and self._seen is None and self._counts is None

    def choose(self, logits_V: Float32[np.ndarray, " vocab"]) -> int:
        """Return the next token and count it as seen.

        Args:
            logits_V: Finite; not changed.
        """
        scores_V = self._penalised(logits_V)
        token = int(scores_V.argmax()) if self._generator is None else self._draw(scores_V)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalised(self, logits_V: np.ndarray) -> np.ndarray:
        scores_V = logits_V
        if self._seen is not None:
            penalty = np.float32(self.sampling.repetition_penalty)
            lowered_V = np.where(scores_V > 0, scores_V / penalty, scores_V * penalty)
            scores_V = np.where(self._seen, lowered_V, scores_V)
        if self._counts is not None:
            frequency = np.float32(self.sampling.frequency_penalty)
            presence = np.float32(self.sampling.presence_penalty)
            scores_V = scores_V - self._counts * frequency - (self._counts > 0) * presence
        return scores_V

    def _draw(self, scores_V: np.ndarray) -> int:
        temperature = np.float32(max(self.sampling.temperature, _SMALLEST_TEMPERATURE))
        with np.errstate(over="ignore"):  # a cold row: far below the best is -inf, as it should be
            scaled_V = (scores_V - scores_V.max()) / temperature
        total = float(np.exp(scaled_V).sum(dtype=np.float64))
        share = float(torch.rand(1, generator=self._generator, dtype=torch.float64))
        for width in _WIDTHS:
            ids = np.flatnonzero(scaled_V >= -width)
            order = np.argsort(-scaled_V[ids], kind="stable")
            place = _place(
                scaled_V[ids[order]], len(ids) == len(scaled_V), total, share, self.sampling
            )
            if place is not None:
                return int(ids[order[place]])
        raise AssertionError("the whole vocabulary holds the kept set")


def _place(
    scaled: np.ndarray, is_whole: bool, total: float, share: float, sampling: Sampling
) -> int | None:
    """Return where the draw falls among candidates, or None when they are too few to tell.

    Args:
        scaled: Scaled logits of the candidates, the largest (0) first; all that are left out are
            below the last of them.
        is_whole: Whether none is left out.
        total: Sum of exp(scaled) over the vocabulary.
        share: The draw, in [0, 1).
        sampling: top_k, top_p and min_p.
    """
    n_kept = len(scaled)
    if sampling.top_k:
        if sampling.top_k > n_kept and not is_whole:
            return None
        if sampling.top_k <= n_kept:
            n_kept = int(np.searchsorted(-scaled, -scaled[sampling.top_k - 1], side="right"))
            is_whole = True  # whatever is left out is cut by top_k
    masses = np.exp(scaled[:n_kept], dtype=np.float64)
    cumulated = masses.cumsum()
    if is_whole:
        total = float(cumulated[-1])
    is_cut = is_whole
    if sampling.top_p < 1.0:
        n_top = int(np.searchsorted(cumulated - masses, sampling.top_p * total, side="left"))
        is_cut |= n_top < n_kept or float(cumulated[-1]) >= sampling.top_p * total
        n_kept = max(min(n_top, n_kept), 1)
    if sampling.min_p > 0.0:
        n_min = int(np.searchsorted(-masses, -sampling.min_p * masses[0], side="right"))
        is_cut |= n_min < n_kept
        n_kept = max(min(n_min, n_kept), 1)
    if not is_cut and (sampling.top_p < 1.0 or sampling.min_p > 0.0):
        return None
    target = share * (float(cumulated[n_kept - 1]) if is_cut else total)
    # The draw lies below the total, so the first place above it has a probability above zero.
    place = int(np.searchsorted(cumulated[:n_kept], target, side="right"))
    if place < n_kept:
        return place
    return n_kept - 1 if is_cut else None


def token_logprobs(
    logits_TV: Float32[torch.Tensor, "tokens vocab"], ids: Sequence[int], n_top: int
) -> list[TokenLogprob]:
    """Return how likely each id was under its row of logits.

    Args:
        logits_TV: One row per id, on any device.
        ids: The tokens that were chosen, or that stand in the prompt.
        n_top: How many of the most likely tokens to name.
    """
    index_T1 = torch.tensor(ids, device=logits_TV.device).unsqueeze(1)
    norms_T1 = logits_TV.logsumexp(-1, keepdim=True)
    chosen = (logits_TV.gather(1, index_T1) - norms_T1).squeeze(1).tolist()
    if not n_top:
        return [TokenLogprob(id_, logprob) for id_, logprob in zip(ids, chosen, strict=True)]
    best = logits_TV.topk(min(n_top, logits_TV.shape[1]), dim=-1)
    top_ids, top_logprobs = best.indices.tolist(), (best.values - norms_T1).tolist()
    return [
        TokenLogprob(id_, logprob, tuple(zip(names, values, strict=True)))
        for id_, logprob, names, values in zip(ids, chosen, top_ids, top_logprobs, strict=True)
    ]
