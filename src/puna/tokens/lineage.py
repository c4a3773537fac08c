"""From a training step back to the documents behind its batch.

The trainer leaves ``loader.json`` in its stage folder: the factory of its batches, the arguments,
and the number of steps. Because a batch is a pure function of the step, that is all it takes.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.tokens.documents import document_pieces
from puna.tokens.loader import BatchSource, is_batch_factory
from puna.tokens.shards import is_remote

LOADER_FILE = "loader.json"
SPLIT_STAGE = "data.split"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class DocumentRecord:
    """Where a document comes from.

    Attributes:
        source: Its source.
        path: Path or URL in the source.
        text: Its text; None when it was not asked for.
    """

    source: str
    path: str
    text: str | None


def open_source(spec: Mapping[str, Any], near: Path | None = None) -> BatchSource:
    """Open the batches that a specification describes.

    Args:
        spec: ``{"factory": "module:function", "kwargs": {...}}`` (see
            :meth:`puna.tokens.loader.PackedLoader.spec`).
        near: A run's folder: a ``folder`` argument that is gone is looked for in it, so that a run
            can be moved or copied.

    Raises:
        PunaError: The specification is damaged, or the data is gone or has changed.
    """
    module, _, name = str(spec.get("factory", "")).partition(":")
    kwargs = dict(spec.get("kwargs") or {})
    try:
        factory = getattr(importlib.import_module(module), name)
        if not is_batch_factory(factory):
            raise TypeError("it is not marked as a @batch_factory")
        inspect.signature(factory).bind(**kwargs)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise PunaError(f"cannot open the batches of {spec.get('factory')!r}: {error}",
                        "use the version of puna (and the plugins) that the run was made with",
                        ) from error  # fmt: skip
    folder = kwargs.get("folder")
    is_path = isinstance(folder, str) and not is_remote(folder)
    if near is not None and is_path and not Path(folder).exists():
        kwargs["folder"] = str(_relocate(Path(folder), near))
    return factory(**kwargs)


def _relocate(folder: Path, run_dir: Path) -> Path:
    """Find in ``run_dir`` what stood under another run folder (or under ``STAGE.partial``)."""
    parts = [part.removesuffix(_PARTIAL) for part in folder.parts]
    tails = (run_dir.joinpath(*parts[i:]) for i in range(len(parts) - 1, 0, -1))
    found = next((tail for tail in tails if tail.exists()), None)
    if found is None:
        raise PunaError(f"{folder} is gone, and {run_dir} does not hold it either",
                        "bring the folder back, or run the stage again")  # fmt: skip
    return found


def read_spec(run_dir: Path, stage: str) -> dict[str, Any]:
    """Read the ``loader.json`` of a finished or unfinished training stage.

    Args:
        run_dir: Folder of the run.
        stage: Name of the stage.

    Raises:
        PunaError: There is none, or it is damaged.
    """
    if not run_dir.is_dir():
        raise PunaError(f"{run_dir} is not the folder of a run", "give a folder such as runs/demo")
    for folder in (run_dir / stage, run_dir / f"{stage}{_PARTIAL}"):
        path = folder / LOADER_FILE
        if path.is_file():
            try:
                spec = json.loads(path.read_text(encoding="utf-8"))
                return dict(spec)
            except (ValueError, TypeError) as error:
                raise PunaError(f"{path} is damaged: {error}",
                                f"run the stage {stage} again")  from error  # fmt: skip
    held = sorted(path.parent.name.removesuffix(_PARTIAL) for path in run_dir.glob("*/loader.json"))
    raise PunaError(f"{run_dir} has no {stage}/{LOADER_FILE}: that stage has not begun to train",
                    f"choose a stage with batches: {', '.join(held) or 'none yet'}")  # fmt: skip


def step_lineage(run_dir: Path, step: int, stage: str = "train.pretrain") -> list[dict[str, Any]]:
    """Return the documents behind the batch of a step.

    Args:
        run_dir: Folder of the run.
        step: Step number, from 0.
        stage: The training stage.

    Returns:
        Per row of the global batch ``{"row", "segments": [{"document_id", "source", "tokens":
        [start, end), ...}]}``.

    Raises:
        PunaError: The stage has no batches, has no such step, or its data is gone or has changed.
    """
    spec = read_spec(run_dir, stage)
    steps = spec.get("steps")
    if step < 0 or (isinstance(steps, int) and step >= steps):
        last = f"0 to {steps - 1}" if isinstance(steps, int) else "0 or more"
        raise PunaError(f"{stage} of {run_dir} has no step {step}", f"give a step from {last}")
    return open_source(spec, run_dir).lineage(step)


def find_documents(
    run_dir: Path, document_ids: Iterable[str], *, with_text: bool = False
) -> dict[str, DocumentRecord]:
    """Look documents up in what ``data.split`` left.

    Args:
        run_dir: Folder of the run.
        document_ids: Ids to look for.
        with_text: Read the texts, too.

    Returns:
        Id -> record, for those that are there (none when the run has no ``data.split``).
    """
    folder = run_dir / SPLIT_STAGE
    if not folder.is_dir():
        return {}
    import pyarrow as pa

    wanted = set(document_ids)
    found: dict[str, DocumentRecord] = {}
    columns = ("id", "source", "path", *(["text"] if with_text else []))
    for piece in document_pieces(folder):
        for batch in piece.batches(columns):
            ids = batch.column("id").to_pylist()
            hits = [index for index, document_id in enumerate(ids) if document_id in wanted]
            for row in batch.take(pa.array(hits, pa.int64())).to_pylist():
                found[row["id"]] = DocumentRecord(row["source"], row["path"], row.get("text"))
        if len(found) == len(wanted):
            break
    return found
