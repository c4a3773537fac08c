"""Options of a store, as configurations hold them; imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    if options:  # else a training need not import what reads sources
        from puna.data.sources.remote import refuse_secrets

        refuse_secrets(options)
    return options


StoreOptions = Annotated[dict[str, Any], AfterValidator(_without_secrets)]
"""For fsspec; secrets are refused, for a configuration is written into artifacts."""
