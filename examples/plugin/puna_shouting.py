"""An example of a plugin: a filter that drops documents written in capital letters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, above, register
from puna.data.filters.batch import TextBatch


@register("shouting")
class Shouting(FilterConfig):
    """Too many capital letters."""

    reasons: ClassVar[dict[str, str]] = {"shouting": "more capital letters than `max`"}
    max: float = Field(default=0.5, ge=0, le=1)
    """Largest share of characters that are capital letters."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Compare the share of capital letters."""
        shares = [sum(map(str.isupper, text)) / max(len(text), 1) for text in docs.strings()]
        yield above("shouting", shares, self.max)
