"""Tables and pages of ``puna model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from puna.model.accounting import PART_LABELS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from puna.lm.inspect_stored import Stored
    from puna.model.accounting import Accounting, Comparison, PartDelta

PLAIN_WIDTH = 100
_WIDE_PARAMS = 10**11  # from here on the columns need the space between them


def presets_table(rows: list[tuple[str, Accounting]], dtype: str) -> Table:
    """Return one line per preset: name and cost."""
    from puna.core.units import format_bytes

    table = new_table(
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
    return table


def print_comparison(
    comparison: Comparison, a: str, b: str, stored: tuple[Stored | None, Stored | None],
    seq_len: int | None,
) -> None:  # fmt: skip
    """Print two models side by side.

    Args:
        comparison: What the configurations cost.
        a: Name of the first.
        b: Name of the second.
        stored: The files of each; None for those without.
        seq_len: Sequence of the FLOPs; the full context when None.
    """
    from puna.model.accounting import FLOPS_CONVENTION

    console = new_console()
    console.print(_parts_table(comparison, a, b))
    console.print(_costs_table(comparison, a, b, stored, seq_len))
    console.print("MiB = 2^20 bytes, MB = 10^6 bytes; KV: key/value cache of one sequence")
    console.print(f"FLOPs: {FLOPS_CONVENTION}")


def _parts_table(comparison: Comparison, a: str, b: str) -> Table:
    wide = max(comparison.a.n_params, comparison.b.n_params) >= _WIDE_PARAMS
    table = new_table(
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
        PART_LABELS.get(line.name, line.name),  # the last line is the total
        f"{line.a_params:,}",
        f"{line.b_params:,}",
        f"{line.delta_params:+,}" if line.delta_params else "0",
        f"{line.delta_bytes:+,}" if line.delta_bytes else "0",
        f"{line.delta_mib:+,.{digits}f}" if line.delta_bytes else "0",
        f"{line.delta_mb:+,.{digits}f}" if line.delta_bytes else "0",
    ]


def _costs_table(
    comparison: Comparison, a: str, b: str, stored: tuple[Stored | None, Stored | None],
    seq_len: int | None,
) -> Table:  # fmt: skip
    from puna.core.units import GIB, MIB, format_count

    dtype = comparison.dtype
    table = new_table("What changed, and what each model costs", "", _short(a), _short(b), "b / a")
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
    if any(stored):
        table.add_row("weights, as stored", *(_stored(one) for one in stored), "")
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


def _stored(stored: Stored | None) -> str:
    from puna.core.units import GIB

    if stored is None:
        return "-"
    return f"{stored.dtypes[0].dtype} {stored.n_bytes / GIB:,.3f} GiB"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"


def new_table(title: str | None, first: str, *columns: str, tight: bool = False) -> Table:
    """Return an empty table; every column but the first is for numbers."""
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


def new_console() -> Console:
    """Return the console that tables are printed to."""
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width: rich would squeeze the tables to 80 columns.
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
