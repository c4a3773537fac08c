"""``puna eval checkpoint``: bits per byte of a training that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import click

from puna.cli.model_tables import new_console, new_table


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), help="Steps done.  [default: the newest]")
@click.option("--max-tokens", type=click.IntRange(2), default=100_000, show_default=True,
              help="Held-out tokens of a source.")  # fmt: skip
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True,
              help="Rows of a forward pass.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where to run.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def checkpoint(
    run_dir: Path, step: int | None, max_tokens: int, rows: int, device: str, as_json: bool
) -> None:
    """Measure bits per byte of held-out text with a checkpoint of RUN, which may still be training.

    A process of its own: the training neither waits nor knows. For measurements inside the
    training see [train.pretrain.eval].
    """
    from puna.core.units import format_count
    from puna.eval.checkpoint import measure_checkpoint

    found = measure_checkpoint(
        run_dir, step, max_tokens=max_tokens, rows_per_batch=rows,
        device=device,  # type: ignore[arg-type]
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = new_table(f"after {found['step']:,} steps", "source", "bits per byte", "nats per token",
                      "documents", "tokens")  # fmt: skip
    for name, row in found["sources"].items():
        table.add_row(name, f"{row['bits_per_byte']:.4f}", f"{row['nats_per_token']:.4f}",
                      f"{row['n_docs']:,}", format_count(row["n_tokens"]))  # fmt: skip
    table.add_row("all documents", f"{found['bits_per_byte']:.4f}")
    new_console().print(table)
