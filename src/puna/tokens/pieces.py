"""The bytes that each id stands for, where a tokenizer has such bytes.

Byte-level tokenizers (Llama 3's kind) and those of SentencePiece with byte fallback (Llama 2's
kind) turn ids into text by joining bytes. That makes decoding a table look-up and streaming exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.tokens.formats.sentencepiece import SPACE, byte_of
from puna.tokens.pretokens import byte_alphabet

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_JOINING = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


@dataclass(frozen=True)
class Pieces:
    """Bytes by id.

    Attributes:
        bytes_of: The bytes of each id.
        is_byte_level: Ids stand for any bytes (Llama 3's kind); else for characters or one byte.
        drops_space: A text loses the space that its first piece begins with (Llama 2's kind, which
            puts one there).
    """

    bytes_of: list[bytes]
    is_byte_level: bool
    drops_space: bool


def find_pieces(
    decoder: Mapping[str, Any] | None,
    vocab: Mapping[str, int],
    added: Mapping[int, str],
    vocab_size: int,
) -> Pieces | None:
    """Make the table of bytes of a tokenizer.

    Args:
        decoder: Entry ``decoder`` of its ``tokenizer.json``.
        vocab: Token -> id, without added tokens.
        added: Id -> text of added tokens.
        vocab_size: Number of ids.

    Returns:
        The table, or None when its texts are not made by joining bytes.
    """
    steps = _steps(decoder)
    kinds = {step.get("type") for step in steps}
    pieces = [REPLACEMENT.encode()] * vocab_size
    if kinds == {"ByteLevel"}:
        alphabet = byte_alphabet()
        table = {ord(char): byte for char, byte in alphabet.items()}
        for text, id_ in vocab.items():
            pieces[id_] = (
                text.translate(table).encode("latin-1")
                if alphabet.keys() >= set(text)
                else b"".join(
                    bytes((alphabet[char],)) if char in alphabet else char.encode() for char in text
                )
            )
        drops_space = False
    elif _joins(steps, kinds):
        for text, id_ in vocab.items():
            byte = byte_of(text)
            pieces[id_] = text.replace(SPACE, " ").encode() if byte is None else bytes((byte,))
        drops_space = any(
            step.get("type") == "Strip" or step.get("prepend_scheme", "never") != "never"
            for step in steps
        )
    else:
        return None
    for id_, text in added.items():
        pieces[id_] = text.encode()
    return Pieces(pieces, kinds == {"ByteLevel"}, drops_space)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]


def _joins(steps: list[Mapping[str, Any]], kinds: set[Any]) -> bool:
    """Tell whether the steps of a decoder do no more than join pieces and bytes."""
    if not {"ByteFallback", "Fuse"} <= kinds <= _JOINING:
        return False
    for step in steps:
        if step["type"] == "Replace" and (step["pattern"], step["content"]) != (
            {"String": SPACE}, " ",
        ):  # fmt: skip
            return False
        if step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) != (
            " ", 1, 0,
        ):  # fmt: skip
            return False
        if step["type"] == "Metaspace" and step.get("replacement", SPACE) != SPACE:
            return False
    return True
