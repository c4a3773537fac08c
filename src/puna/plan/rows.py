"""Rows of measured or planned steps: a CSV with one job per line, as workloads.

The columns are those of the bundled public rows. ``value``, ``step_s`` and ``mem_GiB`` (what was
measured) are never read here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from puna.core.errors import PunaError
from puna.plan.hardware import find_gpu
from puna.plan.workload import Workload

NUMBERS = (
    "ngpu", "L", "h", "ffn", "nh", "nkv", "vocab", "swiglu", "seq", "gbs", "mbs", "tp", "pp", "cp",
    "vpp", "fsdp", "sp", "flash", "nic_GBps",
)  # fmt: skip
WORDS = ("gpu", "recompute", "prec")
RECOMPUTE = ("none", "sel", "sac", "full")
PRECISIONS = ("bf16", "fp8", "mxfp8", "nvfp4")

EAGER = ("llmfoundry",)
"""Sources that ran eager PyTorch modules of 2023."""
TUNED = ("mlperf", "bridge", "megatron_h100")
"""Sources that say they overlapped tensor-parallel communication: NVIDIA's own configurations."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a CSV file.

    Returns:
        Its columns and its rows as text.

    Raises:
        PunaError: A needed column is missing, or a line has another number of fields.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        missing = [name for name in (*WORDS, *NUMBERS) if name not in columns]
        if missing:
            raise PunaError(
                f"{path}: missing columns: {', '.join(missing)}",
                "give the columns of docs/howto/plan.md",
            )
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise PunaError(
                    f"{path}, line {reader.line_num}: not {len(columns)} fields",
                    "mend the line; fields with commas need quotes",
                )
            rows.append(row)
    return columns, rows


def workload_of(row: Mapping[str, str]) -> Workload:
    """Return the workload of a row.

    Raises:
        ValueError: A field is missing, is no number, or does not fit the others.
    """
    n = {name: _number(name, row[name]) for name in NUMBERS}
    recompute, precision = row["recompute"].strip(), row["prec"].strip()
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute = {recompute!r} is none of {', '.join(RECOMPUTE)}")
    if precision not in PRECISIONS:
        raise ValueError(f"prec = {precision!r} is none of {', '.join(PRECISIONS)}")
    source = row.get("src", "")
    gpu = find_gpu(_gpu_name(row["gpu"].strip(), source, row.get("ref", "")))
    ranks = n["tp"] * n["pp"] * n["cp"]
    dp = n["ngpu"] / ranks
    if dp != int(dp):
        raise ValueError(f"ngpu = {n['ngpu']:g} is no multiple of tp * pp * cp = {ranks:g}")
    low = {"bf16": gpu.bf16_tflops, "nvfp4": gpu.fp4_tflops}.get(precision, gpu.fp8_tflops)
    if not low:
        raise ValueError(f"gpu {gpu.name} has no {precision}")
    return Workload(
        n_gpus=n["ngpu"], layers=n["L"], dim=n["h"], ffn=n["ffn"], heads=n["nh"],
        kv_dim=n["h"] * n["nkv"] / n["nh"], vocab=n["vocab"], gated=n["swiglu"],
        tied=float(not n["swiglu"]), seq=n["seq"], batch=n["gbs"], micro=n["mbs"], tp=n["tp"],
        pp=n["pp"], cp=n["cp"], dp=dp, shard=dp * n["cp"], chunks=n["vpp"], zero_bubble=0.0,
        fsdp2=float(n["fsdp"] == 2), fsdp3=float(n["fsdp"] == 3), sp=n["sp"],
        full=float(recompute == "full"), selective=float(recompute == "sel"),
        sac=float(recompute == "sac"), flash=n["flash"], fp8=float(precision == "fp8"),
        mxfp8=float(precision == "mxfp8"), nvfp4=float(precision == "nvfp4"),
        eager=float(source.startswith(EAGER)), tuned=float(source.startswith(TUNED)),
        sustained=gpu.sustained, sms=float(gpu.sms), classic=float(not n["flash"]),
        peak=gpu.bf16_tflops * 1e12, peak_low=low * 1e12, hbm=gpu.hbm_tb_s * 1e12,
        hbm_bytes=gpu.memory_gib * 2**30, nvlink=gpu.nvlink_gb_s * 1e9, domain=float(gpu.domain),
        nic=n["nic_GBps"] * 1e9, is_a100=float(gpu.family == "ampere"),
        is_blackwell=float(gpu.family == "blackwell"), is_other=float(gpu.family == "other"),
    )  # fmt: skip


def workloads(rows: Iterable[Mapping[str, str]]) -> list[Workload]:
    """Return the workload of each row; the first line of a file is 1, so rows start at line 2.

    Raises:
        PunaError: A row that cannot be priced, by its line.
    """
    found = []
    for line, row in enumerate(rows, 2):
        try:
            found.append(workload_of(row))
        except PunaError as error:
            raise PunaError(f"line {line}: {error.message}", error.fix) from error
        except ValueError as error:
            raise PunaError(f"line {line}: {error}", "mend the row, or remove it") from error
    return found


def _gpu_name(name: str, source: str, ref: str) -> str:
    """Return the GPU of a row, where the source says more than the column."""
    if name.lower() == "a100" and "A100 40GB" in ref:
        return "a100-40g"
    if name.lower() == "h100" and source.startswith("torchtitan"):
        return "h100-hbm2e"  # 96 GiB of HBM2e and 500 W, as its performance page says
    return name


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} is no number") from None
    flags = ("swiglu", "sp", "flash", "fsdp")
    if not 0 <= value < 1e12 or (value == 0 and name not in flags):
        raise ValueError(f"{name} = {text} is out of range")
    return value
