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


def print_presets(presets: list[tuple[str, Accounting]], dtype: str) -> None:
    """Print one line per preset: name and cost."""
    from puna.core.units import format_bytes

    columns = ["preset", "parameters", "weights", "layers", "dim", "heads/kv", "ffn", "vocab",
               "context", "KV/token"]  # fmt: skip
    rows = [
        [
            name, f"{cost.n_params:,}", format_bytes(cost.n_bytes(dtype)), str(c.n_layers),
            str(c.dim), f"{c.n_heads}/{c.n_kv_heads}", str(c.ffn_dim), str(c.vocab_size),
            str(c.max_seq_len), format_bytes(cost.kv_bytes_per_token(dtype)),
        ]
        for name, cost in presets
        for c in (cost.config,)
    ]  # fmt: skip
    console = new_console()
    console.print(_fitted(None, columns, rows, ("ffn", "dim", "layers"), console.width))
    console.print(f"weights and KV cache in {dtype}; more about one: puna model inspect NAME")


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
    console.print(_parts_table(comparison, a, b, console.width))
    console.print(_costs_table(comparison, a, b, stored, seq_len))
    console.print("MiB = 2^20 bytes, MB = 10^6 bytes; KV: key/value cache of one sequence")
    at = "the full context" if seq_len is None else f"{seq_len:,} tokens"
    console.print(f"FLOPs at {at}: {FLOPS_CONVENTION}")


def _parts_table(comparison: Comparison, a: str, b: str, width: int) -> Table:
    columns = ["part", _short(a), _short(b), "+/- params", "+/- bytes", "+/- MiB", "+/- MB"]
    rows = [_cells(line) for line in (*comparison.lines, comparison.total)]
    title = f"Parameters, and difference in bytes ({comparison.dtype})"
    less = ("+/- params", "+/- MB", "+/- bytes")
    return _fitted(title, columns, rows, less, width, sums=True)


def _fitted(
    title: str | None, columns: list[str], rows: list[list[str]], less: tuple[str, ...],
    width: int, sums: bool = False,
) -> Table:  # fmt: skip
    """Return a table no wider than the console: rather a column less than a number cut short.

    Args:
        title: Above it.
        columns: Their names.
        rows: Their cells.
        less: What to leave out, the first first.
        width: Of the console.
        sums: The last row is a total.
    """
    sizes = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    kept = list(range(len(columns)))
    for name in less:
        if sum(sizes[at] + 1 for at in kept) + 1 > width:
            kept.remove(columns.index(name))
    tight = sum(sizes[at] + 2 for at in kept) + 1 > width
    table = new_table(title, *(columns[at] for at in kept), tight=tight)
    for number, row in enumerate(rows, 1):
        last = sums and number == len(rows)
        if last:
            table.add_section()
        table.add_row(*(row[at] for at in kept), style="bold" if last else "")
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
        ratio = right / left
        shown = f"{ratio:,.0f}x" if ratio >= 1000 else f"{ratio:.3g}x"
        table.add_row(label, show(left), show(right), shown)

    def flops(cost: Accounting, training: bool) -> int:
        return cost.flops_per_token(seq_len, training=training)

    row("parameters", lambda cost: cost.n_params, lambda n: f"{n:,}")
    row(f"weights, {dtype}", lambda cost: cost.n_bytes(dtype), lambda n: f"{n / GIB:,.3f} GiB")
    if any(stored):
        table.add_row("weights, as stored", *(_stored_bytes(one) for one in stored), "")
        table.add_row("stored as", *(_stored_dtypes(one) for one in stored), "")
    row("KV per token", lambda cost: cost.kv_bytes_per_token(dtype), lambda n: f"{n:,} B")
    row(
        "KV, full context", lambda cost: cost.kv_bytes(dtype=dtype), lambda n: f"{n / MIB:,.1f} MiB"
    )
    row("forward FLOPs/token", lambda cost: flops(cost, False), format_count)
    row("training FLOPs/token", lambda cost: flops(cost, True), format_count)
    return table


def _value(value: Any) -> str:
    if isinstance(value, dict):  # the only part with fields of its own
        context = value.get("original_max_seq_len", "all positions")
        return f"{value['factor']:g} x {context}"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _stored_bytes(stored: Stored | None) -> str:
    from puna.core.units import GIB

    return "-" if stored is None else f"{stored.n_bytes / GIB:,.3f} GiB"


def _stored_dtypes(stored: Stored | None) -> str:
    if stored is None:
        return "-"
    more = len(stored.dtypes) - 1
    return stored.dtypes[0].dtype + (f" and {more} more" if more else "")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"


def new_table(title: str | None, first: str, *columns: str, tight: bool = False) -> Table:
    """Return an empty table; every column but the first is for numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # names are no markup

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False, padding=(0, 0 if tight else 1),
    )  # fmt: skip
    table.add_column(Text(first), no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def new_text_table(*columns: str) -> Table:
    """Return an empty table of words, which are folded where they do not fit."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def new_console() -> Console:
    """Return the console that tables are printed to."""
    from rich.console import Console

    console = Console(highlight=False)
    # A file or a pipe has no width: rich would squeeze the tables to 80 columns.
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
