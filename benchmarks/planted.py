"""Planted near-duplicates with a ground truth, for measuring deduplication.

Kinds: `edit-N` (N % of the words replaced), `moved` (the blocks of the text in another order),
`boilerplate` (header and footer of a site added), `url` (30 % of the words replaced, under another
spelling of the same URL). The true similarity is the Jaccard index of the two sets of word 5-grams,
computed here in plain Python, independent of the kernels that it judges.
"""

from __future__ import annotations

import random
import re
from typing import Any

import pyarrow as pa

from puna.data.schema import document_id, dump_metadata

EDIT_PERCENTS = (1, 2, 5, 10, 20, 30)
KINDS = (*(f"edit-{percent}" for percent in EDIT_PERCENTS), "moved", "boilerplate", "url")
PLANTED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("original_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("jaccard", pa.float64()),
        pa.field("n_words", pa.int64()),
    ]
)
SHINGLE_WORDS = 5
MIN_WORDS, MAX_BYTES = 100, 100_000

# Thai to Lao, Burmese, Khmer, Kana and Han: every character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0010ffff"
_SPACED = (
    "0-9A-Za-z_\u0080-\u0dff\u0f00-\u0fff\u10a0-\u177f\u1800-\u303f\ua000-\uf8ff\ufb00-\U0001ffff"
)
WORD = re.compile(f"[{_UNSPACED}]|[{_SPACED}]+")
_UPPER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the set of word 5-grams; one shorter shingle for fewer words."""
    words = WORD.findall(text.translate(_UPPER))
    size = min(SHINGLE_WORDS, len(words))
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)} if words else set()


def jaccard(a: str, b: str) -> float:
    """Return the exact Jaccard similarity of two texts."""
    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right) if left or right else 1.0


def edited(text: str, share: float, vocabulary: list[str], rng: random.Random) -> str:
    """Replace a share of the words, at least one."""
    spans = [match.span() for match in WORD.finditer(text)]
    pieces, end = [], 0
    for at in sorted(rng.sample(range(len(spans)), max(1, round(share * len(spans))))):
        pieces += [text[end : spans[at][0]], rng.choice(vocabulary)]
        end = spans[at][1]
    return "".join([*pieces, text[end:]])


def moved(text: str, rng: random.Random) -> str:
    """Bring the blocks of a text (paragraphs, else lines, else sentences) into another order."""
    for separator in ("\n\n", "\n", ". ", " "):
        blocks = text.split(separator)
        if len(blocks) > 3:
            break
    at = sorted(rng.sample(range(1, len(blocks)), 2))
    parts = [blocks[: at[0]], blocks[at[0] : at[1]], blocks[at[1] :]]
    return separator.join(block for part in (parts[1], parts[0], parts[2]) for block in part)


def framed(text: str, vocabulary: list[str], rng: random.Random) -> str:
    """Add a header and a footer of 5 to 40 words each."""
    header, footer = (" ".join(rng.choices(vocabulary, k=rng.randint(5, 40))) for _ in range(2))
    return f"{header}\n\n{text}\n\n{footer}\n"


def other_url(url: str, rng: random.Random) -> str:
    """Spell a URL in another way that names the same page."""
    host, _, path = url.removeprefix("https://").partition("/")
    return rng.choice((
        f"http://{host}/{path}", f"https://{host.upper()}:443/{path}#top",
        f"https://www.{host}/{path}", f"https://{host}/{path}?utm_source=feed&utm_medium=rss",
        f"https://{host}/./{path}",
    ))  # fmt: skip


def copy_of(
    row: dict[str, Any], kind: str, vocabulary: list[str], rng: random.Random
) -> dict[str, Any]:
    """Make the planted document of a kind from a document."""
    text, url = row["text"], row["url"].replace("https://", "https://mirror.example.net/")
    if kind.startswith("edit-"):
        text = edited(text, int(kind.removeprefix("edit-")) / 100, vocabulary, rng)
    elif kind == "moved":
        text = moved(text, rng)
    elif kind == "boilerplate":
        text = framed(text, vocabulary, rng)
    else:
        text, url = edited(text, 0.3, vocabulary, rng), other_url(row["url"], rng)
    path = f"{row['path']}#{kind}"
    metadata = {"licence": row["licence"], "url": url}
    return {"id": document_id("mirror", path), "source": "mirror", "path": path, "text": text,
            "metadata": dump_metadata(metadata), "n_bytes": len(text.encode()), "url": url,
            "licence": row["licence"]}  # fmt: skip


def plant(documents: pa.Table, n_per_kind: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """Make edited copies of documents of 100 words to 100 kB, each of its own original.

    Args:
        documents: Real documents, ordered by id.
        n_per_kind: Copies of each of :data:`KINDS`.
        seed: Of the choice of originals and the edits.

    Returns:
        The copies, with the schema of ``documents``, and the ground truth
        (:data:`PLANTED_SCHEMA`).
    """
    rng = random.Random(seed)
    order = list(range(documents.num_rows))
    rng.shuffle(order)
    originals: list[dict[str, Any]] = []
    for at in order:
        if documents["n_bytes"][at].as_py() > MAX_BYTES:
            continue
        (row,) = documents.slice(at, 1).to_pylist()
        if len(WORD.findall(row["text"])) >= MIN_WORDS:
            originals.append(row)
            if len(originals) == n_per_kind * len(KINDS):
                break
    vocabulary = [word for row in originals[:500] for word in WORD.findall(row["text"])[:200]]
    copies, truth = [], []
    for at, row in enumerate(originals):
        kind = KINDS[at % len(KINDS)]
        copy = copy_of(row, kind, vocabulary, rng)
        copies.append(copy)
        truth.append(
            {"id": copy["id"], "original_id": row["id"], "kind": kind,
             "jaccard": jaccard(row["text"], copy["text"]),
             "n_words": len(WORD.findall(row["text"]))}
        )  # fmt: skip
    return (
        pa.Table.from_pylist(copies, schema=documents.schema),
        pa.Table.from_pylist(truth, schema=PLANTED_SCHEMA),
    )
