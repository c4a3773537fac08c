"""``puna tokens``: the stages of tokenisation, and a look at how text is cut."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from puna.cli.common import stage_group

tokens = stage_group("tokens", "Train a tokenizer, encode documents to token shards.")


@tokens.command()
@click.argument("text")
@click.option(
    "--tokenizer",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that holds tokenizer.json.",
)
@click.option("--special", is_flag=True, help="Read special tokens in TEXT as what they name.")
@click.option("--bos", is_flag=True, help="Begin with the begin token.")
def show(text: str, folder: Path, special: bool, bos: bool) -> None:
    """Print the ids and pieces of TEXT (`-` reads standard input)."""
    from puna.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    ids = tokenizer.encode(text, bos=bos, allow_special=special)
    width = len(str(tokenizer.vocab_size - 1))
    for id_ in ids:
        note = "  special" if tokenizer.is_special(id_) else ""
        click.echo(f"{id_:>{width}}  {_printable(tokenizer.piece(id_))}{note}")
    n_bytes = len(text.encode("utf-8", "replace"))
    per_token = f", {n_bytes / len(ids):.2f} bytes per token" if ids else ""
    click.echo(f"{len(ids)} tokens, {n_bytes} bytes{per_token}")


def _printable(piece: bytes) -> str:
    """Show a piece of text in quotes; bytes that are part of a character as hexadecimals."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return "<" + piece.hex(" ") + ">"
