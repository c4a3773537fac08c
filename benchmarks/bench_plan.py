"""How long the planner takes: its import, one prediction, a search, a simulation of failures.

    python benchmarks/bench_plan.py [--rounds 10] [--imports N]

An import is a new interpreter's wall time without the interpreter's own start, the least of the
rounds. ``--imports N`` also lists the N slowest modules of it (python -X importtime).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable

MODULES = ("puna.plan", "puna.plan.estimate", "puna.plan.search", "puna.plan.validate")
_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|(\s*)(\S+)")


def run_s(code: str) -> float:
    """Wall seconds of a new interpreter that runs some code."""
    begin_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin_s


def import_s(module: str, rounds: int) -> float:
    """Least seconds that an import adds to the start of an interpreter."""
    bare = min(run_s("pass") for _ in range(rounds))
    return min(run_s(f"import {module}") for _ in range(rounds)) - bare


def slowest(module: str, n: int) -> list[tuple[float, str]]:
    """Seconds of the modules of an import that take longest themselves."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = [(int(m[1]) / 1e6, m[4]) for m in map(_LINE.match, text.splitlines()) if m]
    return sorted(lines, reverse=True)[:n]


def least_s(call: Callable[[], object], rounds: int) -> float:
    """Least seconds of a call."""
    times = []
    for _ in range(rounds):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return min(times)


def work(rounds: int) -> None:
    """Print the times of predictions, searches and simulations."""
    from puna.plan.fabric import Fabric
    from puna.plan.failures import Reliability, simulate
    from puna.plan.hardware import find_gpu
    from puna.plan.job import Job, Layout, find_model, workload_of_job
    from puna.plan.search import search
    from puna.plan.shipped import calibration
    from puna.plan.step import step_time

    job = Job(
        model=find_model("llama3-8b"), gpu=find_gpu("h100"), fabric=Fabric(), n_gpus=512,
        layout=Layout(), seq_len=8192, global_batch=1024,
    )  # fmt: skip
    w, constants = workload_of_job(job), calibration().constants
    one_s = least_s(lambda: step_time(w, constants), 50 * rounds)
    large = job.model_copy(update={
        "model": find_model("llama3.1-405b"), "n_gpus": 24_576, "global_batch": 3072,
    })  # fmt: skip
    print(f"one prediction            {1e6 * one_s:8.1f} us")
    for name, asked in (("512 GPUs", job), ("24,576 GPUs", large)):
        n = search(asked, 1e12).n_layouts
        seconds = least_s(lambda asked=asked: search(asked, 1e12), max(rounds // 3, 2))
        print(f"search, {name:17} {seconds:8.2f} s, {n:,} layouts five times (upgrades)")
    seconds = least_s(lambda: simulate(16_384, Reliability(), 54.0, 1000), 2)
    print(f"54 days of 16,384 GPUs    {seconds:8.2f} s, 1,000 runs")


def main() -> None:
    """Print all times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--imports", type=int, default=0)
    args = parser.parse_args()
    for module in MODULES:
        print(f"import {module:20} {import_s(module, args.rounds):7.3f} s")
    for seconds, name in slowest("puna.plan.search", args.imports) if args.imports else ():
        print(f"    {1000 * seconds:6.1f} ms {name}")
    work(args.rounds)


if __name__ == "__main__":
    main()
