"""Tokenizers in GGUF files: the entries ``tokenizer.*``, read and written.

Two kinds occur with Llama's architecture: ``gpt2``, byte-level BPE with a list of merges and the
name of the way text is cut, and ``llama``, SentencePiece's pieces with scores.

Source: ggml-org/ggml ``docs/gguf.md``; ggml-org/llama.cpp ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.tokens.formats.sentencepiece import (
    Piece,
    PieceType,
    SentencePieceModel,
    byte_of,
    llama2_engine,
)
from puna.tokens.pretokens import LLAMA3_PATTERN, is_llama3_pattern

if TYPE_CHECKING:
    import tokenizers

    from puna.tokens.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "eot_token": "eot_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Entry of ``tokenizer_config.json`` -> entry of GGUF."""
_NOT_TEXT = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED)


def tokenizer_of(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """Make the tokenizer of a GGUF file.

    Args:
        metadata: Its key-values.
        path: The file, named in messages.

    Raises:
        PunaError: It holds none, or an unknown kind, or a damaged one.
    """
    from puna.tokens.tokenizer import Tokenizer

    kind, tokens = _entry(metadata, "model", str, path), _entry(metadata, "tokens", list, path)
    types = metadata.get(f"{_PREFIX}token_type") or [PieceType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise PunaError(f"{path}: {len(tokens)} tokens, but {len(types)} token types",
                        "copy the file again")  # fmt: skip
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in _ROLES.items():
        id_ = metadata.get(_PREFIX + key)
        if id_ is None:
            continue
        if not 0 <= id_ < len(tokens):
            raise PunaError(f"{path}: {_PREFIX}{key} is {id_}, there are {len(tokens)} tokens",
                            "copy the file again")  # fmt: skip
        config[role] = tokens[id_]
    pieces = _pieces(metadata, tokens, types, set(config.values()), path)
    config["add_bos_token"] = bool(
        metadata.get(
            f"{_PREFIX}add_bos_token",
            kind == "llama" or metadata.get(f"{_PREFIX}pre") in _LLAMA3_NAMES,
        )
    )
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    if kind == "llama":
        prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
        special = {role: config[role] for role in _ROLES if role in config}
        engine = llama2_engine(SentencePieceModel(pieces, special, prefix), str(path))
    elif kind == "gpt2":
        engine = _byte_level(metadata, pieces, config, path)
    else:
        raise PunaError(f"{path}: tokenizer of the kind {kind!r}",
                        "puna reads the kinds 'gpt2' and 'llama'")  # fmt: skip
    ends = [metadata.get(f"{_PREFIX}{key}") for key in ("eot_token_id", "eom_token_id")]
    stop_ids = [id_ for id_ in ends if isinstance(id_, int)]
    return Tokenizer(engine, config, str(path), stop_ids=stop_ids)


def _entry(metadata: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, kind):
        raise PunaError(f"{path} has no {_PREFIX}{name}: no tokenizer here",
                        "give the folder of the tokenizer")  # fmt: skip
    return value


def _pieces(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], roles: set[str],
    path: Path,
) -> list[Piece]:  # fmt: skip
    scores = metadata.get(f"{_PREFIX}scores") or [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise PunaError(f"{path}: {len(tokens)} tokens, but {len(scores)} scores",
                        "copy the file again")  # fmt: skip
    try:
        return [
            Piece(
                token, float(score),
                PieceType.CONTROL if token in roles and type_ == PieceType.NORMAL
                else PieceType(type_),
            )
            for token, score, type_ in zip(tokens, scores, types, strict=True)
        ]  # fmt: skip
    except ValueError as error:
        raise PunaError(f"{path}: {_PREFIX}token_type: {error}", "copy the file again") from error


def _byte_level(
    metadata: Mapping[str, Any], pieces: Sequence[Piece], config: Mapping[str, Any], path: Path
) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    pre = metadata.get(f"{_PREFIX}pre")
    cut = _pre_tokenizer(pre)
    if cut is None:
        raise PunaError(f"{path} cuts text in the way {pre!r} ({_PREFIX}pre)",
                        "puna knows 'llama-bpe', 'smollm' and 'gpt-2'; give the folder that holds "
                        "the tokenizer.json")  # fmt: skip
    n_vocab = len(pieces)
    while n_vocab and pieces[n_vocab - 1].type in _NOT_TEXT:  # those behind all text are added
        n_vocab -= 1
    vocab = {piece.text: i for i, piece in enumerate(pieces[:n_vocab])}
    merges = [tuple(merge.split(" ")) for merge in _entry(metadata, "merges", list, path)]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3_NAMES)
        engine = Tokenizer(model)
    except Exception as error:  # the library raises plain Exception
        raise PunaError(f"{path}: {_PREFIX}merges: {str(error).splitlines()[0]}",
                        "copy the file again") from error  # fmt: skip
    engine.pre_tokenizer = cut
    engine.decoder = decoders.ByteLevel()
    engine.add_tokens(
        [
            AddedToken(piece.text, special=piece.type in _NOT_TEXT, normalized=False)
            for piece in pieces
            if piece.type in (*_NOT_TEXT, PieceType.USER_DEFINED)
        ]
    )
    for i, piece in enumerate(pieces):
        if piece.type != PieceType.NORMAL and engine.token_to_id(piece.text) != i:
            raise PunaError(f"{path}: the token {piece.text!r} occurs twice", "copy the file again")
    bos = config.get("bos_token")
    if config["add_bos_token"] and bos is not None:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, engine.token_to_id(bos))],
        )  # fmt: skip
    return engine


def _pre_tokenizer(name: Any) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name in _LLAMA3_NAMES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words if name == "gpt-2" else None


def metadata_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the entries of a GGUF file that hold a tokenizer.

    Args:
        tokenizer: Byte-level BPE cut as Llama 3, SmolLM2 or GPT-2 do, or of Llama 2's kind.

    Returns:
        Key -> string, integer, truth value, or list of strings, floats or integers.

    Raises:
        PunaError: GGUF has no name for its kind.
    """
    definition = tokenizer.definition
    model: dict[str, Any] = definition["model"]
    added = {entry["id"]: entry for entry in definition["added_tokens"]}
    kind, entries = _kind_of(tokenizer, definition)
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [int(PieceType.UNUSED)] * tokenizer.vocab_size
    for text, id_ in model["vocab"].items():
        is_byte = kind == "llama" and byte_of(text) is not None
        tokens[id_], types[id_] = text, int(PieceType.BYTE if is_byte else PieceType.NORMAL)
    for id_, entry in added.items():
        tokens[id_] = entry["content"]
        types[id_] = int(PieceType.CONTROL if entry["special"] else PieceType.USER_DEFINED)
    unknown = model.get("unk_token")
    if unknown is not None:
        types[model["vocab"][unknown]] = int(PieceType.UNKNOWN)
    out: dict[str, Any] = {f"{_PREFIX}model": kind}
    out |= {f"{_PREFIX}{key}": value for key, value in entries.items()}
    out[f"{_PREFIX}tokens"], out[f"{_PREFIX}token_type"] = tokens, types
    id_of = {text: id_ for id_, text in enumerate(tokens)}
    for role, key in _ROLES.items():
        named = tokenizer.config.get(role)
        text = named.get("content") if isinstance(named, dict) else named
        if text in id_of:
            out[_PREFIX + key] = id_of[text]
    out[f"{_PREFIX}bos_token_id"] = tokenizer.bos_id
    out[f"{_PREFIX}eos_token_id"] = tokenizer.eos_id
    if tokenizer.eot_id != tokenizer.eos_id:
        out[f"{_PREFIX}eot_token_id"] = tokenizer.eot_id
    out[f"{_PREFIX}add_bos_token"] = tokenizer.adds_bos
    out[f"{_PREFIX}add_eos_token"] = False
    template = tokenizer.config.get("chat_template")
    if isinstance(template, str):
        out["tokenizer.chat_template"] = template
    return out


def _kind_of(
    tokenizer: Tokenizer, definition: Mapping[str, Any]
) -> tuple[str, dict[str, str | bool | list[str] | list[float]]]:
    """Return the kind and the entries that only it has."""
    model = definition["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if tokenizer.is_byte_level:
        pre = _name_of(definition)
        return "gpt2", {"pre": pre, "merges": [" ".join(pair) for pair in merges]}
    if tokenizer.pieces is None or not model.get("byte_fallback") or definition["pre_tokenizer"]:
        raise PunaError("GGUF has no name for this kind of tokenizer",
                        "keep its tokenizer.json beside the weights")  # fmt: skip
    lowest = -float(len(merges) + 1)
    scores = [lowest] * tokenizer.vocab_size
    best = 0.0
    last = ""
    for left, right in merges:  # those into one piece stand together
        text = left + right
        if text == last:
            continue
        if scores[model["vocab"][text]] > lowest:
            raise PunaError(f"the merges into {text!r} do not stand together: scores cannot say so",
                            "keep the tokenizer.json beside the weights")  # fmt: skip
        best, last = best - 1.0, text
        scores[model["vocab"][text]] = best
    steps = (definition["normalizer"] or {}).get("normalizers", [])
    prefix = any(step["type"] == "Prepend" for step in steps)
    return "llama", {"scores": scores, "add_space_prefix": prefix}


def _name_of(definition: Mapping[str, Any]) -> str:
    cut, whole = definition["pre_tokenizer"] or {}, bool(definition["model"].get("ignore_merges"))
    steps = cut.get("pretokenizers", [cut])
    words = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    by_regex = bool(steps[-1].get("use_regex"))
    if definition["normalizer"] is None and words:
        if is_llama3_pattern(cut) and whole:
            return _LLAMA3_NAMES[0]
        if len(steps) == 1 and by_regex and not whole:
            return "gpt-2"
        digits = steps[0].get("type") == "Digits" and steps[0].get("individual_digits")
        if len(steps) == 2 and digits and by_regex and not whole:
            return "smollm"
    raise PunaError("GGUF has no name for the way this tokenizer cuts text",
                    "keep its tokenizer.json beside the weights")  # fmt: skip
