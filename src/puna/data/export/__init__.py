"""The final corpus leaves the house: counts, files in open formats, and the card that tells all."""

from __future__ import annotations

from puna.data.export.counts import count_corpus
from puna.data.export.publish import export_run

__all__ = ["count_corpus", "export_run"]
