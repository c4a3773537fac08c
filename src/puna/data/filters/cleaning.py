"""Cleaning by lines: rules that cut lines, or parts of them, out of texts, each counted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from puna.data.filters.base import FilterConfig, Finding, noted
from puna.data.filters.batch import TextBatch


@dataclass(frozen=True)
class Cut:
    """What a rule cuts out.

    Attributes:
        pattern: Its matches are cut out.
        put: What comes in their place.
    """

    pattern: re.Pattern[str]
    put: str = ""


def of_lines(expression: str, flags: int = re.IGNORECASE) -> Cut:
    """Cut out whole lines, white space at both ends ignored, with their newlines."""
    return Cut(re.compile(rf"^[ \t]*(?:{expression})[ \t]*(?:\n|\Z)", flags | re.MULTILINE))


BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


class Cleaning(FilterConfig):
    """Base of filters that cut by rules; :func:`clean` applies them."""

    rewrites: ClassVar[bool] = True
    cuts: ClassVar[Mapping[str, Cut]]
    off: tuple[str, ...] = ()
    """Rules that are left out: names after the dot."""
    min_left: int = Field(default=50, ge=0)
    """Smallest number of characters that must be left of a text that was cut (ours)."""

    @field_validator("off")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - set(cls.cuts))
        if unknown:
            raise ValueError(f"no such rule: {', '.join(unknown)}; known: {', '.join(cls.cuts)}")
        return names


def clean(
    name: str, docs: TextBatch, cuts: Mapping[str, Cut], off: tuple[str, ...], min_left: int
) -> Iterator[Finding]:
    """Apply rules in their order; show what each cut out, fail what is emptied, put in the rest.

    Args:
        name: Of the filter; reasons are ``<name>.<rule>`` and ``<name>.emptied``.
        docs: The batch.
        cuts: Rule -> what it cuts out.
        off: Rules that are left out.
        min_left: Smallest number of characters that must be left of a text that was changed.
    """
    old = docs.strings()
    new = list(old)
    alive = docs.alive.tolist()
    for rule, cut in cuts.items():
        counts = np.zeros(len(docs))
        if rule not in off:
            for index, text in enumerate(new):
                if alive[index]:
                    new[index], counts[index] = cut.pattern.subn(cut.put, text)
        yield noted(f"{name}.{rule}", counts)
    for index, text in enumerate(new):
        if text != old[index]:
            new[index] = BLANK_LINES.sub("\n\n", text).strip("\n")
    left = np.array([len(text.strip()) for text in new], np.float64)
    changed = np.array([a != b for a, b in zip(old, new, strict=True)], bool)
    yield Finding(f"{name}.emptied", left, float(min_left), changed & (left < min_left))
    docs.replace(new)
