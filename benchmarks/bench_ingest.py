"""Speed of the ingest, per kind of source, next to pyarrow and DuckDB on the same JSON Lines.

    python benchmarks/bench_ingest.py [--mb 20]

Every row of the first table is the whole stage `data.ingest` (list, read, decode, extract,
normalise, write Parquet, count again); MB are bytes as stored (read) and bytes of text (out), MB/s
and docs/s are of what was read, after decompression, per second of CPU time of one worker, which
other load on the machine disturbs least. The second table reads one JSON Lines file into texts,
without writing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq
import zstandard

from puna.core.ledger import Ledger
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.readers.compression import decompressed
from puna.data.readers.jsonl import Fields, read_jsonl
from puna.data.readers.records import RawRecord
from puna.data.sources.base import SourceConfig
from puna.data.sources.files import FilesConfig
from puna.data.sources.python_code import PythonCodeConfig
from puna.data.sources.python_docs import PythonDocsConfig
from puna.data.sources.python_reference import PythonReferenceConfig

WORDS = ("data", "the", "of", "model", "größe", "and", "token", "слово", "to", "loss", "层", "in")
N_FILES = 4


def make_texts(n_bytes: int, seed: int = 0) -> list[str]:
    """Texts of 0.2 to 6 kB, one in eight with other scripts than Latin."""
    rng = random.Random(seed)
    texts, size = [], 0
    while size < n_bytes:
        words = rng.choices(WORDS if rng.random() < 0.125 else WORDS[:4], k=rng.randint(40, 1200))
        texts.append(" ".join(words).capitalize() + ".\n")
        size += len(texts[-1].encode())
    return texts


def write_files(folder: Path, mb: int) -> dict[str, SourceConfig]:
    """Write one small corpus per format; return its source."""
    texts = make_texts(mb * 10**6)
    parts = [texts[at::N_FILES] for at in range(N_FILES)]
    lines = [
        "".join(json.dumps({"text": t, "url": f"u{i}"}) + "\n" for i, t in enumerate(part)).encode()
        for part in parts
    ]
    for index, (part, data) in enumerate(zip(parts, lines, strict=True)):
        (folder / f"{index}.jsonl").write_bytes(data)
        (folder / f"{index}.jsonl.gz").write_bytes(gzip.compress(data, 6))
        (folder / f"{index}.jsonl.zst").write_bytes(zstandard.compress(data))
        pq.write_table(pa.table({"text": part}), folder / f"{index}.parquet", compression="zstd")
        for number, text in enumerate(part[: len(part) // 4]):
            sentences = text.replace(". ", ".</p>\n<p>")
            page = f"<html><body><nav><a href='/'>Home</a></nav><p>{sentences}</p></body></html>"
            (folder / f"{index}-{number}.html").write_text(page, encoding="utf-8")
    kinds = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "html")
    return {
        f"files: {kind}": FilesConfig(name="x", paths=(f"{folder}/*.{kind}",)) for kind in kinds
    }


def run_stage(config: SourceConfig) -> dict:
    """Ingest one source into a temporary folder, in this process."""
    with tempfile.TemporaryDirectory() as out:
        cfg = IngestConfig(sources=(config,), workers=1, shard_bytes=8 << 20)  # type: ignore[arg-type]
        return ingest_documents(cfg, {}, Path(out), Ledger(None))


def stage_table(configs: dict[str, SourceConfig]) -> None:
    """Print one row per source."""
    print(
        f"\n{'source':<20}{'docs':>7}{'read MB':>9}{'out MB':>8}{'wall s':>8}{'CPU s':>7}"
        f"{'MB/s':>7}{'docs/s':>8}"
    )
    for name, config in configs.items():
        start_s = time.process_time()
        metrics = run_stage(config)
        cpu_s = time.process_time() - start_s
        (flow,) = metrics["flow"].values()
        mb_per_s = max(flow["in_bytes"], metrics["read_bytes"]) / 1e6 / cpu_s
        print(
            f"{name:<20}{flow['kept_docs']:>7}{metrics['read_bytes'] / 1e6:>9.1f}"
            f"{flow['kept_bytes'] / 1e6:>8.1f}{metrics['seconds']:>8.2f}{cpu_s:>7.2f}"
            f"{mb_per_s:>7.1f}{flow['in_docs'] / cpu_s:>8.0f}"
        )


def read_ours(path: Path) -> int:
    """Read texts with puna's reader, which knows file, line and offset of each record."""
    with path.open("rb") as file:
        records = read_jsonl(decompressed(file), path.name, Fields(), "text/plain")
        return sum(1 for record in records if isinstance(record, RawRecord))


def read_pyarrow(path: Path) -> int:
    """Read texts with pyarrow, one thread, into Python strings."""
    schema = pa.schema([("text", pa.string()), ("url", pa.string())])
    table = pj.read_json(
        path,
        read_options=pj.ReadOptions(use_threads=False, block_size=8 << 20),
        parse_options=pj.ParseOptions(explicit_schema=schema),
    )
    return len(table.column("text").to_pylist())


def read_duckdb(path: Path) -> int:
    """Read texts with DuckDB, one thread, into Python strings."""
    connection = duckdb.connect(config={"threads": 1})
    columns = "{text: 'VARCHAR', url: 'VARCHAR'}"
    query = f"SELECT text FROM read_json(?, format='newline_delimited', columns={columns})"  # noqa: S608
    return len(connection.execute(query, [str(path)]).fetchall())


def reader_table(path: Path) -> None:
    """Print one row per JSON Lines reader, best of five, CPU time."""
    with path.open("rb") as file:
        n_mb = sum(map(len, decompressed(file))) / 1e6
    print(f"\n{'reader of ' + path.suffix:<22}{'docs':>8}{'MB':>9}{'CPU s':>8}{'MB/s':>8}")
    readers: dict[str, Callable[[Path], int]] = {"puna": read_ours, "duckdb": read_duckdb}
    if path.suffix == ".jsonl":
        readers["pyarrow.json"] = read_pyarrow
    for name, read in readers.items():
        best_s, n_docs = float("inf"), 0
        for _ in range(5):
            start_s = time.process_time()
            n_docs = read(path)
            best_s = min(best_s, time.process_time() - start_s)
        print(f"{name:<22}{n_docs:>8}{n_mb:>9.1f}{best_s:>8.2f}{n_mb / best_s:>8.1f}")


def main() -> None:
    """Build the inputs, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=20, help="megabytes per source")
    arguments = parser.parse_args()
    limit = {"max_bytes": arguments.mb * 10**6}
    with tempfile.TemporaryDirectory() as folder:
        configs: dict[str, SourceConfig] = {
            "python-code": PythonCodeConfig(**limit),
            "python-reference": PythonReferenceConfig(**limit),
            "python-docs": PythonDocsConfig(**limit),
            **write_files(Path(folder), arguments.mb),
        }
        stage_table(configs)
        reader_table(Path(folder) / "0.jsonl")
        reader_table(Path(folder) / "0.jsonl.gz")


if __name__ == "__main__":
    main()
