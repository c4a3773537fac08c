"""The extension point: what a filter is, and how one is added in about ten lines.

::

    @register("shouting")
    class Shouting(FilterConfig):
        \"\"\"Too many capital letters.\"\"\"

        reasons: ClassVar[dict[str, str]] = {"shouting": "more capital letters than `max`"}
        max: float = Field(default=0.5, ge=0, le=1)
        \"\"\"Largest share of capital letters.\"\"\"

        def judge(self, docs: TextBatch) -> Iterator[Finding]:
            shares = [sum(map(str.isupper, text)) / max(len(text), 1) for text in docs.strings()]
            yield above("shouting", shares, self.max)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import numpy as np

from puna.core.config import Config
from puna.core.registry import Registry
from puna.data.reasons import register_reasons

if TYPE_CHECKING:
    from puna.data.filters.batch import TextBatch


@dataclass(frozen=True)
class Finding:
    """What one check of a filter found in a batch.

    Attributes:
        reason: A code that the filter has declared in ``reasons``.
        value: What was measured, float64 [n_docs].
        threshold: What it was compared with.
        failed: bool [n_docs].
        details: A free text per document, for the failed ones.
    """

    reason: str
    value: np.ndarray
    threshold: float
    failed: np.ndarray
    details: Sequence[str] | None = None


class Filter(Protocol):
    """Keeps or drops documents; settings are its attributes."""

    reasons: ClassVar[dict[str, str]]
    """Reason code -> what it means; a code is the filter's name, or begins with it and a dot."""

    def judge(self, docs: TextBatch) -> Iterable[Finding]:
        """Check a batch.

        The value of a document must depend on this document only. Documents that an earlier
        finding dropped (``docs.alive`` is False) may have any value.
        """
        ...


class FilterConfig(Config):
    """Base of filters: the settings are typed fields that a recipe may override."""

    reasons: ClassVar[dict[str, str]] = {}
    """See :attr:`Filter.reasons`."""
    rewrites: ClassVar[bool] = False
    """Whether :meth:`judge` replaces texts (:meth:`TextBatch.replace`) once it has judged them."""

    def judge(self, docs: TextBatch) -> Iterable[Finding]:
        """See :meth:`Filter.judge`."""
        raise TypeError(f"{type(self).__name__} defines no judge()")


FILTERS: Registry[type[FilterConfig]] = Registry("document filter")
"""Name in a recipe -> filter class."""

F = TypeVar("F", bound=type[FilterConfig])


def register(name: str) -> Callable[[F], F]:
    """Add a filter class to :data:`FILTERS` and its reason codes to the list of all reasons.

    Raises:
        ValueError: The name or a code is taken, or a code does not begin with the name.
    """

    def add(filter_class: F) -> F:
        for code in filter_class.reasons:
            if code != name and not code.startswith(f"{name}."):
                raise ValueError(f"reason {code!r} of filter {name!r} must begin with {name!r}")
        if not filter_class.reasons:
            raise ValueError(f"filter {name!r} declares no reasons")
        FILTERS.register(name, filter_class)
        register_reasons(filter_class.reasons)
        return filter_class

    return add


def above(
    reason: str,
    value: Sequence[float] | np.ndarray,
    limit: float,
    *,
    where: np.ndarray | None = None,
) -> Finding:
    """Fail the documents whose value is above a limit.

    Args:
        reason: The code.
        value: [n_docs].
        limit: Largest value that passes.
        where: bool [n_docs]; others pass.
    """
    value = np.asarray(value, np.float64)
    failed = value > limit
    return Finding(reason, value, float(limit), failed if where is None else failed & where)


def below(
    reason: str,
    value: Sequence[float] | np.ndarray,
    limit: float,
    *,
    where: np.ndarray | None = None,
) -> Finding:
    """Fail the documents whose value is below a limit; see :func:`above`."""
    value = np.asarray(value, np.float64)
    failed = value < limit
    return Finding(reason, value, float(limit), failed if where is None else failed & where)


def noted(reason: str, value: Sequence[float] | np.ndarray) -> Finding:
    """Show what was measured, [n_docs], without failing any document."""
    value = np.asarray(value, np.float64)
    return Finding(reason, value, float("inf"), np.zeros(len(value), bool))


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide counts, [n_docs]; 0 where the whole is 0, of which no part can be more."""
    return part / np.maximum(whole, 1)
