"""Llama 3's count of dirty words, for adult pages that no list of domains names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, noted, register
from puna.data.filters.batch import TextBatch

if TYPE_CHECKING:
    from puna.data.safety.terms import TermList


@cache
def _terms(files: tuple[Path, ...], with_own: bool, with_context: bool) -> TermList:
    """Read the lists; every term weighs 1, or nearly so where context may excuse it."""
    from puna.data.safety.explicit_terms import CONTEXT_WORDS, EXPLICIT_TERMS
    from puna.data.safety.terms import TermList, read_terms

    given = dict(EXPLICIT_TERMS) if with_own else {}
    for file in files:
        given |= read_terms(file)
    return TermList.of(given, CONTEXT_WORDS if with_context else ())


@register("dirty_words")
class DirtyWords(FilterConfig):
    """Words of pornography, after Llama 3 (Grattafiori et al. 2024).

    Its list and its limits are not published. A document is dropped when it holds both so many of
    these words and so many per 1,000 words. Terms that medicine and law use as well do not count
    near words of these. ``data.safety`` has the same lists, with weights, and a classifier.
    """

    reasons: ClassVar[dict[str, str]] = {
        "dirty_words.count": "dirty words (measured only)",
        "dirty_words.per_1000": "at least `min_count` dirty words, and more than `max_per_1000` "
        "per 1,000 words",
    }
    files: tuple[Path, ...] = ()
    """Further lists: a term per line (what follows a tab is ignored here)."""
    own_list: bool = True
    """Use the list of `data.safety`, too."""
    use_context: bool = True
    """Leave out ambiguous terms near words of medicine, education or law."""
    min_count: int = Field(default=3, ge=1)
    """Documents with fewer are kept (ours)."""
    max_per_1000: float = Field(default=5.0, ge=0)
    """Largest number per 1,000 words (ours)."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Count the terms; the detail names the most frequent."""
        terms = _terms(self.files, self.own_list, self.use_context)
        found = terms.measure(docs.texts)
        counts = found.n_terms.astype(np.float64)
        yield noted("dirty_words.count", counts)
        per_1000 = 1000 * counts / np.maximum(docs["n_words"], 1)
        failed = (counts >= self.min_count) & (per_1000 > self.max_per_1000)
        yield Finding("dirty_words.per_1000", per_1000, self.max_per_1000, failed, found.top)
