"""Where a document ended: kept, rejected or set aside, by which rule, with which value.

Every document is in exactly one place of a run (each step conserves them): the quarantine, the
rejected rows of one stage, or the documents of the last finished stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.data.chain import CORPUS_STAGES
from puna.data.engine.shards import list_shards, read_columns
from puna.data.engine.shardwork import open_schema
from puna.data.flow import finished
from puna.data.reasons import meaning_of
from puna.data.schema import DOCUMENTS_DIR, QUARANTINE_FILE, REJECTED_DIR, document_id

EXCERPT_CHARS = 400
MAX_MATCHES = 1000
_ID = re.compile(r"[0-9a-f]{6,32}")
_COLUMNS = ("id", "source", "path", "n_bytes", "reason", "value", "threshold", "detail", "split",
            "cluster", "language", "repeat")  # fmt: skip


@dataclass(frozen=True)
class TokenPlace:
    """Where the tokens of a document lie: ``tokens.bin`` of its split and source."""

    path: Path
    first_token: int
    n_tokens: int


@dataclass(frozen=True)
class Fate:
    """Where a document ended.

    Attributes:
        outcome: ``kept`` (in the final corpus), ``rejected``, ``quarantined`` (never became a
            document), or ``waiting`` (kept so far; the next stage has not run).
        stage: The stage that rejected it, or the last one that kept it.
        reason: Code of the rejection.
        meaning: What the code means.
        value: What was measured.
        threshold: What it was compared with.
        detail: Free text; for a duplicate the id of the document that was kept.
        kept_path: For a duplicate, the path of that document.
        repeat: How often a pass over its source reads it.
        excerpt: Beginning of the text; empty for quarantined input.
    """

    outcome: Literal["kept", "rejected", "quarantined", "waiting"]
    stage: str
    id: str
    source: str
    path: str
    n_bytes: int
    reason: str | None = None
    meaning: str = ""
    value: float | None = None
    threshold: float | None = None
    detail: str | None = None
    kept_path: str | None = None
    split: str | None = None
    cluster: str | None = None
    language: str | None = None
    repeat: int | None = None
    tokens: TokenPlace | None = None
    excerpt: str = ""


def why(run_dir: Path, query: str) -> list[Fate]:
    """Find documents and tell where they ended.

    Args:
        run_dir: Folder of the run.
        query: A document id, the beginning of one (at least six digits), or a part of a path.

    Returns:
        The matches in the order of their paths, at most :data:`MAX_MATCHES`. A single match comes
        complete; several come without excerpt, kept path and tokens.

    Raises:
        PunaError: Nothing matches, or the run holds no data.
    """
    artifacts = finished(run_dir)
    found = _search(artifacts, query)
    if not found:
        raise PunaError(
            f"no document of {run_dir} has an id that begins with {query!r} or a path that "
            "contains it",
            "give an id (32 hexadecimal digits), at least its first six, or a part of a path",
        )
    found.sort(key=lambda item: (item[0].path, item[0].id))
    if len(found) > 1:
        return [fate for fate, _ in found[:MAX_MATCHES]]
    return [_complete(run_dir, artifacts, *found[0])]


def _search(artifacts: dict[str, Artifact], query: str) -> list[tuple[Fate, Path | None]]:
    """Look for ids first; for paths if there is none."""
    if _ID.fullmatch(query.lower()):
        by_id = list(_matches(artifacts, "id", query.lower()))
        if by_id:
            return by_id
    return list(_matches(artifacts, "path", query))


def _matches(
    artifacts: dict[str, Artifact], column: str, query: str
) -> Iterator[tuple[Fate, Path | None]]:
    """Yield the matches in all places, each with the shard it is in."""
    last = list(artifacts)[-1]
    function = "starts_with" if column == "id" else "match_substring"
    options = pc.MatchSubstringOptions(query)
    for stage, artifact in artifacts.items():
        places = [REJECTED_DIR] if (artifact.path / REJECTED_DIR).is_dir() else []
        if stage == last:
            places.append(DOCUMENTS_DIR)
        if (artifact.path / QUARANTINE_FILE).is_file():
            for fate in _quarantined(artifact.path / QUARANTINE_FILE, stage, column, query):
                yield fate, None
        for place in places:
            for shard in list_shards(artifact.path / place):
                names = [name for name in _COLUMNS if name in open_schema(shard.path).names]
                table = read_columns(shard.path, names)
                mask = pc.call_function(function, [table[column]], options)
                for row in table.filter(mask).to_pylist():
                    yield _fate(stage, place, row), shard.path


def _fate(stage: str, place: str, row: dict[str, Any]) -> Fate:
    if place == REJECTED_DIR:
        meaning = meaning_of(row["reason"])
        return Fate(outcome="rejected", stage=stage, meaning=meaning, **row)
    outcome = "kept" if stage in CORPUS_STAGES else "waiting"
    return Fate(outcome=outcome, stage=stage, **row)


def _quarantined(path: Path, stage: str, column: str, query: str) -> Iterator[Fate]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                record = entry.get("record")
                where = entry["path"] if record is None else f"{entry['path']}#{record}"
                identifier = document_id(entry["source"], where)
            except (ValueError, KeyError, AttributeError) as error:
                raise PunaError(
                    f"{path}:{number} is damaged: {error!r}",
                    f"make it anew: `puna run RECIPE --rebuild {stage}`",
                ) from error
            if identifier.startswith(query) if column == "id" else query in where:
                yield Fate(
                    outcome="quarantined", stage=stage, id=identifier, source=entry["source"],
                    path=where, n_bytes=int(entry.get("n_bytes") or 0),
                    reason=_full_reason(entry["reason"]), detail=entry.get("error"),
                )  # fmt: skip


def _full_reason(reason: str) -> str:
    """Return the code that the flow counts: owners' refusals are no damage."""
    return reason if reason.startswith("robots.") else f"quarantine.{reason}"


def _complete(
    run_dir: Path, artifacts: dict[str, Artifact], fate: Fate, shard: Path | None
) -> Fate:
    """Add what takes another look at the files: excerpt, kept document, tokens."""
    if shard is not None:
        fate = replace(fate, excerpt=_excerpt(shard, fate.id))
    if fate.reason and fate.reason.startswith("duplicate.") and fate.detail:
        kept = list(_matches(artifacts, "id", fate.detail))
        fate = replace(fate, kept_path=kept[0][0].path if kept else None)
    if fate.outcome == "kept" and fate.split:
        fate = replace(fate, tokens=_tokens(run_dir, fate.split, fate.source, fate.id))
    return fate


def _excerpt(shard: Path, identifier: str) -> str:
    table = read_columns(shard, ["id", "text"])
    row = table["id"].index(pa.scalar(identifier)).as_py()
    text = " ".join(table["text"][row].as_py()[: 4 * EXCERPT_CHARS].split())
    return text if len(text) <= EXCERPT_CHARS else f"{text[:EXCERPT_CHARS]} ..."


def _tokens(run_dir: Path, split: str, source: str, identifier: str) -> TokenPlace | None:
    """Look a document up in the token shards; None when they are not made yet."""
    folder = run_dir / "tokens.encode" / split / source
    if not (folder / "ids.npy").is_file():
        return None
    try:
        ids = np.load(folder / "ids.npy", mmap_mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise PunaError(
            f"the token shard {folder} is damaged: {error}",
            "make it anew: `puna run RECIPE --rebuild tokens.encode`",
        ) from error
    rows = np.flatnonzero(ids == identifier.encode())
    if not len(rows):
        return None
    first, end = int(offsets[rows[0]]), int(offsets[rows[0] + 1])
    return TokenPlace(folder / "tokens.bin", first, end - first)
