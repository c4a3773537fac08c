"""``puna resilience``: faults and what is done about them, checks, tests of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.model_tables import new_console, new_text_table

if TYPE_CHECKING:
    from puna.resilience.sdc.coverage import Coverage


@click.group("resilience", no_args_is_help=True)
def resilience() -> None:
    """Faults: what is done about them, what is found of them, whether this machine is sound."""


@resilience.command("sdc-coverage")
@click.option(
    "--trials", type=click.IntRange(min=1), default=40, show_default=True,
    help="Flipped bits per site.",
)  # fmt: skip
@click.option(
    "--ranks", "n_ranks", type=click.IntRange(2, 3), default=3, show_default=True,
    help="Replicas of the tiny training.",
)  # fmt: skip
@click.option(
    "--replay-every", type=click.IntRange(min=1), default=64, show_default=True,
    help="Micro-batches of which one is computed again (sdc.replay_every).",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the flipped bits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def sdc_coverage(trials: int, n_ranks: int, replay_every: int, seed: int, as_json: bool) -> None:
    """Flip single bits at every site of a tiny training and count what is found.

    Sites are weights, optimiser state, gradients before and after they are summed, activations,
    matrix products and data. A flip is harmful when it changes the update of its step by more than
    a thousandth. All checks are on; the overhead is measured on this machine.
    """
    import torch

    from puna.core.progress import progress
    from puna.resilience.sdc.coverage import measure_coverage
    from puna.resilience.sdc.trial import SITES

    torch.set_num_threads(1)
    with progress("sdc coverage", total=trials * (len(SITES) + 1), unit="trials") as bar:
        coverage = measure_coverage(
            trials, n_ranks=n_ranks, replay_every=replay_every, seed=seed, on_trial=bar.advance
        )
    if as_json:
        click.echo(json.dumps(coverage.to_json(), indent=2))
    else:
        _print(coverage)


def _print(coverage: Coverage) -> None:
    k = coverage.replay_every
    click.echo(
        f"{'site':17} {'flips':>6} {'harmful':>8} {'found when':>11} {'found by':>9} "
        f"{'harmful':>8} {'healed to':>10} {'rank':>6}"
    )
    click.echo(
        f"{'':17} {'':>6} {'':>8} {'looked at':>11} {'schedule':>9} {'missed':>8} "
        f"{'the bit':>10} {'named':>6}"
    )
    for row in coverage.sites:
        click.echo(
            f"{row.site:17} {row.trials:6} {row.harmful:8} {row.checked / row.trials:11.0%} "
            f"{row.scheduled / row.trials:9.1%} {row.missed:8.1f} {row.healed:10} {row.named:6}"
        )
    (product,) = (row for row in coverage.sites if row.site == "product")
    click.echo(f"clean steps with an alarm: {coverage.false_alarms} of {coverage.clean}")
    click.echo(
        "products moved by more than a quarter of the mean magnitude, found by their checksum when "
        f"it was their turn: {product.large_found} of {product.large}"
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in coverage.overhead.items())
    click.echo(f"overhead, of a step of 8.4M parameters and 2,048 rows here: {shares}")
    click.echo(
        f"by schedule: state and summed gradients at every step, one micro-batch in {k} computed "
        "again, one layer's product per step"
    )
    click.echo(
        "what a rank computes wrongly once (local gradient, activation, data) is found with a "
        f"chance of 1 in {k}; what it computes wrongly each time, within {k} micro-batches"
    )


@resilience.command("policy")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def policy(as_json: bool) -> None:
    """Print the table of faults: what notices each, how sure that is, what is done about it."""
    from dataclasses import asdict

    from puna.resilience.policy import RULES

    if as_json:
        click.echo(json.dumps([asdict(rule) for rule in RULES]))
        return
    table = new_text_table("fault", "what is seen", "sure", "what is done, in order", "set by")
    for rule in RULES:
        steps = ", then ".join(action.replace("_", " ") for action in rule.actions)
        often = "" if rule.most_times is None else f" ({rule.most_times + 1}. time at one step)"
        table.add_row(rule.detector, rule.sees, rule.confidence, steps + often, rule.key)
    new_console().print(table)


@resilience.command("self-test")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Repeat the tests for so long (burn-in); 0 runs each once.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def self_test(seconds: float, device: str, as_json: bool) -> int:
    """Compute what has known answers: products, attention, functions, memory patterns.

    Exit code 1 when an answer is wrong.
    """
    import torch

    from puna.core.errors import PunaError
    from puna.resilience.sdc.known import KNOWN, run_known

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PunaError(f"--device {device}: {error}", "use cpu, or a GPU that is there") from error
    failed = run_known(device, seconds=seconds)
    if as_json:
        click.echo(json.dumps({"device": device, "tests": list(KNOWN), "failed": failed}))
    else:
        for name in KNOWN:
            click.echo(f"{name:20} {'WRONG' if name in failed else 'right'}")
    return 1 if failed else 0


@resilience.command("health")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="How long to watch what counters do.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("."),
    help="Whose disk is meant.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def health(seconds: float, folder: Path, as_json: bool) -> int:
    """Print the health of this machine: what runs out, and what counts errors.

    A training looks at the same every ten seconds. What this machine does not tell is left out.
    Exit code 1 when something is bad.
    """
    import time

    from puna.resilience.health import LIMITS, HostHealth, show, to_json

    host = HostHealth(folder)
    host.read()
    time.sleep(seconds)
    readings = host.read()
    if as_json:
        click.echo(json.dumps([to_json(reading) for reading in readings]))
    else:
        table = new_text_table("what", f"in {seconds:g} s", "limit", "since boot", "")
        for reading in readings:
            limit = LIMITS[reading.kind]
            values = [show(value, limit.unit) for value in (reading.value, reading.limit)]
            total = "" if reading.total is None else show(reading.total, limit.unit)
            table.add_row(limit.meaning, *values, total, "BAD" if reading.is_bad else "good")
        new_console().print(table)
    return int(any(reading.is_bad for reading in readings))
