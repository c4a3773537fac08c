"""``puna chaos``: hurt a real training in every way, and see that it ends as if nothing was."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.model_tables import new_console, new_table

if TYPE_CHECKING:
    from puna.train.chaos.scenarios import Scenario
    from puna.train.chaos.suite import Verdict


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--ranks", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the choices of whom to hurt.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder for the runs of scenarios that failed, and for the page.")  # fmt: skip
@click.option("--list", "only_list", is_flag=True, help="Show the scenarios and run none.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def chaos(
    names: tuple[str, ...], ranks: int, seed: int, out: Path | None, only_list: bool, as_json: bool
) -> None:
    """Kill, freeze, damage and starve a small training on this machine, a SCENARIO at a time.

    All scenarios without a name. Each must be noticed in time and end with the losses and the
    weights of the training that nothing happened to, bit by bit. Exit code 1 when one does not.
    """
    from puna.train.chaos.scenarios import SCENARIOS

    chosen = _choose(names, ranks)
    if only_list:
        table = new_table(None, "scenario", "fault", "expected")
        for one in SCENARIOS:
            table.add_row(one.name, one.fault, one.expected)
        new_console().print(table)
        return
    if out is not None:
        verdicts = _run(chosen, out, ranks, seed)
    else:
        with tempfile.TemporaryDirectory(prefix="puna-chaos-") as folder:
            verdicts = _run(chosen, Path(folder), ranks, seed)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in verdicts], indent=2))
    else:
        _print(verdicts)
    if out is not None:
        from puna.ui.chaos_page import write_page

        path = write_page([one.to_json() for one in verdicts], out, ranks)
        click.echo(f"page: {path}", err=as_json)
    sys.exit(int(any(one.problems for one in verdicts)))


def _choose(names: tuple[str, ...], ranks: int) -> list[Scenario]:
    """Return the scenarios of these names, or all that so many ranks can run.

    Raises:
        PunaError: There is none of that name, or it needs more ranks.
    """
    from puna.core.errors import PunaError
    from puna.train.chaos.scenarios import SCENARIOS

    known = {one.name: one for one in SCENARIOS}
    for name in names:
        if name not in known:
            raise PunaError(
                f"{name} is no scenario", f"take one of {', '.join(known)} (puna chaos --list)"
            )
        if known[name].is_replicated and ranks == 1:
            raise PunaError(f"{name} needs a replica of the rank that is hurt", "set --ranks 2")
    able = [one for one in SCENARIOS if ranks > 1 or not one.is_replicated]
    return [known[name] for name in names] if names else able


def _run(chosen: list[Scenario], folder: Path, ranks: int, seed: int) -> list[Verdict]:
    from puna.core.errors import PunaError
    from puna.core.progress import say
    from puna.train.chaos.suite import ChaosError, run_suite

    def tell(verdict: Verdict) -> None:
        how = "; ".join(verdict.problems) or "as expected"
        say(f"  {verdict.name}: {how} ({verdict.seconds:.0f} s)")

    say(f"{len(chosen)} scenarios on {ranks} ranks, beside a training without a fault")
    try:
        return run_suite(chosen, folder, ranks, seed=seed, on_verdict=tell)
    except ChaosError as error:
        raise PunaError(
            f"the training without a fault failed: {error}", "see its output in the message"
        ) from error


def _print(verdicts: list[Verdict]) -> None:
    table = new_table(None, "scenario", "result", "noticed", "steps again after", "done again",
                      "from")  # fmt: skip
    for one in verdicts:
        seconds = ("" if s is None else f"{s:.2f} s" for s in (one.detect_s, one.gap_s))
        table.add_row(
            one.name, "FAILED" if one.problems else "passed", *seconds, str(one.steps_again),
            one.tier or "",
        )  # fmt: skip
    console = new_console()
    console.print(table)
    n_passed = sum(not one.problems for one in verdicts)
    console.print(f"{n_passed} of {len(verdicts)} scenarios passed")
    for one in verdicts:
        for problem in one.problems:
            console.print(f"{one.name}: {problem}", markup=False)
