"""What stages and engines agree on: shards, kernels, reports, the conservation law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from puna.core.errors import PunaError

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import pyarrow as pa

A = TypeVar("A")
B = TypeVar("B")

Flow = dict[str, dict[str, Any]]
"""Source -> in_docs, in_bytes, kept_docs, kept_bytes, rejected: {reason: {docs, bytes}}."""

MANIFEST_FILE = "manifest.json"
ROWS_DIR = "rows"
"""Dataset of a step that annotates; a step that judges has ``documents`` and ``rejected``."""


class ConservationError(PunaError):
    """Rows were lost, doubled or changed between what a step read and what it wrote.

    Args:
        step: Name of the step.
        shard: File name of the shard.
        what: What does not add up, with the numbers.
    """

    def __init__(self, step: str, shard: str, what: str) -> None:
        super().__init__(
            f"{step}, shard {shard}: {what}",
            "nothing was published; if a plugin's kernel takes part in this step, check that it "
            "returns one result per row, else report this as a fault of puna",
        )
        self.step, self.shard, self.what = step, shard, what

    def __reduce__(self) -> tuple[type[ConservationError], tuple[str, str, str]]:  # type: ignore[override]
        """Survive the trip back from a worker process."""
        return (type(self), (self.step, self.shard, self.what))


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a dataset.

    Attributes:
        index: Position in the dataset, from 0.
        path: The file.
        n_rows: Rows in it.
        first_row: Rows in all shards before it; ``first_row + i`` numbers a dataset's rows.
    """

    index: int
    path: Path
    n_rows: int
    first_row: int

    @property
    def name(self) -> str:
        """File name, equal in the input and the output of a step."""
        return self.path.name


class Kernel(Protocol):
    """A function over Arrow batches with one result per row.

    Implementations are frozen dataclasses: they are pickled to worker processes, and their ``repr``
    is part of the identity under which finished shards are reused.
    """

    @property
    def columns(self) -> Sequence[str]:
        """Columns that it reads (the batch may hold more)."""
        ...

    def adds(self) -> pa.Schema:
        """Return the schema of its result."""
        ...

    def prepare(self) -> None:
        """Load models and compile; called once in the parent so that workers find a warm cache."""
        ...

    def __call__(self, batch: pa.RecordBatch, shard: Shard, first_row: int) -> pa.RecordBatch:
        """Return the result of a batch whose first row is row ``first_row`` of the shard."""
        ...


class GroupKernel(Protocol):
    """A function over whole groups of rows (the members of an LSH bucket) with any result length.

    A call receives one or more complete groups, in order. It must not be used on documents: no
    conservation law holds for it.
    """

    def adds(self) -> pa.Schema:
        """Return the schema of its result."""
        ...

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the result of some complete groups."""
        ...


@dataclass(frozen=True)
class ShardReport:
    """What one shard's files hold, read back from the written Parquet files.

    ``ids_*`` are order-free digests of the ids (:func:`puna.data.engine.shards.ids_digest`).
    """

    name: str
    key: str
    rows_in: int
    rows_kept: int
    rows_rejected: int
    ids_in: str
    ids_kept: str
    ids_rejected: str
    flow: Flow = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what marks and manifests hold: everything but the flow, which is recomputed."""
        return {name: value for name, value in asdict(self).items() if name != "flow"}


@dataclass(frozen=True)
class Manifest:
    """The outcome of a step over all shards; published last."""

    step: str
    shards: list[ShardReport]

    @property
    def rows_in(self) -> int:
        """Rows read."""
        return sum(report.rows_in for report in self.shards)

    @property
    def rows_kept(self) -> int:
        """Rows kept."""
        return sum(report.rows_kept for report in self.shards)

    def flow(self) -> Flow:
        """Add up the shards' flows, sources and reasons in alphabetical order."""
        total: Flow = {}
        for report in self.shards:
            for source, part in report.flow.items():
                add_flow(total.setdefault(source, empty_flow()), part)
        for part in total.values():
            part["rejected"] = dict(sorted(part["rejected"].items()))
        return dict(sorted(total.items()))

    def to_json(self) -> dict[str, Any]:
        """Return what ``manifest.json`` holds; equal input gives equal text."""
        return {"step": self.step, "shards": [report.to_json() for report in self.shards]}


def empty_flow() -> dict[str, Any]:
    """Return the flow of a source of which nothing was seen."""
    return {"in_docs": 0, "in_bytes": 0, "kept_docs": 0, "kept_bytes": 0, "rejected": {}}


def add_flow(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Add one flow to another."""
    for key in ("in_docs", "in_bytes", "kept_docs", "kept_bytes"):
        total[key] += part[key]
    for reason, counts in part["rejected"].items():
        sums = total["rejected"].setdefault(reason, {"docs": 0, "bytes": 0})
        sums["docs"] += counts["docs"]
        sums["bytes"] += counts["bytes"]


class Mapper(Protocol):
    """Runs a function over items somewhere: in this process, in workers, on a cluster."""

    def __call__(
        self, function: Callable[[A], B], items: Sequence[A], *, useful_workers: int | None = None
    ) -> Iterator[B]:
        """Yield ``function(item)`` in the order of the items.

        Args:
            function: A module-level function (it travels by name).
            items: Arguments, each pickled.
            useful_workers: How many processes are worth starting on this machine; None means one
                per item.
        """
        ...


class Engine(Protocol):
    """The narrow interface that every engine implements."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def map(self) -> Mapper:
        """Run a function that reads and writes files itself, over items, on the workers."""
        ...

    def annotate(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, carry: Sequence[str] = ()
    ) -> Manifest:
        """Write, for every row, its ``id``, the carried columns and the kernel's result.

        Resumable per shard. Law: the ids written are the ids read.

        Args:
            step: Name for progress and errors.
            documents: Folder of shards.
            out: Step folder; gets ``rows/part-*.parquet`` and, last, ``manifest.json``.
            kernel: Computes the new columns.
            carry: Columns copied from the input, besides ``id``.
        """
        ...

    def judge(
        self, step: str, documents: Path, out: Path, kernel: Kernel, *, side: Path | None = None
    ) -> Manifest:
        """Divide every shard into kept and rejected rows by the kernel's verdicts.

        Resumable per shard. Law: ids kept + ids rejected = ids read.

        Args:
            step: Name for progress and errors; written into the rejected rows.
            documents: Folder of shards.
            out: Step folder; gets ``documents/``, ``rejected/`` and, last, ``manifest.json``.
            kernel: Its result begins with the columns of
                :data:`puna.data.engine.shards.VERDICT_FIELDS`; a row is kept when ``reason`` is
                null. Further columns are appended to the rows; a column ``text`` (large_string)
                replaces the text of kept rows, and ``n_bytes`` follows. Rejected rows keep the
                text that was read.
            side: Folder with one shard per shard of ``documents`` that holds the same ids in the
                same order; its columns are given to the kernel, too.
        """
        ...

    def read(self, folder: Path) -> ir.Table:
        """Return the shards of a folder as a relation."""
        ...

    def put(self, table: pa.Table, folder: Path) -> ir.Table:
        """Write a table made by the driver and return it as a relation."""
        ...

    def count(self, relation: ir.Table) -> int:
        """Return the number of rows."""
        ...

    def collect(self, relation: ir.Table, order_by: Sequence[str]) -> pa.Table:
        """Bring a relation to the driver, in a total order."""
        ...

    def write(
        self, relation: ir.Table, folder: Path, *, order_by: Sequence[str], n_shards: int = 1
    ) -> None:
        """Write a relation as shards, in a total order.

        With ``n_shards`` above 1, and only then, rows go to the shard that their column ``shard``
        names; that column is then the first of the order.
        """
        ...

    def groups(
        self,
        relation: ir.Table,
        folder: Path,
        kernel: GroupKernel,
        *,
        by: str,
        order_by: Sequence[str],
    ) -> ir.Table:
        """Apply a kernel to the groups of equal ``by``, rows ordered inside; return its result."""
        ...
