"""Speed of filters, language id, deduplication and split, next to plain Python and datasketch.

    python benchmarks/bench_data.py [--mb 16]

The first table is the compiled kernels and the whole filter profiles, per second of CPU time of one
core, beside a peer on a part of the same texts in the same run (a profile does not measure further
what an early filter has dropped; its peer measures all): the same measures in plain Python
(`plain_filters.py`, which the tests compare with the kernels), py3langid itself, datasketch's
MinHash with as many permutations over the same kind of shingles. The second table is the stages as
a recipe runs them, with reading and writing Parquet and the conservation check, with one worker.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plain_filters as plain
import pyarrow as pa
from datasketch import MinHash
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from rich.console import Console
from rich.table import Table

from puna.core.artifact import Artifact, write_record
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate
from puna.data.filter import FilterStageConfig, filter_documents
from puna.data.filters.heuristics import LICENCE_PHRASES
from puna.data.filters.rules import SourceRules
from puna.data.kernels import chars, language, minhash, phrases, repetition, words
from puna.data.kernels.buffers import Texts, texts_from
from puna.data.split import SplitConfig, split_documents
from puna.data.testing import make_documents

PEER_MB = 0.5
MB = 1e6


@dataclass
class Row:
    """One line of the first table: seconds of CPU per MB, ours and the peer's."""

    name: str
    ours: float
    peer: str
    theirs: float | None


def read_texts(n_mb: float) -> dict[str, list[str]]:
    """Read Python files (code) and package descriptions and language topics (prose)."""
    paths = sysconfig.get_paths()
    code = sorted(Path(paths["stdlib"]).glob("*.py"))
    code += sorted(Path(paths["purelib"]).glob("*/*.py"))
    prose = sorted(Path(paths["purelib"]).glob("*.dist-info/METADATA"))
    prose += sorted(Path(paths["purelib"]).glob("**/*.rst"))
    found = {"code": _read(code, n_mb), "prose": _read(prose, n_mb)}
    return {kind: _repeat(texts, n_mb) for kind, texts in found.items()}


def _read(paths: list[Path], n_mb: float) -> list[str]:
    texts, size = [], 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            print(f"left out, not UTF-8: {path}", file=sys.stderr)
            continue
        if len(text) > 500:
            texts.append(text)
            size += len(text.encode())
        if size > n_mb * MB:
            break
    return texts


def _repeat(texts: list[str], n_mb: float) -> list[str]:
    """Take texts, again and again from the start, up to a size."""
    taken, size = [], 0
    while size < n_mb * MB:
        text = texts[len(taken) % len(texts)]
        taken.append(text)
        size += len(text.encode())
    return taken


def n_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def cpu_per_mb(work: Callable[[], object], size: int, repeats: int = 3) -> float:
    """Least CPU seconds per MB of several runs, after one that compiles."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best / (size / MB)


def bench_kernels(texts: list[str]) -> list[Row]:
    batch, alive = texts_from(texts), np.ones(len(texts), bool)
    part = _repeat(texts, PEER_MB)
    size, part_size = n_bytes(texts), n_bytes(part)
    library = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    head = language.HEAD_BYTES

    def each(function: Callable[[str], object]) -> Callable[[], object]:
        return lambda: [function(text) for text in part]

    cases = [
        ("characters", lambda: chars.count_chars(batch, alive), "plain Python",
         each(plain.char_measures)),
        ("words", lambda: words.count_words(batch, alive), "plain Python",
         each(plain.word_measures)),
        ("lines", lambda: words.count_lines(batch, alive), "plain Python",
         each(plain.line_measures)),
        ("Gopher repetition", lambda: repetition.measure_repetition(batch, alive), "plain Python",
         each(plain.repetition_measures)),
        (f"{len(LICENCE_PHRASES)} phrases",
         lambda: phrases.scan_phrases(batch, alive, LICENCE_PHRASES), "plain Python",
         each(lambda text: plain.phrase_measures(text, LICENCE_PHRASES))),
        (f"language id, first {head} B", lambda: language.identify(batch, alive), "py3langid",
         each(lambda text: library.classify(text[:head]))),
        ("normalise (exact dedup)", lambda: minhash.normalised(batch), "plain Python",
         each(lambda text: " ".join(text.split()).lower())),
        ("MinHash, 128 permutations", lambda: sign_in_batches(batch), "datasketch",
         each(datasketch_minhash)),
    ]  # fmt: skip
    return [
        Row(name, cpu_per_mb(ours, size), peer, cpu_per_mb(theirs, part_size, 1))
        for name, ours, peer, theirs in cases
    ]


def sign_in_batches(texts: Texts) -> None:
    minhash.band_keys(minhash.sign(texts), 32)


def datasketch_minhash(text: str) -> object:
    tokens = re.findall(r"\w+", text.lower())
    shingles = {" ".join(tokens[i : i + 5]) for i in range(max(len(tokens) - 4, 1))}
    signature = MinHash(num_perm=128)
    signature.update_batch([shingle.encode() for shingle in shingles])
    return signature.hashvalues


def bench_profile(kind: str, texts: list[str]) -> Row:
    """All filters of a profile but those that need the language."""
    skip = ["language", "stop_words"] if kind == "prose" else []
    rules = SourceRules(profile=kind, skip=skip, detect_language=False).make()
    batches = [pa.array(texts[i : i + 1024], pa.large_string()) for i in range(0, len(texts), 1024)]
    part = _repeat(texts, PEER_MB)

    def peer() -> None:
        for text in part:
            plain.char_measures(text)
            plain.line_measures(text)
            plain.phrase_measures(text, LICENCE_PHRASES)
            plain.word_measures(text)
            if kind == "prose":
                plain.repetition_measures(text)

    ours = cpu_per_mb(lambda: [rules.judge(batch) for batch in batches], n_bytes(texts))
    return Row(
        f"profile {kind}, no language id", ours, "plain Python", cpu_per_mb(peer, n_bytes(part), 1)
    )


def print_rows(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("what", "MB/s per core", "peer", "its MB/s", "ratio"):
        table.add_column(name, justify="left" if name in ("what", "peer") else "right")
    for row in rows:
        theirs = row.theirs or float("nan")
        ours, ratio = f"{1 / row.ours:,.1f}", f"{theirs / row.ours:,.0f} x"
        table.add_row(row.name, ours, row.peer, f"{1 / theirs:,.2f}", ratio)
    console.print(table)


def bench_stages(console: Console, texts: dict[str, list[str]]) -> None:
    """Run the three stages on all texts, one worker."""
    rows = [(kind, f"{i}", text) for kind, items in texts.items() for i, text in enumerate(items)]
    table = Table(title="stages, one worker", title_justify="left")
    for name in ("stage", "docs in", "MB in", "docs kept", "CPU s", "wall s", "MB/s (CPU)"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        artifact = make_documents(root / "in", rows, n_shards=8)
        stages = [
            ("data.filter", filter_documents,
             FilterStageConfig(workers=1, sources={"code": SourceRules(profile="code")})),
            ("data.dedup", deduplicate, DedupConfig(workers=1)),
            ("data.split", split_documents, SplitConfig(workers=1)),
        ]  # fmt: skip
        for name, function, cfg in stages:
            out = root / name
            out.mkdir()
            cpu_s, wall_s = time.process_time(), time.monotonic()
            metrics = function(cfg, {"documents": artifact}, out, Ledger(None))
            cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
            write_record(
                out, {"stage": name, "fingerprint": name, "config": {}, "metrics": metrics}
            )
            artifact = Artifact(out)
            table.add_row(
                name, f"{metrics['in_docs']:,}", f"{metrics['in_bytes'] / MB:.1f}",
                f"{metrics['kept_docs']:,}", f"{cpu_s:.2f}", f"{wall_s:.2f}",
                f"{metrics['in_bytes'] / MB / cpu_s:.1f}",
            )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=16, help="MB of text per kind")
    arguments = parser.parse_args()
    console = Console()
    console.width = max(console.width, 100)
    texts = read_texts(arguments.mb)
    for kind, items in texts.items():
        title = f"{kind}: {len(items):,} texts, {n_bytes(items) / MB:.1f} MB"
        print_rows(console, title, [*bench_kernels(items), bench_profile(kind, items)])
    # Only distinct texts, or the deduplication would have one text to look at.
    bench_stages(console, {kind: list(dict.fromkeys(items)) for kind, items in texts.items()})


if __name__ == "__main__":
    main()
