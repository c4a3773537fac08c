"""Speed of tokenisation and loading against tiktoken, tokenizers and transformers, in one run.

    python benchmarks/bench_tokens.py [--megabytes 6] [--vocab 16384] [--repeats 3]

The text is this Python installation's own source (and the prose of its language reference). All
contenders use the tokenizer that is trained at the start; their ids are compared before timing.
Every repeat runs all contenders once, one after the other, and the fastest repeat counts. Rates are
per CPU second (all threads of a contender together), which load from elsewhere hardly touches.
"""

from __future__ import annotations

import argparse
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each

import json
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from puna.data.kernels.buffers import texts_from
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.loader import PackedLoader
from puna.tokens.pretokens import LLAMA3_PATTERN, MAX_CHARS, split_huge
from puna.tokens.tokenizer import Tokenizer

Run = Callable[[], object]
N_SPECIAL = 256


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


def encode_runs(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> dict[str, Run]:
    """The contenders over the same texts, checked to give the same ids."""
    import tiktoken
    import tokenizers
    from transformers import AutoTokenizer

    peer = tiktoken.Encoding(
        "peer", pat_str=LLAMA3_PATTERN, mergeable_ranks=tokenizer.ranks(), special_tokens={}
    )
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast = AutoTokenizer.from_pretrained(folder)
    block = texts_from(texts)
    ours, lengths = tokenizer.encode_documents(block)
    ends = lengths.cumsum()
    for text, end, length in zip(texts, ends, lengths, strict=True):
        expected = [id_ for part in split_huge(text) for id_ in peer.encode_ordinary(part)]
        assert ours[end - length : end].tolist() == [tokenizer.bos_id, *expected, tokenizer.eos_id]
        if len(text) < MAX_CHARS:
            assert library.encode(text, add_special_tokens=False).ids == expected
    return {
        "puna, documents": lambda: tokenizer.encode_documents(block),
        "puna, lists": lambda: tokenizer.encode_batch(texts),
        "tiktoken": lambda: [peer.encode_ordinary(text) for text in texts],
        "tokenizers": lambda: [
            encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)
        ],
        "transformers": lambda: fast(texts, add_special_tokens=False).input_ids,
    }


def print_encoding(
    tokenizer: Tokenizer, folder: Path, corpora: dict[str, list[str]], repeats: int, out: Console
) -> None:
    """Megabytes per CPU second of each contender, and ours as a multiple."""
    table = Table(title="Encoding, one thread", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("text", "contender", "MB/s", "tokens/s", "puna is"):
        table.add_column(name, justify="left" if name in ("text", "contender") else "right")
    for corpus, texts in corpora.items():
        runs = encode_runs(tokenizer, folder, texts)
        n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        best = fastest(runs, repeats)
        for name, seconds in best.items():
            ratio = seconds / best["puna, documents"]
            table.add_row(
                f"{corpus}, {megabytes:.1f} MB", name, f"{megabytes / seconds:.1f}",
                f"{n_tokens / seconds:,.0f}", f"{ratio:.2f}x",
            )  # fmt: skip
    out.print(table)


def write_shards(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Two sources in the layout of ``tokens.encode``."""
    index: dict = {
        "dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": {"train": {}},
    }  # fmt: skip
    for number, source in enumerate(("even", "odd")):
        mine = texts[number::2]
        ids, lengths = tokenizer.encode_documents(texts_from(mine))
        target = folder / "train" / source
        target.mkdir(parents=True)
        ids.astype(np.uint16).tofile(target / "tokens.bin")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=6)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    import tiktoken
    import tokenizers
    import transformers

    transformers.logging.set_verbosity_error()
    out = Console(width=120, highlight=False)
    code = source_code(int(arguments.megabytes * 1e6))
    n_bytes = sum(len(text.encode()) for text in code)
    start_s = time.process_time()
    ranks = train_ranks([code], arguments.vocab - N_SPECIAL, 2)
    seconds = time.process_time() - start_s
    tokenizer = Tokenizer(definition(ranks, N_SPECIAL), tokenizer_config())
    out.print(
        f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, transformers "
        f"{transformers.__version__}; vocabulary of {tokenizer.vocab_size} trained on "
        f"{n_bytes / 1e6:.1f} MB at {n_bytes / 1e6 / seconds:.1f} MB per CPU second"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        corpora = {"Python source": code, "English prose": prose() * 4}
        print_encoding(tokenizer, folder, corpora, arguments.repeats, out)
        write_shards(folder / "shards", tokenizer, code)
        print_loading(folder / "shards", arguments.repeats, out)


if __name__ == "__main__":
    main()
