"""Byte-exactness of the tokenizers: fuzzed texts through ours and through the references.

    python benchmarks/token_fuzz.py [--texts 100000] [--seed 0]

Llama 3: the vocabulary in the package ``llama-models`` through tiktoken as Meta's code builds it,
through that code itself, and through the ``tokenizers`` library. Llama 2: SentencePiece models
(Mistral's first one, and one trained here with Llama 2's options) through ``sentencepiece``. Ours
is compared by each of its ways: text by text, in batches, and the compiled path. Exits with 1 when
anything differs. The tests run a smaller share with the same texts.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from puna.data.kernels.buffers import texts_from
from puna.tokens.pretokens import LLAMA3_PATTERN, MAX_CHARS, MAX_RUN_CHARS, split_huge
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

Encode = Callable[[str], list[int]]

SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x600), (0x600, 0x700),
    (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x2150, 0x2190),
    (0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xFE00, 0xFE10), (0xFF00, 0xFFF0),
    (0x10000, 0x10100), (0x1D400, 0x1D800), (0x1F300, 0x1F700), (0x1F900, 0x1FA00),
    (0xE0000, 0xE0080),
)  # fmt: skip
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000"
CONTROLS = "".join(map(chr, [*range(0x20), 0x7F, *range(0x80, 0xA0)])) + "\u200b\u200d\ufeff\ufffd"
EMOJI = (
    "🎉",
    "🏽",
    "👨\u200d👩\u200d👧",
    "❤\ufe0f",
    "🇫🇷",
    "👍🏽",
    "🏴\U000e0067\U000e0062\U000e007f",
)
SNIPPETS = (
    "it's", "WE'LL", "I'd", "'s", "''t", "'ſ", "don't", "12345", "1.5e-10", "٣٤٥", "½²ⅷ", "()",
    "==", "<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "▁", "▁▁",
    "\r\n", "\n\n  \n", "    ", "\t\t", " \n x", "...\n", "# --", "é", "e\u0301", "日本語", "ﷺ",
    "x=1;\n", "'",
)  # fmt: skip
ASCII = "     \n\n\r\t\x0b''\"sdmtrevlSTL01234567((.,=_-#abcxyz"


def text(rng: random.Random, tokens: Sequence[str]) -> str:
    """One text, mostly short; ``tokens`` are pieces of the vocabulary."""
    kind = rng.randrange(9)
    if kind == 3:  # as in code: borders between the blocks of the compiled path
        return "".join(
            rng.choice(ASCII) * rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randrange(300))
        )
    if kind == 0:  # anything in Unicode
        return "".join(_anything(rng) for _ in range(rng.randrange(24)))
    if kind == 1:  # pieces of the vocabulary side by side
        return "".join(rng.choice(tokens) for _ in range(rng.randrange(10)))
    if kind == 2:  # something over and over: ties between merges
        unit = "".join(rng.choice("ab-=. \n\t#*e1'") for _ in range(rng.randint(1, 4)))
        return (unit * rng.randint(1, 80))[: rng.randrange(200)]
    return "".join(_run(rng, tokens) for _ in range(rng.randrange(8)))


def _anything(rng: random.Random) -> str:
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


def _run(rng: random.Random, tokens: Sequence[str]) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return "".join(rng.choice(SPACES) for _ in range(rng.randrange(12)))
    if kind == 1:
        return rng.choice(" \n\t") * rng.randrange(70)
    if kind == 2:
        return "".join(rng.choice(CONTROLS) for _ in range(rng.randrange(6)))
    if kind == 3:
        return "".join(rng.choice(EMOJI) for _ in range(rng.randrange(4)))
    if kind == 4:
        return "".join(rng.choice(SNIPPETS) for _ in range(rng.randrange(6)))
    if kind == 5:
        return " ".join(rng.choice(tokens) for _ in range(rng.randrange(5)))
    low, high = rng.choice(SCRIPTS)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(20)))


def texts(n: int, seed: int, tokens: Sequence[str]) -> Iterator[list[str]]:
    """Batches of ``n`` texts in all."""
    rng = random.Random(seed)
    for first in range(0, n, 1000):
        yield [text(rng, tokens) for _ in range(min(1000, n - first))]


def huge_texts(seed: int, n_chars: int = 1_000_000) -> Iterator[str]:
    """Lines of a megabyte, and lengths around the limits at which Meta's code cuts."""
    rng = random.Random(seed)
    for unit in ("a", " ", "\n", "日", "é", "-", "0", "\x1c", "ab ", "🎉", "\r\n", " \n", "'s"):
        yield (unit * n_chars)[:n_chars]
    for unit, other in (("a", " "), (" ", "a"), ("日", "\u3000"), ("\x1d", "b")):
        for n in (MAX_RUN_CHARS - 1, MAX_RUN_CHARS, MAX_RUN_CHARS + 1, 2 * MAX_RUN_CHARS + 1):
            yield "x y" + unit * n + other + unit * n + "it's\n"
    for n in (MAX_CHARS - 1, MAX_CHARS, MAX_CHARS + 1, 2 * MAX_CHARS + 3):
        yield ("word  d'll 1234\n\n é日 " * (n // 16))[:n]
    parts: list[str] = []
    while sum(map(len, parts)) < n_chars:
        parts.append(text(rng, ["the", " of", "日本"]) * rng.randint(1, 50))
    yield "".join(parts)


def compiled(tokenizer: Tokenizer, batch: list[str]) -> list[list[int]]:
    """The ids by the compiled path alone."""
    ids, lengths = tokenizer.encode_documents(texts_from(batch))
    ends = lengths.cumsum()
    return [
        ids[end - n + 1 : end - 1].tolist() for end, n in zip(ends, lengths, strict=True)
    ]  # between the begin and the end id


class Report:
    """Counts texts and differences."""

    def __init__(self) -> None:
        self.n_texts = self.n_bytes = self.n_different = 0

    def compare(self, batch: list[str], found: list[list[int]], expected: list[list[int]],
                what: str) -> None:  # fmt: skip
        """Count the texts of which two lists of ids differ, and print the first few."""
        for one, mine, other in zip(batch, found, expected, strict=True):
            if mine != other:
                self.n_different += 1
                if self.n_different < 10:
                    print(f"DIFFERENT ({what}): {one[:200]!r}\n  {mine[:30]}\n  {other[:30]}")


def llama3_path() -> Path:
    """Meta's ranks file."""
    return Path(str(find_spec("llama_models").submodule_search_locations[0])) / (  # type: ignore[union-attr]
        "llama3/tokenizer.model"
    )


def mistral_path() -> Path:
    """A SentencePiece model of Llama 2's kind, of the same size."""
    found = find_spec("mistral_common")
    return Path(str(found.submodule_search_locations[0])) / "data/tokenizer.model.v1"  # type: ignore[union-attr]


def check_llama3(n: int, seed: int, n_huge: int | None = None) -> Report:
    """Compare Llama 3's tokenizer with three references.

    Args:
        n: Number of texts.
        seed: Of the texts.
        n_huge: How many of the huge texts; all when None.
    """
    import tiktoken
    import tokenizers
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    ours = load_tokenizer(llama3_path())
    meta = MetaTokenizer(llama3_path())
    reference = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ours.ranks(), special_tokens={}
    )
    library = tokenizers.Tokenizer.from_str(ours.text)
    library.encode_special_tokens = True
    pieces = [piece.decode("utf-8", "ignore") for piece in ours.ranks()]
    report = Report()
    for batch in texts(n, seed, pieces):
        expected = [reference.encode_ordinary(one) for one in batch]
        by_meta = [meta.encode(one, bos=False, eos=False) for one in batch]
        by_library = [
            found.ids for found in library.encode_batch_fast(batch, add_special_tokens=False)
        ]
        report.compare(batch, by_meta, expected, "Meta's code, tiktoken")
        report.compare(batch, by_library, expected, "tokenizers, tiktoken")
        report.compare(batch, [ours.encode(one) for one in batch], expected, "one by one")
        report.compare(batch, compiled(ours, batch), expected, "compiled")
        decoded = [list(ours.decode(ids).encode()) for ids in expected]
        report.compare(batch, decoded, [list(one.encode()) for one in batch], "decoded")
        report.n_texts += len(batch)
        report.n_bytes += sum(len(one.encode()) for one in batch)
    for one in list(huge_texts(seed))[:n_huge]:
        expected = meta.encode(one, bos=False, eos=False)
        in_parts = [id_ for part in split_huge(one) for id_ in reference.encode_ordinary(part)]
        report.compare([one], [in_parts], [expected], "cuts")
        report.compare([one], [ours.encode(one)], [expected], "one by one")
        report.compare([one], compiled(ours, [one]), [expected], "compiled")
        report.n_texts, report.n_bytes = report.n_texts + 1, report.n_bytes + len(one.encode())
    return report


def llama2_like_model(seed: int, vocab_size: int = 1000) -> bytes:
    """A SentencePiece model trained with Llama 2's options."""
    import sentencepiece

    rng = random.Random(seed)
    words = [
        "the",
        "of",
        "return",
        "self",
        "naïve",
        "日本",
        "한국어",
        "слово",
        "'s",
        "x1",
        "==",
        "2024",
    ]
    lines = [
        "  " * rng.randrange(4) + " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        for _ in range(4000)
    ]
    lines += ["".join(chr(rng.randrange(0x21, 0x7F)) for _ in range(60)) for _ in range(400)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
        split_digits=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        pad_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


def check_sentencepiece(path: Path, n: int, seed: int, n_huge: int | None = None) -> Report:
    """Compare a SentencePiece model with ``sentencepiece``, ids and texts.

    Args:
        path: The model.
        n: Number of texts.
        seed: Of the texts.
        n_huge: How many of the huge texts; all when None.
    """
    import sentencepiece

    ours = load_tokenizer(path)
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [piece.replace("▁", " ") for piece in ours.tokens()]
    report = Report()
    for batch in texts(n, seed, pieces):
        expected = reference.encode(batch)
        report.compare(batch, [ours.encode(one) for one in batch], expected, "one by one")
        report.compare(batch, ours.encode_batch(batch), expected, "in batches")
        report.compare(batch, compiled(ours, batch), expected, "documents")
        mine = [list(ours.decode(ids).encode()) for ids in expected]
        report.compare(batch, mine, [list(one.encode()) for one in reference.decode(expected)],
                       "decoded")  # fmt: skip
        report.n_texts += len(batch)
        report.n_bytes += sum(len(one.encode()) for one in batch)
    for one in list(huge_texts(seed))[:n_huge]:
        report.compare([one], [ours.encode(one)], [reference.encode(one)], "huge")
        report.n_texts, report.n_bytes = report.n_texts + 1, report.n_bytes + len(one.encode())
    return report


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    n, seed = arguments.texts, arguments.seed
    n_different = 0
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "tokenizer.model"
        trained.write_bytes(llama2_like_model(seed))
        for name, check in (
            ("Llama 3", lambda: check_llama3(n, seed)),
            ("SentencePiece, Mistral's", lambda: check_sentencepiece(mistral_path(), n, seed)),
            ("SentencePiece, trained here", lambda: check_sentencepiece(trained, n, seed)),
        ):
            start_s = time.monotonic()
            report = check()
            n_different += report.n_different
            print(f"{name}: {report.n_different} differences over {report.n_texts} texts, "
                  f"{report.n_bytes / 1e6:.1f} MB, {time.monotonic() - start_s:.0f} s")  # fmt: skip
    return int(n_different > 0)


if __name__ == "__main__":
    sys.exit(main())
