"""Which document of a group stays."""

from __future__ import annotations

from typing import Literal

Keep = Literal["quality", "longest", "smallest_id"]
"""The best ``quality``, the most bytes, or the smallest id; then the smallest id."""
