"""Which documents go into which file, decided before the first file is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.core.errors import PunaError
from puna.data.engine.shards import read_batches
from puna.data.export.corpus import LICENCE, Corpus

SUFFIXES = {
    "parquet": "parquet", "jsonl": "jsonl", "jsonl.gz": "jsonl.gz", "jsonl.zst": "jsonl.zst",
}  # fmt: skip
"""Format -> what its files end with."""
DATA_DIR = "data"
COPY_COLUMN = "copy"
_BATCH_ROWS = 65536


@dataclass(frozen=True)
class ExportFile:
    """A file to write.

    Attributes:
        name: Path below the export's folder.
        split: Its split.
        first: First row of the split that it holds.
        n_rows: Rows in it (copies are not counted).
    """

    name: str
    split: str
    first: int
    n_rows: int


def choose_columns(corpus: Corpus, wanted: Sequence[str], copies: bool) -> list[str]:
    """Return the columns to export, in the order of the documents.

    Args:
        corpus: The corpus.
        wanted: Columns that were asked for; empty for all. ``id`` and ``text`` always come.
        copies: Repeated documents are written several times: ``copy`` stands for ``repeat``.

    Raises:
        PunaError: There is no such column.
    """
    names = [*corpus.schema.names]
    if LICENCE not in names:
        names.insert(names.index("metadata"), LICENCE)
    if copies and "repeat" in names:
        names[names.index("repeat")] = COPY_COLUMN
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise PunaError(
            f"the documents have no column {unknown[0]!r}", f"columns: {', '.join(names)}"
        )
    if not wanted:
        return names
    return [name for name in names if name in {*wanted, "id", "text"}]


def plan_files(
    corpus: Corpus, splits: Sequence[str], file_format: str, shard_bytes: int, copies: bool
) -> list[ExportFile]:
    """Cut every split, in the order of the shards, into files of about ``shard_bytes`` of text.

    Raises:
        PunaError: There is no such split, or no document in any.
    """
    has_repeat = copies and "repeat" in corpus.schema.names
    sizes: dict[str, list[int]] = {}
    columns = ["split", "n_bytes", *(["repeat"] if has_repeat else [])]
    for shard in corpus.shards:
        for batch in read_batches(shard.path, columns, _BATCH_ROWS):
            values = [column.to_pylist() for column in batch.columns]
            times = values[2] if has_repeat else [1] * batch.num_rows
            for split, size, n in zip(values[0], values[1], times, strict=True):
                sizes.setdefault(split, []).append(size * n)
    for split in splits:
        if split not in sizes:
            raise PunaError(
                f"the corpus has no document of the split {split!r}",
                f"splits: {', '.join(sorted(sizes)) or 'none'}",
            )
    files = []
    for split in splits or sorted(sizes, reverse=True):  # train before heldout
        starts, room = [0], shard_bytes
        for index, size in enumerate(sizes[split]):
            if room < size and index > starts[-1]:
                starts.append(index)
                room = shard_bytes
            room -= size
        ends = [*starts[1:], len(sizes[split])]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            name = f"{split}-{number:05d}-of-{len(starts):05d}.{SUFFIXES[file_format]}"
            files.append(ExportFile(f"{DATA_DIR}/{name}", split, start, end - start))
    return files
