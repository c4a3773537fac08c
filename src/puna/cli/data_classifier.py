"""``puna data classifier``: train, evaluate and apply classifiers of documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.common import config_of

if TYPE_CHECKING:
    from puna.data.quality.examples import Example, Fields


@click.group(no_args_is_help=True)
def classifier() -> None:
    """Quality, perplexity, domains and grades: train, evaluate, apply.

    A PLACE is a file, a folder or a pattern of any format that `data.ingest` reads, or the folder
    of a finished stage, of which `@` chooses sources: runs/web/data.filter@news,blogs.
    """


def _places(name: str, text: str, metavar: str = "PLACE") -> Callable[[Any], Any]:
    return click.option(f"--{name}", multiple=True, metavar=metavar, help=text)


def example_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name examples."""
    options = [
        _places("positive", "Good texts."),
        _places("negative", "Bad texts."),
        _places("label", "Texts of a label, for a classifier of several labels.", "NAME=PLACE"),
        _places("labelled", "Records that hold their label: for several labels, or for `positive` "
                "and `negative`."),
        _places("scores", "Texts with grades from people or a language model."),
        _places("documents", "Documents that `--scores` names by id instead of giving their text."),
        click.option("--text-field", default="text", show_default=True, help="Field of the text."),
        click.option("--score-field", default="score", show_default=True, help="Field of scores."),
        click.option("--label-field", default="label", show_default=True, help="Field of labels."),
        click.option("--weight-field", default="weight", show_default=True,
                     help="Field that says how much a labelled or scored record counts."),
        click.option("--id-field", default="id", show_default=True, help="Field of ids."),
        click.option("--source-field", default="source", show_default=True,
                     help="Field that names the source of a text, for the tables per source."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _fields(given: dict[str, Any]) -> Fields:
    from puna.data.quality.examples import Fields

    names = ("text", "score", "id", "source", "label", "weight")
    return Fields(**{name: given.pop(f"{name}_field") for name in names})


def _examples(given: dict[str, Any]) -> list[Example]:
    from puna.data.quality.examples import gather

    fields = _fields(given)
    return gather(labels=given.pop("label"), fields=fields, **given)


@classifier.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@example_options
def train(out: Path, overrides: tuple[str, ...], **examples: Any) -> None:
    r"""Train a classifier and measure it on texts that it has not seen; write the folder OUT.

    With --positive and --negative a quality classifier, with --label or --labelled several labels
    (domains), with --scores a student of grades. `kind` is one of:

    \b
    fasttext     words and word n-grams (the default)
    ngram        a language model of the positives
    embedding    a head over an embedder that stays as it is: embedder=FOLDER
    transformer  an encoder, fine-tuned with its head: embedder=FOLDER
    lexical      a head over counts of code, formulas and steps

    Other keys: dim, epochs, lr, word_ngrams, min_count, n_buckets, order, preparation, lexical,
    passage_tokens, passages, device, tune_epochs, tune_lr, head_lr, tune_batch, weight_decay,
    warmup, evaluations, patience, max_bytes, calibration, calibration_share, test_share, raters,
    unseen_sources, keep_from, n_resamples, seed.
    """
    from puna.data.quality.train import TrainConfig, train_classifier

    cfg = config_of(TrainConfig, overrides)
    record = train_classifier(cfg, _examples(examples), out)
    _print_record(record)
    click.secho(f"\n{out}", fg="green")


def _print_record(record: dict[str, Any]) -> None:
    """Print what a training has found."""
    texts, parts = record["data"]["texts"], record["data"]["parts"]
    click.echo(
        f"{texts['used']:,} of {texts['read']:,} texts ({texts['duplicates']:,} copies, "
        f"{texts['conflicts']:,} with contradicting labels, {texts['empty']:,} empty): "
        + ", ".join(f"{name} {n:,}" for name, n in parts.items())
    )
    raters = record["data"]["raters"]
    if raters.get("texts"):
        click.echo("several raters: " + ", ".join(f"{k} {_cell(v)}" for k, v in raters.items()))
    for part, report in record["metrics"].items():
        click.secho(f"\n{part}", bold=True)
        _print_report(report)
    for row in record.get("kept_share_thresholds", ()):
        click.echo(
            f"  to keep {row['share']:>4.0%}: threshold {row['threshold']:.6g}, "
            f"precision {row['precision']:.3f}, recall {row['recall']:.3f}"
        )


@classifier.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_places("texts", "Texts that the teacher scores; they need no labels.")
@click.option("--positive-label", help="For a model file of others with two labels: the good one.")
@example_options
def distil(
    teacher: Path, out: Path, overrides: tuple[str, ...], texts: tuple[str, ...],
    positive_label: str | None, **examples: Any,
) -> None:  # fmt: skip
    """Train a fast student, OUT, on what the classifier TEACHER says of --texts.

    With labelled examples (given as for `train`), both are measured on them. Keys: those of
    `train`; `kind=fasttext` or `kind=embedding` with a static embedder are fast.
    """
    from puna.core.errors import PunaError
    from puna.data.quality.classifier import load_classifier
    from puna.data.quality.distil import distil_classifier
    from puna.data.quality.examples import Fields, read_place
    from puna.data.quality.train import TrainConfig

    cfg = config_of(TrainConfig, overrides)
    if not texts:
        raise PunaError("there is no text to learn from", "give --texts")
    fields = Fields(text=examples["text_field"], source=examples["source_field"])
    items = [item for place in texts for item in read_place(place, fields)]
    given = any(examples[name] for name in ("positive", "negative", "label", "labelled", "scores"))
    labelled = _examples(examples) if given else []
    judged = load_classifier(teacher, positive_label)
    record = distil_classifier(cfg, judged, items, out, labelled)
    _print_record(record)
    found = record["teacher"]
    click.secho("\nstudent and teacher, on texts that the student has not seen", bold=True)
    _print_report(found["agreement"])
    _print_rows(found["agreement"].get("kept_by_both", []))
    for name, report in found.get("reports", {}).items():
        click.secho(f"\n{name}, on the labelled texts", bold=True)
        _print_report(report)
    click.secho(f"\n{out}", fg="green")


@classifier.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@example_options
@click.option("--positive-label", help="For a model file of others with two labels: the good one.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def evaluate(
    model: Path, overrides: tuple[str, ...], positive_label: str | None, as_json: bool,
    **examples: Any,
) -> None:  # fmt: skip
    """Measure a classifier on other labelled texts: AUC, errors, calibration, bias per source.

    Keys: n_resamples and seed of the bootstrap, keep_from of grades.
    """
    from puna.data.quality.classifier import load_classifier
    from puna.data.quality.train import TrainConfig, evaluate_on

    cfg = config_of(TrainConfig, overrides)
    report = evaluate_on(load_classifier(model, positive_label), _examples(examples), cfg)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print_report(report)


@classifier.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("places", nargs=-1, required=True, metavar="PLACE...")
@click.option("--out", type=click.Path(path_type=Path),
              help="Write id, source and score to a file, .jsonl or .parquet.")  # fmt: skip
@click.option("--keep-share", type=click.FloatRange(0, 1, min_open=True),
              help="Also tell the threshold that keeps this share of the documents.")  # fmt: skip
@click.option("--positive-label", help="For a model file of others with two labels: the good one.")
@click.option("--text-field", default="text", show_default=True, help="Field of the text.")
@click.option("--source-field", default="source", show_default=True, help="Field of the source.")
def apply(
    model: Path, places: tuple[str, ...], out: Path | None, keep_share: float | None,
    positive_label: str | None, text_field: str, source_field: str,
) -> None:  # fmt: skip
    """Score documents and print what each source gets."""
    import numpy as np

    from puna.core.errors import PunaError
    from puna.data.quality.apply import score_texts, write_scores
    from puna.data.quality.classifier import load_classifier
    from puna.data.quality.examples import Fields, read_place
    from puna.data.quality.measure import threshold_of

    judged = load_classifier(model, positive_label)
    if keep_share is not None and judged.task == "labels":
        raise PunaError(f"{model} gives labels, of which no share can be kept",
                        "leave out --keep-share")  # fmt: skip
    fields = Fields(text=text_field, source=source_field)
    scored = score_texts(judged, (item for place in places for item in read_place(place, fields)))
    if out is not None:
        write_scores(scored, out)
    _print_rows(scored.by_source())
    click.echo(f"{len(scored.ids):,} documents, {scored.n_bytes:,} bytes (task {judged.task})")
    if keep_share is not None:
        lower = judged.task == "bits"
        found = threshold_of(np.array(scored.values), keep_share, lower_is_better=lower)
        key = "max" if lower else "min"
        click.echo(f"to keep {keep_share:.1%} of them: {key} = {found!r}")


def _print_report(report: dict[str, Any]) -> None:
    """Print numbers as lines and tables per source as tables."""
    spans = report.get("intervals_95", {})
    for name, value in report.items():
        if isinstance(value, int | float | None):
            span = f"   95 %: {spans[name][0]:.4f} to {spans[name][1]:.4f}" if name in spans else ""
            click.echo(f"  {name:<26}{_cell(value)}{span}")
    flat = {"confusion": report.get("confusion"), "bits per byte": report.get("bits_per_byte")}
    for name, counts in flat.items():
        if counts and "rows" in counts:
            _print_confusion(counts)
        elif counts:
            click.echo(f"  {name:<26}" + ", ".join(f"{k} {_cell(v)}" for k, v in counts.items()))
    if "calibration" in report:
        click.echo(f"  {'calibration error':<26}{report['calibration']['ece']:.4f}")
        _print_rows(report["calibration"]["table"])
    for key in ("labels", "sources"):
        if key in report:
            _print_rows(report[key])


def _print_confusion(counts: dict[str, Any]) -> None:
    """Print a matrix of true (rows) and predicted labels (columns)."""
    rows = zip(counts["rows"], counts["docs"], strict=True)
    _print_rows([
        {"true / predicted": str(name)}
        | {str(column): n for column, n in zip(counts["columns"], row, strict=True)}
        for name, row in rows
    ])  # fmt: skip


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=SIMPLE)
    for name, value in rows[0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
