"""``puna plan failures``: what failures cost, and what must be better."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.plan.failures import Reliability


@click.command("failures")
@click.option("--gpus", "n_gpus", type=click.IntRange(min=1), default=16_384, show_default=True)
@click.option("--days", type=click.FloatRange(min=0.1, max=3650), default=54.0, show_default=True)
@click.option("--runs", "n_runs", type=click.IntRange(min=20), default=1000, show_default=True)
@click.option(
    "--tier", "tiers", multiple=True,
    help="NAME:SURVIVES:EVERY:STALL:LOAD, seconds, SURVIVES process, node or many; may be given "
    "again. Default: storage:many:480:10:60.",
)  # fmt: skip
@click.option(
    "--detect",
    "detect_s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds until a failure is noticed.",
)
@click.option(
    "--restart",
    "restart_s",
    type=click.FloatRange(min=0),
    default=180.0,
    show_default=True,
    help="Seconds to start again, without loading.",
)
@click.option(
    "--spares",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Nodes that wait to replace a broken one.",
)
@click.option(
    "--repair",
    "repair_h",
    type=click.FloatRange(min=0),
    default=48.0,
    show_default=True,
    help="Hours until a broken node is back.",
)
@click.option(
    "--mtbf-factor",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    help="Hardware this many times as reliable as that of the published counts.",
)
@click.option(
    "--outages",
    "outages_per_year",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Outages of the whole site per year.",
)
@click.option(
    "--goal",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Share of effective training time to reach.",
)
@click.option("--best-interval", is_flag=True, help="Save each tier as often as loses least.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def failures(
    n_gpus: int, days: float, n_runs: int, tiers: tuple[str, ...], goal: float,
    best_interval: bool, seed: int, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Simulate runs with failures at published rates: the effective time, and how to raise it."""
    from puna.plan import failures as f

    if tiers:
        values["tiers"] = tuple(_tier(text) for text in tiers)
    cluster = f.Reliability(**values)
    if best_interval:
        cluster = f.at_best_intervals(n_gpus, cluster)
    result = f.simulate(n_gpus, cluster, days, n_runs, seed)
    best = f.at_best_intervals(n_gpus, cluster)
    answer = {
        "n_gpus": n_gpus, "days": days, "n_runs": n_runs, "cluster": cluster.model_dump(),
        "mtbf_h": f.mtbf_s(n_gpus, cluster) / 3600, "simulated": vars(result),
        "closed_form": f.closed_form(n_gpus, cluster),
        "best_interval_s": {tier.name: tier.every_s for tier in best.tiers},
        "closed_form_at_best_interval": f.closed_form(n_gpus, best),
        "goal": goal, "remedies": [vars(one) for one in f.remedies(n_gpus, cluster, goal)],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_answer(answer, cluster)


def _tier(text: str) -> Any:
    """Read a tier.

    Raises:
        PunaError: Not five fields, or a wrong one.
    """
    from puna.core.errors import PunaError
    from puna.plan.failures import Tier

    fields = dict(zip(("name", "survives", "every_s", "stall_s", "load_s"), text.split(":"),
                      strict=False))  # fmt: skip
    try:
        return Tier.model_validate(fields)
    except ValueError as error:
        raise PunaError(
            f"--tier {text}: cannot be read ({str(error).splitlines()[1].strip()})",
            "write NAME:SURVIVES:EVERY:STALL:LOAD, for example memory:process:60:0.5:5",
        ) from error


def _print_answer(answer: dict[str, Any], cluster: Reliability) -> None:
    from puna.cli.model_tables import new_console, new_table
    from puna.plan.failures import components, tier_of

    console = new_console()
    got = answer["simulated"]
    console.print(
        f"{answer['n_gpus']:,} GPUs, {answer['days']:g} days, {answer['n_runs']:,} runs: "
        f"effective training time {got['p50']:.1%} (5 to 95 % of runs: {got['p5']:.1%} to "
        f"{got['p95']:.1%}), {got['interruptions']:.0f} interruptions, one unexpected per "
        f"{answer['mtbf_h']:.2f} h, {got['waiting_for_spares']:.1%} waiting for spares"
    )
    console.print(
        f"closed form (no waiting for spares): {answer['closed_form']:.1%}; at the best interval "
        + ", ".join(f"{name} {s:.0f} s" for name, s in answer["best_interval_s"].items())
        + f": {answer['closed_form_at_best_interval']:.1%}"
    )
    table = new_table("Failures by component", "", "loses", "hours between", "restored from")
    for one in components():
        hours = one.gpu_hours * cluster.mtbf_factor / answer["n_gpus"]
        table.add_row(one.name, one.scope, f"{hours:,.1f}", tier_of(cluster, one.scope).name)
    console.print(table)
    table = new_table(f"What alone reaches {answer['goal']:.0%}", "", "now", "needed")
    for one in answer["remedies"]:
        needed = "not alone" if one["needed"] is None else f"{one['needed']:,.3g} {one['unit']}"
        table.add_row(one["what"], f"{one['now']:,.3g} {one['unit']}", needed)
    console.print(table)
    console.print("rates: arXiv 2407.21783, counts of 54 days on 16,384 GPUs")
