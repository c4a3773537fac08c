"""Llama 3's ranks file: read, named, written back; a damaged line is named and nothing skipped."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from token_fuzz import llama3_path

from puna.core.errors import PunaError
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.pretokens import byte_alphabet
from puna.tokens.special import special_names
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

TEXT = "Hello  world's 1234567\n\n\tx = é日本🎉 <|eot_id|>"


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return load_tokenizer(llama3_path())


def small_ranks() -> list[bytes]:
    return [bytes((byte,)) for byte in byte_alphabet().values()] + [b"th", b"the", b" the"]


def write(path: Path, tokens: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ids_are_those_of_metas_code(llama3: Tokenizer) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer(llama3_path())
    assert llama3.encode(TEXT, bos=True, eos=True) == meta.encode(TEXT, bos=True, eos=True)
    assert llama3.encode(TEXT, allow_special=True) == meta.encode(
        TEXT, bos=False, eos=False, allowed_special="all"
    )
    assert llama3.special_ids == meta.special_tokens
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (128_256, 128_000, 128_001)
    assert (llama3.pad_id, llama3.eot_id) == (meta.pad_id, meta.eot_id)
    assert llama3.stop_ids == set(meta.stop_tokens) == {128_001, 128_008, 128_009}
    assert llama3.is_llama3
    assert llama3.is_byte_level


def test_names_of_llama_3_and_of_llama_3_1() -> None:
    old, new = special_names(256, "3.0"), special_names(256, "3.1")
    changed = {128_000 + i: (a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    assert {id_: names for id_, names in changed.items() if id_ <= 128_011} == {
        128_004: ("<|reserved_special_token_2|>", "<|finetune_right_pad_id|>"),
        128_005: ("<|reserved_special_token_3|>", "<|step_id|>"),
        128_008: ("<|reserved_special_token_4|>", "<|eom_id|>"),
        128_010: ("<|reserved_special_token_5|>", "<|python_tag|>"),
        128_011: ("<|reserved_special_token_6|>", "<|image|>"),
    }
    assert (old[255], new[255]) == (
        "<|reserved_special_token_250|>", "<|reserved_special_token_245|>",
    )  # fmt: skip
    assert len(set(old)) == len(set(new)) == 256


@pytest.mark.parametrize(
    ("folder", "params", "version"),
    [
        ("x", None, "3.1"),
        ("x", {"rope_theta": 500_000.0, "vocab_size": 272}, "3.1"),  # not Meta's vocabulary
        ("x", {"use_scaled_rope": True, "vocab_size": 272}, "3.1"),
        ("Meta-Llama-3-8B-Instruct", None, "3.0"),
        ("Llama3-70b", {"vocab_size": 272}, "3.0"),
        ("Llama-3.2-1B", None, "3.1"),
        ("Meta-Llama-3.1-8B", None, "3.1"),
    ],
)
def test_what_lies_beside_chooses_the_names(
    tmp_path: Path, folder: str, params: dict | None, version: str
) -> None:
    path = write(tmp_path / folder / "tokenizer.model", small_ranks())
    if params is not None:
        (path.parent / "params.json").write_text(json.dumps(params))
    found = load_tokenizer(path.parent)
    assert ("<|eom_id|>" in found.special_ids) == (version == "3.1")
    assert found.vocab_size == 259 + (256 if params is None else 272 - 259)
    assert "<|eom_id|>" in load_tokenizer(path, version="3.1").special_ids
    old = load_tokenizer(path, version="3.0")
    assert "<|eom_id|>" not in old.special_ids
    assert old.stop_ids == {old.eos_id, old.eot_id}
    assert old.pad_id == old.eos_id
    assert old.chat.name == "llama3"


def test_metas_vocabulary_beside_unscaled_positions_is_llama_3(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(llama3_path())
    params = {"dim": 4096, "rope_theta": 500_000.0, "vocab_size": 128_256}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert load_tokenizer(tmp_path).stop_ids == {128_001, 128_009}


def test_saved_for_hugging_face_and_for_meta(llama3: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    llama3.save_meta(tmp_path / "meta")
    assert (tmp_path / "meta/tokenizer.model").read_bytes() == llama3_path().read_bytes()
    llama3.save(tmp_path / "hf")
    other = AutoTokenizer.from_pretrained(tmp_path / "hf")
    safe = TEXT.replace("<|eot_id|>", "")
    assert other(safe).input_ids == llama3.encode(safe, bos=True)
    again = load_tokenizer(tmp_path / "hf")
    assert again.digest == llama3.digest
    assert again.is_llama3
    again.save_meta(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").read_bytes() == llama3_path().read_bytes()


def test_ones_own_tokenizer_goes_to_meta_and_back(tmp_path: Path) -> None:
    mine = Tokenizer(definition(train_ranks([[TEXT * 20]], 300, 2), 16), tokenizer_config())
    mine.save_meta(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": mine.vocab_size}))
    again = load_tokenizer(tmp_path)
    assert again.special_ids == mine.special_ids
    assert again.encode(TEXT) == mine.encode(TEXT)
    assert again.digest == mine.digest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not base64! 5", "line 6"),
        ("IQ==", "line 6"),
        ("IQ== five", "line 6"),
        ("IQ== 5 6", "line 6"),
        ("JQ== 4", "rank 4 occurs twice"),
        ("Jg== 9999", "rank 5 is missing"),
        ("IQ== 5", "two ranks"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "tokenizer.model", small_ranks())
    lines = path.read_text().splitlines()
    lines[5] = line
    path.write_text("\n".join(lines))
    with pytest.raises(PunaError, match=words) as raised:
        load_tokenizer(path)
    assert str(path) in raised.value.message
    assert raised.value.fix


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.model", small_ranks()[:200])
    with pytest.raises(PunaError, match="has no token"):
        load_tokenizer(path)
    path.write_bytes(b"\x00\x01\x02\x03" * 30)
    with pytest.raises(PunaError, match="neither a ranks file nor a SentencePiece model"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(PunaError, match="is missing"):
        load_tokenizer(path)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.model", small_ranks())
    (tmp_path / "params.json").write_text('{"vocab_size": 100}')
    with pytest.raises(PunaError, match="vocab_size 100"):
        load_tokenizer(tmp_path)


def test_what_meta_cannot_hold_is_refused(tmp_path: Path) -> None:
    ranks = train_ranks([[TEXT * 20]], 300, 2)
    other = json.loads(definition(ranks, 12))
    other["added_tokens"][3]["content"] = "<|mine|>"
    tokenizer = Tokenizer(json.dumps(other), tokenizer_config())
    with pytest.raises(PunaError, match="special tokens"):
        tokenizer.save_meta(tmp_path / "out")
    other = json.loads(definition(ranks, 12))
    del other["model"]["merges"][-1]  # the ids no longer follow from the ranks alone
    with pytest.raises(PunaError, match="neither"):
        Tokenizer(json.dumps(other), tokenizer_config()).save_meta(tmp_path / "out")
    assert not (tmp_path / "out").exists()
