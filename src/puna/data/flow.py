"""The funnel of a run: documents in and out of every data stage, per source and reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.errors import PunaError
from puna.core.units import format_bytes
from puna.data.chain import DATA_STAGES

DEFAULT_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class Count:
    """Documents and their UTF-8 bytes."""

    docs: int
    n_bytes: int


@dataclass(frozen=True)
class FlowRow:
    """What one stage did with one source.

    Attributes:
        stage: Name of the stage.
        source: Name of the source.
        in_docs: Documents that came in (``data.ingest``: raw files or records).
        in_bytes: Their bytes (``data.ingest``: raw bytes).
        kept_docs: Documents that went on.
        kept_bytes: Their bytes; a stage that cuts text out keeps fewer than came in.
        rejected: Reason code -> what was dropped for it.
    """

    stage: str
    source: str
    in_docs: int
    in_bytes: int
    kept_docs: int
    kept_bytes: int
    rejected: dict[str, Count]

    @property
    def rejected_docs(self) -> int:
        """Documents dropped for any reason."""
        return sum(count.docs for count in self.rejected.values())


@dataclass(frozen=True)
class Funnel:
    """All rows, in the order of the stages, sources in alphabetical order.

    Attributes:
        rows: One per stage and source.
        bytes_per_token: For estimates of tokens, as configured for ``data.split``.
    """

    rows: Sequence[FlowRow]
    bytes_per_token: float

    @property
    def stages(self) -> list[str]:
        """Stages that there are rows of."""
        return list(dict.fromkeys(row.stage for row in self.rows))

    @property
    def sources(self) -> list[str]:
        """Sources that there are rows of."""
        return sorted({row.source for row in self.rows})

    def tokens(self, n_bytes: int) -> int:
        """Estimate the tokens in a number of bytes."""
        return round(n_bytes / self.bytes_per_token)

    def total(self, stage: str) -> FlowRow:
        """Add up the sources of a stage; its source is ``all``."""
        rows = [row for row in self.rows if row.stage == stage]
        rejected: dict[str, Count] = {}
        for row in rows:
            for reason, count in row.rejected.items():
                had = rejected.get(reason, Count(0, 0))
                rejected[reason] = Count(had.docs + count.docs, had.n_bytes + count.n_bytes)
        return FlowRow(
            stage, "all",
            sum(row.in_docs for row in rows), sum(row.in_bytes for row in rows),
            sum(row.kept_docs for row in rows), sum(row.kept_bytes for row in rows),
            dict(sorted(rejected.items())),
        )  # fmt: skip


def flow_rows(stage: str, metrics: dict[str, Any]) -> list[FlowRow]:
    """Read the rows of a stage from its metrics."""
    return [
        FlowRow(
            stage, source, part["in_docs"], part["in_bytes"], part["kept_docs"], part["kept_bytes"],
            {reason: Count(c["docs"], c["bytes"]) for reason, c in part["rejected"].items()},
        )
        for source, part in sorted(metrics.get("flow", {}).items())
    ]  # fmt: skip


def result_line(metrics: dict[str, Any]) -> str:
    """Say in one line what a stage made: its own ``headline``, else the documents it kept."""
    if "headline" in metrics:
        return str(metrics["headline"])
    rows = (metrics.get("flow") or {}).values()
    if not rows:
        return ""
    docs, docs_in = (sum(row[key] for row in rows) for key in ("kept_docs", "in_docs"))
    n_bytes = sum(row["kept_bytes"] for row in rows)
    return f"{docs:,} of {docs_in:,} documents, {format_bytes(n_bytes)}"


def finished(run_dir: Path) -> dict[str, Artifact]:
    """Return the finished data stages of a run, in their order.

    Raises:
        PunaError: There is no such run, or no data stage of it is finished.
    """
    if not run_dir.is_dir():
        raise PunaError(f"there is no run in {run_dir}", "give the folder of a run, runs/<name>")
    found = {
        name: Artifact(run_dir / name)
        for name in DATA_STAGES
        if (run_dir / name / ARTIFACT_FILE).is_file()
    }
    if not found:
        raise PunaError(
            f"{run_dir} holds no finished data stage",
            f"run its recipe first; a data stage is one of {', '.join(DATA_STAGES)}",
        )
    return found


def funnel(run_dir: Path) -> Funnel:
    """Read the funnel of a run from the artifacts of its data stages.

    Raises:
        PunaError: There is no such run, or no data stage of it is finished.
    """
    artifacts = finished(run_dir)
    rows = [row for name, item in artifacts.items() for row in flow_rows(name, item.metrics)]
    split = artifacts.get("data.split")
    ratio = split.metrics.get("bytes_per_token") if split is not None else None
    return Funnel(rows, float(ratio or DEFAULT_BYTES_PER_TOKEN))
