"""Starts the ranks that measure a machine, and makes a hardware file of it; imports no torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from puna.core.errors import PunaError
from puna.core.pool import usable_cores
from puna.core.progress import Bar, progress
from puna.plan.hardware import Family, Gpu, preset_in
from puna.plan.measured import BYTES, COPY_SHARE, Measured, Products, fit_curve, fit_products
from puna.train.parallel.threads import thread_env
from puna.train.worker import PARENT_ENV

RESULT_FILE = "result.json"
_GIVE_UP_S = 120.0
"""Grace over the time that was asked for: starting processes, the last repetition."""
_FAMILIES: dict[int, Family] = {8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}
_CPU_WATTS, _GPU_WATTS = 100.0, 400.0


@dataclass(frozen=True)
class MeasurePlan:
    """What the ranks are told.

    Attributes:
        seconds: For all measurements together.
        device: Where.
        quick: Small sizes only: to see that it works, in a second or two.
    """

    seconds: float
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quick: bool = False


def measure_machine(plan: MeasurePlan, n_ranks: int | None = None, name: str = "own") -> Gpu:
    """Measure this machine and return what a hardware file says of it.

    Args:
        plan: How long, where.
        n_ranks: Processes; default: one per GPU, or two on a CPU with two cores and more.
        name: Of the hardware.

    Raises:
        PunaError: A rank failed, or took much longer than it may.
    """
    n = n_ranks or _default_ranks(plan.device)
    with tempfile.TemporaryDirectory(prefix="puna-measure-") as folder:
        found = _run(plan, n, Path(folder))
    return hardware_of(found, name)


def _default_ranks(device: str) -> int:
    """Return one rank per GPU; without a GPU two, if there are two cores."""
    if device != "cpu":
        import torch  # only asks for GPUs

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return min(2, usable_cores())


def _run(plan: MeasurePlan, n_ranks: int, folder: Path) -> dict[str, Any]:
    ranks = [_start(plan, rank, n_ranks, folder, port) for port in (_free_port(),)
             for rank in range(n_ranks)]  # fmt: skip
    deadline_s = time.monotonic() + plan.seconds + _GIVE_UP_S
    try:
        with progress("measure", total=100, unit="%") as bar:
            _watch(ranks, folder, bar, deadline_s)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))


def _start(
    plan: MeasurePlan, rank: int, n_ranks: int, folder: Path, port: int
) -> subprocess.Popen[bytes]:
    env = os.environ | thread_env(n_ranks) | {PARENT_ENV: str(os.getpid())}
    env |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_RANK": str(rank)}
    env |= {"LOCAL_WORLD_SIZE": str(n_ranks)}
    if n_ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "puna.train.measure.worker", json.dumps(asdict(plan)), folder]
    with (folder / f"log-{rank}.txt").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def _watch(ranks: list[subprocess.Popen[bytes]], folder: Path, bar: Bar, deadline_s: float) -> None:
    """Show how far rank 0 is until all have ended.

    Raises:
        PunaError: One failed or hangs.
    """
    shown, seen = 0.0, folder / "progress.txt"
    stream: IO[str] | None = None
    while any(rank.poll() is None for rank in ranks):
        failed = next((i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)), None)
        if failed is not None:
            break
        if time.monotonic() > deadline_s:
            raise PunaError(
                "the measurements hang", "try `--ranks 1`, and look whether ranks can connect"
            )
        if stream is None and seen.exists():
            stream = seen.open(encoding="utf-8")
        for line in stream or ():
            done, _, note = line.strip().partition(" ")
            bar.advance(float(done) - shown, note)
            shown = float(done)
        time.sleep(0.1)
    if stream is not None:
        stream.close()
    for i, rank in enumerate(ranks):
        if rank.returncode:
            text = (folder / f"log-{i}.txt").read_text(encoding="utf-8", errors="replace")
            last = text.strip().splitlines()[-1:] or ["no message"]
            raise PunaError(
                f"rank {i} of the measurements ended with code {rank.returncode}: {last[0]}",
                "try `--ranks 1`, or `--device cpu`",
            )
    bar.advance(100 - shown, "done")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def hardware_of(found: dict[str, Any], name: str) -> Gpu:
    """Return the hardware that measurements describe.

    Args:
        found: What :mod:`puna.train.measure.worker` wrote.
        name: Of it.
    """
    products: dict[str, Products] = {
        kind: fit_products([(m, n, k) for m, n, k, _ in rows], [s for *_, s in rows], BYTES[kind])
        for kind, rows in found["products"].items()
    }
    best = {
        kind: max(rate for *_, rate in one.points) for kind, one in products.items()
    }  # fmt: skip
    curves = [
        fit_curve(one["op"], one["n_ranks"], *zip(*one["points"], strict=True))
        for one in found["collectives"]
    ]
    is_gpu, n = found["device"] == "cuda", found["n_ranks"]
    known = preset_in(found["name"]) if is_gpu else None
    assumed = ["nic_gb_s", "watts", "usd_per_hour", *([] if curves else ["nvlink_gb_s"])]
    measured = Measured(
        device=found["device"], name=found["name"], n_ranks=n, threads=found["threads"],
        seconds=round(found["seconds"], 2), copy_gb_s=found["copy_bytes_s"] / 1e9,
        copy_scatter=found["copy_scatter"], bf16=products["bf16"], fp32=products.get("fp32"),
        curves=curves, assumed=assumed,
    )  # fmt: skip
    link = measured.link()
    link_gb_s = link.bus_gb_s if link else (known.nvlink_gb_s if known else 32.0)
    own = {
        "name": name, "hbm_tb_s": measured.copy_gb_s / COPY_SHARE / 1000,
        "memory_gib": found["memory_bytes"] / 2**30, "sms": found["sms"],
        "nvlink_gb_s": link_gb_s, "domain": max(n, 1), "fp32_tflops": best.get("fp32", 0.0),
        "measured": measured,
    }  # fmt: skip
    if known is not None:  # peak and price are its data sheet's
        return known.model_copy(update=own)
    return Gpu(
        family=_FAMILIES.get(found["capability"], "other"), bf16_tflops=best["bf16"],
        nic_gb_s=50.0 if is_gpu else 1.25, watts=_GPU_WATTS if is_gpu else _CPU_WATTS / n,
        usd_per_hour=2.0 if is_gpu else 0.05, **own,
    )  # fmt: skip
