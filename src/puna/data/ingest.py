"""Stage ``data.ingest``: documents of every source, extracted and normalised, in Parquet shards.

The plan groups the files of a source into units; workers write each unit's documents, what they had
to set aside and a state file; the end gives shards their names and counts everything again. An
attempt that was killed is continued at the first unit without a state. The output is the same, byte
for byte, for any number of workers.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree
from puna.core.ledger import Ledger
from puna.core.progress import progress, say
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import MIB, format_count
from puna.data.engine import EngineConfig, open_engine
from puna.data.sources import AnySourceConfig, list_source


class IngestConfig(EngineConfig):
    """Sources of documents and how they are read."""

    sources: tuple[AnySourceConfig, ...] = Field(min_length=1)
    """The sources; each has its own name."""
    strict: bool = False
    """Stop at the first input that cannot be used, instead of setting it aside and counting it."""
    shard_bytes: int = Field(default=16 * MIB, ge=1)
    """Size at which the files of a source (and the texts of one large file) are split."""

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, sources: tuple[Any, ...]) -> tuple[Any, ...]:
        for name, count in Counter(source.name for source in sources).items():
            if count > 1:
                raise ValueError(f"{count} sources are called {name!r}; give each its own `name`")
        return sources


def external_state(cfg: IngestConfig) -> dict[str, Any]:
    """Tell what the sources hold now, so that a rerun can say that they have changed."""
    from puna.data.ingest_plan import listing_digest

    try:
        return {"sources": listing_digest(cfg.sources)}
    except PunaError as error:
        return {"unavailable": error.message}


@stage("data.ingest", resumable=True, external_state=external_state)
def ingest_documents(cfg: IngestConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Read all sources, extract and normalise their texts, set bad input aside.

    Writes ``documents/part-*.parquet`` (each of one source, ordered by id), ``quarantine.jsonl``
    (input that could not become a document: source, path, record, offset, reason, error) and
    ``manifest.json`` (rows and a digest of the ids per shard).

    Raises:
        PunaError: A source is missing or unreadable, or no document comes out of it; in strict
            mode, any input that cannot be used; a worker was killed.
    """
    from puna.data.extract import check_extract
    from puna.data.ingest_plan import WORK_DIR, make_plan
    from puna.data.ingest_publish import publish
    from puna.data.ingest_unit import load_state, process_unit
    from puna.data.schema import DOCUMENTS_DIR, QUARANTINE_FILE
    from puna.data.stagework import SCRATCH_DIR

    start_s = time.monotonic()
    for source in cfg.sources:
        check_extract(source.extract)
    listings = [(source, list_source(source)) for source in cfg.sources]
    for source, items in listings:
        if not items:
            raise _nothing(source.name, "it has no file", "check its patterns and limits")
    units = make_plan(listings, cfg.shard_bytes, cfg.strict, out)
    remove_tree(out / DOCUMENTS_DIR)  # shards that an earlier attempt had begun to publish
    for folder in (WORK_DIR, DOCUMENTS_DIR):
        (out / folder).mkdir(exist_ok=True)
    states = {unit.index: state for unit in units if (state := load_state(unit)) is not None}
    todo = [unit for unit in units if unit.index not in states]
    n_resumed = len(states)
    if n_resumed:
        say(f"  {n_resumed} of {len(units)} units were read by an earlier attempt")
    total_mb = sum(unit.n_bytes for unit in units) / 1e6
    done_mb = total_mb - sum(unit.n_bytes for unit in todo) / 1e6
    n_docs, new_docs, new_bytes = 0, 0, 0
    with (
        progress("data.ingest", total=total_mb, unit="MB", initial=done_mb) as bar,
        open_engine(cfg, out / SCRATCH_DIR) as engine,
    ):
        for unit, state in zip(todo, engine.map(process_unit, todo), strict=True):
            states[unit.index] = state
            flow = state["flow"]
            new_docs, new_bytes = new_docs + flow["in_docs"], new_bytes + flow["in_bytes"]
            n_docs += flow["kept_docs"]
            events.emit("ingest.unit", unit=unit.index, source=state["source"],
                        docs=flow["kept_docs"], seconds=state["worker_s"])  # fmt: skip
            bar.advance(unit.n_bytes / 1e6, note=f"{format_count(n_docs)} documents")
    ordered = [states[unit.index] for unit in units]
    tallies = publish(units, ordered, out)
    for source in cfg.sources:
        if not tallies[source.name].kept_docs:
            raise _no_document(source.name, tallies[source.name], out / QUARANTINE_FILE)
    remove_tree(out / WORK_DIR)
    seconds = time.monotonic() - start_s
    return {
        "flow": {source.name: tallies[source.name].flow() for source in cfg.sources},
        "seconds": seconds,
        "docs_per_s": new_docs / max(seconds, 1e-9),
        "mb_per_s": new_bytes / 1e6 / max(seconds, 1e-9),
        "read_bytes": sum(state["read_bytes"] for state in ordered),
        "units": len(units),
        "units_resumed": n_resumed,
        "worker_s": _sums(ordered, lambda state: {state["source"]: state["worker_s"]}),
        "encodings": _sums(ordered, lambda state: state["encodings"]),
        "repaired": _sums(ordered, lambda state: {state["source"]: state.get("repaired", 0)}),
    }


def _sums(states: list[dict[str, Any]], pick: Any) -> dict[str, float]:
    total: Counter[str] = Counter()
    for state in states:
        total.update(pick(state))
    return dict(sorted(total.items()))


def _nothing(source: str, why: str, fix: str) -> PunaError:
    return PunaError(f"source {source!r} gives no document: {why}", fix)


def _no_document(source: str, tally: Any, quarantine: Path) -> PunaError:
    from puna.data.ingest_publish import first_quarantined

    if not tally.in_docs:
        return _nothing(source, "its files hold no record", "check that they are the right files")
    reasons = ", ".join(
        f"{entry['docs']:,} {reason}" for reason, entry in sorted(tally.rejected.items())
    )
    first = first_quarantined(quarantine, source)
    return _nothing(
        source,
        f"of {tally.in_docs:,} records, {reasons}" + (f"; the first: {first}" if first else ""),
        "check format, encoding and fields of the source (`text_field`), or remove it",
    )
