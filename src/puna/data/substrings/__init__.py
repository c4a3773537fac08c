"""Stage ``data.substrings``: passages that another document has already are cut."""

from __future__ import annotations

from puna.data.substrings.stage import SubstringsConfig, cut_substrings

__all__ = ["SubstringsConfig", "cut_substrings"]
