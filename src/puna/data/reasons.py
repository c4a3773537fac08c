"""Every reason code under which a document can be rejected, and what it means."""

from __future__ import annotations

from collections.abc import Mapping

from puna.core.registry import Registry

REASONS: Registry[str] = Registry("rejection reason")
"""Code -> meaning. Filters add theirs when they are registered."""


def register_reasons(reasons: Mapping[str, str]) -> None:
    """Add reason codes.

    Raises:
        ValueError: A code is registered with another meaning.
    """
    for code, meaning in reasons.items():
        REASONS.register(code, meaning)


def meaning_of(code: str) -> str:
    """Return what a code means; empty for a code of a plugin that is not installed here."""
    return REASONS.get(code) if code in REASONS else ""


register_reasons(
    {
        "empty": "the file or record holds no text",
        "duplicate.exact": "same text as another document, white space and case ignored; the "
        "detail is the document that was kept",
        "duplicate.url": "its URL names the page of another document; the detail is the one that "
        "was kept",
        "duplicate.id": "an index of an earlier run has a document with this id, which stays",
        "duplicate.near": "similarity (of word 5-grams) to a document of its group is at least "
        "`near`; the detail is the document that was kept",
        "budget": "the source's token budget was used up by documents that come before it",
    }
)
