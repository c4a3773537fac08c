"""Stage ``post.annotated``: conversations that people wrote, as an annotation desk exports them.

They take the place of the pairs made from documents, or of none: ``post.sft`` trains on them, and
each still tells who wrote and who reviewed it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, hash_file
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.post.pairs import PAIRS_FILE, SPLITS

_FIELDS = ("id", "document_id", "source", "split", "kind")


class AnnotatedConfig(Config):
    """Conversations exported by `puna annotate export` (format `sft`, JSONL)."""

    files: tuple[str, ...] = Field(min_length=1)
    """The exported files."""


def _state_of_files(cfg: AnnotatedConfig) -> dict[str, str]:
    """Hashes of the files: a change is reported on a rerun."""
    return {name: hash_file(Path(name)) for name in cfg.files if Path(name).is_file()}


@stage("post.annotated", external_state=_state_of_files)
def take_annotated(
    cfg: AnnotatedConfig, inputs: Artifacts, out: Path, events: Ledger
) -> Metrics:  # fmt: skip
    """Take the conversations of an annotation desk, with who wrote and reviewed each.

    Writes ``pairs.jsonl`` as ``post.pairs`` does, ordered by id, with ``provenance``.

    Raises:
        PunaError: A file is missing, a line is no exported conversation, or none is for training.
    """
    start_s = time.monotonic()
    reasons: Counter[str] = Counter()
    pairs: dict[str, dict[str, Any]] = {}
    for pair in _read(cfg.files):
        if pair["id"] in pairs:
            reasons["id.repeated"] += 1
        else:
            pairs[pair["id"]] = pair
    by_split = Counter(pair["split"] for pair in pairs.values())
    if not by_split["train"]:
        raise PunaError(
            f"none of {len(pairs)} conversations of {', '.join(cfg.files)} is for training",
            "export a version with items of the split train",
        )
    ordered = [pairs[key] for key in sorted(pairs)]
    with atomic_path(out / PAIRS_FILE) as path, path.open("w", encoding="utf-8") as file:
        for pair in ordered:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    seconds = time.monotonic() - start_s
    counts = {"in": len(pairs) + reasons.total(), "kept": len(pairs), "rejected": dict(reasons)}
    told = [pair.get("provenance") or {} for pair in ordered]
    people = {one["author"] for one in told if one.get("author")}
    return {
        "seconds": seconds,
        "pairs_per_s": len(pairs) / max(seconds, 1e-9),
        "entries": {"in": len(pairs), "kept": len(pairs), "rejected": {}},
        "pairs": counts,
        "by_split": {split: by_split[split] for split in SPLITS},
        "by_kind": dict(sorted(Counter(pair["kind"] for pair in ordered).items())),
        "authors": len(people),
        "by_rounds": dict(sorted(Counter(str(one.get("rounds", "?")) for one in told).items())),
        "example": ordered[0],
        "headline": f"{len(pairs):,} conversations of {len(people)} people",
    }  # fmt: skip


def _read(files: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name in files:
        try:
            with Path(name).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    yield _checked(line, f"{name}:{number}")
        except (OSError, UnicodeDecodeError) as error:
            raise PunaError(
                f"[post.annotated] {name}: {error}", "name a file of `puna annotate export`"
            ) from error


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        pair = json.loads(line)
        wrong = [key for key in _FIELDS if not isinstance(pair[key], str)]
        last = pair["messages"][-1]["role"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PunaError(
            f"{where} is no exported conversation: {error!r}",
            "export with `puna annotate export DESK VERSION FILE.jsonl`",
        ) from error
    if wrong or last != "assistant" or pair["split"] not in SPLITS:
        raise PunaError(
            f"{where}: {wrong or pair['split'] if last == 'assistant' else last!r} is not as it "
            f"should be: texts, a split of {', '.join(SPLITS)}, the assistant speaks last",
            "export the version again",
        )
    return pair
