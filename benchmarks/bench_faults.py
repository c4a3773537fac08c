"""Faulty input: what puna's ingest and datatrove's readers make of the same files.

    python benchmarks/bench_faults.py

Every file set holds documents whose number and texts are known, and one kind of fault. A document
is *out* when its text came out exactly; *reported* when a count, an error or a log line of the
reader accounts for what did not come out (puna: the quarantine; datatrove: an exception, or a
warning about the record or file); *lost* when neither. Files that could not be read to their end
and said so count as reported whole, since their reader cannot know what was behind the damage.
Changed: documents that came out with another text than went in. Each reader reads each set with its
default settings.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.sources.files import FilesConfig

N_DOCS = 200
TEXTS = [f"Document {i} über {'words ' * (i % 7 + 3)}".strip() for i in range(N_DOCS)]


def lines(ids: Callable[[int], Any] = str) -> list[bytes]:
    """One JSON line per document."""
    return [
        json.dumps({"text": text, "id": ids(i)}, ensure_ascii=False).encode()
        for i, text in enumerate(TEXTS)
    ]


def write_sets(root: Path) -> dict[str, tuple[str, int]]:
    """Write one folder per fault; return kind of file and number of documents in it."""
    data = b"\n".join(lines()) + b"\n"
    half = len(data) // 2
    cut = data.index(b"\n", half) + 1
    bad_line, surrogate, nul, latin = lines(), lines(), lines(), lines()
    bad_line[50] = b'{"text": "cut off'
    surrogate[50] = b'{"text": "half an emoji \\ud83d here", "id": "50"}'
    nul[50] = nul[50] + b"\0"
    latin[50] = json.dumps({"text": TEXTS[50], "id": "50"}, ensure_ascii=False).encode("latin-1")
    gzipped, framed = (
        gzip.compress(data),
        zstandard.compress(data[:cut]) + zstandard.compress(data[cut:]),
    )
    table = pa.table({"text": TEXTS, "id": list(map(str, range(N_DOCS)))})
    pq.write_table(table, root / "t.parquet", row_group_size=50)
    parquet = bytearray((root / "t.parquet").read_bytes())
    (root / "t.parquet").unlink()
    parquet[len(parquet) // 3] ^= 0xFF
    mixed = b"\n".join([*lines()[:100], *lines(int)[100:]]) + b"\n"
    twice = b"\n".join(lines(lambda i: str(i % 100))) + b"\n"
    files = {
        "sound": ("a.jsonl", data),
        "zst of two frames": ("a.jsonl.zst", framed),
        "gzip of two members": (
            "a.jsonl.gz",
            gzip.compress(data[:cut]) + gzip.compress(data[cut:]),
        ),
        "truncated gzip": ("a.jsonl.gz", gzipped[: len(gzipped) * 2 // 3]),
        "truncated zst": ("a.jsonl.zst", zstandard.compress(data)[:-40]),
        "one broken line": ("a.jsonl", b"\n".join(bad_line)),
        "lone surrogate": ("a.jsonl", b"\n".join(surrogate)),
        "NUL byte after a line": ("a.jsonl", b"\n".join(nul)),
        "one line of Latin-1": ("a.jsonl", b"\n".join(latin)),
        "ids of two types": ("a.jsonl", mixed),
        "equal ids": ("a.jsonl", twice),
        "flipped byte in Parquet": ("a.parquet", bytes(parquet)),
        "truncated Parquet": ("a.parquet", bytes(parquet[:-20])),
    }
    for name, (file, content) in files.items():
        (root / name).mkdir()
        (root / name / file).write_bytes(content)
    return {name: (file, N_DOCS) for name, (file, _) in files.items()}


def read_puna(folder: Path, file: str) -> tuple[list[str], int, bool]:
    """Ingest; return texts, records reported, whether a file was reported as cut."""
    with tempfile.TemporaryDirectory() as out:
        source = FilesConfig(name="x", paths=(str(folder),), id_field="id")
        cfg = IngestConfig(sources=(source,), workers=1)  # type: ignore[arg-type]
        try:
            metrics = ingest_documents(cfg, {}, Path(out), Ledger(None))
        except PunaError:
            return [], 0, True
        texts = [
            text
            for shard in sorted((Path(out) / "documents").iterdir())
            for text in pq.read_table(shard, columns=["text"])["text"].to_pylist()
        ]
        rejected = metrics["flow"]["x"]["rejected"]
        is_cut = any("corrupt-gzip" in reason or "corrupt-zstd" in reason for reason in rejected)
        return texts, sum(entry["docs"] for entry in rejected.values()), is_cut


def read_datatrove(folder: Path, file: str) -> tuple[list[str], int, bool]:
    """Read with datatrove; the same."""
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from loguru import logger

    logger.remove()
    messages: list[str] = []
    handle = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    reader = (ParquetReader if file.endswith(".parquet") else JsonlReader)(str(folder))
    texts: list[str] = []
    is_cut = False
    try:
        for document in reader.run():
            texts.append(document.text)  # noqa: PERF401 - what came before an error counts
    except Exception:  # noqa: BLE001 - any exception is a report
        is_cut = True
    logger.remove(handle)
    is_cut |= any("may be corrupted" in message for message in messages)
    return texts, len(messages), is_cut


def main() -> None:
    """Write the sets, read them with both, print one row per set."""
    readers = {"puna": read_puna, "datatrove": read_datatrove}
    print(
        f"{'':<26}{'in':>5}" + "".join(f"{name:>11}: out reported changed lost" for name in readers)
    )
    with tempfile.TemporaryDirectory() as folder:
        lost_in_all = dict.fromkeys(readers, 0)
        for name, (file, n_in) in write_sets(Path(folder)).items():
            row = f"{name:<26}{n_in:>5}"
            for reader, read in readers.items():
                texts, n_reported, is_cut = read(Path(folder) / name, file)
                left = list(TEXTS)
                n_out = sum(text in left and not left.remove(text) for text in texts)
                n_changed = len(texts) - n_out
                lost = 0 if is_cut else max(0, n_in - len(texts) - n_reported)
                lost_in_all[reader] += lost
                shown = "cut" if is_cut else str(n_reported)
                row += f"{n_out:>16}{shown:>9}{n_changed:>8}{lost:>5}"
            print(row, flush=True)
        print(f"{'lost silently':<31}" + "".join(f"{n:>38}" for n in lost_in_all.values()))


if __name__ == "__main__":
    main()
