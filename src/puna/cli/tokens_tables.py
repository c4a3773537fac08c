"""Tables of ``puna tokens compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puna.cli.model_tables import new_console

if TYPE_CHECKING:
    from puna.tokens.compare import SourceTokens, TokenizerComparison


def print_comparison(found: TokenizerComparison, a: str, b: str) -> None:
    """Print bytes per token of each source, and from where on the larger vocabulary pays.

    Args:
        found: The comparison.
        a: Name of the first tokenizer.
        b: Name of the second.
    """
    from rich import box
    from rich.table import Table

    from puna.core.units import MIB

    console = new_console()
    console.print(f"A: {a} ({found.vocab_sizes[0]:,} ids)", soft_wrap=True)
    console.print(f"B: {b} ({found.vocab_sizes[1]:,} ids)", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("source")
    for column in ("bytes", "tokens A", "tokens B", "B/tok A", "B/tok B", "B saves"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [*found.sources, found.total] if len(found.sources) > 1 else list(found.sources)
    for one in rows:
        table.add_row(*_cells(one))
    console.print(table)
    mib_a, mib_b = (n / MIB for n in found.vocab_bytes)
    what = "embedding (shared with the head)" if found.tied else "embedding and head"
    console.print(
        f"{what} at width {found.dim:,}, {8 * found.bytes_per_weight:g} bit: A {mib_a:,.1f} MiB, "
        f"B {mib_b:,.1f} MiB, difference {mib_b - mib_a:+,.1f} MiB",
        soft_wrap=True,
    )
    for line in verdict(found):
        console.print(line, soft_wrap=True)


def _cells(one: SourceTokens) -> list[str]:
    a, b = one.bytes_per_token
    return [
        one.name, f"{one.n_bytes:,}", f"{one.a:,}", f"{one.b:,}", f"{a:.3f}", f"{b:.3f}",
        f"{one.saved:.1%}",
    ]  # fmt: skip


def verdict(found: TokenizerComparison) -> list[str]:
    """Say from where on the larger vocabulary pays, in two sentences."""
    from puna.core.units import format_bytes, format_count

    params, cached = found.break_even_params, found.break_even_cached_bytes
    larger = "A" if found.vocab_sizes[0] > found.vocab_sizes[1] else "B"
    if found.vocab_sizes[0] == found.vocab_sizes[1]:
        return ["The vocabularies are of one size: the one with fewer tokens costs less."]
    if params is None or cached is None:
        return [f"{larger} is larger and needs no fewer tokens here: it does not pay."]
    return [
        f"Work and weights read per byte of text: {larger} costs less from {format_count(params)} "
        "parameters in the layers on.",
        f"Memory: with {format_bytes(found.kv_bytes_per_token)} of keys and values per token the "
        f"cache of {format_bytes(cached)} of text saves what its rows cost.",
    ]
