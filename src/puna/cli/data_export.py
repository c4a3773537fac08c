"""``puna data count`` and ``puna data export``: the final corpus in numbers and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.common import load_stages

if TYPE_CHECKING:
    from puna.data.export.counts import Counts

FORMATS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst")
MIN_WIDTH = 120


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in value.split(",") if one.strip())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--by",
    default="source",
    show_default=True,
    callback=_names,
    metavar="COLUMN,...",
    help="Columns: source, language, split, a label (domain), licence, metadata.KEY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def count(run: Path, by: tuple[str, ...], as_json: bool) -> None:
    """Count documents, bytes and tokens of what RUN's last data stage has left, by any columns."""
    from puna.data.export import count_corpus

    found = count_corpus(run, by)
    if as_json:
        click.echo(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        _print_counts(found)


def _print_counts(found: Counts) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from puna.core.units import format_bytes

    table = Table(box=SIMPLE)
    for name in found.by:
        table.add_column(escape(name), overflow="fold")
    for name in ("documents", "text", "tokens", "read in a pass", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    total = found.total
    for values, one in [*found.groups.items(), (("all", *[""] * len(found.by))[: len(found.by)],
                                                total)]:  # fmt: skip
        share = one.tokens_read / total.tokens_read if total.tokens_read else 0.0
        table.add_row(
            *map(escape, values), f"{one.docs:,}", format_bytes(one.n_bytes), f"{one.n_tokens:,}",
            f"{one.tokens_read:,}", f"{share:.1%}", style="bold" if one is total else None,
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    console.print(table)
    if not found.is_counted:
        console.print(f"tokens are estimated at {found.bytes_per_token:g} bytes per token",
                      style="dim")  # fmt: skip


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "file_format", type=click.Choice(FORMATS), default="parquet",
              show_default=True, help="Format of the data files.")  # fmt: skip
@click.option("--shard-size", default="256MiB", show_default=True,
              help="Text in a file, about: a number of bytes, or with KiB, MiB, GiB.")  # fmt: skip
@click.option("--columns", default="", callback=_names, metavar="COLUMN,...",
              help="Columns besides id and text; all when not given.")  # fmt: skip
@click.option("--split", "splits", multiple=True, help="Only this split; may be repeated.")
@click.option("--copies", is_flag=True,
              help="Write repeated documents as copies, not with a column `repeat`.")  # fmt: skip
@click.option("--name", default="", help="Name of the data set on its card; the run's by default.")
@click.option("--force", is_flag=True, help="Replace an earlier export in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def export(
    run: Path, out: Path, file_format: str, shard_size: str, columns: tuple[str, ...],
    splits: tuple[str, ...], copies: bool, name: str, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export the final documents of RUN to the new folder OUT, with licences and a data card.

    OUT holds data files, README.md and card.json (the data card), a picture of the composition, and
    checksums. `datasets.load_dataset("OUT")` reads it.
    """
    from puna.core.units import format_bytes
    from puna.data.export import export_run

    load_stages()  # the card explains the reasons of all filters
    manifest = export_run(
        run, out, file_format=file_format, shard_bytes=_n_bytes(shard_size), columns=columns,
        splits=splits, copies=copies, name=name, force=force,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, ensure_ascii=False, indent=2))
        return
    n_files = len(manifest["files"])
    click.echo(
        f"{manifest['docs']:,} documents, {manifest['rows']:,} rows, "
        f"{format_bytes(manifest['bytes'])} in {n_files} file{'s' * (n_files > 1)}"
    )


def _n_bytes(text: str) -> int:
    """Read a size: ``1048576``, ``1MiB``.

    Raises:
        PunaError: It is none.
    """
    from puna.core.errors import PunaError
    from puna.core.units import GIB, KIB, MIB

    units = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "": 1}
    unit = next(one for one in units if text.strip().endswith(one))
    try:
        size = int(float(text.strip().removesuffix(unit)) * units[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise PunaError(f"--shard-size is {text!r}", "give bytes, such as 268435456 or 256MiB")
    return size
