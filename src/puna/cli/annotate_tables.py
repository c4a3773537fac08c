"""Tables of ``puna annotate report``."""

from __future__ import annotations

from typing import Any

from puna.cli.model_tables import new_console, new_table


def print_report(values: dict[str, Any]) -> None:
    """Print what :func:`puna.post.annotate.dashboard.collect` returned."""
    console = new_console()
    states = new_table("Items", "state", "items")
    for name, n in values["items"].items():
        states.add_row(name, f"{n:,}")
    console.print(states)
    if values["agreement"]:
        table = new_table("Agreement", "kind", "round", "items", "alpha", "95 %")
        for one in values["agreement"]:
            table.add_row(f"{one['kind']} ({one['level']})", str(one["round"]),
                          f"{one['n_items']:,}", _number(one["value"]), _bounds(one))  # fmt: skip
        console.print(table)
    if values["rounds"]:
        table = new_table("Defects by round", "by", "round", "seen", "defects", "rate", "95 %")
        for one in values["rounds"]:
            table.add_row(one["by"], str(one["round"]), f"{one['n']:,}", f"{one['n_defects']:,}",
                          _number(one["value"]), _bounds(one))  # fmt: skip
        console.print(table)
    table = new_table("People", "who", "role", "answers", "returned", "judged", "gold",
                      "informedness", "95 %", "status")  # fmt: skip
    for one in values["people"]:
        gold = "-" if not one["n_gold"] else f"{one['n_right']}/{one['n_gold']}"
        table.add_row(one["pseudonym"], one["role"], f"{one['n_submitted']:,}",
                      str(one["n_returned"]), str(one["n_judged"]), gold, _number(one["value"]),
                      _bounds(one), one["status"] or "-")  # fmt: skip
    console.print(table)
    table = new_table("Batches", "batch", "state", "round", "accepted", "items", "audit", "bound")
    for one in values["batches"]:
        audit = one["audit"]
        seen = "-" if audit is None else f"{audit['done']}/{audit['n']}"
        table.add_row(one["name"], one["state"], str(one["round"]), f"{one['n_accepted']:,}",
                      f"{one['n_items']:,}", seen, _number(audit and audit["bound"]))  # fmt: skip
    console.print(table)
    for one in values["versions"]:
        console.print(f"version {one['name']}: {one['n_items']:,} examples, {one['sha'][:16]}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bounds(one: dict[str, Any]) -> str:
    return "-" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}"
