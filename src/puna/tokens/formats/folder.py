"""Finding and reading the tokenizer that a path holds, and writing tokenizer files.

In a folder ``tokenizer.json`` counts first, then ``tokenizer.model`` (Meta's folders; those of
Llama 2 keep it in the folder above), then a single ``.gguf`` file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, write_json, write_text
from puna.tokens.chat import template_to_save
from puna.tokens.formats.ranks import (
    in_alphabet,
    read_ranks,
    special_count,
    version_of,
    write_ranks,
)
from puna.tokens.formats.sentencepiece import llama2_engine, looks_like_sentencepiece, parse
from puna.tokens.special import Version, special_names

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
PARAMS_FILE = "params.json"
_HEAD_BYTES = 64


def open_tokenizer(path: Path, version: Version | None) -> Tokenizer:
    """Read the tokenizer of a folder or a file.

    Args:
        path: The folder, or the file.
        version: See :func:`puna.tokens.tokenizer.load_tokenizer`.

    Raises:
        PunaError: There is none, or it is damaged or of an unknown kind.
    """
    file = find_file(path)
    if file.suffix == ".gguf":
        from puna.core.gguf import read_gguf
        from puna.tokens.formats.gguf import tokenizer_of

        return tokenizer_of(read_gguf(file).metadata, file)
    if file.suffix == ".json":
        return _read_json(file)
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if looks_like_sentencepiece(head):
        return _read_sentencepiece(file)
    if b"\0" in head or not head.isascii():
        raise PunaError(f"{file} is neither a ranks file nor a SentencePiece model: it begins with "
                        f"{head[:12]!r}", "copy the file again")  # fmt: skip
    return _read_ranks(file, version)


def find_file(path: Path) -> Path:
    """Return the file that holds the tokenizer of a path.

    Raises:
        PunaError: There is none.
    """
    if not path.is_dir():
        if path.is_file():
            return path
        raise PunaError(f"{path} does not exist: no tokenizer here",
                        "give a model folder, or a tokenizer's file")  # fmt: skip
    places = [path / JSON_FILE, path / MODEL_FILE]
    if (path / PARAMS_FILE).is_file():
        places.append(path.parent / MODEL_FILE)
    for file in places:
        if file.is_file():
            return file
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise PunaError(f"{path / JSON_FILE} does not exist, nor {MODEL_FILE}, nor one .gguf file: no "
                    "tokenizer here",
                    f"give a folder that holds a {JSON_FILE}, such as the output of the stage "
                    "tokens.train")  # fmt: skip


def _read_ranks(file: Path, version: Version | None) -> Tokenizer:
    from puna.tokens.bpe import llama3_engine, tokenizer_config
    from puna.tokens.tokenizer import Tokenizer

    ranks = read_ranks(file)
    params = read_object(file.with_name(PARAMS_FILE))
    names = special_names(
        special_count(file, len(ranks), params), version or version_of(file, len(ranks), params)
    )
    engine = llama3_engine(in_alphabet(ranks), names)
    return Tokenizer(
        engine, tokenizer_config(names), str(file),
        stop_ids=further_stop_ids(file.with_name(GENERATION_FILE)),
    )  # fmt: skip


def _read_sentencepiece(file: Path) -> Tokenizer:
    from puna.tokens.tokenizer import Tokenizer

    data = file.read_bytes()
    model = parse(data, str(file))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    config |= model.special | read_config(file)
    config.setdefault("clean_up_tokenization_spaces", False)
    return Tokenizer(
        llama2_engine(model, str(file)), config, str(file),
        stop_ids=further_stop_ids(file.with_name(GENERATION_FILE)), sentencepiece=data,
    )  # fmt: skip


def _read_json(file: Path) -> Tokenizer:
    from puna.tokens.tokenizer import Tokenizer

    config = read_config(file)
    try:
        definition = file.read_text(encoding="utf-8")
    except ValueError as error:
        raise PunaError(f"the tokenizer in {file.parent} is damaged: {file.name}: {error}",
                        f"copy {file.name} again") from error  # fmt: skip
    stop_ids = further_stop_ids(file.with_name(GENERATION_FILE))
    tokenizer = Tokenizer(definition, config, str(file), stop_ids=stop_ids)
    original = file.with_name(MODEL_FILE)
    if file.name == JSON_FILE and original.is_file():
        data = original.read_bytes()
        if looks_like_sentencepiece(data[:_HEAD_BYTES]):
            tokenizer.sentencepiece = data
    return tokenizer


def read_config(file: Path) -> dict[str, Any]:
    """Read what lies beside a tokenizer's file: its configuration, special tokens and template."""
    config = {
        **read_object(file.with_name(SPECIAL_FILE)),
        **read_object(file.with_name(CONFIG_FILE)),
    }
    template = file.with_name(TEMPLATE_FILE)
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    named = config.get("chat_template")
    if isinstance(named, list):  # several templates: the one called "default" is for conversations
        templates = {entry.get("name"): entry.get("template") for entry in named}
        config["chat_template"] = templates.get("default")
    return config


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object that lies beside a tokenizer; empty when it is not there.

    Raises:
        PunaError: The file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PunaError(f"the tokenizer in {file.parent} is damaged: {file.name}: {error}",
                        f"copy {file.name} again") from error  # fmt: skip
    if not isinstance(value, dict):
        raise PunaError(f"the tokenizer in {file.parent} is damaged: {file.name} holds no object",
                        f"copy {file.name} again")  # fmt: skip
    return value


def further_stop_ids(file: Path) -> list[int]:
    """Return the ids that end a generation by a ``generation_config.json``."""
    ids = read_object(file).get("eos_token_id")
    return [id_ for id_ in (ids if isinstance(ids, list) else [ids]) if isinstance(id_, int)]


def save_hf(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files with which transformers uses the tokenizer.

    Args:
        tokenizer: Of any kind.
        folder: Made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JSON_FILE, tokenizer.text)
    config = dict(tokenizer.config)
    template = template_to_save(tokenizer)
    if template is not None:
        config["chat_template"] = template
    write_json(folder / CONFIG_FILE, config)


def save_meta(tokenizer: Tokenizer, folder: Path) -> None:
    """Write Meta's ``tokenizer.model``.

    Args:
        tokenizer: Of Llama 3's kind, or made of a SentencePiece model.
        folder: Made when missing.

    Raises:
        PunaError: The format cannot hold this tokenizer.
    """
    target = folder / MODEL_FILE
    if tokenizer.sentencepiece is not None:
        _check_sentencepiece(tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            partial.write_bytes(tokenizer.sentencepiece)
        return
    if not tokenizer.is_llama3:
        raise PunaError("Meta's tokenizer.model holds Llama 3's ranks or Llama 2's SentencePiece "
                        "model; this tokenizer is neither",
                        "save it for Hugging Face (a tokenizer.json)")  # fmt: skip
    ranks = list(tokenizer.ranks())
    n_special = tokenizer.vocab_size - len(ranks)
    names = sorted(tokenizer.special_ids, key=lambda name: tokenizer.special_ids[name])
    for version in ("3.1", "3.0"):
        if n_special == len(names) and names == special_names(n_special, version):
            folder.mkdir(parents=True, exist_ok=True)
            write_ranks(target, ranks)
            return
    raise PunaError("Meta's tokenizer.model cannot hold these special tokens: "
                    + ", ".join(names[:4]) + ", ...",
                    "save it for Hugging Face (a tokenizer.json)")  # fmt: skip


def _check_sentencepiece(tokenizer: Tokenizer) -> None:
    """Check that the SentencePiece file still is this tokenizer's."""
    model = parse(tokenizer.sentencepiece or b"", MODEL_FILE)
    if [piece.text for piece in model.pieces] != tokenizer.tokens():
        raise PunaError("tokenizer.model beside tokenizer.json holds another vocabulary",
                        "remove one of the two")  # fmt: skip
