"""Stage ``data.filter``: language id and heuristic filters, each drop with its reason."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.engine import EngineConfig, open_engine
from puna.data.filters.rules import FilterKernel, SourceRules
from puna.data.stagework import SCRATCH_DIR, documents_of, require_documents, step_metrics


class FilterStageConfig(EngineConfig):
    """Which filters apply to which source."""

    default: SourceRules = Field(default_factory=SourceRules)
    """Rules of sources that have no entry in `sources`."""
    sources: dict[str, SourceRules] = Field(default_factory=dict)
    """Source -> its rules: a profile, with thresholds overridden, or an ordered list of filters."""


@stage("data.filter", needs={"documents": before("data.filter")}, resumable=True)
def filter_documents(
    cfg: FilterStageConfig, inputs: Artifacts, out: Path, events: Ledger
) -> Metrics:
    """Drop documents by language and quality heuristics, each with its reason.

    Writes ``documents/`` (with a column ``language``) and ``rejected/``.
    """
    started_s = time.monotonic()
    kernel = FilterKernel(
        cfg.default.make(), {name: rules.make() for name, rules in sorted(cfg.sources.items())}
    )
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        manifest = engine.judge("data.filter", documents_of(inputs["documents"]), out, kernel)
    require_documents(manifest.rows_in, "data.filter", "data.ingest")
    return step_metrics(manifest, started_s, events)
