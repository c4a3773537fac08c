"""Tables of ``puna mix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.cli.model_tables import new_console, new_table


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
