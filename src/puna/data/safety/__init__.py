"""Stage ``data.safety``: personal data, keys, block lists, explicit and toxic text."""

from __future__ import annotations

from puna.data.safety.config import SafetyConfig
from puna.data.safety.stage import make_safe

__all__ = ["SafetyConfig", "make_safe"]
