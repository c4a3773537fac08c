"""Stage ``data.dedup``: exact and MinHash near-duplicates, and the clusters that the split uses."""

from __future__ import annotations

from puna.data.dedup.stage import DedupConfig, deduplicate

__all__ = ["DedupConfig", "deduplicate"]
