"""``puna model``: the presets of the family and what each of them costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.common import stage_group

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from puna.model.accounting import Accounting, Comparison, PartDelta
    from puna.model.config import LlamaConfig

PLAIN_WIDTH = 100
_WIDE_PARAMS = 10**11  # from here on the columns need the space between them
_LABELS = {
    "output_head": "output head", "kv_projections": "K/V projections",
    "qo_projections": "Q/O projections", "ffn": "FFN",
}  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16", "float8", "int8")

model = stage_group("model", "Presets, exact accounting and comparison of models.")


@model.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True)
def list_presets(as_json: bool, dtype: str) -> None:
    """List the presets with their size; a recipe names one as `preset`."""
    from puna.core.stage import load_plugins
    from puna.core.units import format_bytes
    from puna.model.accounting import account
    from puna.model.config import PRESETS

    load_plugins()
    rows = sorted(
        ((name, account(PRESETS.get(name))) for name in PRESETS), key=lambda row: row[1].n_params
    )
    if as_json:
        click.echo(json.dumps({name: cost.to_json(dtype) for name, cost in rows}, indent=2))
        return
    table = _table(
        None, "preset", "parameters", "weights", "layers", "dim", "heads/kv", "ffn", "vocab",
        "context", "KV/token", tight=True,
    )  # fmt: skip
    for name, cost in rows:
        c = cost.config
        table.add_row(
            name, f"{cost.n_params:,}", format_bytes(cost.n_bytes(dtype)), str(c.n_layers),
            str(c.dim), f"{c.n_heads}/{c.n_kv_heads}", str(c.ffn_dim), str(c.vocab_size),
            str(c.max_seq_len), format_bytes(cost.kv_bytes_per_token(dtype)),
        )  # fmt: skip
    console = _console()
    console.print(table)
    console.print(f"weights and KV cache in {dtype}; parts of one: puna model compare A B")


@model.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True)
@click.option(
    "--seq-len", type=click.IntRange(min=1), help="Sequence of the FLOPs; default: full context."
)
def compare_models(a: str, b: str, as_json: bool, dtype: str, seq_len: int | None) -> None:
    """Show part by part what model B costs more than model A, without allocating either.

    A and B are presets (`puna model list`) or folders with a config.json.
    """
    from puna.core.stage import load_plugins
    from puna.model.accounting import FLOPS_CONVENTION, compare

    load_plugins()
    comparison = compare(find_config(a), find_config(b), dtype)
    if as_json:
        click.echo(json.dumps(comparison.to_json(seq_len), indent=2))
        return
    console = _console()
    console.print(_parts_table(comparison, a, b))
    console.print(_costs_table(comparison, a, b, seq_len))
    console.print("MiB = 2^20 bytes, MB = 10^6 bytes; KV: key/value cache of one sequence")
    console.print(f"FLOPs: {FLOPS_CONVENTION}")


def find_config(name: str) -> LlamaConfig:
    """Return the configuration of a preset, of a model folder, or of a stage folder with a model.

    Raises:
        PunaError: Neither a preset nor a folder with a readable config.json.
    """
    from puna.lm.load import MODEL_DIR
    from puna.model.config import PRESETS
    from puna.model.formats.hf_config import CONFIG_FILE, read_hf_config

    if name not in PRESETS:
        for folder in (Path(name), Path(name) / MODEL_DIR):
            if (folder / CONFIG_FILE).is_file():
                return read_hf_config(folder)
        if Path(name).is_dir():
            return read_hf_config(Path(name))
    return PRESETS.get(name)


def _parts_table(comparison: Comparison, a: str, b: str) -> Table:
    wide = max(comparison.a.n_params, comparison.b.n_params) >= _WIDE_PARAMS
    table = _table(
        f"Parameters, and difference in bytes ({comparison.dtype})", "part", _short(a), _short(b),
        "+/- params", "+/- bytes", "+/- MiB", "+/- MB", tight=wide,
    )  # fmt: skip
    for line in comparison.lines:
        table.add_row(*_cells(line))
    table.add_section()
    table.add_row(*_cells(comparison.total), style="bold")
    return table


def _cells(line: PartDelta) -> list[str]:
    digits = 1 if abs(line.delta_mb) < 10_000 else 0
    return [
        _LABELS.get(line.name, line.name),
        f"{line.a_params:,}",
        f"{line.b_params:,}",
        f"{line.delta_params:+,}" if line.delta_params else "0",
        f"{line.delta_bytes:+,}" if line.delta_bytes else "0",
        f"{line.delta_mib:+,.{digits}f}" if line.delta_bytes else "0",
        f"{line.delta_mb:+,.{digits}f}" if line.delta_bytes else "0",
    ]


def _costs_table(comparison: Comparison, a: str, b: str, seq_len: int | None) -> Table:
    from puna.core.units import GIB, MIB, format_count

    dtype = comparison.dtype
    table = _table("What changed, and what each model costs", "", _short(a), _short(b), "b / a")
    for name, (before, after) in comparison.changed.items():
        table.add_row(name, _value(before), _value(after), "")
    table.add_section()

    def row(label: str, number: Any, show: Any) -> None:
        left, right = number(comparison.a), number(comparison.b)
        table.add_row(label, show(left), show(right), f"{right / left:.3g}x")

    def flops(cost: Accounting, training: bool) -> int:
        return cost.flops_per_token(seq_len, training=training)

    row("parameters", lambda cost: cost.n_params, lambda n: f"{n:,}")
    row(f"weights, {dtype}", lambda cost: cost.n_bytes(dtype), lambda n: f"{n / GIB:,.3f} GiB")
    row("KV per token", lambda cost: cost.kv_bytes_per_token(dtype), lambda n: f"{n:,} B")
    row(
        "KV, full context", lambda cost: cost.kv_bytes(dtype=dtype), lambda n: f"{n / MIB:,.1f} MiB"
    )
    at = "full context" if seq_len is None else f"{seq_len} tokens"
    row(f"forward FLOPs/token, {at}", lambda cost: flops(cost, False), format_count)
    row(f"training FLOPs/token, {at}", lambda cost: flops(cost, True), format_count)
    return table


def _value(value: Any) -> str:
    if isinstance(value, dict):  # the only part with fields of its own
        context = value.get("original_max_seq_len", "all positions")
        return f"{value['factor']:g} x {context}"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"


def _table(title: str | None, first: str, *columns: str, tight: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False, padding=(0, 0 if tight else 1),
    )  # fmt: skip
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width: rich would squeeze the tables to 80 columns.
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
