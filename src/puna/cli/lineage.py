"""``puna lineage``: which documents a training step read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

EXCERPT_CHARS = 160


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", required=True, type=int, help="Step number, from 0.")
@click.option("--stage", default="train.pretrain", show_default=True, help="Training stage.")
@click.option("--row", type=int, help="Only this row of the batch.")
@click.option("--text", is_flag=True, help="Show the beginning of each segment's text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line per row.")
def lineage(run: Path, step: int, stage: str, row: int | None, text: bool, as_json: bool) -> None:
    """Print the documents behind the batch of a step of RUN (a folder such as runs/demo).

    Each line is a segment of a row: the document's id, its source, the range of its tokens and its
    path in the source.
    """
    from puna.core.errors import PunaError
    from puna.tokens.lineage import find_documents, step_lineage

    rows = step_lineage(run, step, stage)
    if row is not None:
        if not 0 <= row < len(rows):
            raise PunaError(
                f"step {step} has no row {row}", f"give a row from 0 to {len(rows) - 1}"
            )
        rows = [rows[row]]
    ids = {segment["document_id"] for entry in rows for segment in entry["segments"]}
    documents = find_documents(run, ids, with_text=text)
    tokenizer = _tokenizer(run) if text else None
    for entry in rows:
        for segment in entry["segments"]:
            record = documents.get(segment["document_id"])
            if record is not None:
                segment["path"] = record.path
                if tokenizer is not None and record.text is not None:
                    segment["text"] = _excerpt(tokenizer, record.text, segment)
        if as_json:
            click.echo(json.dumps({"step": step, **entry}, ensure_ascii=False))
        else:
            _print_row(entry)
    if not as_json:
        click.echo(f"step {step} of {stage}: {len(rows)} rows, {len(ids)} documents")


def _print_row(entry: dict[str, Any]) -> None:
    click.echo(f"row {entry['row']}")
    for segment in entry["segments"]:
        start, end = segment["tokens"]
        path = segment.get("path", "(document not in data.split)")
        click.echo(
            f"  {segment['document_id']}  {segment['source']:<12}  "
            f"tokens {f'{start}-{end}':<13}  {path}"
        )
        if segment.get("text"):
            click.echo(f"    {segment['text']}")


def _tokenizer(run: Path) -> Tokenizer:
    from puna.tokens.tokenizer import load_tokenizer

    made_by = ("tokens.train", "tokens.use", "tokens.import")
    folders = [run / name for name in made_by if (run / name).is_dir()]
    return load_tokenizer(folders[0] if folders else run / made_by[0])


def _excerpt(tokenizer: Tokenizer, text: str, segment: dict[str, Any]) -> str:
    """Return the beginning of a segment's text on one line."""
    if "pair_id" not in segment:  # else the tokens are of a conversation made from the document
        start, end = segment["tokens"]
        ids = tokenizer.encode(text, bos=True, eos=True)[start:end]
        text = tokenizer.decode(ids[:EXCERPT_CHARS], skip_special=True)
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARS else line[: EXCERPT_CHARS - 1] + "…"
