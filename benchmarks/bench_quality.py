"""Quality of a fastText classifier and an n-gram model on real text, and their speed.

    python benchmarks/bench_quality.py [--per-source 800]

Good texts are reference documents of this machine: manual pages, docstrings of Python's library and
of installed packages, Perl's pods, README files. Bad ones are copyright files and licences,
changelogs, logs, tables and data files, script bundles, and two kinds made from the good texts:
menus (headings and titles in a row) and prose whose words are shuffled.

Some sources of both kinds are only measured on (`unseen`): their AUC tells what the classifier does
with text of a new origin. Each source has at most `--per-source` texts, chosen by hash. Rates are
per second of CPU time of one thread.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import xxhash

from puna.data.extract import extract
from puna.data.kernels.buffers import Texts, texts_from
from puna.data.quality.classifier import Classifier, load_classifier
from puna.data.quality.examples import NEGATIVE, POSITIVE, Example, distinct
from puna.data.quality.measure import Ranking
from puna.data.quality.prepare import prepare
from puna.data.quality.train import TrainConfig, divide, train_classifier
from puna.data.readers.compression import decompressed
from puna.data.readers.records import UnusableError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = Path(sysconfig.get_paths()["purelib"])
MIN_BYTES, MAX_BYTES = 300, 30_000
UNSEEN = (
    "manual-3", "manual-5-7", "docstrings-packages", "readme", "licences-packages", "data-json",
    "script-bundles", "shuffled-packages", "log-alternatives", "menus-packages",
)  # fmt: skip
MENU_WORDS = (
    "Home", "About", "Contact", "Log in", "Sign up", "Next", "Previous", "Search", "Help",
    "Privacy policy", "Terms of use", "All rights reserved", "Share", "Read more",
)  # fmt: skip


def chosen(paths: Iterable[Path], n: int) -> list[Path]:
    """Take ``n`` files by the hash of their path."""
    found = {path for path in paths if path.is_file() and not path.is_symlink()}
    return sorted(found, key=lambda path: xxhash.xxh3_64_intdigest(str(path).encode()))[:n]


def read(path: Path, media_type: str = "text/plain") -> str:
    """Read a file as text, decompressed; empty when it is none."""
    try:
        with path.open("rb") as file:
            data = b"".join(decompressed(file))
        return extract(data[: 10 * MAX_BYTES], media_type)[0]
    except (OSError, UnusableError):
        return ""


def files(patterns: dict[Path, str], n: int, media_type: str = "text/plain") -> Iterator[str]:
    """Yield the texts of files, whole or (of long ones) a piece from the beginning."""
    found = (path for root, pattern in patterns.items() for path in root.glob(pattern))
    for path in chosen(found, 2 * n):
        yield read(path, media_type)[:MAX_BYTES]


def pieces(patterns: dict[Path, str], n_lines: int, n: int) -> Iterator[str]:
    """Yield long files in pieces of some lines."""
    for root, pattern in patterns.items():
        for path in chosen(root.glob(pattern), n):
            lines = read(path).splitlines(keepends=True)
            for start in range(0, len(lines), n_lines):
                yield "".join(lines[start : start + n_lines])


@cache
def docstrings(root: Path, pattern: str, n: int) -> list[str]:
    """Return the longer docstrings of Python files."""
    found = []
    for path in chosen(root.glob(pattern), n):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if text.count(" ") > 60:
                    found.append(text)
    return found


def shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Shuffle the words of texts, line lengths as they were."""
    chance = random.Random(seed)
    for text in texts:
        words = text.split()
        chance.shuffle(words)
        rest = iter(words)
        lines = [" ".join(next(rest) for _ in line.split()) for line in text.split("\n")]
        yield "\n".join(lines)


def menus(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Make menus, link lists and footers from the short lines and first words of texts."""
    chance = random.Random(seed)
    titles: list[str] = []
    for text in texts:
        lines = (line.split() for line in text.split("\n"))
        titles += [" ".join(words[:5]).strip(".:,") for words in lines if words]
    for _ in range(len(titles) // 10):
        parts = chance.sample(titles, chance.randint(15, 60)) + chance.sample(MENU_WORDS, 7)
        chance.shuffle(parts)
        yield chance.choice([" | ", "\n", " » ", "\n* ", "  "]).join(parts)


def sources(n: int) -> dict[str, tuple[str, Callable[[], Iterable[str]]]]:
    """Name every source with its label and a function that reads its texts."""
    man, share, doc = Path("/usr/share/man"), Path("/usr/share"), Path("/usr/share/doc")
    roff = "text/troff"
    library = lambda: docstrings(STDLIB, "*/*.py", 400)  # noqa: E731
    packages = lambda: docstrings(PACKAGES, "*/**/*.py", 3000)  # noqa: E731
    perl = {Path("/usr/share/perl"): "**/*.pod", Path("/usr/lib"): "**/*.pod"}
    good = {
        "manual-1": lambda: files({man: "man1/[a-fh-z]*"}, n, roff),
        "manual-1-cloud": lambda: files({man: "man1/g*"}, n // 4, roff),
        "manual-8": lambda: files({man: "man8/*"}, n, roff),
        "docstrings-library": library,
        "pods": lambda: (pod_text(t) for t in files(perl, n)),
        "manual-3": lambda: files({man: "man[23]/*"}, n, roff),
        "manual-5-7": lambda: files({man: "man[457]/*"}, n, roff),
        "docstrings-packages": packages,
        "readme": lambda: files({doc: "*/README*", share: "doc/*/*.md"}, n),
    }  # fmt: skip
    bad = {
        "copyright": lambda: files({doc: "*/copyright"}, n),
        "changelogs": lambda: pieces({doc: "*/changelog*.gz"}, 60, n),
        "log-packages": lambda: pieces({Path("/var/log"): "dpkg.log"}, 40, 1),
        "tables": lambda: pieces({PACKAGES: "**/*.csv", share: "**/*.csv"}, 40, 300),
        "data-xml": lambda: files({share: "**/*.xml"}, n),
        "menus-manual": lambda: menus(files({man: "man[18]/*"}, 300, roff), 1),
        "shuffled-library": lambda: shuffled(library(), 2),
        "shuffled-manual": lambda: shuffled(files({man: "man[18]/[a-fh-z]*"}, n, roff), 3),
        "licences-packages": lambda: files({PACKAGES: "**/[Ll][Ii][Cc][Ee][Nn]*"}, n),
        "data-json": lambda: files({PACKAGES: "**/*.json", share: "**/*.json"}, n),
        "script-bundles": lambda: files({PACKAGES: "**/*.min.js", share: "**/*.js"}, n),
        "shuffled-packages": lambda: shuffled(packages(), 4),
        "log-alternatives": lambda: pieces({Path("/var/log"): "alternatives.log"}, 40, 1),
        "menus-packages": lambda: menus(packages(), 5),
    }
    named = {name: (POSITIVE, texts) for name, texts in good.items()}
    return named | {name: (NEGATIVE, texts) for name, texts in bad.items()}


def pod_text(text: str) -> str:
    """Drop the markup of a Perl pod."""
    text = re.sub(r"[A-Z]<+\s?([^<>]*?)\s?>+", r"\1", text)
    return re.sub(r"^=\w+ ?", "", text, flags=re.MULTILINE)


def collect(n: int) -> list[Example]:
    """Read at most ``n`` texts of every source."""
    items = []
    for name, (label, texts) in sources(n).items():
        found = {text for text in texts() if len(text) >= MIN_BYTES and "\0" not in text}
        kept = sorted(found, key=lambda text: xxhash.xxh3_64_intdigest(text.encode()))[:n]
        items += [
            Example(f"{name}/{k}", name, text[:MAX_BYTES], label) for k, text in enumerate(kept)
        ]
    return items


def rate(work: Callable[[Texts], object], texts: Texts) -> float:
    """Return MB of text per second of CPU time, the best of three."""
    work(texts)
    times = []
    for _ in range(3):
        start_s = time.process_time()
        work(texts)
        times.append(time.process_time() - start_s)
    return len(texts.data) / 1e6 / min(times)


def heldout_auc(cfg: TrainConfig, judged: Classifier, items: list[Example]) -> float:
    """Return the AUC over the test part and the unseen sources together."""
    examples = distinct(items, last=cfg.unseen_sources)
    parts = divide(cfg, examples)
    chosen = [examples.items[k] for k in (*parts.test, *parts.unseen)]
    scores = judged.score(texts_from([item.text for item in chosen]))[0]
    return Ranking(scores, np.array([item.label == POSITIVE for item in chosen])).auc()


def show(name: str, record: dict) -> None:
    for part, report in record["metrics"].items():
        span = report["intervals_95"]["auc"]
        print(
            f"{name:<9} {part:<7} docs {report['docs']:>6,}  AUC {report['auc']:.4f} "
            f"({span[0]:.4f} to {span[1]:.4f})  AP {report['average_precision']:.4f}  "
            f"accuracy {report['accuracy']:.4f}  ECE {report['calibration']['ece']:.4f}"
        )
        for row in report["sources"]:
            error = row["false_negative_rate"] if row["positives"] else row["false_positive_rate"]
            print(
                f"    {row['source']:<22} docs {row['docs']:>5,}  kept {row['kept_share']:>6.1%}  "
                f"error {error:>6.1%}  mean score {row['mean_score']:.3f}"
            )


def library_rate(model_file: Path, lines: list[str]) -> float | None:
    """Return the speed of the fastText library on the same, prepared lines; None without it."""
    try:
        import fasttext
    except ImportError:
        return None
    model = fasttext.load_model(str(model_file))
    start_s = time.process_time()
    for line in lines:
        model.predict(line)
    return time.process_time() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-source", type=int, default=800)
    args = parser.parse_args()
    start_s = time.perf_counter()
    items = collect(args.per_source)
    n_bytes = sum(len(item.text.encode()) for item in items)
    seconds = time.perf_counter() - start_s
    print(f"{len(items):,} texts, {n_bytes / 1e6:.1f} MB, read in {seconds:.0f} s")
    unseen = tuple(name for name in UNSEEN if any(item.source == name for item in items))
    texts = texts_from([item.text for item in items])
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("fasttext", "ngram"):
            out = Path(folder) / kind
            cfg = TrainConfig(kind=kind, unseen_sources=unseen)
            start_s = time.process_time()
            record = train_classifier(cfg, items, out)
            seconds = time.process_time() - start_s
            show(kind, record)
            judged = load_classifier(out)
            print(f"{kind}: AUC of all held-out texts, test and unseen: "
                  f"{heldout_auc(cfg, judged, items):.4f}")  # fmt: skip
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            print(f"{kind}: trained and measured in {seconds:.1f} CPU s, {size:.1f} MB on disk, "
                  f"applied at {rate(judged.score, texts):.0f} MB/s\n")  # fmt: skip
        compare(Path(folder) / "fasttext", texts)


def compare(folder: Path, texts: Texts) -> None:
    """Compare speed and probabilities with the fastText library, on the same prepared lines."""
    judged = load_classifier(folder)
    lines = prepare(texts, "words", 1 << 30)
    strings = [bytes(lines.bytes_of(k)).decode() for k in range(len(lines))]
    seconds = library_rate(folder / "model.bin", strings)
    if seconds is None:
        print("the fastText library is not installed: no comparison")
        return
    speed = len(texts.data) / 1e6 / seconds
    print(f"fastText library, prediction alone, the same model: {speed:.1f} MB/s")
    raw = judged.model.raw(texts)
    import fasttext

    model = fasttext.load_model(str(folder / "model.bin"))
    p = 1 / (1 + np.exp(raw[:, 0] - raw[:, 1]))
    gaps = []
    for k in range(0, len(strings), 10):
        labels, values = model.predict(strings[k], k=2)
        gaps.append(abs(dict(zip(labels, values, strict=True))["__label__positive"] - p[k]))
    print(f"largest difference of probabilities: {max(gaps):.1e}")


if __name__ == "__main__":
    main()
