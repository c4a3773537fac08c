"""Stage ``post.pairs``: instruction pairs from documented names (docstrings).

A document tells what it documents in its metadata: ``kind`` is ``"docstring"`` and either ``name``,
``signature`` and ``summary`` stand beside it or ``entries`` is a list of such objects. Each entry
that passes :mod:`puna.post.quality` becomes up to ``pairs_per_entry`` short conversations. The
choice of questions and wordings is a hash of seed and name, so it does not depend on order,
number of files or workers.

Nothing leaks between the splits: a pair belongs to the split of its document, and an entry of a
held-out document is dropped when its name or its summary also stands in a train document.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field

from puna.core.config import Config, Seed
from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.core.ledger import Ledger
from puna.core.progress import progress
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import CORPUS_STAGES
from puna.data.engine.shards import read_batches
from puna.data.schema import DOCUMENTS_DIR
from puna.post.quality import Entry, judge, read_entry

PAIRS_FILE = "pairs.jsonl"
SPLITS = ("train", "heldout")
_BATCH_ROWS = 4096
QuestionKind = Literal["purpose", "call", "name", "dialogue"]

_PURPOSE = (
    "What does `{name}` do?",
    "Explain `{name}` in one sentence.",
    "What is `{name}` for?",
    "Tell me what `{name}` does.",
)
_CALL = (
    "How do I call `{name}`?",
    "What is the signature of `{name}`?",
    "Which arguments does `{name}` take?",
)
_NAME = (
    "Which name in Python is described by: {summary}",
    "What is this the description of? {summary}",
)


class PairsConfig(Config):
    """Instruction pairs from documented names."""

    sources: tuple[str, ...] = Field(default=("reference",), min_length=1)
    """Sources whose documents are looked at."""
    kinds: tuple[QuestionKind, ...] = Field(
        default=("purpose", "call", "name", "dialogue"), min_length=1
    )
    """Kinds of conversation: what a name does, how it is called, which name fits a description, and
    a dialogue of two turns (what it does, then how it is called)."""
    pairs_per_entry: int = Field(default=2, ge=1, le=4)
    """Conversations made of one documented name, each of another kind."""
    min_summary_chars: int = Field(default=20, ge=1)
    """Shorter summaries are dropped (reason ``summary.too_short``)."""
    max_summary_chars: int = Field(default=300, ge=1)
    """Longer summaries are dropped (reason ``summary.too_long``)."""
    max_same_summary: int = Field(default=2, ge=1)
    """Names that may share one summary (reason ``summary.repeated`` beyond)."""
    max_pairs: int = Field(default=20_000, ge=1)
    """Pairs kept in all, chosen by hash (reason ``budget`` beyond)."""
    seed: Seed = 0
    """Chooses questions, wordings and, beyond ``max_pairs``, the pairs."""


@dataclass(frozen=True)
class Documented:
    """An entry with the document it comes from; ``index`` is its place in the document."""

    document_id: str
    source: str
    split: str
    index: int
    entry: Entry


@stage("post.pairs", needs={"documents": "|".join(CORPUS_STAGES)})
def make_pairs(cfg: PairsConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Make instruction pairs from documented names, with reasons for what is left out.

    Only documents that are trained on (or held out) give pairs: those of ``data.compose`` where the
    recipe has it, each once however often it is read.

    Writes ``pairs.jsonl``, ordered by id: ``{id, document_id, source, split, kind, messages}``.

    Raises:
        PunaError: No document of the sources documents a name, or no pair is left for training.
    """
    start_s = time.monotonic()
    entry_reasons: Counter[str] = Counter()
    found = list(_read_entries(inputs["documents"].file(DOCUMENTS_DIR), cfg, entry_reasons))
    n_entries = len(found) + entry_reasons.total()
    if n_entries == 0:
        raise PunaError(
            f"no document of {', '.join(cfg.sources)} has metadata of kind 'docstring'",
            "name a source of docstrings in [post.pairs] `sources`, or leave out [post.pairs]",
        )
    entries = _without_repeats_and_leaks(found, cfg.max_same_summary, entry_reasons)
    pair_reasons: Counter[str] = Counter()
    candidates = [pair for item in entries for pair in _conversations(item, cfg)]
    pairs = _choose(candidates, cfg, pair_reasons)
    by_split = Counter(pair["split"] for pair in pairs)
    if not by_split["train"]:
        raise PunaError(
            f"none of {n_entries} documented names gives a pair for training: "
            f"{dict(entry_reasons + pair_reasons)}",
            "loosen the limits of [post.pairs], or add sources with docstrings",
        )
    with atomic_path(out / PAIRS_FILE) as path, path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    seconds = time.monotonic() - start_s
    return {
        "seconds": seconds,
        "pairs_per_s": len(pairs) / max(seconds, 1e-9),
        "entries": {
            "in": n_entries, "kept": len(entries), "rejected": dict(sorted(entry_reasons.items())),
        },
        "pairs": {
            "in": len(candidates), "kept": len(pairs),
            "rejected": dict(sorted(pair_reasons.items())),
        },
        "by_split": {split: by_split[split] for split in SPLITS},
        "by_kind": dict(sorted(Counter(pair["kind"] for pair in pairs).items())),
        "example": pairs[0],
        "headline": f"{len(pairs):,} pairs from {len(entries):,} documented names",
    }  # fmt: skip


def read_pairs(path: Path, split: str) -> list[dict[str, Any]]:
    """Read the pairs of one split from ``pairs.jsonl``.

    Raises:
        PunaError: A line is not a JSON object with ``split`` and ``messages``.
    """
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                pair = json.loads(line)
                if pair["split"] == split and pair["messages"]:
                    pairs.append(pair)
            except (ValueError, KeyError, TypeError) as error:
                raise PunaError(f"{path}:{number} is not an instruction pair: {error!r}",
                                "run post.pairs again") from error  # fmt: skip
    return pairs


def _read_entries(folder: Path, cfg: PairsConfig, reasons: Counter[str]) -> Iterator[Documented]:
    shards = sorted(folder.glob("*.parquet"))
    columns = ["id", "source", "split", "metadata"]
    with progress("post.pairs", unit="documents") as bar:
        for shard in shards:
            for batch in read_batches(shard, columns, _BATCH_ROWS):
                rows = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
                for document_id, source, split, metadata in rows:
                    if source not in cfg.sources:
                        continue
                    for index, raw in enumerate(_raw_entries(metadata)):
                        entry = read_entry(raw)
                        reason = (
                            judge(entry, cfg.min_summary_chars, cfg.max_summary_chars)
                            if entry is not None
                            else "entry.malformed"
                        )
                        if entry is None or reason is not None:
                            reasons[reason or "entry.malformed"] += 1
                        else:
                            yield Documented(document_id, source, split, index, entry)
                bar.advance(batch.num_rows)


def _raw_entries(metadata: str) -> list[Any]:
    fields = json.loads(metadata)
    if not isinstance(fields, dict) or fields.get("kind") != "docstring":
        return []
    entries = fields.get("entries", [fields])
    return entries if isinstance(entries, list) else [entries]


def _without_repeats_and_leaks(
    found: list[Documented], max_same_summary: int, reasons: Counter[str]
) -> list[Documented]:
    train = [item for item in found if item.split == "train"]
    names = {item.entry.name for item in train}
    summaries = {_fold(item.entry.summary) for item in train}
    seen_names: set[str] = set()
    seen_summaries: Counter[str] = Counter()
    kept = []
    for item in sorted(
        found, key=lambda item: (item.split != "train", item.document_id, item.index)
    ):
        name, summary = item.entry.name, _fold(item.entry.summary)
        if item.split != "train" and (name in names or summary in summaries):
            reasons["split.leak"] += 1
        elif name in seen_names:
            reasons["name.repeated"] += 1
        elif seen_summaries[summary] >= max_same_summary:
            reasons["summary.repeated"] += 1
        else:
            seen_names.add(name)
            seen_summaries[summary] += 1
            kept.append(item)
    return kept


def _conversations(item: Documented, cfg: PairsConfig) -> Iterator[dict[str, Any]]:
    entry = item.entry
    possible = [kind for kind in cfg.kinds if entry.signature or kind in ("purpose", "name")]
    possible.sort(key=lambda kind: _hash(cfg.seed, "kind", entry.name, kind))
    for kind in possible[: cfg.pairs_per_entry]:
        turns = _turns(entry, kind, cfg.seed)
        messages = [
            {"role": role, "content": text}
            for question, answer in turns
            for role, text in (("user", question), ("assistant", answer))
        ]
        yield {
            "id": f"{_hash(0, item.document_id, turns[0][0], kind):032x}",
            "document_id": item.document_id,
            "source": item.source,
            "split": item.split,
            "kind": kind,
            "messages": messages,
        }


def _turns(entry: Entry, kind: str, seed: int) -> list[tuple[str, str]]:
    def wording(options: tuple[str, ...]) -> str:
        pick = options[_hash(seed, "wording", kind, options[0], entry.name) % len(options)]
        return pick.format(name=entry.name, summary=entry.summary)

    if kind == "name":
        return [(wording(_NAME), f"`{entry.name}`")]
    purpose = (wording(_PURPOSE), _sentence(entry.summary))
    if kind == "purpose":
        return [purpose]
    call = f"`{_call(entry)}`"
    return (
        [purpose, ("How do I call it?", call)] if kind == "dialogue" else [(wording(_CALL), call)]
    )


def _choose(
    candidates: list[dict[str, Any]], cfg: PairsConfig, reasons: Counter[str]
) -> list[dict[str, Any]]:
    kept, questions = [], set()
    for pair in candidates:
        asked = tuple(turn["content"] for turn in pair["messages"] if turn["role"] == "user")
        if asked in questions:
            reasons["question.duplicate"] += 1
        else:
            questions.add(asked)
            kept.append(pair)
    kept.sort(key=lambda pair: (_hash(cfg.seed, "budget", pair["id"]), pair["id"]))
    if len(kept) > cfg.max_pairs:
        reasons["budget"] += len(kept) - cfg.max_pairs
    return sorted(kept[: cfg.max_pairs], key=lambda pair: pair["id"])


def _call(entry: Entry) -> str:
    signature, short = entry.signature, entry.name.rpartition(".")[2]
    if signature.startswith("("):
        return entry.name + signature
    if signature.startswith(f"{short}("):
        return entry.name + signature[len(short) :]
    return signature


def _sentence(summary: str) -> str:
    return summary if summary.endswith((".", "!", "?")) else summary + "."


def _fold(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())


def _hash(seed: int, *parts: str) -> int:
    return xxhash.xxh3_128_intdigest("\0".join((str(seed), *parts)).encode())
