"""Document filters: keep or drop with a reason code, the measured value and the threshold."""

from __future__ import annotations

from puna.data.filters.base import FILTERS, Filter, FilterConfig, Finding, above, below, register
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import PROFILES, Profile

__all__ = [
    "FILTERS", "PROFILES", "Filter", "FilterConfig", "Finding", "Profile", "TextBatch", "above",
    "below", "register",
]  # fmt: skip
