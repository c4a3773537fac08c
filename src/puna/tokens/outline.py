"""The outline of a tokenizer: its size, special tokens and chat format, without building it.

Building Llama 3's tokenizer takes about two seconds, most of them for its merges. Whether it fits a
model is told by the list of its tokens alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.tokens.formats import folder
from puna.tokens.formats.ranks import read_ranks, special_count, version_of
from puna.tokens.formats.sentencepiece import PieceType, looks_like_sentencepiece, parse
from puna.tokens.special import (
    BOS,
    END_HEADER,
    EOM,
    EOT,
    START_HEADER,
    find_roles,
    special_names,
)

_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
_VOCAB = re.compile(r'"vocab"\s*:\s*(?=[\[{])')  # a token "vocab" has a number behind it
_GGUF = "tokenizer.ggml."
_GGUF_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "eot_token": "eot_token_id",
}


@dataclass(frozen=True)
class Outline:
    """What a tokenizer's files say about it.

    Attributes:
        file: The file that holds it.
        vocab_size: Number of ids, special ones included.
        special: Text -> id of the special tokens.
        bos_id: Begins a text; None where no token does.
        stop_ids: End a text, a turn or a message.
        chat: ``llama3``, ``llama2``, ``template`` (any other the files bring), or None.
    """

    file: Path
    vocab_size: int
    special: dict[str, int]
    bos_id: int | None
    stop_ids: frozenset[int]
    chat: str | None


def outline_tokenizer(path: Path) -> Outline:
    """Read the outline of the tokenizer that :func:`puna.tokens.tokenizer.load_tokenizer` loads.

    Args:
        path: A folder or a file.

    Raises:
        PunaError: There is none, or it is damaged.
    """
    file = folder.find_file(path)
    try:
        return _read(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PunaError(f"the tokenizer in {file} is damaged: {error}",
                        f"copy {file.name} again") from error  # fmt: skip


def _read(file: Path) -> Outline:
    if file.suffix == ".gguf":
        return _of_gguf(file)
    if file.suffix == ".json":
        return _of_json(file)
    with file.open("rb") as stream:
        head = stream.read(64)
    return _of_sentencepiece(file) if looks_like_sentencepiece(head) else _of_ranks(file)


def _of_json(file: Path) -> Outline:
    text = file.read_text(encoding="utf-8")
    added: Any = _value(text, _ADDED) or []
    vocab: Any = _value(text, _VOCAB)
    names = {one["content"]: int(one["id"]) for one in added}
    special = {one["content"]: int(one["id"]) for one in added if one["special"]}
    # BPE and WordPiece number their tokens, Unigram lists them.
    last = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    size = max([last, *names.values()]) + 1
    return _finish(file, size, special, names, folder.read_config(file))


def _value(text: str, key: re.Pattern[str]) -> Any:
    """Return the value of a key without parsing what stands around it."""
    match = key.search(text)
    if match is None:
        return None
    return json.JSONDecoder().raw_decode(text, match.end())[0]


def _of_ranks(file: Path) -> Outline:
    n_ranks = len(read_ranks(file))
    params = folder.read_object(file.with_name(folder.PARAMS_FILE))
    names = special_names(special_count(file, n_ranks, params), version_of(file, n_ranks, params))
    special = {name: n_ranks + at for at, name in enumerate(names)}
    return _finish(file, n_ranks + len(names), special, special, {})


def _of_sentencepiece(file: Path) -> Outline:
    model = parse(file.read_bytes(), str(file))
    config = {**model.special, **folder.read_config(file)}
    ids = {piece.text: at for at, piece in enumerate(model.pieces)}
    special = {
        piece.text: at
        for at, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
    }
    return _finish(file, len(model.pieces), special, ids, config, is_sentencepiece=True)


def _of_gguf(file: Path) -> Outline:
    from puna.core.gguf import read_gguf

    metadata = read_gguf(file).metadata
    tokens: Sequence[str] = metadata.get(f"{_GGUF}tokens") or ()
    if not tokens:
        raise PunaError(f"{file} has no {_GGUF}tokens: no tokenizer here",
                        "give the folder of the tokenizer")  # fmt: skip
    types = metadata.get(f"{_GGUF}token_type") or [PieceType.NORMAL] * len(tokens)
    controls = (PieceType.CONTROL, PieceType.UNKNOWN)
    special = {tokens[at]: at for at, type_ in enumerate(types) if type_ in controls}
    roles = {role: metadata.get(_GGUF + key) for role, key in _GGUF_ROLES.items()}
    config: dict[str, Any] = {
        role: tokens[id_]
        for role, id_ in roles.items()
        if isinstance(id_, int) and 0 <= id_ < len(tokens)
    }
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    names = {**special, **{text: tokens.index(text) for text in config.values() if text in tokens}}
    is_sentencepiece = metadata.get(f"{_GGUF}model") == "llama"
    return _finish(file, len(tokens), special, names, config, is_sentencepiece)


def _finish(
    file: Path, vocab_size: int, special: dict[str, int], names: Mapping[str, int],
    config: Mapping[str, Any], is_sentencepiece: bool = False,
) -> Outline:  # fmt: skip
    roles = find_roles(names, config)
    ends = {roles["eos"], roles["eot"], names.get(EOM)} | set(
        folder.further_stop_ids(file.with_name(folder.GENERATION_FILE))
    )
    template = config.get("chat_template")
    return Outline(
        file, vocab_size, special, roles["bos"],
        frozenset(id_ for id_ in ends if id_ is not None),
        _chat(special, template if isinstance(template, str) else "", is_sentencepiece),
    )  # fmt: skip


def _chat(special: Mapping[str, int], template: str, is_sentencepiece: bool) -> str | None:
    if {BOS, START_HEADER, END_HEADER, EOT} <= special.keys() and (
        not template or START_HEADER in template
    ):
        return "llama3"
    if ("<<SYS>>" in template and "[INST]" in template) or (is_sentencepiece and not template):
        return "llama2"
    return "template" if template else None
