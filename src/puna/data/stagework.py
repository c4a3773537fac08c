"""What the data stages share: opening the input, the metrics of a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.units import MB
from puna.data.engine.base import Flow, Manifest
from puna.data.schema import DOCUMENTS_DIR

WORK_DIR = ".work"
"""Steps of a stage before its result, inside its folder; gone when the stage is done."""
SCRATCH_DIR = ".scratch"
"""Spill files of the engine inside a stage's folder; gone when the stage is done."""


def documents_of(artifact: Artifact) -> Path:
    """Return the folder of an artifact's documents."""
    return artifact.file(DOCUMENTS_DIR)


def require_documents(n_docs: int, stage: str, producer: str) -> None:
    """Refuse to go on without documents.

    Raises:
        PunaError: There is none.
    """
    if n_docs == 0:
        raise PunaError(
            f"{stage}: there is no document left after {producer}",
            "look at `puna data funnel --run RUN` for the reasons, then loosen the thresholds or "
            "add sources",
        )


def step_metrics(manifest: Manifest, started_s: float, events: Ledger) -> dict[str, Any]:
    """Return the metrics of a step that judged documents, and write them to the ledger.

    Args:
        manifest: What the step wrote.
        started_s: ``time.monotonic()`` at the start of the stage.
        events: The run's ledger.
    """
    flow: Flow = manifest.flow()
    seconds = time.monotonic() - started_s
    n_docs = sum(part["in_docs"] for part in flow.values())
    n_bytes = sum(part["in_bytes"] for part in flow.values())
    kept = sum(part["kept_docs"] for part in flow.values())
    events.emit(
        "data.step", step=manifest.step, shards=len(manifest.shards), rows_in=n_docs,
        rows_kept=kept, rows_rejected=n_docs - kept,
    )  # fmt: skip
    return {
        "in_docs": n_docs,
        "in_bytes": n_bytes,
        "kept_docs": kept,
        "kept_bytes": sum(part["kept_bytes"] for part in flow.values()),
        "seconds": seconds,
        "docs_per_s": n_docs / max(seconds, 1e-9),
        "mb_per_s": n_bytes / MB / max(seconds, 1e-9),
        "flow": flow,
    }
