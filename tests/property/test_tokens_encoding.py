"""Encoding is exact: the library, the compiled path and tiktoken give the same ids for any text."""

from __future__ import annotations

from functools import cache

import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.kernels.buffers import texts_from
from puna.tokens import pretokens
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.bulk import character_classes
from puna.tokens.kernels.scan import LETTER, NEWLINE, NUMBER, SPACE
from puna.tokens.stream import StreamDecoder
from puna.tokens.tokenizer import Tokenizer

ALPHABETS = (
    "ab", " -=", "a'sStTdDlLrReEvVmM\u017f", "  \t\r\n\x0b\x0c\x85\xa0\u3000x1.", "<|eot_id>",
    "abcXYZ é日本語한국어 🎉🏽_", "0123456789.,١٢½²ⅷ a", "\x1c\x1d\x1e\x1f \na",
    "\u0301e\u200d\U0001f468\u200d\U0001f469", "العربيةעברית हिन्दी",
)  # fmt: skip


def mixed_text(max_size: int = 200) -> st.SearchStrategy[str]:
    """Runs from one script or another, as real text and as adversaries write it."""
    runs = [st.text(alphabet, max_size=30) for alphabet in ALPHABETS]
    anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    return (
        st.lists(st.one_of(*runs, anything), max_size=12)
        .map("".join)
        .map(lambda text: text[:max_size])
    )


@cache
def tokenizer() -> Tokenizer:
    parts = [alphabet * 3 for alphabet in ALPHABETS]
    parts += [
        "aabab bbaab",
        "    if x:\n\t\treturn  'it''s'\r\n\r\n",
        "---- ==== -=-=",
        "1234567 12",
    ]
    corpus = [a + b for a in parts for b in parts]
    return Tokenizer(definition(train_ranks([corpus], 700, 2), 12), tokenizer_config())


@cache
def reference() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference", pat_str=pretokens.LLAMA3_PATTERN, mergeable_ranks=tokenizer().ranks(),
        special_tokens={},
    )  # fmt: skip


def compiled(texts: list[str]) -> list[list[int]]:
    bulk = tokenizer()._bulk
    assert bulk is not None
    ids, lengths = bulk.encode(texts_from(texts))
    ends = lengths.cumsum()
    return [ids[end - n : end].tolist() for end, n in zip(ends, lengths, strict=True)]


@settings(max_examples=250, deadline=None)
@given(st.lists(mixed_text(), min_size=1, max_size=8))
def test_three_encoders_agree_and_lose_nothing(texts: list[str]) -> None:
    expected = [reference().encode_ordinary(text) for text in texts]
    assert [tokenizer().encode(text) for text in texts] == expected
    assert compiled(texts) == expected
    assert tokenizer().encode_batch(texts) == expected
    assert [tokenizer().decode(ids) for ids in expected] == texts


@settings(max_examples=20, deadline=None)
@given(mixed_text(60), st.integers(100, 4000))
def test_long_pieces_agree(text: str, times: int) -> None:
    long = "".join(text.split()) * times
    long = long[:20_000]  # below the limits of huge texts, which the reference does not have
    assert compiled([long]) == [reference().encode_ordinary(long)] == [tokenizer().encode(long)]


def split_as_llama_3(text: str) -> list[str]:
    """The loop of meta-llama/llama3, ``llama/tokenizer.py``, in our words."""
    parts = []
    for first in range(0, len(text), pretokens.MAX_CHARS):
        block = text[first : first + pretokens.MAX_CHARS]
        start, run, space = 0, 0, block[0].isspace()
        for i, char in enumerate(block):
            if char.isspace() != space:
                run, space = 1, char.isspace()
            else:
                run += 1
                if run > pretokens.MAX_RUN_CHARS:
                    parts.append(block[start:i])
                    start, run = i, 1
        parts.append(block[start:])
    return parts


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "é", " ", "\n", "\x1c", "ab ", "日"]),
            st.sampled_from([1, 7, 24_999, 25_000, 25_001, 50_001, 130_000, 399_990]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_huge_texts_are_cut_as_in_llama_3(runs: list[tuple[str, int]]) -> None:
    text = "".join(unit * times for unit, times in runs)
    parts = split_as_llama_3(text)
    assert list(pretokens.split_huge(text)) == parts
    expected = [id_ for part in parts for id_ in reference().encode_ordinary(part)]
    assert compiled([text]) == [expected]
    assert tokenizer().encode(text) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-3, 800), max_size=40), st.booleans())
def test_streaming_gives_the_text_of_all_ids(ids: list[int], skip_special: bool) -> None:
    decoder = StreamDecoder(tokenizer(), skip_special)
    text = "".join(map(decoder.push, ids)) + decoder.flush()
    assert text == tokenizer().decode(ids, skip_special)


def test_classes_are_those_of_tiktoken() -> None:
    """Over every code point: the table of the compiled path covers all that the pattern can see."""
    table = character_classes()
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pattern, kinds in ((r"\p{L}", {LETTER}), (r"\p{N}", {NUMBER}), (r"\s", {SPACE, NEWLINE})):
        engine = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        found = set(engine.decode(engine.encode_ordinary(everything)))
        mine = {chr(c) for kind in kinds for c in (table == kind).nonzero()[0]}
        assert mine == found
