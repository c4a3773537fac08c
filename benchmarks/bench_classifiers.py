"""Students, transformers, domains and finders of code and formulas, measured on real text.

    python benchmarks/debian_corpus.py --cache CACHE
    python benchmarks/bench_classifiers.py --cache CACHE --model MODEL_FOLDER --static STATIC_FOLDER

The model is a sentence-transformers folder (see `bench_semantic.py`), the static embedder one that
`puna data embedder distil` made of it. Three parts (`--only` chooses one):

- `quality`: the texts of `bench_quality.py`, of which few have a label (`--labels`). Every kind of
  classifier learns from these; then the transformer teaches a student on texts without labels. The
  AUC is that of the test part and of sources that neither labels nor texts came from.
- `domains`: documents of the corpus by what their package is about; some packages are unseen.
- `finders`: pages of HTML whose markup tells what they hold: `code`, at least a quarter of the text
  in <pre> against none; `maths`, an element of class math or <math> against none in the same
  packages. The classifiers see the extracted text without the markup.

Rates are MB of text per second of CPU time; on the texts of the quality part.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import xxhash
from bench_quality import UNSEEN, collect
from rich.console import Console
from rich.table import Table

from puna.data.kernels.buffers import texts_from
from puna.data.quality.classifier import Classifier, load_classifier
from puna.data.quality.distil import distil_classifier
from puna.data.quality.examples import POSITIVE, Example
from puna.data.quality.measure import Ranking
from puna.data.quality.train import TrainConfig, train_classifier

DOMAINS = {
    "programming": ("rust-doc", "cppreference-doc-en-html", "python-pandas-doc", "nodejs-doc"),
    "numerics": ("python-scipy-doc", "octave-doc"),
    "office": ("libreoffice-help-en-us",),
    "system": ("man_en", "linux-doc-6.12", "installation-guide-amd64", "debian-handbook",
               "harden-doc"),
    "dictionary": ("dict-foldoc", "dict-jargon"),
    "quotations": ("fortunes",),
}  # fmt: skip
UNSEEN_DOMAINS = ("nodejs-doc", "octave-doc", "harden-doc", "dict-jargon")
MARKED = (
    "cppreference-doc-en-html", "python-scipy-doc", "python-pandas-doc", "linux-doc-6.12",
    "cmake-doc", "sqlite3-doc", "octave-doc", "qtbase5-doc-html",
)  # fmt: skip
UNSEEN_MARKED = ("sqlite3-doc", "octave-doc", "qtbase5-doc-html")
_PRE = re.compile(r"<pre\b.*?</pre>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_MATHS = re.compile(r'<math\b|class="(?:[^"]* )?math[ "]', re.IGNORECASE)
MAX_CHARS, MIN_CHARS = 20_000, 300


def place(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def some(items: list[Example], n: int) -> list[Example]:
    """Choose examples by the hash of their texts."""
    return sorted(items, key=lambda item: place(item.text))[:n]


def documents(corpus: Path, sources: tuple[str, ...], n: int) -> list[Example]:
    """Read at most ``n`` documents of every source, chosen by hash; the path is the id."""
    found: dict[str, list[Example]] = {name: [] for name in sources}
    wanted = pads.field("source").isin(list(sources))
    scan = pads.dataset(corpus / "documents")
    for batch in scan.to_batches(columns=["path", "source", "text"], filter=wanted):
        for row in batch.to_pylist():
            if len(row["text"]) >= MIN_CHARS and "#edit" not in row["path"]:
                item = Example(row["path"], row["source"], row["text"][:MAX_CHARS])
                found[row["source"]].append(item)
    return [item for items in found.values() for item in some(items, n)]


def rate(judged: Classifier, texts: list[str]) -> float:
    given = texts_from(texts)
    judged.score(texts_from(texts[:2]))
    start = time.process_time()
    judged.score(given)
    return len(given.data) / 1e6 / (time.process_time() - start)


def auc_of(judged: Classifier, items: list[Example], positive: str = POSITIVE) -> float:
    texts = texts_from([item.text for item in items])
    values = judged.model.raw(texts)
    values = values[:, 1] - values[:, 0] if values.shape[1] > 1 else values[:, 0]
    return Ranking(values, np.array([item.label == positive for item in items])).auc()


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def quality(args: argparse.Namespace, work: Path, console: Console) -> None:
    """Few labels: every kind, and a student of the transformer."""
    items = collect(args.per_source)
    unseen = [item for item in items if item.source in UNSEEN]
    known = some([item for item in items if item.source not in UNSEEN], len(items))
    test, rest = known[: len(known) // 5], known[len(known) // 5 :]
    labelled, unlabelled = rest[: args.labels], rest[args.labels :]
    encoder = {"embedder": str(args.model), "passage_tokens": 128, "passages": 1}
    common = {"n_resamples": 0}
    kinds: dict[str, dict[str, Any]] = {
        "fasttext": {"kind": "fasttext"},
        "lexical": {"kind": "lexical"},
        "static": {"kind": "embedding", "embedder": str(args.static)},
        "static + lexical": {"kind": "embedding", "embedder": str(args.static), "lexical": True},
        "encoder, frozen": {"kind": "embedding", **encoder},
        "transformer": {"kind": "transformer", **encoder},
    }
    table = Table(title=f"Quality from {len(labelled):,} labels; {len(unlabelled):,} texts without",
                  title_justify="left")  # fmt: skip
    for column in ("classifier", "AUC test", "AUC unseen", "training s", "MB/s"):
        table.add_column(column, justify="right")

    def add(name: str, folder: Path, seconds: float) -> None:
        judged = load_classifier(folder)
        is_slow = name.startswith(("encoder", "transformer"))
        few = [item.text for item in test[: 100 if is_slow else 1000]]
        row = (name, f"{auc_of(judged, test):.4f}", f"{auc_of(judged, unseen):.4f}",
               f"{seconds:.1f}", f"{rate(judged, few):.2f}")  # fmt: skip
        table.add_row(*row)
        console.print("done:", *row)

    for name, settings in kinds.items():
        folder, cfg = work / name, TrainConfig(**common, **settings)
        add(name, folder, seconds_of(lambda c=cfg, f=folder: train_classifier(c, labelled, f)))
    teacher = load_classifier(work / "transformer")
    students = {name: kinds[name] for name in ("fasttext", "static + lexical")}
    for name, settings in students.items():
        folder, cfg = work / f"student {name}", TrainConfig(**common, **settings)
        texts = [*unlabelled, *labelled]
        spent = seconds_of(lambda c=cfg, f=folder, t=texts: distil_classifier(c, teacher, t, f))
        add(f"student: {name}", folder, spent)
        found = load_record(folder)["teacher"]["agreement"]
        overlap = {row["share"]: round(row["overlap"], 3) for row in found["kept_by_both"]}
        console.print(f"student {name}: Spearman {found['spearman']:.3f} with the teacher, kept by "
                      f"both {overlap}")  # fmt: skip
    cfg = TrainConfig(**common)
    spent = seconds_of(lambda: train_classifier(cfg, rest, work / "all"))
    add("fasttext, all labels", work / "all", spent)
    console.print(table)


def load_record(folder: Path) -> dict[str, Any]:
    from puna.data.quality.classifier import read_record

    return read_record(folder)


def domains(args: argparse.Namespace, work: Path, console: Console) -> None:
    """Several labels, held-out documents and unseen packages."""
    label = {source: name for name, sources in DOMAINS.items() for source in sources}
    items = documents(args.cache / "corpus", tuple(label), args.per_source)
    items = [replace(item, label=label[item.source]) for item in items]
    kinds: dict[str, dict[str, Any]] = {
        "fasttext": {"kind": "fasttext"},
        "static": {"kind": "embedding", "embedder": str(args.static)},
        "static + lexical": {"kind": "embedding", "embedder": str(args.static), "lexical": True},
    }
    for name, settings in kinds.items():
        cfg = TrainConfig(unseen_sources=UNSEEN_DOMAINS, **settings)
        folder = work / f"domains {name}"
        record = train_classifier(cfg, items, folder)
        speed = rate(load_classifier(folder), [item.text for item in items[:1000]])
        for part, report in record["metrics"].items():
            console.print(
                f"[bold]{name}, {part}[/]: {report['docs']:,} documents, accuracy "
                f"{report['accuracy']:.4f}, macro F1 {report['macro_f1']:.4f}, {speed:.1f} MB/s"
            )
            table = Table("label", "documents", "precision", "recall", *DOMAINS)
            confusion = dict(zip(report["confusion"]["rows"], report["confusion"]["docs"],
                                 strict=True))  # fmt: skip
            order = [report["confusion"]["columns"].index(one) for one in DOMAINS]
            for row in report["labels"]:
                numbers = [row["precision"], row["recall"]]
                table.add_row(row["label"], f"{row['docs']:,}",
                              *("-" if one is None else f"{one:.3f}" for one in numbers),
                              *(str(confusion[row["label"]][k]) for k in order))  # fmt: skip
            console.print(table)


def marked(args: argparse.Namespace) -> dict[str, list[Example]]:
    """Label pages by their markup: code and maths, against pages that have none."""
    found: dict[str, list[Example]] = {"code": [], "maths": []}
    for item in documents(args.cache / "corpus", MARKED, 4000):
        path = args.cache / "unpacked" / item.id
        if path.suffix != ".html" or not path.is_file():
            continue
        page = path.read_text("utf-8", "ignore")
        code = sum(len(_TAG.sub("", one)) for one in _PRE.findall(page)) / max(len(item.text), 1)
        if code >= 0.25 or (code == 0 and "<code" not in page):
            found["code"].append(replace(item, label="positive" if code else "negative"))
        has = bool(_MATHS.search(page))
        found["maths"].append(replace(item, label="positive" if has else "negative"))
    return found


def finders(args: argparse.Namespace, work: Path, console: Console) -> None:
    """Finders of code and formulas, on test documents and on unseen packages."""
    table = Table(title="Finders", title_justify="left")
    for column in ("finder", "classifier", "positives", "negatives", "AUC test", "precision",
                   "recall", "AUC unseen", "unseen positives", "MB/s"):  # fmt: skip
        table.add_column(column, justify="right")
    kinds: dict[str, dict[str, Any]] = {
        "fasttext": {}, "lexical": {"kind": "lexical"},
        "static + lexical": {"kind": "embedding", "embedder": str(args.static), "lexical": True},
    }  # fmt: skip
    for finder, items in marked(args).items():
        unseen = UNSEEN_MARKED
        if finder == "maths":  # the others hold next to none
            unseen = tuple(name for name in MARKED if name != "python-scipy-doc")
        for name, settings in kinds.items():
            cfg = TrainConfig(unseen_sources=unseen, n_resamples=0, **settings)
            folder = work / f"{finder} {name}"
            record = train_classifier(cfg, items, folder)
            test, late = record["metrics"]["test"], record["metrics"]["unseen"]
            counts = {label: sum(item.label == label for item in items)
                      for label in ("positive", "negative")}  # fmt: skip
            n_late = sum(row["positives"] for row in late["sources"])
            speed = rate(load_classifier(folder), [item.text for item in items[:1000]])
            right = test["confusion"]["true_positives"]
            precision = right / max(right + test["confusion"]["false_positives"], 1)
            recall = right / max(right + test["confusion"]["false_negatives"], 1)
            table.add_row(finder, name, *(f"{n:,}" for n in counts.values()),
                          f"{test['auc']:.4f}", f"{precision:.3f}", f"{recall:.3f}",
                          f"{late['auc']:.4f}" if late["auc"] is not None else "-", f"{n_late:,}",
                          f"{speed:.1f}")  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--static", type=Path, required=True)
    parser.add_argument("--per-source", type=int, default=800)
    parser.add_argument("--labels", type=int, default=600)
    parser.add_argument("--only", choices=("quality", "domains", "finders"))
    args, console = parser.parse_args(), Console(width=140)
    parts = {"finders": finders, "domains": domains, "quality": quality}
    with tempfile.TemporaryDirectory() as name:
        for part, run in parts.items():
            if args.only in (None, part):
                run(args, Path(name), console)


if __name__ == "__main__":
    main()
