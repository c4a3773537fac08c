"""From shares, rates and a budget to how often the documents of each part are read.

A *part* is what one rule names. Its *factor* is tokens read / tokens that there are: 0.25 samples a
quarter of the documents, 1.5 reads each once and half of them twice. A factor never exceeds the
part's repetition limit: up to four passes over the same data are worth nearly as much as new data,
and what comes after loses its worth quickly (Muennighoff et al. 2023, "Scaling Data-Constrained
Language Models").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from puna.core.errors import PunaError

_EPSILON = 1e-9


@dataclass(frozen=True)
class Part:
    """What one rule asks for.

    Attributes:
        name: For messages.
        n_tokens: Tokens of its training documents, each once.
        share: Asked share of all tokens read; None for none.
        fixed: Asked factor (a sampling rate or a repetition); None for none.
        reads: Tokens that a fixed factor reads (draws decide, so not exactly factor * tokens);
            None: as many as the factor says.
        limit: Highest factor.
        factor: The solution.
    """

    name: str
    n_tokens: int
    share: float | None = None
    fixed: float | None = None
    reads: float | None = None
    limit: float = 4.0
    factor: float = 0.0

    @property
    def target(self) -> float:
        """Tokens to read."""
        if self.reads is not None:
            return self.reads
        return self.factor * self.n_tokens

    @property
    def most(self) -> float:
        """Tokens that the repetition limit allows."""
        return self.limit * self.n_tokens


def solve(
    parts: Sequence[Part], budget: int | None, shortfall: Literal["fill", "shrink"]
) -> list[Part]:
    """Find every part's factor.

    Parts with a fixed factor take their tokens first. Of the rest of the budget each part with a
    share takes this share *of the whole budget*; what remains goes to the parts without a wish, in
    proportion to their tokens.

    Args:
        parts: The parts; those without tokens stay at 0.
        budget: Tokens to read; None means as many as there are (with fixed parts counted as what
            they are read), so that shares neither shrink nor grow the whole.
        shortfall: What happens when a part cannot fill its share within its limit. ``fill``: the
            others take over, in proportion (the budget is met, the shares are not). ``shrink``:
            all parts become smaller until the shares hold (the shares are met, the budget is not).

    Raises:
        PunaError: Fixed parts and shares exceed the budget, or leave a rest that nothing takes.
    """
    fixed = sum(
        part.n_tokens * part.fixed if part.reads is None else part.reads
        for part in parts
        if part.fixed is not None
    )
    loose = [part for part in parts if part.fixed is None and part.n_tokens]
    total = budget if budget is not None else fixed + sum(part.n_tokens for part in loose)
    asked = sum(part.share or 0.0 for part in loose)
    rest = total * (1 - asked) - fixed
    if rest < -_EPSILON * max(total, 1):
        raise PunaError(
            f"data.compose: the shares ({asked:.1%} of {total:,.0f} tokens) and the parts with a "
            f"fixed rate or repetition ({fixed:,.0f} tokens) exceed the budget",
            "lower the shares or the rates, or raise `budget_tokens`",
        )
    unnamed = sum(part.n_tokens for part in loose if part.share is None)
    if asked and not unnamed and rest > _EPSILON * total:
        raise PunaError(
            f"data.compose: shares and fixed parts make up {1 - rest / total:.1%} of the budget, "
            "and no other training document can take the rest",
            "let the shares add up to 1",
        )
    wishes = {
        part.name: part.share * total if part.share is not None
        else max(rest, 0.0) * part.n_tokens / unnamed
        for part in loose
    }  # fmt: skip
    scale = _shrink(loose, wishes) if shortfall == "shrink" else _fill(loose, wishes)
    solved = []
    for part in parts:
        if part.fixed is not None:
            solved.append(replace(part, factor=part.fixed if part.n_tokens else 0.0))
        elif part.n_tokens:
            read = min(wishes[part.name] * scale, part.most)
            solved.append(replace(part, factor=read / part.n_tokens))
        else:
            solved.append(part)
    return solved


def _shrink(parts: Sequence[Part], wishes: dict[str, float]) -> float:
    """Return the largest scale (at most 1) under which no part exceeds its limit."""
    return min((part.most / wishes[part.name] for part in parts
                if wishes[part.name] > part.most), default=1.0)  # fmt: skip


def _fill(parts: Sequence[Part], wishes: dict[str, float]) -> float:
    """Return the scale under which the parts, each cut at its limit, read what they wish together.

    The sum of ``min(scale * wish, most)`` grows piece by piece linearly: parts reach their limits
    in the order of ``most / wish``.
    """
    wanted = sum(wishes.values())
    growing = sorted(
        (part for part in parts if wishes[part.name] > 0),
        key=lambda part: part.most / wishes[part.name],
    )
    full, slope, scale = 0.0, wanted, 1.0
    for part in growing:
        scale = (wanted - full) / slope
        if scale * wishes[part.name] <= part.most * (1 + _EPSILON):
            return scale
        full += part.most
        slope -= wishes[part.name]
        if slope <= _EPSILON * wanted:
            break
    return scale  # every part is at its limit
