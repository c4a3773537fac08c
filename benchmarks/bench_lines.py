"""Line rewriting and decontamination: rates per CPU second, recall and precision on planted truth.

    python benchmarks/bench_lines.py [--mb 64] [--examples 2000]

The corpus is real text of this machine (`/usr/share/doc`, Python's library and installed packages;
`--root` names other folders). Into it are planted: lines that occur 3, 6, 7, 20 and 200 times, with
white space varied; long lines that repeat themselves; documents of random words; and evaluation
examples, taken from files that are not in the corpus: verbatim, in capital letters without
punctuation, cut off after half. As many examples are not planted.

The truth does not rest on the plan alone, because real text repeats itself: a plain Python count of
all lines, and a plain Python search for the examples' n-grams in a part of the corpus, say what had
to be found; they are also the peers of the speeds.
"""

from __future__ import annotations

import argparse
import random
import re
import string
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from bench_data import cpu_per_mb

from puna.core.ledger import Ledger
from puna.data.decontaminate import DecontaminateConfig, decontaminate
from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.index import NgramRule, build_index, hash_index, load_index
from puna.data.decontaminate.kernels import find_examples
from puna.data.kernels.buffers import Texts, texts_from
from puna.data.kernels.repetition import measure_repetition
from puna.data.lines import LinesConfig, rewrite_lines
from puna.data.lines.kernels import (
    count_keys,
    fold_table,
    long_lines,
    mark_frequent,
    scan_lines,
    without_lines,
)
from puna.data.lines.tokens import count_tokens, divergence, log_distribution
from puna.data.schema import dump_metadata
from puna.data.testing import kept_rows, make_documents, rejected_rows

MB = 1e6
SUFFIXES = {".py", ".txt", ".md", ".rst", ".html", ".pyi", ".h", ".js", ""}
PART_MB = 4
"""Part of the corpus that plain Python searches for examples."""


@dataclass
class Corpus:
    """Documents and what was planted in them.

    Attributes:
        texts: (source, path, text) of each document.
        lines: Planted line -> how often.
        logs: Planted lines that repeat themselves.
        outliers: Paths of planted documents of random words.
        examples: Evaluation examples.
        planted: Example -> how it was planted.
    """

    texts: list[tuple[str, str, str]]
    lines: dict[str, int] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    outliers: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    planted: dict[int, str] = field(default_factory=dict)


def default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path("/usr/share/doc"), Path(paths["stdlib"]), Path(paths["purelib"])]


def read_files(roots: list[Path], n_mb: float) -> Iterator[tuple[str, str, str]]:
    """Yield text files of the roots in turn, each root up to its part of the size."""
    for root in roots:
        size, unreadable = 0, 0
        for path in sorted(root.rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                unreadable += 1
                continue
            if len(text) < 500 or "\0" in text:
                continue
            yield root.name, str(path), text
            size += len(text.encode())
            if size > n_mb * MB / len(roots):
                break
        print(f"{root}: {size / MB:.1f} MB, {unreadable} files not UTF-8", file=sys.stderr)


def sentence(rng: random.Random, n_words: int) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))
                    for _ in range(n_words))  # fmt: skip


def make_corpus(roots: list[Path], n_mb: float, n_examples: int) -> Corpus:
    """Read real documents, keep every tenth for examples, plant into the others."""
    rng = random.Random(7)
    files = list(read_files(roots, n_mb))
    held, texts = files[::10], [one for i, one in enumerate(files) if i % 10]
    corpus = Corpus(texts)
    additions: dict[int, list[str]] = {}

    def place(text: str) -> None:
        additions.setdefault(rng.randrange(len(texts)), []).append(text)

    for count in (3, 6, 7, 20, 200):
        for _ in range(10):
            line = sentence(rng, 8)
            corpus.lines[line] = count
            for _ in range(count):
                place(line.replace(" ", " " * rng.randint(1, 3)) + " " * rng.randint(0, 2))
    for _ in range(50):
        words = sentence(rng, 6)
        corpus.logs.append(" ".join(f"{words} {rng.randint(0, 9)}" for _ in range(20)))
        place(corpus.logs[-1])
    _plant_examples(rng, corpus, held, n_examples, place)
    for index, added in additions.items():
        source, path, text = texts[index]
        texts[index] = (source, path, text.rstrip("\n") + "\n" + "\n".join(added) + "\n")
    for index in range(50):
        corpus.outliers.append(f"random/{index}")
        texts.append((roots[0].name, f"random/{index}", sentence(rng, 400)))
    return corpus


def _plant_examples(
    rng: random.Random, corpus: Corpus, held: list[tuple[str, str, str]], n_examples: int,
    place: Callable[[str], None],
) -> None:  # fmt: skip
    """Take passages of 8 to 120 words from files outside of the corpus, plant every second."""
    seen: set[tuple[str, ...]] = set()
    pool = [text.split() for _, _, text in held if len(text.split()) > 200]
    while len(corpus.examples) < n_examples:
        words = rng.choice(pool)
        n = rng.choice([9, 11, 30, 60, 120])
        start = rng.randrange(len(words) - n)
        text = " ".join(words[start : start + n])
        if len(plain_words(text)) >= 8 and tuple(plain_words(text)) not in seen:
            corpus.examples.append(text)
            seen.add(tuple(plain_words(text)))
    for index in range(0, n_examples, 2):
        text, how = corpus.examples[index], rng.choice(["verbatim", "capitals", "half"])
        if how == "half" and len(plain_words(text)) < 30:
            how = "verbatim"
        corpus.planted[index] = how
        if how == "capitals":
            text = " -- ".join(plain_words(text)).upper()
        elif how == "half":
            text = " ".join(text.split()[: len(text.split()) // 2 + 1])
        place(text)


def plain_words(text: str) -> list[str]:
    """Words as decontamination defines them, for text in scripts with spaces."""
    return re.findall(r"[^\W_]+", text.lower())


def plain_line(line: str) -> str:
    return " ".join(re.split("[\x00-\x20\u00a0\u2000-\u200b\u3000]+", line)).strip()


def rate(work: Callable[[], object], n_bytes: int, repeats: int = 3) -> float:
    """MB per CPU second, the best of some runs after one that compiles."""
    return 1 / cpu_per_mb(work, n_bytes, repeats)


def bench_kernels(texts: Texts, folder: Path, examples: list[str]) -> None:
    n_bytes, n = int(texts.offsets[-1]), len(texts)
    alive, zeros, fold = np.ones(n, bool), np.zeros(n, np.int64), fold_table(False, False)
    lines = scan_lines(texts, zeros, alive, fold, squeeze=True, min_bytes=1)
    table, used = np.zeros(1 << 20, np.uint64), np.zeros(1 << 20, np.int64)
    cut = np.zeros(len(lines.keys), bool)
    _, view = long_lines(texts, lines, 200)
    is_line = np.arange(len(view)) % 2 == 1
    log_q = log_distribution(count_tokens(texts, zeros, 1))
    folder.mkdir()
    index = load_examples(folder, examples)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("hash lines", lambda: scan_lines(texts, zeros, alive, fold, squeeze=True, min_bytes=1)),
        ("count line keys", lambda: count_keys(lines.keys, lines.doc_lines)),
        (
            "look lines up",
            lambda: mark_frequent(lines.keys, lines.doc_lines, table, used, 0, False),
        ),
        ("write texts anew", lambda: without_lines(texts, lines, cut)),
        ("n-grams of long lines", lambda: measure_repetition(view, is_line)),
        ("count tokens", lambda: count_tokens(texts, zeros, 1)),
        ("divergence", lambda: divergence(texts, zeros, log_q, 100)),
        ("find examples", lambda: find_examples(texts, index)),
    ]
    print("\nkernels, MB per CPU second of one core")
    for name, work in cases:
        print(f"  {name:24s} {rate(work, n_bytes):8.0f}")


def load_examples(folder: Path, examples: list[str]):
    rule = NgramRule(13, 8, 10, 4)
    build_index((Example("e", i, "", (text,)) for i, text in enumerate(examples)), rule, folder)
    return load_index(folder, hash_index(folder)).index


def bench_lines(corpus: Corpus, tmp: Path) -> None:
    """Run the stage and compare what it cut with a plain count of all lines."""
    documents = make_documents(tmp / "docs", corpus.texts, n_shards=4)
    n_bytes = sum(len(text.encode()) for _, _, text in corpus.texts)
    out = tmp / "lines"
    out.mkdir()
    cfg = LinesConfig(workers=1, line_coverage=1, kl_max_nats=0, min_left_bytes=0)
    start = time.process_time()
    metrics = rewrite_lines(cfg, {"documents": documents}, out, Ledger(None))
    per_s = n_bytes / MB / (time.process_time() - start)
    print(f"\ndata.lines, deduplication only: {per_s:.0f} MB per CPU second with Parquet, DuckDB "
          f"and checks; {metrics['frequent_lines']:,} frequent lines, "
          f"{1 - metrics['kept_bytes'] / n_bytes:.1%} of the bytes cut")  # fmt: skip
    start = time.process_time()
    counts = Counter(plain_line(line) for _, _, text in corpus.texts for line in text.split("\n"))
    print(f"  plain Python count: {n_bytes / MB / (time.process_time() - start):.1f} MB/CPU s")
    kept = {row["path"]: row["text"] for row in kept_rows(out)}
    wrong = 0
    for _, path, text in corpus.texts:
        left = [line for line in text.split("\n") if not 6 < counts[plain_line(line)] < 10**9
                or not plain_line(line)]  # fmt: skip
        wrong += kept[path].split("\n") != left and kept[path].rstrip("\n") != "\n".join(
            left
        ).rstrip("\n")
    print(f"  documents that differ from the plain count's: {wrong} of {len(corpus.texts):,}")
    left = Counter(plain_line(line) for text in kept.values() for line in text.split("\n"))
    for count in (3, 6, 7, 20, 200):
        lines = [line for line, n in corpus.lines.items() if n == count]
        print(f"  planted {count:3d} times: {sum(left[line] for line in lines):4d} of "
              f"{count * len(lines):4d} occurrences left")  # fmt: skip
    print("  most frequent:", *(f"{row['n']} x {row['text'][:60]!r}"
                                for row in metrics["top_lines"][:8]), sep="\n    ")  # fmt: skip


def bench_outliers(corpus: Corpus, tmp: Path) -> None:
    """Run the stage without deduplication: repetitive lines, documents of other words."""
    documents = make_documents(tmp / "docs2", corpus.texts, n_shards=4)
    out = tmp / "outliers"
    out.mkdir()
    start = time.process_time()
    rewrite_lines(LinesConfig(workers=1, units=()), {"documents": documents}, out, Ledger(None))
    n_bytes = sum(len(text.encode()) for _, _, text in corpus.texts)
    print(f"\ndata.lines, n-gram coverage and divergence: "
          f"{n_bytes / MB / (time.process_time() - start):.0f} MB per CPU second")  # fmt: skip
    kept, dropped = kept_rows(out), rejected_rows(out)
    n_cut = sum(row["ngram_lines_cut"] for row in [*kept, *dropped])
    missed = sum(log in row["text"] for row in kept for log in corpus.logs)
    print(f"  repetitive lines: {len(corpus.logs) - missed} of {len(corpus.logs)} planted ones "
          f"cut, {n_cut - len(corpus.logs) + missed} others cut")  # fmt: skip
    outliers = set(corpus.outliers)
    by_kl = [row for row in dropped if row["reason"] == "lines.kl_outlier"]
    found = [row for row in by_kl if row["path"] in outliers]
    print(f"  documents of random words: {len(found)} of {len(outliers)} dropped; others dropped: "
          f"{len(by_kl) - len(found)} of {len(corpus.texts) - len(outliers):,}")  # fmt: skip
    for row in sorted((r for r in by_kl if r["path"] not in outliers), key=lambda r: -r["value"])[
        :8
    ]:
        print(f"    {row['value']:.2f} nats {row['path'][-70:]}")
    _quantiles(corpus)


def _quantiles(corpus: Corpus) -> None:
    names = sorted({source for source, _, _ in corpus.texts})
    groups = np.array([names.index(source) for source, _, _ in corpus.texts])
    texts = texts_from([text for _, _, text in corpus.texts])
    log_q = log_distribution(count_tokens(texts, groups, len(names)))
    nats, n_words = divergence(texts, groups, log_q, 100)
    planted = np.array([path in set(corpus.outliers) for _, path, _ in corpus.texts])
    for low, high in ((50, 200), (200, 1000), (1000, 10000), (10000, 10**9)):
        here = nats[~planted & (n_words >= low) & (n_words < high)]
        if len(here):
            values = np.quantile(here, [0.5, 0.9, 0.99, 0.999, 1])
            print(f"  nats of {len(here):5d} real documents with {low} to {high} words, quantiles "
                  f".5 .9 .99 .999 1: {' '.join(f'{v:.2f}' for v in values)}")  # fmt: skip
    print(f"  nats of planted ones: {nats[planted].min():.2f} to {nats[planted].max():.2f}")


def bench_decontaminate(corpus: Corpus, tmp: Path) -> None:
    """Run the stage, then search a part of the corpus in plain Python."""
    documents = make_documents(tmp / "docs3", corpus.texts, n_shards=4)
    path, out = tmp / "set.jsonl", tmp / "clean"
    path.write_text("".join(dump_metadata({"text": text}) + "\n" for text in corpus.examples))
    out.mkdir()
    n_bytes = sum(len(text.encode()) for _, _, text in corpus.texts)
    cfg = DecontaminateConfig(workers=1, sets=({"name": "set", "paths": str(path)},))
    start = time.process_time()
    metrics = decontaminate(cfg, {"documents": documents}, out, Ledger(None))
    print(f"\ndata.decontaminate: {n_bytes / MB / (time.process_time() - start):.0f} MB per CPU "
          f"second with Parquet, DuckDB and checks\n  {metrics['sets']['set']}, "
          f"{metrics['in_docs'] - metrics['kept_docs']:,} of {metrics['in_docs']:,} documents "
          "dropped")  # fmt: skip
    hits = pq.read_table(out / "hits.parquet").to_pylist()
    found = {hit["example"] for hit in hits}
    for how in ("verbatim", "capitals", "half"):
        of_kind = [index for index, kind in corpus.planted.items() if kind == how]
        print(f"  planted {how}: {len(found.intersection(of_kind))} of {len(of_kind)} found")
    print(
        f"  not planted, but found (real text that both have): {len(found - set(corpus.planted))}"
    )
    _compare_with_plain(corpus, hits)


def _compare_with_plain(corpus: Corpus, hits: list[dict]) -> None:
    """Search a part of the documents for n-grams in plain Python and compare all decisions."""
    grams: dict[tuple[str, ...], set[int]] = {}
    seen: set[tuple[str, ...]] = set()
    for index, text in enumerate(corpus.examples):
        words = tuple(plain_words(text))
        if words in seen:
            continue
        seen.add(words)
        for i in range(max(len(words) - 12, 1)):
            grams.setdefault(words[i : i + 13], set()).add(index)
    grams = {gram: owners for gram, owners in grams.items()
             if len(owners) <= 10 and len(set(gram)) >= 4}  # fmt: skip
    sizes = sorted({len(gram) for gram in grams})
    part, size = [], 0
    for one in corpus.texts[:: max(1, len(corpus.texts) // 800)]:
        if size < PART_MB * MB and all(ord(char) < 0x370 for char in one[2]):
            part.append(one)
            size += len(one[2].encode())
    start = time.process_time()
    truth = set()
    for _, path, text in part:
        words = plain_words(text)
        for n in sizes:
            for gram in zip(*(words[i:] for i in range(n)), strict=False):
                truth |= {(path, example) for example in grams.get(gram, ())}
    seconds = time.process_time() - start
    paths = {document_path: None for _, document_path, _ in part}
    ours = {(hit["path"], hit["example"]) for hit in hits if hit["path"] in paths}
    print(f"  plain Python search of {size / MB:.1f} MB: {size / MB / seconds:.1f} MB per CPU "
          f"second; pairs of document and example: {len(truth)} there, {len(ours)} by the stage, "
          f"{len(truth & ours)} in both")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=64)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--root", type=Path, action="append")
    arguments = parser.parse_args()
    corpus = make_corpus(arguments.root or default_roots(), arguments.mb, arguments.examples)
    texts = texts_from([text for _, _, text in corpus.texts])
    print(f"{len(texts):,} documents, {texts.offsets[-1] / MB:.1f} MB")
    with tempfile.TemporaryDirectory() as name:
        bench_kernels(texts, Path(name) / "index", corpus.examples)
        bench_lines(corpus, Path(name))
        bench_outliers(corpus, Path(name))
        bench_decontaminate(corpus, Path(name))


if __name__ == "__main__":
    main()
