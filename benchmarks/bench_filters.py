"""The filters of datatrove beside datatrove: every decision and reason, then megabytes per second.

    python benchmarks/bench_filters.py [--corpus FOLDER] [--docs 3000] [--seed 0]

The documents are a random sample of a folder of Parquet shards (`benchmarks/debian_corpus.py`
builds one), or else of the text files and Python sources of this machine. Each filter sees each
document as it is. Rates are per CPU second; datatrove's include its words, which it makes anew for
each filter here, as ours do. Exits with 1 when a decision, a reason or a rewritten text differs.

    python benchmarks/bench_filters.py --corpus FOLDER --docs 200000 --only-agreement --minutes 45

compares without timing, and sooner: datatrove makes the words of a document once, and the words of
all documents are compared. It stops after the given minutes and tells how many documents it did.

    python benchmarks/bench_filters.py --only-ours

times every profile. `--dclm FOLDER` (a checkout of mlfoundations/dclm) and `--redpajama FOLDER`
(togethercomputer/RedPajama-Data) compare with the code of these projects, which is on no package
index; `bench_filters_peers.py` says what they need installed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from puna.data.filters.base import FilterConfig
from puna.data.filters.c4 import C4Quality
from puna.data.filters.datatrove import FineWebQuality, GopherQuality, GopherRepetition
from puna.data.filters.profiles import PROFILES
from puna.data.filters.rules import Rules, Verdicts
from puna.data.words.split import split_words
from puna.data.words.urls import Urls

MAX_CHARS = 200_000
SHOWN_DIFFERENCES = 10
AGREEMENT_BLOCK = 2000


def sample_corpus(folder: Path, n_docs: int, seed: int) -> list[str]:
    """Random documents of all shards, all sources alike."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise SystemExit(
            f"{folder} holds no Parquet shards; benchmarks/debian_corpus.py makes some"
        )
    rng = random.Random(seed)
    counts = [pq.ParquetFile(shard).metadata.num_rows for shard in shards]
    chosen = sorted(rng.sample(range(sum(counts)), min(n_docs, sum(counts))))
    texts, first = [], 0
    for shard, count in zip(shards, counts, strict=True):
        rows = [row - first for row in chosen if first <= row < first + count]
        column = pq.read_table(shard, columns=["text"])["text"]
        texts += [column[row].as_py() for row in rows]
        first += count
    return texts


def sample_machine(n_docs: int, seed: int) -> list[str]:
    """Random text files of this machine."""
    roots = ["/usr/share/doc", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    kinds = {".py", ".txt", ".md", ".rst", ".html", ""}
    files = sorted(path for root in roots for path in Path(root).rglob("*")
                   if path.suffix in kinds and path.is_file())  # fmt: skip
    random.Random(seed).shuffle(files)
    texts: list[str] = []
    for file in files:
        if len(texts) == n_docs:
            break
        try:
            texts.append(file.read_text(encoding="utf-8")[:MAX_CHARS])
        except (UnicodeDecodeError, OSError):
            continue
    return texts


def judge(filters: tuple[FilterConfig, ...], texts: list[str]) -> Verdicts:
    """Our verdicts, in batches of the engine's size."""
    rules, all_ = Rules(filters, detect_language=False), Verdicts.keep_all(len(texts))
    for first in range(0, len(texts), 1024):
        part = texts[first : first + 1024]
        verdicts = rules.judge(pa.array(part, pa.large_string()))
        all_.scatter(verdicts, range(first, first + len(part)))
    return all_


def peers() -> list[tuple[FilterConfig, Any]]:
    """Our filters and datatrove's."""
    try:
        from datatrove.pipeline import filters
    except ImportError as error:
        raise SystemExit(f"{error}: install the test tools (make bench does)") from error
    return [
        (GopherQuality(), filters.GopherQualityFilter()),
        (GopherRepetition(), filters.GopherRepetitionFilter()),
        (C4Quality(), filters.C4QualityFilter()),
        (FineWebQuality(), filters.FineWebQualityFilter()),
    ]


def ask(peer: Any, document: Any) -> Any:
    """The peer's verdict, None where it fails: on a text without words."""
    try:
        return peer.filter(document)
    except ZeroDivisionError:
        return None


def differs(mine: FilterConfig, verdicts: Verdicts, index: int, text: str, result: Any) -> bool:
    """Tell whether our verdict on a document is another one; ``text`` is what the peer made."""
    reason = verdicts.reason[index]
    found = True if reason is None else (False, reason.partition(".")[2])
    same_text = not (mine.rewrites and found is True) or verdicts.text[index] == text
    return result is not None and (found != result or not same_text)


def compare(mine: FilterConfig, peer: Any, texts: list[str], out: Console) -> tuple[int, list[str]]:
    """Compare one filter; return the number of differences and the row of the table."""
    from datatrove.data import Document
    from datatrove.utils.text import split_into_parts

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    judge((mine,), texts[:50])  # compiled
    rates = []
    for _ in range(3):
        start_s = time.process_time()
        verdicts = judge((mine,), texts)
        rates.append(megabytes / (time.process_time() - start_s))
    documents = [Document(text=text, id=str(index)) for index, text in enumerate(texts)]
    split_into_parts.cache_clear()
    peer.filter(Document(text="It loads its tokenizer. " * 20, id=""))
    start_s = time.process_time()
    results = [ask(peer, document) for document in documents]
    theirs = megabytes / (time.process_time() - start_s)
    n_different = 0
    for index, (document, result) in enumerate(zip(documents, results, strict=True)):
        if differs(mine, verdicts, index, document.text, result):
            n_different += 1
            if n_different <= SHOWN_DIFFERENCES:
                out.print(f"DIFFERENT: {verdicts.reason[index]} {result} {texts[index][:100]!r}")
    kept = verdicts.reason.count(None)
    name = type(mine).__name__
    common = Counter(code for code in verdicts.reason if code).most_common(1)
    ours = statistics.median(rates)
    reason = common[0][0].partition(".")[2] if common else ""
    row = [name, f"{n_different}", f"{kept / len(texts):.0%}", reason, f"{ours:.1f}",
           f"{theirs:.2f}", f"{ours / theirs:.0f}x"]  # fmt: skip
    return n_different, row


def compare_words(texts: list[str], out: Console) -> int:
    """Compare the words themselves on a part of the texts."""
    from datatrove.utils.word_tokenizers import SpaCyTokenizer

    tokenizer, urls, n_different, n_words = SpaCyTokenizer("en"), Urls(), 0, 0
    for text in texts[::5]:
        mine, theirs = split_words(text, urls), tokenizer.word_tokenize(text)
        n_words += len(theirs)
        if mine != theirs:
            n_different += 1
            out.print(f"OTHER WORDS: {text[:100]!r}")
    out.print(f"words of {len(texts[::5]):,} documents, {n_words:,} in all: "
              f"{n_different} documents differ from spaCy's")  # fmt: skip
    return n_different


def compare_only(texts: list[str], minutes: float, out: Console) -> int:
    """Compare words and verdicts, in blocks, until the time is up; print the differences."""
    from datatrove.data import Document
    from datatrove.utils.text import split_into_words

    # the one that splits sentences last: datatrove keeps the words of a few texts only
    both = sorted(peers(), key=lambda pair: pair[0].rewrites)
    urls, until = Urls(), time.monotonic() + 60 * minutes
    different, failed, n_done, n_bytes, n_words = Counter[str](), Counter[str](), 0, 0, 0
    for first in range(0, len(texts), AGREEMENT_BLOCK):
        if time.monotonic() > until:
            break
        block = texts[first : first + AGREEMENT_BLOCK]
        verdicts = [judge((mine,), block) for mine, _ in both]
        for index, text in enumerate(block):
            words = split_into_words(text)  # cached: their filters take these
            n_words += len(words)
            if split_words(text, urls) != words:
                different["words"] += 1
                out.print(f"OTHER WORDS: {text[:100]!r}")
            for (mine, peer), ours in zip(both, verdicts, strict=True):
                name, document = type(mine).__name__, Document(text=text, id="")
                result = ask(peer, document)
                failed[name] += result is None
                if differs(mine, ours, index, document.text, result):
                    different[name] += 1
                    out.print(f"DIFFERENT: {name} {ours.reason[index]} {result} {text[:100]!r}")
        n_done += len(block)
        n_bytes += sum(len(text.encode()) for text in block)
        out.print(f"{n_done:,} of {len(texts):,} documents, {n_bytes / 1e6:.1f} MB, {n_words:,} "
                  f"words: {dict(different) or 'no difference'}; not judged by datatrove, which "
                  f"fails on texts without words: {dict(+failed)}")  # fmt: skip
    return different.total()


def compare_with_datatrove(texts: list[str], out: Console) -> int:
    """Print the table; return the number of differences."""
    n_different = compare_words(texts, out)
    table = Table(box=box.SIMPLE_HEAD)
    for name in (
        "filter",
        "different",
        "kept",
        "most frequent reason",
        "MB/s",
        "datatrove",
        "ratio",
    ):
        table.add_column(
            name, justify="left" if name in ("filter", "most frequent reason") else "right"
        )
    for mine, peer in peers():
        n, row = compare(mine, peer, texts, out)
        n_different += n
        table.add_row(*row)
    out.print(table)
    return n_different


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="folder of Parquet shards with a column text")
    parser.add_argument("--docs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-agreement", action="store_true", help="time nothing")
    parser.add_argument("--minutes", type=float, default=45.0, help="of --only-agreement")
    parser.add_argument("--start", type=int, default=0, help="documents that were compared before")
    parser.add_argument("--only-ours", action="store_true", help="compare with nothing")
    parser.add_argument("--dclm", type=Path, help="checkout of mlfoundations/dclm")
    parser.add_argument("--redpajama", type=Path, help="checkout of RedPajama-Data")
    options = parser.parse_args()
    out = Console(width=120, highlight=False)
    if options.corpus:
        texts = sample_corpus(options.corpus, options.docs, options.seed)
    else:
        texts = sample_machine(options.docs, options.seed)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    out.print(f"{len(texts):,} documents, {megabytes:.1f} MB")
    if options.only_agreement:
        return 1 if compare_only(texts[options.start :], options.minutes, out) else 0
    n_different = 0
    if options.dclm or options.redpajama:
        import bench_filters_peers

        for name in ("dclm", "redpajama"):
            if folder := getattr(options, name):
                n_different += getattr(bench_filters_peers, name)(folder.resolve(), texts, out)
    elif not options.only_ours:
        n_different = compare_with_datatrove(texts, out)
    time_profiles(texts, out)
    return 1 if n_different else 0


def time_profiles(texts: list[str], out: Console) -> None:
    """Print the rate of each profile; every filter sees what the ones before it kept."""
    table = Table("profile", box=box.SIMPLE_HEAD)
    for name in ("kept", "MB/s"):
        table.add_column(name, justify="right")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name in PROFILES:
        filters = PROFILES.get(name).filters
        if not filters:
            continue
        judge(filters, texts[:50])  # compiled
        start_s = time.process_time()
        verdicts = judge(filters, texts)
        rate = megabytes / (time.process_time() - start_s)
        table.add_row(name, f"{verdicts.reason.count(None) / len(texts):.0%}", f"{rate:.1f}")
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
