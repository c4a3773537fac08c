"""The compiled path: blocks of 64 bytes, tables that fill up, pieces of every length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tiktoken

from puna.data.kernels.buffers import texts_from
from puna.tokens import bpe
from puna.tokens.bulk import bulk_encoder, character_classes
from puna.tokens.kernels.bits import padded
from puna.tokens.kernels.masks import cut
from puna.tokens.kernels.scan import piece_end
from puna.tokens.kernels.words import KNOWN_BYTES, LONG_BYTES, MAX_LEARNT, MAX_LEARNT_LONG
from puna.tokens.pretokens import LLAMA3_PATTERN
from puna.tokens.tokenizer import Tokenizer

SAMPLE = "The puna is the high plain of Peru; llamas live on it. Ночью холодно, “froid”. 日本語 "
CHARACTERS = (
    *"aB1 1  \n\r\t\x0b'',.(", "'s", "'ll", "'ſ", "é", "ж", "日", "“", "—", "🎉", "\u0301", "\xa0",
    "\u3000", "\x85", "²", "٣", "\n   ", "   \n",
)  # fmt: skip
ENDS_AT = ("", "x", "\n", "\xa0\n", "\u3000", "\u3000\n\nb", "é", "“b", "²3", "'sé", "\x85 \n b")
"""What may follow a run that crosses the border of a block."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    ranks = bpe.train_ranks([[SAMPLE * 5]], 400, 2)
    return Tokenizer(bpe.definition(ranks, 12), bpe.tokenizer_config())


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return tiktoken.Encoding(
        "reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=tokenizer.ranks(), special_tokens={}
    ).encode_ordinary


def compiled(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    ids, lengths = tokenizer.encode_documents(texts_from(list(texts)))
    ends = lengths.cumsum()
    return [ids[end - n + 1 : end - 1].tolist() for end, n in zip(ends, lengths, strict=True)]


def ends_of(text: str) -> tuple[list[int], list[int]]:
    """Where pieces end: cut by blocks, and piece by piece."""
    raw = np.frombuffer(text.encode(), np.uint8)
    data, classes = padded(raw), character_classes()
    ends = np.empty(len(raw), np.int32)
    n = cut(data, 0, len(raw), classes, ends)
    one_by_one = [0]
    while one_by_one[-1] < len(raw):
        one_by_one.append(piece_end(data, one_by_one[-1], len(raw), classes))
    return ends[:n].tolist(), one_by_one[1:]


def test_blocks_are_cut_as_piece_by_piece() -> None:
    rng = random.Random(0)
    for number in range(4000):
        some = rng.sample(CHARACTERS, rng.randint(2, len(CHARACTERS)))
        text = "".join(rng.choice(some) for _ in range(rng.randrange(200)))
        by_blocks, one_by_one = ends_of(text)
        assert by_blocks == one_by_one, (number, text)


@pytest.mark.parametrize("unit", [" ", "a", "é", "日", "“", "—", "1", "\n", "🎉", "\u0301"])
def test_runs_across_the_borders_of_blocks(unit: str) -> None:
    for first in ("", "a\n", "a", "“", "'", "\n", " ", "²"):
        for n in range(15, 75):
            for last in ENDS_AT:
                text = first + unit * n + last
                by_blocks, one_by_one = ends_of(text)
                assert by_blocks == one_by_one, text


def test_bytes_that_are_no_text_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = padded(rng.integers(0x70, 0x100, 150).astype(np.uint8))
        ends = np.empty(200, np.int32)
        n = cut(data, 0, 150, character_classes(), ends)
        assert (np.diff(ends[:n]) > 0).all()


def test_pieces_of_every_length(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    rng = random.Random(1)
    lengths = [*range(1, 40), *range(LONG_BYTES - 3, LONG_BYTES + 5), 1000]
    for alphabet in ("a", "the pun".replace(" ", ""), "жно", "日本", "-"):
        texts = [
            "".join(rng.choice(alphabet) for _ in range(n // len(alphabet[0].encode()) + 1))
            for n in lengths
        ]
        expected = [reference(text) for text in texts]
        assert compiled(tokenizer, texts) == expected
        assert compiled(tokenizer, texts) == expected  # now they are known


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (7, None), (None, 8), (7, 8)])
def test_begin_and_end_ids_stand_around_each_document(
    tokenizer: Tokenizer, bos: int | None, eos: int | None
) -> None:
    encoder = bulk_encoder(tokenizer.definition)
    assert encoder is not None
    texts = ["the puna", "", "a " * 30_000, "x" * 60_000 + " y", ""]
    ids, lengths = encoder.encode(texts_from(texts), bos, eos)
    expected = [
        [*([] if bos is None else [bos]), *one, *([] if eos is None else [eos])]
        for one in map(tokenizer.encode, texts)
    ]
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == [id_ for one in expected for id_ in one]


def test_the_text_of_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    name = next(iter(tokenizer.special_set))
    text = f"a {tokenizer.decode([name])} b"
    assert compiled(tokenizer, [text]) == [tokenizer.encode(text)]
    assert name not in tokenizer.encode(text)


def test_full_tables_forget_and_stay_exact(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    words = [f"{chr(0x61 + i % 26)}q{i:x}z".translate(str.maketrans("0123456789", "ghijklmnop"))
             for i in range(MAX_LEARNT + 1000)]  # fmt: skip
    long = [word * (KNOWN_BYTES // len(word) + 1) for word in words[: MAX_LEARNT_LONG + 1000]]
    everything = words + long
    texts = [" ".join(everything[i : i + 1000]) for i in range(0, len(everything), 1000)]
    expected = [reference(text) for text in texts]
    assert compiled(tokenizer, texts) == expected
    assert compiled(tokenizer, texts) == expected
    assert [compiled(tokenizer, [text])[0] for text in texts] == expected
