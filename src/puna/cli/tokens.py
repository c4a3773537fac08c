"""``puna tokens``: the stages of tokenisation, and a look at how text is cut."""

from __future__ import annotations

import json
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
    help="Model folder, tokenizer.json, tokenizer.model, or .gguf file.",
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


@tokens.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--source", "own", multiple=True, metavar="NAME=PATH",
    help="Also compare on the texts of a file or folder; may be given several times.",
)  # fmt: skip
@click.option("--only-own", is_flag=True, help="Compare on the given sources only.")
@click.option("--dim", type=click.IntRange(min=1), default=4096, show_default=True,
              help="Width of the model.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
              default="bfloat16", show_default=True, help="Of embedding and head.")  # fmt: skip
@click.option("--tied", is_flag=True, help="The head shares the embedding's weights.")
@click.option("--kv-bytes-per-token", type=click.IntRange(min=1), default=131_072,
              show_default=True, help="Keys and values of a token (Llama 3 8B's).")  # fmt: skip
@click.option("--max-bytes", type=click.IntRange(min=1), default=2_000_000, show_default=True,
              help="Text taken of each source.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False),
              help="Also draw it, as an SVG file.")  # fmt: skip
def compare(
    a: Path, b: Path, own: tuple[str, ...], only_own: bool, dim: int, dtype: str, tied: bool,
    kv_bytes_per_token: int, max_bytes: int, as_json: bool, picture: Path | None,
) -> None:  # fmt: skip
    """Show bytes per token of tokenizers A and B per source, and when the larger one pays.

    A and B are model folders, tokenizer files or .gguf files. The texts are Python's source code,
    docstrings and documentation as installed here, and those of every --source.
    """
    from puna.cli.tokens_tables import print_comparison
    from puna.core.errors import PunaError
    from puna.core.fsio import write_text
    from puna.tokens.compare import TokenizerComparison, count_tokens, default_sources, own_source
    from puna.tokens.tokenizer import load_tokenizer
    from puna.ui.tokens_picture import draw_comparison

    if picture is not None and picture.suffix != ".svg":
        raise PunaError(f"--picture {picture}: only SVG can be drawn", "end the name with .svg")
    named = [_named(one) for one in own]
    if only_own and not named:
        raise PunaError("--only-own without --source: nothing to compare on", "give a --source")
    first, second = load_tokenizer(a), load_tokenizer(b)
    sources = {} if only_own else default_sources(max_bytes)
    sources |= {name: own_source(name, path, max_bytes) for name, path in named}
    width = {"float32": 4, "int8": 1}.get(dtype, 2)
    found = TokenizerComparison(
        count_tokens(first, second, sources), (first.vocab_size, second.vocab_size), dim, width,
        tied, kv_bytes_per_token,
    )  # fmt: skip
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_text(picture, draw_comparison(found, str(a), str(b)))
    if as_json:
        click.echo(json.dumps({"a": str(a), "b": str(b)} | found.to_json(), indent=2))
        return
    print_comparison(found, str(a), str(b))
    if picture is not None:
        click.echo(f"picture: {picture}")


@tokens.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--split", "splits", multiple=True, help="Only this split; may be given twice.")
@click.option("--dtype", type=click.Choice(["uint16", "int32", "int64"]),
              help="Type of the ids; else that of imported files, else Megatron's choice for the "
              "vocabulary.")  # fmt: skip
def export(shards: Path, out: Path, splits: tuple[str, ...], dtype: str | None) -> None:
    """Write the token SHARDS of tokens.encode as Megatron-LM's .bin and .idx files into OUT.

    Each source and split gets OUT/SOURCE-SPLIT.bin and .idx. The stage `tokens.import` reads them.
    """
    from puna.core.units import format_count
    from puna.tokens.export import export_megatron

    for one in export_megatron(shards, out, list(splits) or None, dtype):
        click.echo(
            f"{one.prefix}.bin, .idx: {format_count(one.n_docs)} documents, "
            f"{format_count(one.n_tokens)} tokens, {one.dtype}"
        )


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise click.BadParameter(f"{text!r} is not NAME=PATH", param_hint="--source")
    return name, Path(path)


def _printable(piece: bytes) -> str:
    """Show a piece of text in quotes; bytes that are part of a character as hexadecimals."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return "<" + piece.hex(" ") + ">"
