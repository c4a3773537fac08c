"""``puna plan search``: which layout, how long, how much, and which upgrade pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.plan_estimate import html_option, job_options, shown_name

if TYPE_CHECKING:
    from puna.plan.search import Candidate, Found


@click.command("search")
@job_options
@click.option("--tokens", required=True, help="To train on: 15T, 300B, 2e12.")
@click.option(
    "--also-gpus", type=click.IntRange(min=1), multiple=True,
    help="Another number of GPUs for the Pareto front; may be given again.",
)  # fmt: skip
@click.option(
    "--sharding", type=click.Choice(("zero1", "zero2", "zero3")), multiple=True,
    help="Kinds to try; default: zero2 and zero3, which puna trains.",
)  # fmt: skip
@click.option("--best", "n_best", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--usd-per-gpu-hour", type=click.FloatRange(min=0), help="Your price.")
@click.option("--kg-per-kwh", type=click.FloatRange(min=0), help="CO2 of your grid, kg.")
@click.option("--pue", type=click.FloatRange(min=1), help="Power of the building over machines.")
@html_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--recipe", type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the sections of a recipe that make `puna train` use the best layout.",
)  # fmt: skip
def search(
    tokens: str, also_gpus: tuple[int, ...], sharding: tuple[str, ...], n_best: int,
    usd_per_gpu_hour: float | None, kg_per_kwh: float | None, pue: float | None, as_json: bool,
    recipe: Path | None, html: Path | None, **values: Any,
) -> None:  # fmt: skip
    """Search layouts: days, money, energy, CO2, the bottleneck, and which upgrade pays."""
    from puna.cli.plan_estimate import job_values
    from puna.core.fsio import write_text
    from puna.plan.energy import Site
    from puna.plan.job import Job, Layout
    from puna.plan.search import recipe_section
    from puna.plan.search import search as find

    model, n_tokens = values["model_name"], _count(tokens)
    given = {"usd_per_gpu_hour": usd_per_gpu_hour, "kg_per_kwh": kg_per_kwh, "pue": pue}
    job = Job(layout=Layout(), **job_values(values))
    site = Site(**{k: v for k, v in given.items() if v is not None})
    found = find(job, n_tokens, also_gpus, site, n_best=n_best, sharding=sharding)
    if html is not None:
        from puna.ui.plan_page import Searched, write_page

        best, goodput = found.estimate, found.goodput[job.n_gpus]
        searched = Searched(found, n_tokens, site)
        write_page(html, shown_name(model), best, best.waterfall(goodput), searched)
    if recipe is not None:
        write_text(recipe, recipe_section(found.estimate.job))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    _print_found(found, job)
    for what, path in (("recipe", recipe), ("page", html)):
        if path is not None:
            click.echo(f"{what}: {path}")


def _count(text: str) -> float:
    """Read ``15T``.

    Raises:
        PunaError: It is no positive number.
    """
    from puna.core.errors import PunaError

    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        value = float(text[:-1] if scale else text) * (scale or 1.0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise PunaError(f"--tokens {text}: not a number of tokens", "write 15T, 300B or 2e12")
    return value


def _print_found(found: Found, job: Any) -> None:
    from puna.cli.model_tables import new_console, new_table

    console = new_console()
    n = job.n_gpus
    console.print(
        f"{found.n_layouts:,} layouts of {n:,} {job.gpu.name} can run, {found.n_fitting:,} fit; "
        f"goodput with failures {found.goodput[n]:.1%}"
    )
    console.print(_candidates("Fastest", found.best))
    if len({one.n_gpus for one in found.front}) > 1 or len(found.front) > 1:
        console.print(_candidates("Pareto front: days, money, memory", found.front[:8]))
    low, high = found.estimate.step_s.low, found.estimate.step_s.high
    mid = found.estimate.step_s.mid
    days = found.best[0].days
    console.print(
        f"90 % interval of the best: {days * low / mid:.1f} to {days * high / mid:.1f} days; "
        "prices and premiums are assumptions, give your own"
    )
    table = new_table("Which upgrade pays", "", "days", "USD", "premium", "saves")
    before = found.upgrades[0]
    for one in found.upgrades:
        saved = before.usd - one.usd
        table.add_row(
            one.name, f"{one.days:.1f}", f"{one.usd:,.0f}", f"{one.premium:.0%}",
            "" if one is before else f"{saved:+,.0f} USD",
        )  # fmt: skip
    console.print(table)


def _candidates(title: str, rows: list[Candidate]) -> Any:
    from puna.cli.model_tables import new_table

    table = new_table(
        title, "layout", "step", "days", "kGPU-h", "MUSD", "MWh", "tCO2e", "GiB", "bound by"
    )
    for one in rows:
        lay = one.layout
        name = f"{one.n_gpus}: tp{lay.tp} cp{lay.cp} pp{lay.pp}"
        name += f"x{lay.chunks}" if lay.chunks > 1 else ""
        name += f" mb{lay.micro_batch} {lay.sharding}" + ("" if lay.recompute == "none" else " rc")
        cost = one.bill
        table.add_row(
            name, f"{one.step_s:.3g} s", f"{one.days:.1f}", f"{cost.gpu_hours / 1e3:,.0f}",
            f"{cost.usd / 1e6:,.3g}", f"{cost.kwh / 1e3:,.0f}", f"{cost.tonnes_co2e:,.0f}",
            f"{one.memory_gib:.0f}", one.bottleneck,
        )  # fmt: skip
    return table
