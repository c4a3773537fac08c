"""One recipe on DuckDB and on a Spark cluster of this machine: the same bytes, and what it costs.

    python benchmarks/bench_engines.py --corpus FOLDER [--docs 5000]

FOLDER holds the `jsonl` of `benchmarks/debian_corpus.py`. The cluster has one worker of one core
per core of this machine; DuckDB gets as many worker processes. Spark's times hold the start of a
session and its executors in every stage. Exits with 1 when a file differs.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from spark_cluster import spark_cluster

from puna.cli.common import load_stages
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data.chain import DATA_STAGES
from puna.data.testing import folder_bytes

OWN_TO_A_RUN = {"artifact.json", "config.toml"}  # they tell times, and the engine


def write_sample(corpus: Path, folder: Path, n_docs: int) -> None:
    """Deal the first lines of every file of a corpus to as many files."""
    files = sorted(corpus.glob("*.jsonl.gz"))
    if not files:
        raise SystemExit(f"{corpus} holds no .jsonl.gz; benchmarks/debian_corpus.py makes some")
    folder.mkdir()
    for file in files:
        with gzip.open(file, "rb") as lines, (folder / file.stem).open("wb") as out:
            out.writelines(islice(lines, n_docs // len(files)))


def run(folder: Path, name: str, **top: Any) -> dict[str, float]:
    """Run all data stages; return the seconds of each."""
    source = {"kind": "files", "name": "debian", "paths": [str(folder / "in" / "*.jsonl")]}
    data = {
        "ingest": {"sources": [source], "shard_bytes": 4 << 20},
        "filter": {"default": {"profile": "prose"}}, "safety": {}, "lines": {}, "dedup": {},
        "split": {},
    }  # fmt: skip
    recipe = resolve({"name": name, "runs_dir": str(folder), "data": data, **top})
    seconds = {}
    for stage in (stage for stage in DATA_STAGES if stage.partition(".")[2] in data):
        started_s = time.monotonic()
        run_recipe(recipe, only=stage)
        seconds[stage] = time.monotonic() - started_s
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--docs", type=int, default=5000)
    args = parser.parse_args()
    load_stages()
    n_cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_sample(args.corpus / "jsonl", folder / "in", args.docs)
        local = run(folder, "duckdb", workers=n_cores)
        (folder / "cluster").mkdir()
        with spark_cluster(folder / "cluster", n_workers=n_cores, memory="2g") as url:
            spark = run(folder, "spark", engine=url, spark={"spark.executor.memory": "1500m"})
        table = Table(title=f"{args.docs:,} documents, {n_cores} cores", box=box.SIMPLE_HEAD)
        for column in ("stage", "DuckDB s", "Spark s", "files", "differing"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        n_differing = 0
        for stage in local:
            one, two = (folder_bytes(folder / name / stage) for name in ("duckdb", "spark"))
            names = (one.keys() | two.keys()) - OWN_TO_A_RUN
            differing = [name for name in names if one.get(name) != two.get(name)]
            n_differing += len(differing)
            row = (f"{local[stage]:.1f}", f"{spark[stage]:.1f}", f"{len(names)}")
            table.add_row(stage, *row, f"{len(differing)}")
        Console().print(table)
    return 1 if n_differing else 0


if __name__ == "__main__":
    sys.exit(main())
