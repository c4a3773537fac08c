"""C4's cleaning of lines and pages, decision for decision as datatrove 0.10 implements it.

It keeps the lines that look like sentences, and the document if enough sentences are left; the text
of what is kept are the lines that were kept. Sentences are those of spaCy's sentencizer.

Sources: Raffel et al. 2020, section 2.2; ``c4_filters.py`` of
https://github.com/huggingface/datatrove.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, below, register
from puna.data.filters.batch import TextBatch

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ENDS = (".", "?", "!", '"', "'")
_POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
    "use cookies",
)  # fmt: skip


@register("c4_quality")
class C4Quality(FilterConfig):
    """C4's rules for lines and pages; rewrites what it keeps."""

    rewrites: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {
        "c4_quality.lorem_ipsum": 'a line holds "lorem ipsum"',
        "c4_quality.curly_bracket": "a line holds a curly bracket",
        "c4_quality.too_few_sentences": "fewer than `min_sentences` in the lines that are kept",
    }
    terminal_punctuation: bool = True
    """Keep only lines that end with one of `. ? ! " '`, and not with an ellipsis."""
    min_sentences: int = Field(default=5, ge=0)
    """Smallest number of sentences of a document."""
    min_words_per_line: int = Field(default=3, ge=0)
    """Lines of fewer words are left out."""
    max_word_chars: int = Field(default=1000, ge=1)
    """Lines with a longer word are left out."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Look at the lines of each document, then count the sentences of those that are kept."""
        texts = docs.strings()
        lines: list[list[str]] = [[] for _ in texts]
        dropped = {name: np.zeros(len(texts), bool) for name in ("lorem_ipsum", "curly_bracket")}
        for index in np.flatnonzero(docs.alive):
            lines[index], reason = self._clean(texts[index])
            if reason:
                dropped[reason][index] = True
        for reason, failed in dropped.items():
            yield Finding(f"c4_quality.{reason}", failed.astype(np.float64), 0.0, failed)
        kept = [lines[index] if docs.alive[index] else [] for index in range(len(texts))]
        yield below("c4_quality.too_few_sentences", _count_sentences(kept), self.min_sentences)
        docs.replace(["\n".join(part).strip() for part in lines])

    def _clean(self, text: str) -> tuple[list[str], str]:
        """Return the lines to keep, and the reason to drop the document or nothing."""
        kept = []
        for raw in text.splitlines():
            line = raw.strip()
            words = line.split()
            longest = self.max_word_chars
            if len(line) > longest and any(len(word) > longest for word in words):
                continue
            if "[" in line:
                line = _CITATION.sub("", line)
            if self.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith("...")):
                continue
            if len(words) < self.min_words_per_line:
                continue
            lower = line.lower()
            if "lorem ipsum" in lower:
                return [], "lorem_ipsum"
            if "javascript" in lower:
                continue
            if "{" in line:
                return [], "curly_bracket"
            if any(policy in lower for policy in _POLICIES):
                continue
            kept.append(line)
        return kept, ""


def _count_sentences(documents: list[list[str]]) -> np.ndarray:
    """Count the sentences of each document's lines, each line by itself; at least one per line."""
    from puna.data.kernels.buffers import texts_from
    from puna.data.words.columns import COLUMNS, SENTENCES
    from puna.data.words.measure import measure

    lengths = [len(lines) for lines in documents]
    texts = texts_from([line for lines in documents for line in lines])
    rows = measure(texts, np.ones(len(texts), bool), SENTENCES)[:, COLUMNS.index("n_sentences")]
    sums = np.concatenate([[0], np.cumsum(np.maximum(rows, 1))])
    ends = np.cumsum([0, *lengths])
    return sums[ends[1:]] - sums[ends[:-1]]
