"""Substring deduplication on the Debian corpus, next to a suffix array over all texts.

    python benchmarks/debian_corpus.py --cache CACHE
    pip install pydivsufsort
    python benchmarks/bench_substrings.py --corpus CACHE/corpus [--docs 50000]

Into the first documents of the corpus are planted: passages of random letters, of 100 to 2000
bytes, some of them just below the threshold (with the digits around them) and just at it, in 2 to
300 documents each, at random places. The stage `data.substrings` runs as a recipe runs it, with one
worker, once as it is by default and once so that every byte can be compared (no document dropped,
cuts at characters). The peer puts all texts into memory, sorts their suffixes (libdivsufsort by
pydivsufsort), computes the common prefixes (Kasai's algorithm) and marks each byte of a window that
an earlier document has. Both run in processes of their own, one after the other, and must leave
exactly the same texts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puna.core.artifact import Artifact, write_record
from puna.core.ledger import Ledger
from puna.data.engine.shards import list_shards, read_batches, write_shard
from puna.data.schema import DOCUMENT_SCHEMA, DOCUMENTS_DIR, shard_name
from puna.data.substrings import SubstringsConfig, cut_substrings

MB = 1e6
SIZE = 200
LENGTHS = (100, 150, 187, 200, 201, 250, 500, 2000)
COPIES = (2, 3, 20, 300)
PER_KIND = 5


def read_corpus(corpus: Path, n_docs: int) -> list[pa.Table]:
    """Read shards until there are enough documents."""
    tables, n = [], 0
    for shard in list_shards(corpus / DOCUMENTS_DIR):
        for batch in read_batches(shard.path, DOCUMENT_SCHEMA.names, 8192):
            if n < n_docs:
                tables.append(pa.Table.from_batches([batch]).slice(0, n_docs - n))
                n += tables[-1].num_rows
    return tables


def plant(tables: list[pa.Table], folder: Path) -> list[dict[str, Any]]:
    """Write the documents with passages planted in them; return the passages."""
    rng = random.Random(5)
    texts = [text for table in tables for text in table["text"].to_pylist()]
    planted = []
    for n_bytes in LENGTHS:
        for copies in COPIES:
            for _ in range(PER_KIND):
                text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=n_bytes - 2))
                planted.append({"text": f"[{text}]", "n_bytes": n_bytes, "copies": copies})
    places: dict[int, list[str]] = {}
    for one in planted:
        for number in rng.sample(range(len(texts)), one["copies"]):
            places.setdefault(number, []).append(one["text"])
    for number, pieces in places.items():
        text, mark, parts, at = texts[number], f"{number:07}", [], 0
        cuts = sorted(rng.randrange(len(text) + 1) for _ in pieces)
        for cut, piece in zip(cuts, pieces, strict=True):
            # digits around each copy: two have at most 6 in common on each side
            parts += [text[at:cut], f"<{mark}{piece}{mark[::-1]}>"]
            at = cut
        texts[number] = "".join([*parts, text[at:]])
    (folder / DOCUMENTS_DIR).mkdir(parents=True)
    first = 0
    for index, table in enumerate(tables):
        part = texts[first : first + table.num_rows]
        first += table.num_rows
        columns = {name: table[name] for name in DOCUMENT_SCHEMA.names}
        columns |= {"text": pa.array(part, pa.large_string()),
                    "n_bytes": pa.array([len(text.encode()) for text in part])}  # fmt: skip
        write_shard(folder / DOCUMENTS_DIR / shard_name(index),
                    pa.table(columns, schema=DOCUMENT_SCHEMA))  # fmt: skip
    write_record(folder, {"stage": "data.quality", "fingerprint": "planted", "config": {},
                          "metrics": {}, "inputs": {}})  # fmt: skip
    return planted


def measured(work: Any) -> dict[str, Any]:
    """Run some work in this process; return wall and CPU seconds and the peak memory."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            **result}  # fmt: skip


def run_stage(corpus: Path, out: Path, *, exact: bool, workers: int = 1) -> dict[str, Any]:
    out.mkdir()
    cfg = SubstringsConfig(min_bytes=SIZE, workers=workers, keep="smallest_id")
    if exact:
        cfg = cfg.model_copy(update={"border": "character", "max_share": 1, "min_left_bytes": 0})
    metrics = cut_substrings(cfg, {"documents": Artifact(corpus)}, out, Ledger(None))
    names = ("in_docs", "in_bytes", "kept_docs", "kept_bytes", "passages")
    return {name: metrics[name] for name in names}


def run_peer(corpus: Path, out: Path) -> dict[str, Any]:
    """Find the same bytes with a suffix array; write id -> number of bytes cut, and the texts."""
    from pydivsufsort import divsufsort, kasai

    rows = []
    for shard in list_shards(corpus / DOCUMENTS_DIR):
        table = pq.read_table(shard.path, columns=["id", "text"])
        rows += zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
    rows.sort()
    raws = [text.encode() for _, text in rows]
    data = np.frombuffer(bytearray(b"\xff".join(raws)), np.uint8)  # no byte of UTF-8
    starts = np.concatenate([[0], np.cumsum([len(raw) + 1 for raw in raws])[:-1]])
    order = divsufsort(data)
    common = kasai(data, order)  # of a suffix and the one behind it
    is_new = np.ones(len(order), bool)
    is_new[1:] = common[: len(order) - 1] < SIZE
    del common
    heads = np.flatnonzero(is_new)
    first = np.minimum.reduceat(order, heads)
    first = np.repeat(first, np.diff(np.append(heads, len(order))))
    differs = first != order
    found, first = order[differs], first[differs]
    del order, is_new
    document = np.searchsorted(starts, found, "right") - 1
    is_before = first < starts[document]
    is_before &= found + SIZE < np.append(starts[1:], len(data) + 1)[document]  # inside of it
    ahead = np.zeros(len(data) + SIZE + 1, np.int32)
    np.add.at(ahead, found[is_before], 1)
    np.add.at(ahead, found[is_before] + SIZE, -1)
    cut = np.cumsum(ahead[: len(data)]) > 0
    texts = []
    for raw, start in zip(raws, starts.tolist(), strict=True):
        here, characters = cut[start : start + len(raw)], np.frombuffer(raw, np.uint8)
        if here.any():  # a character goes only as a whole
            heads = np.flatnonzero((characters & 0xC0) != 0x80)
            whole = np.logical_and.reduceat(here, heads)
            sizes = np.diff(np.append(heads, len(raw)))
            texts.append(characters[~np.repeat(whole, sizes)].tobytes().decode())
        else:
            texts.append(raw.decode())
    ids = pa.array([identifier for identifier, _ in rows])
    pq.write_table(pa.table({"id": ids, "text": pa.array(texts, pa.large_string())}), out)
    return {"cut_bytes": len(data) - len(raws) + 1 - sum(len(text.encode()) for text in texts)}


def in_process(*arguments: str) -> dict[str, Any]:
    """Run one of the parts in a new process."""
    command = [sys.executable, __file__, *arguments]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(ran.stdout.splitlines()[-1])


def judge(planted: list[dict[str, Any]], texts: list[str]) -> None:
    """Count what is left of what was planted."""
    left: Counter[str] = Counter()
    known = {one["text"] for one in planted}
    for text in texts:
        at = text.find("[")
        while at >= 0:
            for n_bytes in LENGTHS:
                piece = text[at : at + n_bytes]
                if piece in known:
                    left[piece] += 1
            at = text.find("[", at + 1)
    long = [one for one in planted if one["n_bytes"] >= SIZE]
    short = [one for one in planted if one["n_bytes"] < SIZE]
    right = sum(left[one["text"]] == 1 for one in long)
    copies = sum(one["copies"] - 1 for one in long)
    gone = sum(one["copies"] - left[one["text"]] for one in long)
    whole = sum(left[one["text"]] for one in short)
    total = sum(one["copies"] for one in short)
    print(f"planted passages of {SIZE} bytes or more: {gone:,} of {copies:,} copies cut, and one "
          f"left of {right} of {len(long)} passages; shorter ones: {whole:,} of {total:,} copies "
          "left whole")  # fmt: skip


def compare(ours: dict[str, str], peers: dict[str, str]) -> None:
    differ = [name for name, text in peers.items() if ours.get(name) != text]
    n_bytes = sum(len(text.encode()) for text in ours.values())
    print(f"texts that differ from the suffix array's: {len(differ)} of {len(peers):,} "
          f"({n_bytes / MB:.1f} MB left by both)")  # fmt: skip
    if differ:
        raise SystemExit(f"first that differs: {differ[0]}")


def show(name: str, result: dict[str, Any], n_bytes: int) -> None:
    rate, memory = n_bytes / MB / result["cpu_s"], result["peak_mb"] * MB / n_bytes
    print(f"{name}: {result['wall_s']:.0f} s wall, {result['cpu_s']:.0f} s CPU ({rate:.1f} MB per "
          f"CPU second), peak memory {result['peak_mb']:,.0f} MB ({memory:.1f} bytes per "
          "byte)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--docs", type=int, default=50_000)
    parser.add_argument("--part", choices=["default", "exact", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "peer":
        print(json.dumps(measured(lambda: run_peer(args.corpus, args.out))))
        return
    if args.part:
        exact = args.part == "exact"
        print(json.dumps(measured(lambda: run_stage(args.corpus, args.out, exact=exact))))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus, tmp = Path(folder) / "planted", Path(folder)
        planted = plant(read_corpus(args.corpus, args.docs), corpus)
        results = {}
        for part in ("default", "exact", "peer"):
            results[part] = in_process("--corpus", str(corpus), "--part", part,
                                       "--out", str(tmp / part))  # fmt: skip
        n_bytes = results["default"]["in_bytes"]
        print(f"\n{results['default']['in_docs']:,} documents, {n_bytes / MB:.0f} MB, "
              f"passages of {SIZE} bytes")  # fmt: skip
        show("data.substrings, default", results["default"], n_bytes)
        show("data.substrings, nothing dropped", results["exact"], n_bytes)
        show("suffix array in memory", results["peer"], n_bytes)
        kept = pq.read_table(tmp / "exact" / DOCUMENTS_DIR, columns=["id", "text"])
        peer = pq.read_table(tmp / "peer")
        left = {one: dict(zip(t["id"].to_pylist(), t["text"].to_pylist(), strict=True))
                for one, t in (("ours", kept), ("peer", peer))}  # fmt: skip
        compare(left["ours"], left["peer"])
        judge(planted, list(left["ours"].values()))
        row = results["default"]
        print(f"default: {row['kept_docs']:,} documents kept, {row['passages']:,} different "
              f"passages found, {1 - row['kept_bytes'] / n_bytes:.1%} of the bytes cut or dropped; "
              f"suffix array: {results['peer']['cut_bytes'] / n_bytes:.1%} cut")  # fmt: skip


if __name__ == "__main__":
    main()
