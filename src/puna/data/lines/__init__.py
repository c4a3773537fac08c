"""Stage ``data.lines``: lines that are everywhere, lines that repeat themselves, outlier words."""

from __future__ import annotations

from puna.data.lines.stage import LinesConfig, rewrite_lines

__all__ = ["LinesConfig", "rewrite_lines"]
