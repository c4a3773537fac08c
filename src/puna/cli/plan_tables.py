"""Tables of ``puna plan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from puna.cli.model_tables import new_console, new_table
from puna.core.units import GIB

if TYPE_CHECKING:
    from puna.plan.estimate import Estimate, Level, Range
    from puna.plan.validate import Dossier, Line


def print_estimate(found: Estimate, levels: Sequence[Level]) -> None:
    """Print one job: speed, time per part, memory per part and stage, waterfall."""
    from puna.plan.flops import CONVENTION, CONVENTIONS

    console = new_console()
    job = found.job
    lay = job.layout
    table = new_table(
        f"{job.n_gpus:,} {job.gpu.name}: dp {job.dp}, tp {lay.tp}, cp {lay.cp}, pp {lay.pp}, "
        f"{job.n_micro} micro-batches of {lay.micro_batch}", "", "estimate", "90 % interval",
    )  # fmt: skip
    table.add_row("step", *_cells(found.step_s, "s"))
    table.add_row("tokens/s", *_cells(found.tokens_per_s, ""))
    for name in CONVENTIONS:
        table.add_row(f"TFLOPS per GPU ({name})", *_cells(found.tflops(name), ""))
    for name in ("model", "causal"):
        percent = type(found.step_s)(*(100 * x for x in found.mfu(name)))
        table.add_row(f"MFU ({name})", *_cells(percent, "%"))
    table.add_row("memory", *_cells(type(found.memory)(*(n / GIB for n in found.memory)), "GiB"))
    console.print(table)
    _print_parts(found, levels)
    room = "fits into" if found.fits else "DOES NOT FIT into"
    capacity = found.workload.hbm_bytes / GIB
    console.print(f"{room} {capacity:g} GiB; the CUDA context and NCCL take 1 to 3 GiB more")
    console.print(f"FLOPs (model): {CONVENTION}")
    for name, text in list(CONVENTIONS.items())[1:]:
        console.print(f"  {name}: {text}")
    if job.gpu.runs:
        console.print(
            f"times multiplied by {found.factor:.3g} after {len(job.gpu.runs)} runs of your own"
        )
        return
    console.print(f"interval of {found.group}; see `puna plan validate` for how it was measured")
    if job.gpu.measured is not None and job.gpu.measured.device == "cpu":
        console.print("no constant was fitted on a CPU: add runs (`puna plan calibrate --run`)")


def _print_parts(found: Estimate, levels: Sequence[Level]) -> None:
    from puna.plan.estimate import PART_NAMES

    console = new_console()
    table = new_table("Time of a step", "", "seconds", "90 % interval", "share")
    for name, part in found.parts.items():
        if part.mid > 0:
            share = f"{part.mid / found.step_s.mid:.1%}"
            table.add_row(PART_NAMES[name], *_cells(part, "s"), share)
    console.print(table)
    names = list(found.stages[0])
    table = new_table("Memory per GPU, GiB", "stage", *names, "sum")
    shown = range(len(found.stages))
    for stage in shown if len(shown) <= 8 else [0, 1, len(shown) - 2, len(shown) - 1]:
        parts = found.stages[stage]
        cells = [f"{parts[name] / GIB:.2f}" for name in names]
        table.add_row(str(stage), *cells, f"{sum(parts.values()) / GIB:.2f}")
    console.print(table)
    table = new_table("From the peak to what is left, TFLOPS per GPU", "after", "left", "lost")
    before = levels[0].tflops
    for level in levels:
        if level is levels[0] or level.tflops < before:
            table.add_row(level.name, f"{level.tflops:,.0f}", f"{before - level.tflops:,.1f}")
        before = level.tflops
    console.print(table)


def _cells(value: Range, unit: str) -> tuple[str, str]:
    unit = f" {unit}" if unit else ""
    return f"{_short(value.mid)}{unit}", f"{_short(value.low)} to {_short(value.high)}{unit}"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def print_dossier(dossier: Dossier) -> None:
    """Print the accuracy dossier."""
    from puna.plan.constants import PRIORS

    console = new_console()
    n_sources = len(dossier.in_sample)
    console.print(
        f"{dossier.n_rows} public rows of {n_sources} sources, {len(PRIORS)} fitted constants, "
        f"on a bound: {', '.join(dossier.at_bounds) or 'none'}"
    )
    console.print(_lines("Step time, errors in %", dossier.protocols))
    console.print(_lines("By source, all rows in the fit", dossier.in_sample))
    console.print(_lines("By source, left out of the fit", dossier.left_out))
    for title, rows, unit in (
        ("Llama 3 Table 4, never fitted", dossier.llama3, "s"),
        ("Peak memory", dossier.memory, "GiB"),
        ("Emissions of Meta's model cards", dossier.cards, "t"),
    ):
        table = new_table(title, "", f"published, {unit}", f"computed, {unit}", "error, %")
        for name, a, b in rows:
            table.add_row(name, f"{a:,.2f}", f"{b:,.2f}", f"{100 * (b / a - 1):+.1f}")
        if rows:
            table.add_section()
            mean = sum(abs(b / a - 1) for _, a, b in rows) / len(rows)
            table.add_row("mean", "", "", f"{100 * mean:.1f}")
        console.print(table)
    table = new_table("Constants", "", "value", "prior", "low", "high")
    for name, prior in PRIORS.items():
        value = getattr(dossier.fit.constants, name)
        cells = (value, prior.start, prior.low, prior.high)
        table.add_row(f"{name}: {prior.meaning}", *(f"{x:.3g}" for x in cells))
    console.print(table)


def _lines(title: str, lines: Sequence[Line]) -> object:
    table = new_table(
        title, "", "rows", "mean", "median", "p90", "bias", "within 5", "within 10", "in 90 %"
    )
    for line in lines:
        numbers = (line.mape, line.median, line.p90)
        table.add_row(
            line.name, str(line.n), *(f"{100 * x:.1f}" for x in numbers), f"{100 * line.bias:+.1f}",
            f"{100 * line.within_5:.0f}", f"{100 * line.within_10:.0f}",
            "" if line.coverage is None else f"{100 * line.coverage:.0f}",
        )  # fmt: skip
    return table
