"""Exporting a corpus: files, checksums, card and picture; complete under its name, or not there.

Everything is written to ``OUT.partial`` and renamed at the end. Each data file appears there whole,
with a mark that holds its checksum, so that a stopped export goes on at the first file without one.
"""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import tomli_w

from puna.core.errors import PunaError
from puna.core.fsio import commit_dir, hash_json, remove_tree, write_json, write_text
from puna.core.progress import progress, say
from puna.core.version import VERSION
from puna.data.export.card import collect_card
from puna.data.export.corpus import Corpus, open_corpus
from puna.data.export.markdown import render
from puna.data.export.picture import picture
from puna.data.export.plan import (
    COPY_COLUMN,
    SUFFIXES,
    ExportFile,
    choose_columns,
    plan_files,
)
from puna.data.export.write import export_schema, sha256, split_rows, with_copies, write_file

MANIFEST, SUMS, CARD, README, PICTURE, RECIPE = (
    "manifest.json", "SHA256SUMS", "card.json", "README.md", "composition.svg", "recipe.toml",
)  # fmt: skip
MANIFEST_KIND = "puna-export"
_STATE, _MARKS = ".export.json", ".done"
_PUBLISHED = frozenset({MANIFEST, SUMS, CARD, README, PICTURE, RECIPE, "data"})


def export_run(
    run_dir: Path,
    out: Path,
    *,
    file_format: str = "parquet",
    shard_bytes: int = 256 << 20,
    columns: Sequence[str] = (),
    splits: Sequence[str] = (),
    copies: bool = False,
    name: str = "",
    force: bool = False,
) -> dict[str, Any]:
    """Write the final corpus of a run as a folder that others can use.

    Args:
        run_dir: Folder of the run.
        out: Folder to make.
        file_format: ``parquet``, ``jsonl``, ``jsonl.gz`` or ``jsonl.zst``.
        shard_bytes: Bytes of text in a file, about.
        columns: Columns besides ``id`` and ``text``; empty for all.
        splits: Splits; empty for all.
        copies: Write repeated documents several times rather than with a column ``repeat``.
        name: Name on the card; by default the run's.
        force: Replace an earlier export in ``out``.

    Returns:
        The manifest.

    Raises:
        PunaError: The run is not finished, the folder is not empty, or the disk is full.
    """
    if file_format not in SUFFIXES:
        raise PunaError(f"no format {file_format!r}", f"formats: {', '.join(SUFFIXES)}")
    if shard_bytes < 1:
        raise PunaError(f"the shard size is {shard_bytes} bytes", "give a size above 0")
    corpus = open_corpus(run_dir, final=True)
    _check_target(out, force)
    copies = copies and "repeat" in corpus.schema.names
    names = choose_columns(corpus, columns, copies)
    files = plan_files(corpus, list(dict.fromkeys(splits)), file_format, shard_bytes, copies)
    identity = hash_json([
        MANIFEST_KIND, corpus.artifact.content_hash, file_format, names, copies,
        [asdict(one) for one in files],
    ])  # fmt: skip
    partial = out.with_name(f"{out.name}.partial")
    try:
        _begin(partial, identity)
        entries = _write_files(corpus, partial, files, names)
        manifest = _describe(corpus, partial, files, entries, names, file_format, name)
        for leftover in (_STATE, _MARKS):
            remove_tree(partial / leftover)
        _publish(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PunaError(
            f"no space is left for {partial}",
            "free some and run the same command again: it continues after the last whole file; "
            f"{out} is as it was",
        ) from error
    return manifest


def _check_target(out: Path, force: bool) -> None:
    """Refuse a folder that holds anything but, with ``force``, an earlier export."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    if not out.is_dir():
        raise PunaError(f"{out} is not a folder", "give a new folder")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not force:
        raise PunaError(f"{out} is not empty", "give a new folder, or --force to replace an export")
    try:
        kind = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    foreign = sorted(names - _PUBLISHED)
    if kind != MANIFEST_KIND or foreign:
        what = f"holds {foreign[0]!r}" if foreign else f"has no {MANIFEST} of an export"
        raise PunaError(
            f"{out} is no export ({what}): --force does not remove what puna has not written",
            "give another folder, or remove it yourself",
        )


def _begin(partial: Path, identity: str) -> None:
    """Make the folder, or go on in the one of a stopped export of the same corpus."""
    state = partial / _STATE
    if partial.exists():
        found = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
        if found is None and any(partial.iterdir()):
            raise PunaError(f"{partial} is in the way and was not made by an export",
                            "move it elsewhere, or give another folder")  # fmt: skip
        if found == identity:
            for left in (partial / "data").glob(".*.tmp"):
                left.unlink()
            return
        remove_tree(partial)
    (partial / "data").mkdir(parents=True)
    (partial / _MARKS).mkdir()
    write_json(state, identity)


def _write_files(
    corpus: Corpus, partial: Path, files: Sequence[ExportFile], columns: list[str]
) -> list[dict[str, Any]]:
    """Write the files that are not there yet; return the entries of all.

    Raises:
        PunaError: A file does not hold the rows that were planned (never seen; a guard).
    """
    schema = export_schema(corpus, columns)
    entries = []
    with progress("data.export", total=sum(one.n_rows for one in files), unit="docs") as bar:
        rows, split = _Rows(iter(())), ""
        for file in files:
            mark = partial / _MARKS / f"{Path(file.name).name}.json"
            entry = _finished(partial, mark)
            if entry is None:
                if split != file.split:
                    rows, split = _Rows(split_rows(corpus, file.split, columns)), file.split
                rows.skip_to(file.first)
                given = rows.take(file.n_rows)
                if COPY_COLUMN in columns:
                    given = map(with_copies, given)
                n_rows, text_bytes = write_file(partial / file.name, file, given, schema)
                if rows.at != file.first + file.n_rows:
                    raise PunaError(
                        f"{file.name}: {rows.at - file.first} documents instead of {file.n_rows}",
                        "the run has changed; export it again",
                    )
                path = partial / file.name
                entry = {
                    "path": file.name, "split": file.split, "docs": file.n_rows, "rows": n_rows,
                    "text_bytes": text_bytes,
                    "bytes": path.stat().st_size, "sha256": sha256(path),
                }  # fmt: skip
                write_json(mark, entry)
            entries.append(entry)
            bar.advance(file.n_rows)
    return entries


def _finished(partial: Path, mark: Path) -> dict[str, Any] | None:
    """Return the entry of a file that an earlier attempt has finished and nobody has touched."""
    if not mark.is_file():
        return None
    entry = json.loads(mark.read_text(encoding="utf-8"))
    path = partial / entry["path"]
    return entry if path.is_file() and sha256(path) == entry["sha256"] else None


class _Rows:
    """Rows of a split, taken piece by piece."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._rest, self.at = batches, None, 0

    def skip_to(self, row: int) -> None:
        """Go forward to a row."""
        for _ in self.take(row - self.at):
            pass

    def take(self, n_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the next rows."""
        while n_rows > 0:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            part = batch.slice(0, n_rows)
            self._rest = batch.slice(n_rows) if batch.num_rows > n_rows else None
            n_rows -= part.num_rows
            self.at += part.num_rows
            if part.num_rows:
                yield part


def _describe(
    corpus: Corpus, partial: Path, files: Sequence[ExportFile], entries: list[dict[str, Any]],
    columns: list[str], file_format: str, name: str,
) -> dict[str, Any]:  # fmt: skip
    """Write card, picture, manifest and checksums; return the manifest."""
    splits: dict[str, dict[str, int]] = {}
    for entry in entries:
        sums = splits.setdefault(
            entry["split"], {"docs": 0, "rows": 0, "text_bytes": 0, "bytes": 0}
        )
        for key in sums:
            sums[key] += entry[key]
    export = {
        "format": file_format, "columns": columns, "splits": splits,
        "docs": sum(one["docs"] for one in splits.values()),
        "rows": sum(one["rows"] for one in splits.values()),
        "bytes": sum(one["bytes"] for one in splits.values()),
    }  # fmt: skip
    card: dict[str, Any] = {
        **collect_card(corpus, name or corpus.run_dir.resolve().name),
        "export": export,
    }
    write_json(partial / CARD, card)
    write_text(partial / RECIPE, tomli_w.dumps(card["rebuild"]["recipe"]))
    write_text(partial / PICTURE, picture(card))
    write_text(partial / README, render(card, files, PICTURE))
    others = [
        {"path": one, "bytes": (partial / one).stat().st_size, "sha256": sha256(partial / one)}
        for one in (CARD, PICTURE, README, RECIPE)
    ]
    manifest = {
        "kind": MANIFEST_KIND, "schema_version": 1, "puna": VERSION,
        "run": corpus.run_dir.resolve().name, "content_hash": corpus.artifact.content_hash,
        **export, "files": entries, "described_by": others,
    }  # fmt: skip
    write_json(partial / MANIFEST, manifest)
    lines = [f"{one['sha256']}  {one['path']}\n" for one in (*entries, *others)]
    lines.append(f"{sha256(partial / MANIFEST)}  {MANIFEST}\n")
    write_text(partial / SUMS, "".join(lines))
    return manifest


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier export goes only after it stands."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
    if out.exists():
        out.rename(old)
    try:
        commit_dir(partial, out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    if old.exists():
        remove_tree(old)
    say(f"  {out}")
