"""The final corpus of a run: which stage left it, and its columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.errors import PunaError
from puna.data.chain import CORPUS_STAGES
from puna.data.engine.base import Shard
from puna.data.engine.shards import list_shards
from puna.data.engine.shardwork import open_schema
from puna.data.flow import DEFAULT_BYTES_PER_TOKEN, finished
from puna.data.stagework import documents_of

LICENCE = "licence"
_LICENCE_NAMES = ("licence", "license")
_UNKNOWN = frozenset(("", "unknown", "none", "null", "n/a", "noassertion", "?"))
"""What sources write when they do not know the licence, in small letters (ours)."""
TOKEN_STAGE = "tokens.count"


@dataclass(frozen=True)
class Corpus:
    """The documents that the last data stage of a run has left.

    Attributes:
        run_dir: The run.
        stages: Its finished data stages in order, ``tokens.count`` before ``data.compose``.
        shards: The documents.
        schema: Their columns.
    """

    run_dir: Path
    stages: Mapping[str, Artifact]
    shards: tuple[Shard, ...]
    schema: pa.Schema

    @property
    def artifact(self) -> Artifact:
        """Artifact of the last stage."""
        return list(self.stages.values())[-1]

    @property
    def is_final(self) -> bool:
        """Whether the run has come to its split."""
        return self.artifact.stage in (*CORPUS_STAGES, TOKEN_STAGE)

    @property
    def is_counted(self) -> bool:
        """Whether each document has its number of tokens."""
        return "n_tokens" in self.schema.names

    @property
    def bytes_per_token(self) -> float:
        """Ratio for estimates: as configured for ``data.split``."""
        split = self.stages.get("data.split")
        found = split.metrics.get("bytes_per_token") if split is not None else None
        return float(found or DEFAULT_BYTES_PER_TOKEN)


def open_corpus(run_dir: Path, *, final: bool) -> Corpus:
    """Open what the last finished data stage of a run has left.

    Args:
        run_dir: Folder of the run.
        final: Refuse a run that has not come to ``data.split``.

    Raises:
        PunaError: There is no such run, or it is not far enough.
    """
    stages = dict(finished(run_dir))
    counted = run_dir / TOKEN_STAGE
    if (counted / ARTIFACT_FILE).is_file():
        composed = stages.pop("data.compose", None)
        stages[TOKEN_STAGE] = Artifact(counted)
        if composed is not None:
            stages["data.compose"] = composed
    shards = tuple(list_shards(documents_of(list(stages.values())[-1])))
    corpus = Corpus(run_dir, stages, shards, open_schema(shards[0].path))
    if final and not corpus.is_final:
        raise PunaError(
            f"{run_dir} has come to {corpus.artifact.stage}, not to data.split",
            "finish the run: `puna run RECIPE`",
        )
    return corpus


def licences(table: pa.Table | pa.RecordBatch) -> list[str | None]:
    """Return the licence of each document: its column or its metadata; None when unknown.

    Args:
        table: Documents; columns metadata, and ``licence`` or ``license`` if there is one.
    """
    names = table.schema.names
    column = next((name for name in _LICENCE_NAMES if name in names), None)
    given = table.column(column).to_pylist() if column else [None] * table.num_rows
    found: list[str | None] = []
    seen: dict[str, str | None] = {}
    for own, metadata in zip(given, table.column("metadata").to_pylist(), strict=True):
        if _is_known(own):
            found.append(str(own))
            continue
        if metadata not in seen:
            if len(seen) > 10_000:
                seen.clear()
            seen[metadata] = _in_metadata(metadata)
        found.append(seen[metadata])
    return found


def licence_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that :func:`licences` reads."""
    return ["metadata", *(name for name in _LICENCE_NAMES if name in schema.names)]


def _in_metadata(metadata: str) -> str | None:
    if not any(name in metadata for name in _LICENCE_NAMES):
        return None
    values = json.loads(metadata)
    value = next((values[name] for name in _LICENCE_NAMES if _is_known(values.get(name))), None)
    if isinstance(value, list):
        value = ", ".join(str(one) for one in value if _is_known(one)) or None
    return None if value is None else str(value)


def _is_known(value: Any) -> bool:
    return value is not None and str(value).strip().lower() not in _UNKNOWN
