"""``puna mix``: which mix of sources makes the best model, with error bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_tables = click.argument("tables", nargs=-1, required=True, type=_FILE)
_manifest = click.option("--manifest", type=_FILE, help="Sources, targets and objective (TOML).")
_model = click.option("--model", "only", help="Regressor to take; default: cross-validation.")
_noisy = click.option(
    "--noisy", is_flag=True, help="Fit targets whose signal-to-noise is under 2 all the same."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_seed = click.option("--seed", type=int, default=0, show_default=True)


@click.group("mix", no_args_is_help=True)
def mix() -> None:
    """Plan small runs, learn losses from mixes, recommend a mix or say that it is not known."""


@mix.command("design")
@click.argument("manifest", type=_FILE)
@click.option("--runs", "n_runs", type=click.IntRange(min=1), required=True, help="Runs to make.")
@click.option("--out", required=True, type=_FILE, help="Table of planned runs to write (CSV).")
@click.option(
    "--how", type=click.Choice(("maximin", "d-optimal")), default="maximin", show_default=True
)
@click.option("--held-out", type=click.IntRange(min=0), default=8, show_default=True)
@click.option("--done", type=_FILE, help="Table of runs made before; the same are marked done.")
@click.option("--keep", type=_FILE, help="Mix to keep as one source (JSON), for added sources.")
@_seed
def design(
    manifest: Path, n_runs: int, out: Path, how: str, held_out: int, done: Path | None,
    keep: Path | None, seed: int,
) -> None:  # fmt: skip
    """Plan which mixes to train: baselines, corners, leave-one-out, random ones, repeats."""
    from collections import Counter
    from typing import cast

    from puna.core.fsio import write_text
    from puna.mix import design as plan
    from puna.mix.sources import read_manifest

    known = read_manifest(manifest)
    keys = [] if done is None else plan.done_keys(done)
    if keep is None:
        choice = cast("plan.Choice", how)
        runs = plan.design(
            known, n_runs, how=choice, n_held_out=held_out, proxy=known.proxy.content(),
            first_seed=known.proxy.seed, done=keys, seed=seed,
        )  # fmt: skip
    else:
        runs = plan.extend(
            known, plan.read_mix(keep, known.names), n_runs, proxy=known.proxy.content(),
            first_seed=known.proxy.seed, seed=seed,
        )  # fmt: skip
    write_text(out, plan.to_csv(runs, known.names))
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(one.kind for one in runs).items())
    click.echo(f"{len(runs)} runs: {kinds}; {sum(one.done for one in runs)} made before: {out}")


@mix.command("sources")
@click.argument("shards", type=_FOLDER)
@click.option("--out", required=True, type=_FILE, help="Manifest to write (TOML).")
@click.option("--tokens", type=float, required=True, help="Tokens of the training it is for.")
@click.option("--leave-out", multiple=True, help="Source that is only a target; may be repeated.")
def sources(shards: Path, out: Path, tokens: float, leave_out: tuple[str, ...]) -> None:
    """Write a manifest of the sources of token SHARDS, to be edited."""
    from puna.core.fsio import write_text
    from puna.mix.proxy.manifest import manifest_of

    write_text(out, manifest_of(str(shards), tokens, leave_out))
    click.echo(f"manifest: {out}")


@mix.command("run")
@click.argument("plan", type=_FILE)
@click.option("--manifest", type=_FILE, required=True, help="Sources, targets, [proxy] (TOML).")
@click.option("--shards", type=_FOLDER, required=True, help="Output of tokens.encode.")
@click.option("--out", type=_FOLDER, required=True, help="Folder for results and runs.csv.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0: all cores.")
def run(plan: Path, manifest: Path, shards: Path, out: Path, workers: int) -> None:
    """Train the mixes of a PLAN and measure them: runs.csv, which `puna mix fit` reads.

    Runs that are finished are not made again; a call that was killed goes on with the others.
    """
    from puna.mix.proxy.runs import headline, make_runs, read_plan
    from puna.mix.sources import read_manifest

    known = read_manifest(manifest)
    made = make_runs(known, read_plan(plan, known), str(shards), out, n_workers=workers)
    for note in made.notes:
        click.echo(f"note: {note}")
    click.echo(headline(made))


@mix.command("fit")
@_tables
@_manifest
@_model
@_noisy
@_json
@_seed
def fit(
    tables: tuple[Path, ...], manifest: Path | None, only: str | None, noisy: bool, as_json: bool,
    seed: int,
) -> None:  # fmt: skip
    """Learn losses from the mixes of a table of runs (CSV, Parquet, JSON lines; joined on `run`).

    Prints the noise of each target, the errors of each regressor in cross-validation, and how well
    held-out runs are predicted.
    """
    from puna.cli.mix_tables import print_fit
    from puna.mix.analyse import fit_runs

    found = fit_runs(list(tables), manifest, only=only, allow_noisy=noisy, seed=seed)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_fit(found.to_json())


@mix.command("recommend")
@_tables
@_manifest
@_model
@_noisy
@click.option("--out", type=_FILE, help="Also write the recommended mix (JSON).")
@_json
@_seed
def recommend(
    tables: tuple[Path, ...], manifest: Path | None, only: str | None, noisy: bool,
    out: Path | None, as_json: bool, seed: int,
) -> None:  # fmt: skip
    """Recommend a mix, with intervals and the chance to beat each baseline, or say it is unknown.

    The exit code is 0 in both cases; the verdict tells which it is.
    """
    from puna.cli.mix_tables import print_recommendation
    from puna.core.fsio import write_json
    from puna.mix.analyse import fit_runs, recommend_from

    found = fit_runs(list(tables), manifest, only=only, allow_noisy=noisy, seed=seed)
    made = recommend_from(found, seed=seed).to_json()
    if out is not None:
        write_json(out, made)
    if as_json:
        click.echo(json.dumps(made, indent=2))
    else:
        print_recommendation(made, found.notes)


@mix.command("report")
@_tables
@_manifest
@_model
@_noisy
@click.option("--out", required=True, type=_FILE, help="Page to write; JSON beside it.")
@_seed
def report(
    tables: tuple[Path, ...], manifest: Path | None, only: str | None, noisy: bool, out: Path,
    seed: int,
) -> None:  # fmt: skip
    """Write one page with everything: noise, fit, recommendation, attribution, verdict."""
    from puna.core.fsio import write_json
    from puna.mix.analyse import attribute_from, fit_runs, recommend_from, report_values
    from puna.ui.mix_page import write_page

    found = fit_runs(list(tables), manifest, only=only, allow_noisy=noisy, seed=seed)
    made = recommend_from(found, seed=seed)
    values: dict[str, Any] = report_values(found, made, attribute_from(found, made))
    write_page(values, out)
    write_json(out.with_suffix(".json"), values)
    click.echo(made.verdict)
    click.echo(f"report: {out}, {out.with_suffix('.json')}")


@mix.command("confirm")
@click.argument("recommended", type=_FILE)
@click.option("--manifest", type=_FILE, required=True, help="Sources, targets, [proxy] (TOML).")
@click.option("--shards", type=_FOLDER, required=True, help="Output of tokens.encode.")
@click.option("--out", type=_FOLDER, required=True, help="Folder for results, confirm.csv, .json.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--first-seed", type=click.IntRange(min=0), help="Default: 100 after proxy.seed.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0: all cores.")
@_json
def confirm(
    recommended: Path, manifest: Path, shards: Path, out: Path, seeds: int,
    first_seed: int | None, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Train a RECOMMENDED mix and its baselines with fresh seeds, and compare.

    A mix is recommended for good only when it beats all of them beyond the noise of seeds; the exit
    code is 0 either way. Larger proxies in another manifest tell whether that holds at their size.
    """
    from puna.cli.mix_tables import print_confirmed
    from puna.core.fsio import write_json
    from puna.mix.fresh import confirm_mix
    from puna.mix.sources import read_manifest

    found = confirm_mix(
        recommended, read_manifest(manifest), str(shards), out, n_seeds=seeds,
        first_seed=first_seed, n_workers=workers,
    )  # fmt: skip
    write_json(out / "confirm.json", found.to_json())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_confirmed(found.to_json(), found.made.notes)


@mix.command("schedule")
@click.argument("stable", type=_FILE)
@click.option("--manifest", type=_FILE, required=True, help="Sources, limits, tokens (TOML).")
@click.option("--anneal", type=_FILE, help="Mix of the last tokens (JSON); default: the same.")
@click.option("--anneal-share", type=float, default=0.1, show_default=True)
@click.option("--out", type=_FILE, required=True, help="Schedule to write (JSON).")
def schedule(
    stable: Path, manifest: Path, anneal: Path | None, anneal_share: float, out: Path
) -> None:
    """Write the schedule of a training: a STABLE mix, then the mix of the last tokens.

    `mix = "FILE"` under `[train.pretrain]` executes it. Sources are not read more often than the
    manifest allows, over both phases.
    """
    from puna.core.fsio import write_json
    from puna.core.units import format_count
    from puna.mix.design import read_mix
    from puna.mix.schedule import two_phases
    from puna.mix.sources import read_manifest

    known = read_manifest(manifest)
    first = read_mix(stable, known.names)
    last = first if anneal is None else read_mix(anneal, known.names)
    made = two_phases(known, first, last, anneal_share)
    write_json(out, made.to_json())
    for phase in made.phases:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in phase.shares.items())
        click.echo(f"{phase.name}: {format_count(phase.n_tokens)} tokens: {shares}")
    click.echo(f"schedule: {out}; execute it with mix under [train.pretrain]")


@mix.command("scaling")
@click.argument("table", type=_FILE)
@click.option("--loss", default="loss", show_default=True, help="Column of the loss.")
@click.option("--flop", "budgets", type=float, multiple=True, help="Budget; may be repeated.")
@click.option("--draws", type=click.IntRange(min=2), default=100, show_default=True)
@_json
@_seed
def scaling(
    table: Path, loss: str, budgets: tuple[float, ...], draws: int, as_json: bool, seed: int
) -> None:
    """Fit scaling laws to a TABLE with n_params, n_tokens (or flop) and a loss.

    Tells the law of parameters and tokens with 90 % intervals, the IsoFLOP optima where budgets
    have three sizes or more, and the best model of each budget.
    """
    from puna.cli.mix_tables import print_scaling
    from puna.mix.scaling.table import fit_scaling, read_points

    if any(not budget > 0 for budget in budgets):
        raise click.BadParameter("a budget is above 0", param_hint="--flop")
    made = fit_scaling(*read_points(table, loss), budgets, n_draws=draws, seed=seed)
    if as_json:
        click.echo(json.dumps(made, indent=2))
    else:
        print_scaling(made)


@mix.command("isoflop")
@click.argument("flop", type=float)
@click.option("--budgets", type=int, default=4, show_default=True)
@click.option("--sizes", type=int, default=5, show_default=True)
@click.option("--tokens-per-param", type=float, default=20.0, show_default=True)
def isoflop(flop: float, budgets: int, sizes: int, tokens_per_param: float) -> None:
    """Say which models to train to find the optimum, with FLOP in all."""
    from puna.cli.model_tables import new_console, new_table
    from puna.core.units import format_count
    from puna.mix.scaling.isoflop import plan_isoflops

    if not flop > 0 or not tokens_per_param > 0:
        raise click.BadParameter("FLOP and --tokens-per-param are above 0")
    table = new_table("Runs", "FLOP", "parameters", "tokens")
    for one, n_params, n_tokens in plan_isoflops(
        flop, n_budgets=budgets, n_sizes=sizes, tokens_per_param=tokens_per_param
    ):
        table.add_row(f"{one:.3g}", format_count(n_params), format_count(n_tokens))
    new_console().print(table)
