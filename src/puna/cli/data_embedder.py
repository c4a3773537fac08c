"""``puna data embedder``: make and examine embedders for semantic deduplication."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from puna.cli.common import config_of


@click.group(no_args_is_help=True)
def embedder() -> None:
    """Embedders for `data.semantic`: distil a static one, find its threshold.

    A PLACE is a file, a folder or a pattern of any format that `data.ingest` reads, or the folder
    of a finished stage, of which `@` chooses sources: runs/web/data.dedup@news,blogs.
    """


def _texts(places: tuple[str, ...], text_field: str) -> Iterator[str]:
    from puna.data.quality.examples import Fields, read_place

    fields = Fields(text=text_field)
    return (item.text for place in places for item in read_place(place, fields))


@embedder.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--documents", multiple=True, metavar="PLACE",
              help="Documents to fit it to, best those to be deduplicated.")  # fmt: skip
@click.option("--text-field", default="text", show_default=True, help="Field of the text.")
def distil(
    model: Path, out: Path, overrides: tuple[str, ...], documents: tuple[str, ...], text_field: str
) -> None:
    """Make a static embedder, OUT, of the sentence-transformers folder MODEL.

    Nothing is downloaded. A few minutes on a CPU with --documents; without, the embedder is less
    like its teacher. Keys: dim, sample, count, passage_chars, sif, device, seed.
    """
    from puna.data.semantic.distil import DistilConfig
    from puna.data.semantic.distil import distil as make

    cfg = config_of(DistilConfig, overrides)
    record = make(model, out, cfg, _texts(documents, text_field))
    click.echo(f"{record['n_tokens']:,} tokens, {cfg.dim} dimensions, {record['seconds']:.0f} s")
    if record["fitted_to"]:
        click.echo(
            f"cosine with the encoder on passages that the fit has not seen: "
            f"{record['agreement_after']:.3f} ({record['agreement_before']:.3f} without the fit)"
        )
    click.echo(f"digest {record['digest']}")
    click.secho(f"{out}", fg="green")


@embedder.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="EMBEDDER")
@click.argument("places", nargs=-1, required=True, metavar="PLACE...")
@click.option("--sample", default=2000, show_default=True, help="Documents to look at.")
@click.option("--seed", default=0, show_default=True, help="Seed of the pairs.")
@click.option("--device", default="auto", show_default=True, help="Where an encoder runs.")
@click.option("--text-field", default="text", show_default=True, help="Field of the text.")
def threshold(
    folder: Path, places: tuple[str, ...], sample: int, seed: int, device: str, text_field: str
) -> None:
    """Print what cosines documents have that are no duplicates: the ground for `threshold`."""
    from puna.data.semantic.embedder import load_embedder
    from puna.data.semantic.passages import Passages
    from puna.data.semantic.stage import SemanticConfig
    from puna.data.semantic.thresholds import false_positive_thresholds

    defaults = SemanticConfig.model_fields
    passages = Passages(defaults["passage_tokens"].default, defaults["passages"].default)
    loaded = load_embedder(folder, passages, device, n_threads=0)
    found = false_positive_thresholds(loaded, _texts(places, text_field), sample, seed)
    click.echo(json.dumps(found, indent=2))
