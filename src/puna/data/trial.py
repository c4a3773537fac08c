"""One document through filters: every check with what it measured, whether it fails or not."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from puna.core.errors import PunaError
from puna.data.filters.base import FILTERS, FilterConfig
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import PROFILES, name_of


@dataclass(frozen=True)
class Check:
    """One check of a filter on one document.

    Attributes:
        filter: Name of the filter.
        reason: Code under which the document would be rejected.
        meaning: Of the code.
        value: What was measured.
        threshold: What it was compared with.
        failed: Whether the document fails it.
        detail: Free text of the filter.
    """

    filter: str
    reason: str
    meaning: str
    value: float
    threshold: float
    failed: bool
    detail: str | None


@dataclass(frozen=True)
class Trial:
    """All checks, and the text as it is after them.

    Attributes:
        checks: In their order; the first that failed decides.
        text: Rewritten, when a filter rewrites, else as given.
    """

    checks: list[Check]
    text: str

    @property
    def verdict(self) -> Check | None:
        """The check that decides, None when the document is kept."""
        return next((check for check in self.checks if check.failed), None)


def try_filters(name: str, text: str, path: str = "") -> Trial:
    """Judge a text by a filter with its defaults, or by all filters of a profile.

    Later filters are asked, too, when an earlier one has failed the document.

    Args:
        name: Of a filter or a profile.
        text: The document.
        path: Its path, for filters that look at the file's extension.

    Raises:
        PunaError: There is neither a filter nor a profile of this name.
    """
    checks, current = [], text
    for one in _filters(name):
        docs = TextBatch(pa.array([current], pa.large_string()), [path])
        for finding in one.judge(docs):
            detail = finding.details[0] if finding.details is not None else None
            checks.append(
                Check(
                    name_of(one),
                    finding.reason,
                    one.reasons[finding.reason],
                    float(finding.value[0]),
                    finding.threshold,
                    bool(finding.failed[0]),
                    detail,
                )
            )
        if one.rewrites and not any(check.failed for check in checks):
            current = docs.strings()[0]
    return Trial(checks, current)


def _filters(name: str) -> tuple[FilterConfig, ...]:
    if name in PROFILES:
        return PROFILES.get(name).filters
    if name not in FILTERS:
        raise PunaError(
            f"there is no filter and no profile {name!r}",
            f"filters: {', '.join(FILTERS)}; profiles: {', '.join(PROFILES)}",
        )
    return (FILTERS.get(name)(),)
