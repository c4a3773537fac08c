"""Speed of tokenisation and loading against every fast library that is installed, in one run.

    python benchmarks/bench_tokens.py [--megabytes 24] [--repeats 5] [--ranks FILE]
                                      [--corpus FILE]

The text is this Python installation's own source (and the prose of its language reference), the
vocabulary Llama 3's (of the package ``llama-models``, or a ranks file). All ids are compared before
timing. *Fresh* text was not seen by a contender before: each repeat takes the next part, and the
contenders take it one after the other, so that what they remember of words is worth what it is in a
corpus. *Seen* text is the same part once more. Rates are medians, in megabytes per CPU second (all
threads of a contender together), which load from elsewhere hardly touches.

*puna* takes Python strings like the others, *puna, Arrow* the buffers that the corpus path has.
Contenders that are not installed are left out: gigatoken, fastokens, splintr-rs, tokie, riptoken,
kitoken (``pip install`` them into a virtual environment of their own to see them).
"""

from __future__ import annotations

import argparse
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
os.environ["RAYON_NUM_THREADS"] = "1"

import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from puna.data.kernels.buffers import texts_from
from puna.tokens.loader import PackedLoader
from puna.tokens.pretokens import LLAMA3_PATTERN, split_huge
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

Run = Callable[[], object]
Encode = Callable[[list[str]], object]


def source_code(n_bytes: int) -> list[str]:
    """Python files of this installation, up to a size."""
    texts: list[str] = []
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(name)).rglob("*.py")):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
            n_bytes -= len(texts[-1])
            if n_bytes <= 0:
                return texts
    return texts


def up_to(n_bytes: int, texts: list[str]) -> list[str]:
    """The first texts that have this size together."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(sizes, n_bytes)) + 1]


def prose() -> list[str]:
    """The language reference that ships with Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def fastest(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """CPU seconds of the fastest repeat of each contender, interleaved, after one warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start_s = time.process_time()
            run()
            if repeat:
                best[name] = min(best[name], time.process_time() - start_s)
    return best


def contenders(tokenizer: Tokenizer, folder: Path, ranks_file: Path) -> dict[str, Encode]:
    """Everything that encodes a list of texts with one vocabulary, as far as it is installed."""
    import tiktoken
    import tokenizers

    peer = tiktoken.Encoding(
        "peer", pat_str=LLAMA3_PATTERN, mergeable_ranks=tokenizer.ranks(), special_tokens={}
    )
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found: dict[str, Encode] = {
        "puna": lambda texts: tokenizer.encode_documents(texts_from(texts)),
        "tiktoken": lambda texts: [peer.encode_ordinary(text) for text in texts],
        "tokenizers": lambda texts: [
            encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)
        ],
    }
    definition = (folder / "tokenizer.json").read_text()
    for name, make in OPTIONAL.items():
        if find_spec(name) is not None:
            found[name] = make(definition, folder, ranks_file, tokenizer)
    return found


def _gigatoken(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import gigatoken

    engine = gigatoken.Tokenizer.from_json(definition)
    return lambda texts: engine.encode_batch(texts, parallel=False)


def _fastokens(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import fastokens

    engine = fastokens.Tokenizer.from_json_str(definition)
    return lambda texts: engine.encode_batch_flat(texts, False)


def _splintr(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import splintr

    special = {"<|begin_of_text|>": tokenizer.bos_id}
    engine = splintr.Tokenizer.from_bytes(ranks_file.read_bytes(), LLAMA3_PATTERN, special)
    return lambda texts: [engine.encode_ordinary(text) for text in texts]


def _tokie(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import tokie

    engine = tokie.Tokenizer.from_json(str(folder / "tokenizer.json"))
    return lambda texts: engine.encode_batch_flat(texts, add_special_tokens=False)


def _riptoken(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import riptoken

    engine = riptoken.CoreBPE(tokenizer.ranks(), {}, LLAMA3_PATTERN)
    return lambda texts: [engine.encode_ordinary(text) for text in texts]


def _kitoken(definition: str, folder: Path, ranks_file: Path, tokenizer: Tokenizer) -> Encode:
    import kitoken

    engine = kitoken.Kitoken.from_tokenizers(definition.encode())
    return lambda texts: [engine.encode(text, False) for text in texts]


OPTIONAL: dict[str, Callable[[str, Path, Path, Tokenizer], Encode]] = {
    "gigatoken": _gigatoken, "fastokens": _fastokens, "splintr": _splintr, "tokie": _tokie,
    "riptoken": _riptoken, "kitoken": _kitoken,
}  # fmt: skip


def check(tokenizer: Tokenizer, runs: dict[str, Encode], texts: list[str]) -> None:
    """Compare our ids with tiktoken's over all texts."""
    ours, lengths = tokenizer.encode_documents(texts_from(texts))
    ends = lengths.cumsum()
    for text, end, length in zip(texts, ends, lengths, strict=True):
        expected = [id_ for part in split_huge(text) for id_ in runs["tiktoken"]([part])[0]]  # type: ignore[index]
        assert ours[end - length : end].tolist() == [tokenizer.bos_id, *expected, tokenizer.eos_id]


def parts_of(texts: list[str], n: int) -> list[list[str]]:
    """Split texts into ``n`` parts of about one size."""
    parts: list[list[str]] = [[]]
    share = sum(map(len, texts)) / n
    for text in texts:
        parts[-1].append(text)
        if sum(map(len, parts[-1])) >= share and len(parts) < n:
            parts.append([])
    return parts


def print_encoding(
    tokenizer: Tokenizer, runs: dict[str, Encode], corpora: dict[str, list[str]], repeats: int,
    out: Console,
) -> None:  # fmt: skip
    """Megabytes per CPU second of each contender on fresh and on seen text."""
    table = Table(title="Encoding, one thread", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("text", "contender", "fresh MB/s", "puna is", "seen MB/s", "puna is"):
        table.add_column(name, justify="left" if name in ("text", "contender") else "right")
    for corpus, texts in corpora.items():
        first, *parts = parts_of(texts, repeats + 1)
        arrow = {id(part): texts_from(part) for part in (first, *parts)}
        runs = {
            **runs,
            "puna, Arrow": lambda part, arrow=arrow: tokenizer.encode_documents(arrow[id(part)]),
        }
        for run in runs.values():
            run(first)
        fresh, seen = ({name: [] for name in runs} for _ in range(2))
        for part in parts:
            megabytes = sum(len(text.encode()) for text in part) / 1e6
            for rates in (fresh, seen):
                for name, run in runs.items():
                    start_s = time.process_time()
                    run(part)
                    rates[name].append(megabytes / max(time.process_time() - start_s, 1e-9))
        for name in runs:
            cells = []
            for rates in (fresh, seen):
                rate, ours = (statistics.median(rates[one]) for one in (name, "puna"))
                cells += [f"{rate:.1f}", f"{ours / rate:.2f}x"]
            table.add_row(corpus, name, *cells)
        check(tokenizer, runs, texts)
    out.print(table)


def write_shards(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Two sources in the layout of ``tokens.encode``."""
    index: dict = {
        "dtype": "uint32", "vocab_size": tokenizer.vocab_size, "splits": {"train": {}},
    }  # fmt: skip
    for number, source in enumerate(("even", "odd")):
        mine = texts[number::2]
        ids, lengths = tokenizer.encode_documents(texts_from(mine))
        target = folder / "train" / source
        target.mkdir(parents=True)
        ids.astype(np.uint32).tofile(target / "tokens.bin")
        np.save(target / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(target / "ids.npy", np.array([f"{i:032x}" for i in range(len(mine))], "S32"))
        np.save(target / "n_bytes.npy", np.array([len(text.encode()) for text in mine], np.int64))
        index["splits"]["train"][source] = {
            "n_docs": len(mine), "n_tokens": len(ids), "n_bytes": sum(map(len, mine)),
        }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))


def print_loading(folder: Path, repeats: int, out: Console) -> None:
    """Rows and tokens per second of the loader, beside a bare copy of the same number of tokens."""
    table = Table(title="Loading, one thread", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("seq_len", "rows/s", "tokens/s", "bare copy tokens/s", "share of bare copy"):
        table.add_column(name, justify="right")
    for seq_len in (256, 1024, 8192):
        n_steps, n_rows = max(1, 2**21 // (32 * seq_len)), 32
        loader = PackedLoader(folder, "train", {"even": 0.7, "odd": 0.3}, seq_len, n_rows, 0)
        tokens = loader.shards.open("train", "even").tokens
        span = n_rows * seq_len

        def load(loader: PackedLoader = loader, n_steps: int = n_steps) -> None:
            for step in range(n_steps):
                loader.batch(step, 0, 1)

        def copy(tokens: np.ndarray = tokens, span: int = span, n_steps: int = n_steps) -> None:
            for step in range(n_steps):
                start = step * span % max(1, len(tokens) - span)
                window = tokens[start : start + span].astype(np.int64)
                window[:-1].copy(), window[1:].copy()

        best = fastest({"puna": load, "copy": copy}, repeats)
        n_tokens = n_steps * span
        table.add_row(
            f"{seq_len}", f"{n_steps * n_rows / best['puna']:,.0f}",
            f"{n_tokens / best['puna']:,.0f}", f"{n_tokens / best['copy']:,.0f}",
            f"{best['copy'] / best['puna']:.2f}",
        )  # fmt: skip
    out.print(table)


def ranks_file(name: str | None) -> Path:
    """The ranks file of the command line, else Llama 3's."""
    if name is not None:
        return Path(name)
    found = find_spec("llama_models")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llama-models is not installed: make bench installs it, or give --ranks")
    return Path(found.submodule_search_locations[0]) / "llama3/tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", help="ranks file; default: Llama 3's of llama-models")
    parser.add_argument("--corpus", help="Parquet file with a column `text`, as a third text")
    arguments = parser.parse_args()
    out = Console(width=120, highlight=False)
    code = source_code(int(arguments.megabytes * 1e6))
    path = ranks_file(arguments.ranks)
    start_s = time.process_time()
    tokenizer = load_tokenizer(path)
    out.print(f"{tokenizer.vocab_size} ids, loaded in {time.process_time() - start_s:.2f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        runs = contenders(tokenizer, folder, path)
        out.print(
            ", ".join(f"{one} {installed(one)}" for one in runs if not one.startswith("puna"))
        )
        corpora = {"Python source": code, "English prose": prose()}
        if arguments.corpus:
            column = pq.read_table(arguments.corpus, columns=["text"])["text"].to_pylist()
            corpora["corpus"] = up_to(int(arguments.megabytes * 1e6), column)
        print_encoding(tokenizer, runs, corpora, arguments.repeats, out)
        write_shards(folder / "shards", tokenizer, code)
        print_loading(folder / "shards", arguments.repeats, out)


def installed(name: str) -> str:
    """The version of a library."""
    return version({"splintr": "splintr-rs"}.get(name, name))


if __name__ == "__main__":
    main()
