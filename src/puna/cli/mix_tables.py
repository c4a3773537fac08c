"""Tables of ``puna mix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.cli.model_tables import new_console, new_table
from puna.core.units import format_count


def print_fit(found: Mapping[str, Any]) -> None:
    """Print what was learnt."""
    console = new_console()
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)
    if found["noise"] is not None:
        table = new_table("Noise of a seed", "target", "seed", "mixes", "S/N", "best rank", "use")
        for one in found["noise"]:
            fine = "yes" if one["fine"] else f"no: {one['seeds_needed']} seeds"
            table.add_row(
                one["target"], _number(one["sd_seed"]), _number(one["sd_mix"]),
                _number(one["snr"]), _number(one["best_rank"]), fine,
            )  # fmt: skip
        console.print(table)
    title = f"Cross-validation on {found['n_runs']} runs of {found['n_mixes']} mixes"
    table = new_table(title, "regressor", "Spearman", "error / scatter", "taken")
    for one in found["scores"]:
        taken = "*" if one["name"] == found["chosen"] else ""
        table.add_row(one["name"], _number(one["spearman"]), _number(one["relative_rmse"]), taken)
    console.print(table)
    inside = ", ".join(f"{name} {share:.0%}" for name, share in found["weights"].items())
    console.print(f"taken: {found['chosen']} ({inside})", markup=False)
    if found["held_out"] is not None:
        held = found["held_out"]
        table = new_table(
            f"{held['n']} held-out runs", "target", "Spearman", "ceiling", "error", "pairs right",
            "regret",
        )  # fmt: skip
        for name, one in held["targets"].items():
            table.add_row(
                name, _number(one["spearman"]), _number(one["noise_ceiling"]),
                _number(one["rmse"]), f"{one['decision_accuracy']:.0%}", _number(one["regret"]),
            )  # fmt: skip
        console.print(table)


def print_recommendation(made: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print a mix, its intervals and the verdict."""
    console = new_console()
    for note in notes:
        console.print(f"note: {note}", markup=False)
    table = new_table("Mix", "source", "share", "90 % interval", "as good", "limit", "epochs")
    low, high = made["interval"]["low"], made["interval"]["high"]
    flat = made["flat_region"]
    for name, share in made["mix"].items():
        epochs = "" if made["epochs"] is None else f"{made['epochs'][name]:.2g}"
        table.add_row(
            name, f"{share:.1%}", f"{low[name]:.1%} to {high[name]:.1%}",
            f"{flat['low'][name]:.0%} to {flat['high'][name]:.0%}", f"{made['caps'][name]:.0%}",
            epochs,
        )  # fmt: skip
    console.print(table)
    title = f"Against other mixes (objective {made['value']:.4f} ± {made['value_sd']:.4f})"
    table = new_table(title, "baseline", "objective", "gain", "90 % interval", "beaten with")
    for one in made["baselines"]:
        table.add_row(
            one["name"], f"{one['value']:.4f}", f"{one['gain']:+.4f}",
            f"{one['gain_low']:+.4f} to {one['gain_high']:+.4f}", f"{one['probability']:.0%}",
        )  # fmt: skip
    console.print(table)
    for doubt in made["doubts"]:
        console.print(f"doubt: {doubt}", markup=False)
    console.print(made["verdict"], markup=False)


def print_confirmed(made: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print what fresh seeds say, and the verdict."""
    console = new_console()
    for note in notes:
        console.print(f"note: {note}", markup=False)
    title = (
        f"Fresh seeds: {made['n_params']} parameters, {made['n_tokens']} tokens "
        "(objective, lower is better)"
    )
    table = new_table(title, "mix", "mean", "seeds", "gain of the mix", "90 % interval", "beaten")
    rows = {one["name"]: one for one in made["baselines"]}
    for name, values in made["values"].items():
        shown = " ".join(f"{value:.4f}" for value in values)
        mean = f"{sum(values) / len(values):.4f}"
        one = rows.get(name)
        if one is None:
            table.add_row(name, mean, shown, "", "", "")
        else:
            table.add_row(
                name, mean, shown, f"{one['gain']:+.4f}",
                f"{one['gain_low']:+.4f} to {one['gain_high']:+.4f}",
                "yes" if one["better"] else "no",
            )  # fmt: skip
    console.print(table)
    console.print(made["verdict"], markup=False)


def print_scaling(made: Mapping[str, Any]) -> None:
    """Print a scaling law and the optima of budgets."""
    console = new_console()
    table = new_table(
        f"L = E + A N^-alpha + B D^-beta on {made['n_points']} runs", "", "value", "90 % interval",
        "by projection",
    )  # fmt: skip
    for name, value in made["law"].items():
        low, high = made["interval"][name]
        table.add_row(
            name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{made['projected'][name]:.4g}"
        )
    console.print(table)
    iso = made["isoflop"]
    if iso is None:
        console.print(f"no IsoFLOP optima: {made['isoflop_missing']}", markup=False)
    else:
        console.print(
            f"IsoFLOP: best tokens = {iso['scale']:.3g} C^{iso['exponent']:.3f} from "
            f"{iso['n_budgets']} budgets; the optimum of {iso['outside']} lies outside of its runs"
        )
    if made["optima"]:
        table = new_table("Best model of a budget", "FLOP", "parameters", "tokens", "loss",
                          "tokens by IsoFLOP")  # fmt: skip
        for one in made["optima"]:
            iso_tokens = one.get("isoflop_n_tokens")
            table.add_row(
                f"{one['flop']:.3g}", format_count(one["n_params"]), format_count(one["n_tokens"]),
                f"{one['loss']:.4f}", "-" if iso_tokens is None else format_count(iso_tokens),
            )  # fmt: skip
        console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
