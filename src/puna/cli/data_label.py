"""``puna data label``: what every filter says about every document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.common import load_stages

if TYPE_CHECKING:
    from puna.data.label import Labelled


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "--profile",
    "profiles",
    required=True,
    metavar="NAME,...",
    help="Filter profiles: gopher, c4, fineweb, fineweb-pipeline, prose, code, ...",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Parquet file to write."
)
@click.option("--text-field", default="text", show_default=True, help="Field of the text.")
@click.option("--id-field", default="id", show_default=True, help="Field of the id.")  # fmt: skip
def label(source: Path, profiles: str, out: Path, text_field: str, id_field: str) -> None:
    """Write what every filter decides about every document, without dropping any.

    INPUT is a JSONL or Parquet file, or a folder of them. The table has a row per document, profile
    and filter: whether it keeps the document, the reason, the value and its threshold, and all
    measured values.
    """
    from puna.core.progress import progress
    from puna.data.label import label_documents

    load_stages()  # plugins register profiles
    names = [name.strip() for name in profiles.split(",") if name.strip()]
    with progress("data.label", unit="docs") as bar:
        done = label_documents(
            source, out, names, text_field=text_field, id_field=id_field,
            on_batch=bar.advance,
        )  # fmt: skip
    _print(done, out)


def _print(done: Labelled, out: Path) -> None:
    for (profile, name), n_kept in done.n_kept.items():
        share = n_kept / done.n_docs if done.n_docs else 0.0
        click.echo(f"{profile:<18} {name:<20} keeps {n_kept:>10,} of {done.n_docs:,} ({share:.1%})")
        for (of_profile, of_name, reason), n_docs in done.reasons.items():
            if (of_profile, of_name) == (profile, name):
                click.echo(f"{'':<18} {'':<20} {n_docs:>16,} {reason}")
    click.echo(f"written to {out}")
