"""Reads artifacts and the ledger of a run into the JSON value that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.core.artifact import Artifact
from puna.core.ledger import LEDGER_FILE, read_events
from puna.ui.report.collect.composition import composition_section
from puna.ui.report.collect.data import data_section
from puna.ui.report.collect.record import lineage_section, run_section, stages_section
from puna.ui.report.collect.results import (
    evaluation_section,
    model_section,
    samples_section,
    tuning_section,
)
from puna.ui.report.collect.story import headline, story
from puna.ui.report.collect.tokens import tokens_section
from puna.ui.report.collect.training import training_section

REPORT_SCHEMA_VERSION = 1


def collect(
    inputs: Mapping[str, Artifact], ledger: Path | None, *, title: str, max_reasons: int
) -> dict[str, Any]:
    """Gather everything the report shows.

    Args:
        inputs: Finished artifacts by the name of the input; any subset.
        ledger: The run's ledger, for its name. What happened is read from the ledger beside each
            artifact: an input may come from another run.
        title: Heading; the name of the run when empty.
        max_reasons: Rejection reasons named per stage; the rest is summed up.

    Returns:
        JSON values: what ``report.json`` holds. A section without its stages is None.
    """
    artifacts = sorted(inputs.values(), key=lambda item: item.record["started_at"])
    events = _events(artifacts)
    stages = stages_section(artifacts, events)
    tokens = tokens_section(inputs)
    value: dict[str, Any] = {
        "report_schema_version": REPORT_SCHEMA_VERSION,
        "run": run_section(artifacts, stages, ledger, title),
        "data": data_section(artifacts, tokens, max_reasons),
        "composition": composition_section(inputs),
        "tokens": tokens,
        "model": model_section(inputs),
        "training": training_section(inputs.get("pretrain"), events),
        "tuning": tuning_section(inputs, events),
        "evaluation": evaluation_section(inputs),
        "samples": samples_section(inputs),
        "stages": stages,
        "lineage": lineage_section(artifacts),
    }
    value["headline"] = headline(value)
    value["story"] = story(value)
    return value


def _events(artifacts: Sequence[Artifact]) -> dict[str, list[dict[str, Any]]]:
    """The events of each stage, from the ledger of the run that its artifact stands in."""
    ledgers = {artifact.stage: artifact.path.parent / LEDGER_FILE for artifact in artifacts}
    known = {path: list(read_events(path)) for path in set(ledgers.values())}
    return {
        stage: [event for event in known[path] if event.get("stage") == stage]
        for stage, path in ledgers.items()
    }
