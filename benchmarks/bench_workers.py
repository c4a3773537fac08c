"""What a second worker brings a filter stage, beside what a second core brings at all.

    python benchmarks/bench_workers.py [--corpus DOCUMENTS] [--mb 480] [--profile fineweb-pipeline]
                                       [--pairs 5]

Whole processes, started anew: one worker over all shards, two workers, and two processes at once
that know nothing of each other, with one worker and half of the shards each. The last is what the
machine gives two cores of this work (memory, clock rates, other load); the stage can hardly do
better. Each pair runs the three in turn, and medians of the ratios count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from bench_data import MB, read_texts

from puna.core.artifact import Artifact
from puna.core.ledger import Ledger
from puna.data.filter import FilterStageConfig, filter_documents
from puna.data.filters.rules import SourceRules
from puna.data.testing import make_documents

N_SHARDS = 32


def texts_of(corpus: Path | None, n_mb: float) -> list[str]:
    """Texts of Parquet files with a column `text`, or of this Python, up to a size."""
    if corpus is None:
        return [text for texts in read_texts(n_mb / 2).values() for text in texts]
    found: list[str] = []
    size = 0
    for path in sorted(corpus.glob("**/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            for text in batch["text"].to_pylist():
                found.append(text)
                size += len(text.encode())
                if size > n_mb * MB:
                    return found
    return found


def run_stage(folder: Path, profile: str, n_workers: int) -> None:
    """Filter an artifact's documents into a folder that is thrown away."""
    cfg = FilterStageConfig(workers=n_workers, sources={"all": SourceRules(profile=profile)})
    with tempfile.TemporaryDirectory() as out:
        filter_documents(cfg, {"documents": Artifact(folder)}, Path(out), Ledger(None))


def processes_s(*runs: tuple[Path, str, int]) -> float:
    """Seconds that processes take, started together, each to run a stage."""
    start_s = time.perf_counter()
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--run", str(folder), profile, str(n)],
            stdout=subprocess.DEVNULL,
        )
        for folder, profile, n in runs
    ]
    codes = [one.wait() for one in started]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}")
    return time.perf_counter() - start_s


def main() -> None:
    """Print the ratios of each pair and their medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="folder of Parquet files with a column `text`")
    parser.add_argument("--mb", type=float, default=480)
    parser.add_argument("--profile", default="fineweb-pipeline")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        folder, profile, n_workers = options.run
        run_stage(Path(folder), profile, int(n_workers))
        return
    texts = texts_of(options.corpus, options.mb)
    size_mb = sum(len(text.encode()) for text in texts) / MB
    rows = [("all", str(i), text) for i, text in enumerate(texts)]
    by_workers: list[float] = []
    by_processes: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        whole, *halves = (Path(name) / part for part in ("whole", "even", "odd"))
        make_documents(whole, rows, n_shards=N_SHARDS)
        for i, half in enumerate(halves):
            make_documents(half, rows[i::2], n_shards=N_SHARDS // 2)
        print(f"{len(texts):,} documents, {size_mb:.0f} MB, {options.profile}", flush=True)
        processes_s((whole, options.profile, 1))  # compiles
        for number in range(options.pairs):
            one_s = processes_s((whole, options.profile, 1))
            two_s = processes_s((whole, options.profile, 2))
            apart_s = processes_s(*((half, options.profile, 1) for half in halves))
            by_workers.append(one_s / two_s)
            by_processes.append(one_s / apart_s)
            print(
                f"pair {number + 1}: one worker {one_s:.1f} s, two workers {two_s:.1f} s "
                f"({by_workers[-1]:.2f}x), two processes apart {apart_s:.1f} s "
                f"({by_processes[-1]:.2f}x)",
                flush=True,
            )
    print(
        f"median: {statistics.median(by_workers):.2f}x with two workers (wanted >= 1.8x), "
        f"{statistics.median(by_processes):.2f}x with two processes that share nothing"
    )


if __name__ == "__main__":
    main()
