"""``puna plan calibrate``: from measured rows constants, from machines a hardware file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from puna.plan.hardware import Gpu

_NOISY = 0.2
"""Scatter of repetitions from which on something else was running."""


@click.command("calibrate")
@click.argument("rows", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False),
    help="File to write: constants for --constants, or with --measure or --run a hardware file "
    "(.toml or .json) for --gpu.",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure this machine; needs torch.")
@click.option("--minutes", type=click.FloatRange(0.01, 60), default=5.0, show_default=True,
              help="For --measure, beside starting its processes.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(1, 1024),
              help="Processes of --measure.  [default: one per GPU; two on a CPU]")  # fmt: skip
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
              show_default=True, help="Of --measure.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Small sizes only: to see that --measure works.")
@click.option(
    "--run", "runs", multiple=True, type=click.Path(path_type=Path, file_okay=False),
    help="Folder of a training of yours on this hardware; may be given again.",
)  # fmt: skip
@click.option("--stage", default="train.pretrain", show_default=True, help="Training of --run.")
@click.option("--hardware", "--gpu", "hardware",
              help="Preset or hardware file that --run is added to.")  # fmt: skip
def calibrate(
    rows: Path | None, out: Path, measure: bool, minutes: float, ranks: int | None, device: str,
    quick: bool, runs: tuple[Path, ...], stage: str, hardware: str | None,
) -> None:  # fmt: skip
    """Adapt the planner to your rows, your machine or your trainings.

    Without --measure and --run: fit the constants to the bundled public rows, and to ROWS, a CSV
    file with their columns, step_s measured by you; name your cluster in src. At least three rows
    of one kind of job are worth it; one is not.

    --measure runs matrix products, copies and collectives here and writes a hardware file. --run
    adds what a finished training took, by which predictions with this file are corrected.
    """
    if measure or runs:
        _hardware(rows, out, measure, minutes, ranks, device, quick, runs, stage, hardware)
        return
    from puna.plan.shipped import join, measured, published, refit, write_calibration

    data = published() if rows is None else join(published(), measured(rows))
    fit, widths = refit(data)
    write_calibration(out, fit, widths)
    bounds = ", ".join(fit.constants.at_bounds()) or "none"
    click.echo(f"{fit.n_rows} rows, constants on a bound: {bounds}; written: {out}")


def _hardware(
    rows: Path | None, out: Path, measure: bool, minutes: float, ranks: int | None, device: str,
    quick: bool, runs: tuple[Path, ...], stage: str, hardware: str | None,
) -> None:  # fmt: skip
    """Write a hardware file.

    Raises:
        PunaError: Options that exclude each other, or a run that cannot be read.
    """
    from puna.core.errors import PunaError
    from puna.plan.hardware import find_gpu, write_gpu
    from puna.plan.runs import read_run

    if rows is not None:
        raise PunaError(
            f"{rows} is for constants, --measure and --run are for a hardware file",
            "give one of them, and the other in a second call",
        )
    if measure == bool(hardware):
        raise PunaError(
            "--measure makes a hardware file, --hardware names one" if measure
            else "--run is added to a hardware file",
            "give either --measure or --hardware FILE",
        )  # fmt: skip
    if out.suffix not in (".toml", ".json"):
        raise PunaError(f"--out {out}: a hardware file is TOML or JSON", "end it with .toml")
    if measure:
        from puna.train.measure.run import MeasurePlan, measure_machine

        plan = MeasurePlan(60 * minutes, device, quick)  # pyrefly: ignore[bad-argument-type]
        gpu = measure_machine(plan, ranks, out.stem)
        _print(gpu)
    else:
        gpu = find_gpu(str(hardware))
    added = [read_run(folder, gpu, stage) for folder in runs]
    kept = [run for run in gpu.runs if run.name not in {one.name for one in added}]
    gpu = gpu.model_copy(update={"runs": [*kept, *added], "name": out.stem})
    write_gpu(out, gpu)
    for run in added:
        click.echo(f"{run.name}: {run.step_s:.4g} s per step, scatter {run.scatter:.1%}")
    if gpu.runs:
        click.echo(f"{_correction(gpu)}")
    click.echo(f"hardware file: {out}; use it with --gpu {out}")


def _correction(gpu: Gpu) -> str:
    """Say what the runs of a hardware file do to a prediction."""
    from puna.plan.fabric import Fabric
    from puna.plan.job import Job
    from puna.plan.runs import own_factor
    from puna.plan.shipped import calibration

    first = Job.model_validate({**gpu.runs[0].job, "gpu": gpu, "fabric": Fabric()})
    factor, half = own_factor(first, calibration())
    return (
        f"{len(gpu.runs)} run{'s' if len(gpu.runs) > 1 else ''}: predicted times are multiplied by "
        f"{factor:.3g}, 90 % interval {half:.0%} to both sides"
    )


def _print(gpu: Gpu) -> None:
    """Print what was measured."""
    from puna.cli.model_tables import new_console, new_table

    measured = gpu.measured
    assert measured is not None
    console = new_console()
    table = new_table(
        f"{measured.n_ranks} ranks of {measured.threads} threads on {measured.name}",
        "", "measured", "scatter",
    )  # fmt: skip
    for kind, products in (("bf16", measured.bf16), ("fp32", measured.fp32)):
        if products is not None:
            best = max(rate for *_, rate in products.points)
            table.add_row(f"{kind} products, best", f"{best:.4g} TFLOPS", "")
            table.add_row(
                f"{kind} products, fitted", f"{products.tflops:.4g} TFLOPS",
                f"{products.scatter:.0%}",
            )  # fmt: skip
    table.add_row("copy", f"{measured.copy_gb_s:.4g} GB/s", f"{measured.copy_scatter:.0%}")
    for curve in measured.curves:
        table.add_row(
            f"{curve.op} of {curve.n_ranks}",
            f"{1e6 * curve.latency_s:.3g} us + {curve.bus_gb_s:.4g} GB/s", f"{curve.scatter:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"not measured, assumed: {', '.join(measured.assumed)}")
    if measured.copy_scatter > _NOISY:
        console.print("the same copy took very different times: measure again on an idle machine")
