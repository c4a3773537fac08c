"""Recall, precision and speed of deduplication on the Debian corpus, next to datasketch.

    python benchmarks/debian_corpus.py --cache CACHE
    python benchmarks/bench_dedup.py --corpus CACHE/corpus [--subset 150] [--sample 2000]

First the stage `data.dedup` runs as a recipe runs it (one worker) on the whole corpus, with chains
of near-duplicates cut and not cut. A planted copy counts as found when the stage put it and its
original into one group. The ground truth is the exact Jaccard similarity of word 5-grams in plain
Python (`planted.py`). Precision: the share of documents dropped as near-duplicates that have a true
similarity of at least 0.8 to another document of their group (a sample of them is checked, in plain
Python again); and, stricter, to the very document that was kept.

Then datasketch and the kernels run on one subset: some planted pairs and as many other documents.
datasketch has as many permutations over the same shingles, and either the bands that it chooses for
this threshold itself, or those of the stage.
Speeds are per second of CPU time of one core.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from datasketch import MinHash, MinHashLSH
from planted import KINDS, jaccard, shingles
from rich.console import Console
from rich.table import Table

from puna.core.artifact import Artifact
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate
from puna.data.dedup.kernels import SignatureKernel
from puna.data.engine import Shard
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.components import components, link_buckets
from puna.data.kernels.jaccard import NO_SETS, shingle_sets
from puna.data.kernels.minhash import N_PERMUTATIONS, band_keys, sign

NEAR, LOOSE, N_BANDS = 0.8, 0.5, 32
EDGES = (0.8, 0.85, 0.9, 0.95, 1.01)
MB = 1e6


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at == 0 else "right")
    return table


def share(found: Iterable[bool]) -> str:
    values = list(found)
    if not values:
        return "-"
    return f"{sum(values) / len(values):.4f} ({sum(values):,}/{len(values):,})"


def read_texts(corpus: Path, ids: Iterable[str]) -> dict[str, str]:
    """Read the texts of some documents."""
    documents = pads.dataset(corpus / "documents")
    wanted = pads.field("id").isin(pa.array(sorted(set(ids)), pa.string()))
    table = documents.to_table(columns=["id", "text"], filter=wanted)
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def run_stage(corpus: Path, console: Console, *, chains: bool) -> pa.Table:
    """Run the stage and return ``pairs.parquet``."""
    cpu_s = time.process_time()
    cfg = DedupConfig(workers=1, chains=chains)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        metrics = deduplicate(cfg, {"documents": Artifact(corpus)}, out, Ledger(None))
        pairs = pq.read_table(out / "pairs.parquet")
    cpu_s = time.process_time() - cpu_s
    n_bytes = metrics["in_bytes"]
    console.print(
        f"data.dedup, chains = {chains}, one worker: {metrics['in_docs']:,} documents, "
        f"{n_bytes / MB:.0f} MB, "
        f"{metrics['kept_docs']:,} kept, {metrics['seconds']:.0f} s wall, {cpu_s:.0f} s CPU "
        f"({n_bytes / MB / cpu_s:.1f} MB/s)"
    )
    return pairs


def judge_planted(planted: list[dict[str, Any]], pairs: pa.Table, console: Console) -> None:
    """Print the recall per kind and per band of similarity."""
    kept = dict(zip(pairs["dropped_id"].to_pylist(), pairs["kept_id"].to_pylist(), strict=True))
    for row in planted:
        row["found"] = kept.get(row["id"], row["id"]) == kept.get(
            row["original_id"], row["original_id"]
        )
        row["near"] = row["jaccard"] >= NEAR
    table = table_of("planted copies found, whole corpus", "kind", "similarity >= 0.8",
                     "below 0.8", "median similarity")  # fmt: skip
    for kind in KINDS:
        rows = [row for row in planted if row["kind"] == kind]
        table.add_row(
            kind, share(row["found"] for row in rows if row["near"]),
            share(row["found"] for row in rows if not row["near"]),
            f"{np.median([row['jaccard'] for row in rows]):.3f}",
        )  # fmt: skip
    console.print(table)
    table = table_of("by true similarity (all kinds but url)", "similarity", "found")
    bands = [(0.0, 0.5), (0.5, 0.7), (0.7, 0.75), (0.75, 0.8), *itertools.pairwise(EDGES)]
    texts = [row for row in planted if row["kind"] != "url"]
    for low, high in bands:
        found = share(row["found"] for row in texts if low <= row["jaccard"] < high)
        table.add_row(f"{low:.2f} to {min(high, 1):.2f}", found)
    table.add_row("all >= 0.80", share(row["found"] for row in texts if row["near"]))
    console.print(table)


def judge_precision(corpus: Path, pairs: pa.Table, n_sample: int, console: Console) -> None:
    """Check a sample of what was dropped as a near-duplicate against the texts."""
    groups: dict[str, list[str]] = defaultdict(list)
    for kept, dropped in zip(pairs["kept_id"].to_pylist(), pairs["dropped_id"].to_pylist(),
                             strict=True):  # fmt: skip
        groups[kept].append(dropped)
    near = [row for row in pairs.to_pylist() if row["reason"] == "duplicate.near"]
    rows = random.Random(0).sample(near, min(n_sample, len(near)))
    texts = read_texts(
        corpus, [id for row in rows for id in (row["kept_id"], *groups[row["kept_id"]])]
    )
    to_kept, to_any, errors = [], [], []
    for row in rows:
        text, kept = texts[row["dropped_id"]], texts[row["kept_id"]]
        true = jaccard(text, kept)
        errors.append(abs(true - row["similarity"]))
        to_kept.append(true >= NEAR)
        others = (id for id in groups[row["kept_id"]] if id != row["dropped_id"])
        to_any.append(true >= NEAR or any(jaccard(text, texts[id]) >= NEAR for id in others))
    console.print(
        f"precision, {len(rows):,} of {len(near):,} dropped near-duplicates: similar to a document "
        f"of the group {share(to_any)}; to the kept one {share(to_kept)}; largest error of a "
        f"reported similarity {max(errors):.1e}\n"
    )


def cpu_of(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def ours_on(texts: list[str], *, verify: bool) -> list[tuple[int, int]]:
    """Link texts with the kernels as the stage does."""
    batch = texts_from(texts)
    signatures = sign(batch)
    keys = band_keys(signatures, N_BANDS)
    nodes = np.repeat(np.arange(len(texts)), N_BANDS)
    order = np.lexsort([nodes, keys.ravel()])
    sets = shingle_sets(batch, np.ones(len(texts), bool)) if verify else NO_SETS
    pairs, found = link_buckets(
        keys.ravel()[order], nodes[order], signatures[nodes[order]], n_bands=N_BANDS, near=NEAR,
        loose=LOOSE, sets=sets,
    )  # fmt: skip
    return [tuple(pair) for pair in pairs[found >= NEAR].tolist()]


def datasketch_on(
    texts: list[str], bands: tuple[int, int] | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs that datasketch's LSH names, and those whose estimate is near, too."""
    lsh = MinHashLSH(threshold=NEAR, num_perm=N_PERMUTATIONS, params=bands)
    signatures: list[MinHash] = []
    named: list[Any] = []
    for at, text in enumerate(texts):
        signature = MinHash(num_perm=N_PERMUTATIONS)
        signature.update_batch([" ".join(words).encode() for words in shingles(text)])
        named += [(other, at) for other in lsh.query(signature)]
        lsh.insert(at, signature)
        signatures.append(signature)
    near = [(a, b) for a, b in named if signatures[a].jaccard(signatures[b]) >= NEAR]
    return named, near


def compare(corpus: Path, planted: list[dict[str, Any]], n_per_kind: int, console: Console) -> None:
    """Print recall, precision and speed of both on one subset."""
    chosen = [row for kind in KINDS if kind != "url" for row in
              [row for row in planted if row["kind"] == kind][:n_per_kind]]  # fmt: skip
    ids = [id for row in chosen for id in (row["id"], row["original_id"])]
    every = pads.dataset(corpus / "documents").to_table(columns=["id"])["id"].to_pylist()
    ids += random.Random(1).sample(sorted(set(every) - set(ids)), len(ids))
    texts = read_texts(corpus, ids)
    ids, values = list(texts), list(texts.values())
    n_mb = sum(len(text.encode()) for text in values) / MB
    place = {id: at for at, id in enumerate(ids)}
    truth: dict[tuple[int, int], float] = {}

    def is_near(pair: tuple[int, int]) -> bool:
        if pair not in truth:
            truth[pair] = jaccard(values[pair[0]], values[pair[1]])
        return truth[pair] >= NEAR

    ours_on(values[:10], verify=True)  # compiles
    verified, verified_s = cpu_of(lambda: ours_on(values, verify=True))
    estimated, estimated_s = cpu_of(lambda: ours_on(values, verify=False))
    (named, near), theirs_s = cpu_of(lambda: datasketch_on(values, None))
    own = (N_BANDS, N_PERMUTATIONS // N_BANDS)
    (named_own, near_own), own_s = cpu_of(lambda: datasketch_on(values, own))
    table = table_of(f"subset: {len(ids):,} documents, {n_mb:.1f} MB", "what", "recall >= 0.8",
                     "precision of pairs", "MB/s per core")  # fmt: skip
    for name, pairs, seconds in (
        ("puna, verified", verified, verified_s),
        ("puna, estimates", estimated, estimated_s),
        ("datasketch LSH", named, theirs_s),
        ("datasketch LSH and estimate", near, theirs_s),
        (f"datasketch LSH {own[0]} x {own[1]}", named_own, own_s),
        (f"datasketch LSH {own[0]} x {own[1]} and estimate", near_own, own_s),
    ):
        roots = components(len(ids), np.array(pairs, np.int64).reshape(-1, 2))
        found = (
            roots[place[row["id"]]] == roots[place[row["original_id"]]]
            for row in chosen
            if row["jaccard"] >= NEAR
        )
        precise = share(is_near(pair) for pair in pairs)
        table.add_row(name, share(map(bool, found)), precise, f"{n_mb / seconds:,.2f}")
    console.print(table)


def measure_speed(corpus: Path, console: Console) -> None:
    """Print the speed of the passes over the text, on one shard of the corpus."""
    rows = pq.read_table(corpus / "documents" / "part-00000.parquet").combine_chunks()
    (whole,) = rows.to_batches()
    batches = [whole.slice(at, 1024) for at in range(0, whole.num_rows, 1024)]
    n_mb = sum(rows["n_bytes"].to_pylist()) / MB
    few = rows["text"].slice(0, 1000).to_pylist()
    few_mb = sum(len(text.encode()) for text in few) / MB
    shard, kernel = Shard(0, Path(), whole.num_rows, 0), SignatureKernel(N_BANDS, "url")
    texts = [texts_from(batch.column("text").to_pylist()) for batch in batches]
    kernel.prepare()
    shingle_sets(texts[0], np.ones(len(texts[0]), bool))

    def theirs() -> None:
        for text in few:
            signature = MinHash(num_perm=N_PERMUTATIONS)
            signature.update_batch([" ".join(words).encode() for words in shingles(text)])

    cases = [
        ("signature and bands", lambda: [band_keys(sign(batch), N_BANDS) for batch in texts], n_mb),
        ("all of the first pass", lambda: [kernel(batch, shard, 0) for batch in batches], n_mb),
        ("sets of shingles",
         lambda: [shingle_sets(batch, np.ones(len(batch), bool)) for batch in texts], n_mb),
        ("datasketch signature", theirs, few_mb),
    ]  # fmt: skip
    table = table_of(f"speed, {whole.num_rows:,} documents, {n_mb:.0f} MB", "what", "MB/s per core")
    for name, work, size in cases:
        best = min(cpu_of(work)[1] for _ in range(3))
        table.add_row(name, f"{size / best:,.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="`corpus` of debian_corpus.py")
    parser.add_argument("--subset", type=int, default=150, help="planted pairs per kind")
    parser.add_argument("--sample", type=int, default=2000, help="dropped documents to check")
    arguments = parser.parse_args()
    console = Console()
    console.width = max(console.width, 100)
    corpus = arguments.corpus
    planted = pq.read_table(corpus / "planted.parquet").to_pylist()
    cut = run_stage(corpus, console, chains=False)
    judge_precision(corpus, cut, arguments.sample, console)
    pairs = run_stage(corpus, console, chains=True)
    judge_planted(planted, pairs, console)
    judge_precision(corpus, pairs, arguments.sample, console)
    compare(corpus, planted, arguments.subset, console)
    measure_speed(corpus, console)


if __name__ == "__main__":
    main()
