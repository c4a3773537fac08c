"""Labelled texts for training and evaluation: from files, folders, and the documents of a run.

A place is a path of files in any format that ``data.ingest`` reads, or the folder of a finished
stage (``runs/web/data.filter``); ``@`` chooses sources of it, ``runs/web/data.filter@news,blogs``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.errors import PunaError
from puna.data.engine.shards import list_shards, read_batches
from puna.data.extract import extract
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.minhash import normalised
from puna.data.quality.raters import agreement, merge_ratings
from puna.data.readers.records import BadRecord, UnusableError
from puna.data.sources import list_source, open_source
from puna.data.sources.files import FilesConfig
from puna.data.stagework import documents_of

POSITIVE, NEGATIVE = "positive", "negative"

Rated = Literal["", "score", "label"]

_BATCH_ROWS = 2048


@dataclass(frozen=True)
class Fields:
    """Which fields of JSON Lines and Parquet records are read.

    Attributes:
        text: The text.
        score: The teacher's score.
        id: The document's id, for scores without a text.
        source: The document's source; without it the folder or file names the source.
        label: The label, of labelled records.
        weight: How much a labelled or scored record counts; 1 without it.
    """

    text: str = "text"
    score: str = "score"
    id: str = "id"
    source: str = "source"
    label: str = "label"
    weight: str = "weight"


@dataclass(frozen=True)
class Example:
    """A text with what is known about it.

    Attributes:
        id: Where it comes from.
        source: Its source, for tables per source.
        text: The text.
        label: Its label, or the empty string.
        score: The teacher's score, or NaN.
        weight: How much it counts in training, beside the others.
        shares: A teacher's share of each label, in the order of its labels; empty without one.
    """

    id: str
    source: str
    text: str
    label: str = ""
    score: float = float("nan")
    weight: float = 1.0
    shares: tuple[float, ...] = ()


@dataclass
class Examples:
    """Distinct labelled texts, in an order that depends on the texts alone.

    Attributes:
        items: The examples.
        keys: Hash of each normalised text (white space and case ignored), uint64 [n].
        counts: Texts read, ``empty``, ``duplicates`` and ``conflicts`` (the same text under
            several labels, or with scores that differ: none of them is used).
        agreement: How well several raters of a text agree; empty unless they were merged.
    """

    items: list[Example]
    keys: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a digest of the texts, labels, scores and sources."""
        digest = xxhash.xxh3_128()
        for item, key in zip(self.items, self.keys, strict=True):
            head = f"{key:016x}\0{item.label}\0{item.score!r}\0{item.source}\0"
            if item.weight != 1 or item.shares:
                head += f"{item.weight!r}\0{item.shares!r}\0"
            digest.update(head.encode())
            digest.update(item.text.encode())
        return digest.hexdigest()


def read_place(
    place: str, fields: Fields, *, label: str = "", rated: Rated = ""
) -> Iterator[Example]:
    """Read the texts of a place.

    Args:
        place: Files, or the folder of a finished stage.
        fields: Names of the fields.
        label: Label of all texts.
        rated: Field that every record must have, beside its text: ``score`` or ``label``.

    Raises:
        PunaError: Nothing is there, a record is damaged (named with file and record), or a score
            or label is missing or cannot be one.
    """
    path, sources = _parse(place)
    if (Path(path) / ARTIFACT_FILE).is_file():
        yield from _read_stage(Path(path), sources, label)
    elif sources:
        raise PunaError(f"{place}: only the folder of a finished stage has sources to choose from",
                        "leave out what follows the `@`")  # fmt: skip
    else:
        yield from _read_files(path, fields, label, rated)


def _parse(place: str) -> tuple[str, list[str]]:
    path, at, names = place.rpartition("@")
    if not at or os.path.exists(place):
        return place, []
    return path, [name for name in names.split(",") if name]


def _read_stage(folder: Path, sources: list[str], label: str) -> Iterator[Example]:
    seen: set[str] = set()
    for shard in list_shards(documents_of(Artifact(folder))):
        for batch in read_batches(shard.path, ["id", "source", "text"], _BATCH_ROWS):
            for row in batch.to_pylist():
                seen.add(row["source"])
                if not sources or row["source"] in sources:
                    yield Example(row["id"], row["source"], row["text"], label)
    unknown = sorted(set(sources) - seen)
    if unknown:
        raise PunaError(f"{folder} has no document of the source {unknown[0]!r}",
                        f"its sources: {', '.join(sorted(seen))}")  # fmt: skip


def _read_files(path: str, fields: Fields, label: str, rated: Rated) -> Iterator[Example]:
    metadata = (fields.source,)
    if rated:
        metadata += (fields.score if rated == "score" else fields.label, fields.weight)
    config = FilesConfig(
        name="examples", paths=(path,), text_field=fields.text, metadata_fields=metadata
    )
    reader = open_source(config)
    base = Path(path.rstrip("/")).name
    for item in list_source(config):
        for record in reader.read(item):
            if isinstance(record, BadRecord):
                number = "" if record.record is None else f", record {record.record}"
                raise PunaError(f"{item.location}{number}: {record.reason}: {record.error}",
                                "repair it or leave it out")  # fmt: skip
            where = f"{path}: {record.path}"
            try:
                text, _ = extract(record.content, record.media_type, record.encoding)
            except UnusableError as error:
                raise PunaError(f"{where}: {error}", "repair it or leave it out") from error
            source = record.metadata.get(fields.source)
            if not isinstance(source, str) or not source:
                source = _source_of(item.path, base, is_record=record.record is not None)
            score, weight = float("nan"), 1.0
            if rated == "score":
                score = _score(record.metadata, fields.score, where)
            elif rated == "label":
                label = _label(record.metadata, fields.label, where)
            if rated and record.metadata.get(fields.weight) is not None:
                weight = _weight(record.metadata, fields.weight, where)
            yield Example(record.path, source, text, label, score, weight)


def _source_of(path: str, base: str, *, is_record: bool) -> str:
    """Name a source after the first folder, or the file of records, or the place itself."""
    folder, _, name = path.rpartition("/")
    if folder:
        return folder.partition("/")[0]
    return name.partition(".")[0] or name if is_record else base


def _score(metadata: dict[str, object], name: str, where: str) -> float:
    value = metadata.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        shown = "missing" if name not in metadata else repr(value)
        raise PunaError(
            f"{where}: field {name!r} (score) is {shown}, not a number",
            "give every record a score, or name the field with --score-field",
        )
    return float(value)


def _label(metadata: dict[str, object], name: str, where: str) -> str:
    value = metadata.get(name)
    text = "" if isinstance(value, bool | float) or value is None else str(value)
    if not re.fullmatch(r"[^\s=]+", text):
        shown = "missing" if name not in metadata else repr(value)
        raise PunaError(
            f"{where}: field {name!r} (label) is {shown}, not a word or a whole number",
            "give every record a label without spaces, or name the field with --label-field",
        )
    return text


def _weight(metadata: dict[str, object], name: str, where: str) -> float:
    value = metadata[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise PunaError(f"{where}: field {name!r} (weight) is {value!r}, not a number above 0",
                        "correct it, or name another field with --weight-field")  # fmt: skip
    return float(value)


def join_scores(scores: str, documents: Sequence[str], fields: Fields) -> Iterator[Example]:
    """Give documents the scores that another file names by their id.

    Raises:
        PunaError: A score's id is not among the documents.
    """
    by_id_fields = Fields(fields.id, fields.score, fields.id, fields.source)
    wanted = {
        item.text.strip(): item.score for item in read_place(scores, by_id_fields, rated="score")
    }
    for place in documents:
        for item in read_place(place, fields):
            if item.id in wanted:
                yield Example(item.id, item.source, item.text, "", wanted.pop(item.id))
    if wanted:
        raise PunaError(
            f"{scores}: {len(wanted)} of its ids are not among the documents, such as "
            f"{next(iter(wanted))!r}",
            "score the documents that --documents names",
        )


def gather(
    *,
    positive: Sequence[str] = (),
    negative: Sequence[str] = (),
    labels: Sequence[str] = (),
    labelled: Sequence[str] = (),
    scores: Sequence[str] = (),
    documents: Sequence[str] = (),
    fields: Fields | None = None,
) -> list[Example]:
    """Read all labelled or scored texts that a command names.

    Args:
        positive: Places of good texts.
        negative: Places of bad texts.
        labels: ``name=place`` of a classifier of several labels.
        labelled: Places of records that hold their label.
        scores: Places of texts with scores, or of ids with scores.
        documents: Where the texts of ``scores`` are, if those are ids.
        fields: Names of the fields.

    Raises:
        PunaError: Several kinds of examples, none, or a place that cannot be read.
    """
    fields = fields or Fields()
    given = [bool(positive or negative), bool(labels), bool(labelled), bool(scores)]
    if sum(given) != 1:
        raise PunaError(
            "no examples are given" if not any(given) else "several kinds of examples are given",
            "give --positive and --negative, or --label NAME=PLACE, or --labelled, or --scores",
        )
    named = [(POSITIVE, place) for place in positive]
    named += [(NEGATIVE, place) for place in negative]
    for text in labels:
        name, equals, place = text.partition("=")
        if not equals or not re.fullmatch(r"[^\s=]+", name):
            raise PunaError(f"--label {text!r} is not of the form NAME=PLACE",
                            "write for example --label science=texts/science.jsonl")  # fmt: skip
        named.append((name, place))
    items = [item for name, place in named for item in read_place(place, fields, label=name)]
    for place in labelled:
        items += read_place(place, fields, rated="label")
    for place in scores:
        if documents:
            items += join_scores(place, documents, fields)
        else:
            items += read_place(place, fields, rated="score")
    return items


def distinct(
    items: Sequence[Example], *, last: Sequence[str] = (), several_raters: bool = False
) -> Examples:
    """Drop empty texts, copies, and texts with contradicting labels; order by the texts' hashes.

    Args:
        items: What was read.
        last: Sources whose copies of other sources' texts go (those held out as unseen).
        several_raters: The records of one text are ratings, to be merged; only labels that tie are
            contradictions.
    """
    filled = [item for item in items if item.text and not item.text.isspace()]
    keys: list[int] = []
    for start in range(0, len(filled), _BATCH_ROWS):
        part = normalised(texts_from([item.text for item in filled[start : start + _BATCH_ROWS]]))
        keys += [xxhash.xxh3_64_intdigest(part.bytes_of(index)) for index in range(len(part))]
    late = set(last)
    order = sorted(
        range(len(filled)),
        key=lambda k: (keys[k], filled[k].source in late, filled[k].source, filled[k].id),
    )
    groups: dict[int, list[Example]] = {}
    for k in order:
        groups.setdefault(keys[k], []).append(filled[k])
    kept, n_conflicts = [], 0
    for key, group in groups.items():
        merged: Example | None = group[0]
        if several_raters:
            merged = merge_ratings(group)
        elif len({(item.label, repr(item.score)) for item in group}) > 1:
            merged = None
        if merged is None:
            n_conflicts += len(group)
        else:
            kept.append((key, merged))
    counts = {"read": len(items), "empty": len(items) - len(filled), "conflicts": n_conflicts,
              "duplicates": len(filled) - n_conflicts - len(kept), "used": len(kept)}  # fmt: skip
    kept_keys = np.array([key for key, _ in kept], np.uint64)
    agreed = agreement(list(groups.values())) if several_raters else {}
    return Examples([item for _, item in kept], kept_keys, counts, agreed)
