"""Llama 2's SentencePiece models: read without the library, exact, kept for Meta's layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from token_fuzz import llama2_like_model, mistral_path

from puna.core.errors import PunaError
from puna.tokens.stream import StreamDecoder
from puna.tokens.tokenizer import REPLACEMENT, Tokenizer, load_tokenizer

TEXTS = (
    "", " ", "Hello", " Hello", "  Hello  world ", "a\n b", "é日本🎉", "</s><s>", "▁x", "12",
    "\t\r\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return load_tokenizer(mistral_path())


@pytest.fixture(scope="module")
def reference() -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(mistral_path()))


def test_ids_and_texts_are_those_of_sentencepiece(mistral: Tokenizer, reference: Any) -> None:
    for text in TEXTS:
        ids = reference.encode(text)
        assert mistral.encode(text) == ids, text
        assert mistral.encode(text, bos=True, eos=True) == [1, *ids, 2]
        assert mistral.decode(ids) == reference.decode(ids)
        assert mistral.decode([1, *ids, 2], skip_special=True) == reference.decode([1, *ids, 2])
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32_000, 1, 2)
    assert mistral.stop_ids == {2}
    assert (mistral.is_byte_level, mistral.is_compiled, mistral.is_llama3) == (False, False, False)
    with pytest.raises(PunaError, match="not byte-level"):
        mistral.ranks()


def test_pieces_are_bytes(mistral: Tokenizer) -> None:
    ids = mistral.encode("Hi é\x07🎉")
    assert b"".join(map(mistral.piece, ids)) == " Hi é\x07🎉".encode()
    assert mistral.piece(3 + 0x0A) == b"\n"
    assert mistral.piece(1) == b"<s>"
    assert mistral.piece(-1) == mistral.piece(32_000) == REPLACEMENT.encode()


def test_special_tokens_in_text_stay_text(mistral: Tokenizer) -> None:
    for name in ("<s>", "</s>", "<unk>"):
        assert not any(map(mistral.is_special, mistral.encode(f"a{name}b")))
        assert mistral.special_ids[name] in mistral.encode(f"a{name}b", allow_special=True)


@pytest.mark.parametrize("continues", [False, True])
def test_streaming_gives_the_whole_text(mistral: Tokenizer, continues: bool) -> None:
    for text in TEXTS:
        ids = mistral.encode(text, bos=True, eos=True)
        decoder = StreamDecoder(mistral, continues=continues)
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        added = " " if continues and text else ""
        assert streamed == added + text.replace("▁", " ")
    decoder = StreamDecoder(mistral, skip_special=False)
    ids = mistral.encode("Hi", bos=True)
    assert "".join(map(decoder.push, ids)) == mistral.decode(ids) == "<s> Hi"


def test_saved_for_meta_and_hugging_face(mistral: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    mistral.save_meta(tmp_path / "meta")
    assert (tmp_path / "meta/tokenizer.model").read_bytes() == mistral_path().read_bytes()
    mistral.save(tmp_path / "hf")
    other = AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = load_tokenizer(tmp_path / "hf")
    for text in TEXTS:
        if "s>" not in text:
            assert other(text).input_ids == mistral.encode(text, bos=True)
        assert again.encode(text) == mistral.encode(text)
    with pytest.raises(PunaError, match="neither"):  # the SentencePiece file did not come along
        again.save_meta(tmp_path / "out")
    (tmp_path / "hf/tokenizer.model").write_bytes(mistral_path().read_bytes())
    load_tokenizer(tmp_path / "hf").save_meta(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == mistral_path().read_bytes()


def test_another_model_beside_the_definition_is_refused(mistral: Tokenizer, tmp_path: Path) -> None:
    mistral.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(llama2_like_model(0, 600))
    with pytest.raises(PunaError, match="another vocabulary"):
        load_tokenizer(tmp_path).save_meta(tmp_path / "out")


def test_metas_folder_has_it_one_above(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(mistral_path().read_bytes())
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    with pytest.raises(PunaError, match="no tokenizer here"):
        load_tokenizer(folder)
    (folder / "params.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_tokenizer(folder).vocab_size == 32_000


def trained(**options: Any) -> bytes:
    out = io.BytesIO()
    plain = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 50), model_writer=out, vocab_size=300,
        hard_vocab_limit=False, minloglevel=2, **(plain | options),
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram"}, "no byte-pair encoding"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "removes whitespace"),
        ({"treat_whitespace_as_suffix": True}, "end of words"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, options: dict, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(**options))
    with pytest.raises(PunaError, match=words) as raised:
        load_tokenizer(path)
    assert str(path) in raised.value.message


def test_without_a_dummy_prefix(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(add_dummy_prefix=False))
    ours = load_tokenizer(path)
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (*TEXTS, "the cat", " the cat"):
        ids = reference.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("n_bytes", [3, 40, 5000, 480_000])
def test_a_file_cut_short_is_refused(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(mistral_path().read_bytes()[:n_bytes])
    with pytest.raises(PunaError) as raised:
        load_tokenizer(path)
    assert str(path) in raised.value.message
