"""Reading the documents that ``data.split`` or ``data.compose`` leaves, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from puna.core.errors import PunaError
from puna.core.units import MIB
from puna.data.schema import DOCUMENTS_DIR

_NEEDED = ("id", "source", "path", "text", "split")
_BATCH_BYTES = 8 * MIB
_MAX_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Piece:
    """A row group of a document shard: what one worker takes at a time.

    Attributes:
        path: The Parquet file.
        row_group: Number of the row group in it.
        n_rows: Its documents.
        n_bytes: Size of its texts, not compressed.
        has_repeat: Whether the file says how often each document is read (column ``repeat``).
    """

    path: Path
    row_group: int
    n_rows: int
    n_bytes: int
    has_repeat: bool = False

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches of about 8 MiB of text.

        Raises:
            PunaError: The file is damaged.
        """
        n_rows = max(1, min(_MAX_BATCH_ROWS, self.n_rows * _BATCH_BYTES // max(1, self.n_bytes)))
        try:
            with pq.ParquetFile(self.path) as file:
                yield from file.iter_batches(
                    n_rows, row_groups=[self.row_group], columns=list(columns), use_threads=False
                )
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error


def document_pieces(folder: Path) -> list[Piece]:
    """List the row groups of the documents of a finished stage of the corpus, in order.

    Args:
        folder: The stage's folder.

    Raises:
        PunaError: There are no documents, a shard is damaged, or it has no column ``split``.
    """
    paths = sorted((folder / DOCUMENTS_DIR).glob("*.parquet"))
    if not paths:
        raise PunaError(f"{folder / DOCUMENTS_DIR} holds no Parquet file",
                        "give the output of data.compose or data.split")  # fmt: skip
    pieces: list[Piece] = []
    for path in paths:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        names = metadata.schema.to_arrow_schema().names
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise PunaError(f"{path} has no column {', '.join(missing)}",
                            "give the output of data.compose or data.split")  # fmt: skip
        text = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("text")
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            n_bytes = group.column(text).total_uncompressed_size
            if group.num_rows:
                pieces.append(Piece(path, index, group.num_rows, n_bytes, "repeat" in names))
    return pieces


def _damaged(path: Path, error: Exception) -> PunaError:
    return PunaError(f"{path} is damaged: {str(error).splitlines()[0] if str(error) else error!r}",
                     f"run the stage again: --rebuild {path.parent.parent.name}")  # fmt: skip
