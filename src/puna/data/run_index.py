"""What the indexes of all kinds of deduplication share: their record, and finding them.

An index is a folder ``index/`` beside a stage's ``documents/``, with ``rows/`` (Parquet shards) and
``index.json``, which tells with what it was made and comes last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.data.engine.base import ROWS_DIR, Shard
from puna.data.engine.shards import list_shards

INDEX_DIR = "index"
RECORD_FILE = "index.json"


def read_record(
    path: str, stage: str, identity: Mapping[str, Any], remedy: str
) -> tuple[Path, dict[str, Any]]:
    """Find an index and read its record.

    Args:
        path: Folder of the index, or of the stage that wrote it.
        stage: The stage that reads it.
        identity: What the record must have in common with this run.
        remedy: What to do when it has not.

    Raises:
        PunaError: There is none, or it is damaged or of another identity.
    """
    places = (Path(path), Path(path) / INDEX_DIR)
    folder = next((place for place in places if (place / RECORD_FILE).is_file()), None)
    if folder is None:
        raise PunaError(
            f"{stage}: {path} holds no index ({RECORD_FILE} is missing)",
            f"name the {stage} folder of a run that had `write_index = true`",
        )
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        wrong = [key for key, value in identity.items() if record[key] != value]
        _ = record["n_docs"], record["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise PunaError(
            f"{folder / RECORD_FILE}: damaged ({error!r})", "run the stage that wrote it again"
        ) from error
    if wrong:
        raise PunaError(
            f"{folder / RECORD_FILE}: {wrong[0]} is {record[wrong[0]]!r}, "
            f"not {identity[wrong[0]]!r}",
            remedy,
        )
    return folder, record


def rows_of(folder: Path, record: Mapping[str, Any]) -> list[Shard]:
    """Return the shards of an index.

    Raises:
        PunaError: Rows are missing.
    """
    rows = folder / ROWS_DIR
    shards = list_shards(rows)
    n_docs = sum(shard.n_rows for shard in shards)
    if n_docs != record["n_docs"]:
        raise PunaError(f"{rows}: {n_docs} rows, but {record['n_docs']} were written",
                        "run the stage that wrote the index again")  # fmt: skip
    return shards
