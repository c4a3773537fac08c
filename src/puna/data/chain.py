"""The order of the data stages; each takes the documents of the nearest one before it.

A recipe leaves out the stages that it does not want, all but the first and the last.
"""

from __future__ import annotations

DATA_STAGES = (
    "data.ingest",
    "data.filter",
    "data.safety",
    "data.lines",
    "data.dedup",
    "data.semantic",
    "data.quality",
    "data.substrings",
    "data.decontaminate",
    "data.split",
    "data.compose",
)
"""Passages are cut (`data.substrings`) when no stage drops documents for what they are any more, as
a document that goes later would take the only copy of a passage with it; decontamination sees the
texts as they are trained on."""


CORPUS_STAGES = ("data.compose", "data.split")
"""Stages that leave the final corpus, the last first; a recipe may end with the split."""


def before(stage: str) -> str:
    """Return what a stage needs as its documents: the stages before it, the nearest first.

    Args:
        stage: One of :data:`DATA_STAGES`, not the first.
    """
    return "|".join(reversed(DATA_STAGES[: DATA_STAGES.index(stage)]))
