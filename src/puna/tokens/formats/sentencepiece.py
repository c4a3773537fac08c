"""Llama 2's ``tokenizer.model``: a SentencePiece model, read without its library.

The file is a protobuf message: the pieces (text, score, type), how they were trained and how text
is normalised. Llama 2's kind is byte-pair encoding with a token for each byte, no normalisation, a
space put before the text and all whitespace kept. The definition made of it has the merges in the
order of the scores of what they form.

Source: google/sentencepiece ``src/sentencepiece_model.proto``, ``src/bpe_model.cc``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""Stands for a space in pieces."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BPE = 2


class PieceType(IntEnum):
    """What a piece is; the numbers are those of SentencePiece and of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids.

    Attributes:
        pieces: By id.
        special: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token`` -> piece, where named.
        dummy_prefix: A space is put before the text.
    """

    pieces: list[Piece]
    special: dict[str, str]
    dummy_prefix: bool


def looks_like_sentencepiece(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it is a SentencePiece model."""
    return head[:1] == b"\n" and head[2:3] == b"\n"  # field 1 (a piece) with field 1 (its text)


def parse(data: bytes, where: str) -> SentencePieceModel:
    """Read a SentencePiece model.

    Args:
        data: Content of the file.
        where: Named in messages.

    Raises:
        PunaError: The file is damaged, or its kind is not Llama 2's.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(
                    Piece(piece[1].decode(), float(piece.get(2, 0.0)), PieceType(piece.get(3, 1)))
                )
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
        names = {
            f"{role}_token": trainer.get(field, default).decode()
            for role, field, default in (
                ("unk", 45, b"<unk>"), ("bos", 46, b"<s>"), ("eos", 47, b"</s>"), ("pad", 48, b""),
            )
        }  # fmt: skip
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise PunaError(f"{where} is no SentencePiece model: {type(error).__name__}: {error}",
                        "copy the file again") from error  # fmt: skip
    _check_kind(trainer, normalizer, pieces, where)
    known = {piece.text for piece in pieces}
    return SentencePieceModel(
        pieces,
        {role: name for role, name in names.items() if name in known},
        bool(normalizer.get(3, 1)),
    )


def _check_kind(
    trainer: dict[int, Any], normalizer: dict[int, Any], pieces: list[Piece], where: str
) -> None:
    wrong = {
        "it is no byte-pair encoding (model_type)": trainer.get(3, 1) != _BPE,
        "it has no byte fallback": not trainer.get(35, 0),
        "it normalises text": bool(normalizer.get(2)),
        "it removes whitespace": bool(normalizer.get(4, 1)),
        "it keeps spaces as they are (escape_whitespaces)": not normalizer.get(5, 1),
        "it puts the space at the end of words": bool(trainer.get(24, 0)),
        "it has user-defined pieces": any(
            piece.type in (PieceType.USER_DEFINED, PieceType.UNUSED) for piece in pieces
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise PunaError(f"{where} is not of Llama 2's kind: {what}",
                            "convert it with transformers to a tokenizer.json")  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            n_bytes, at = _varint(data, at)
            value = data[at : at + n_bytes]
            at += n_bytes
            if len(value) < n_bytes:
                raise ValueError(f"cut short at byte {len(data)}")
        elif kind == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        elif kind == 1:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        else:
            raise ValueError(f"strange field at byte {at}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def merges_by_score(pieces: Sequence[Piece], where: str) -> list[tuple[str, str]]:
    """Return every pair that forms a piece, best score of what it forms first.

    Args:
        pieces: By id.
        where: Named in messages.

    Raises:
        PunaError: A piece holds a character that is no piece, which merges cannot tell.
    """
    id_of = {piece.text: i for i, piece in enumerate(pieces) if piece.type == PieceType.NORMAL}
    found: list[tuple[float, int, int, int, str, str]] = []
    for i, piece in enumerate(pieces):
        text = piece.text
        if piece.type != PieceType.NORMAL or len(text) < 2:
            continue
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in id_of and right in id_of:
                found.append((-piece.score, i, id_of[left], id_of[right], left, right))
            elif (at == 1 and left not in id_of) or (at == len(text) - 1 and right not in id_of):
                raise PunaError(f"{where}: the piece {text!r} holds a character that is no piece",
                                "convert it with transformers to a tokenizer.json")  # fmt: skip
    return [(left, right) for *_, left, right in sorted(found)]


def llama2_engine(model: SentencePieceModel, where: str) -> tokenizers.Tokenizer:
    """Make the library's tokenizer that gives the ids of a SentencePiece model.

    Args:
        model: What :func:`parse` read.
        where: Named in messages.

    Raises:
        PunaError: See :func:`merges_by_score`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    if len(vocab) < len(model.pieces):
        raise PunaError(f"{where}: a piece occurs twice", "copy the file again")
    unknown = next((p.text for p in model.pieces if p.type == PieceType.UNKNOWN), None)
    engine = Tokenizer(
        models.BPE(vocab=vocab, merges=merges_by_score(model.pieces, where), unk_token=unknown,
                   fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    prepend = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    engine.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    engine.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for special, types in ((True, (PieceType.CONTROL, PieceType.UNKNOWN)),
                           (False, (PieceType.USER_DEFINED,))):  # fmt: skip
        engine.add_tokens(
            [
                AddedToken(piece.text, special=special, normalized=False)
                for piece in model.pieces
                if piece.type in types
            ]
        )
    bos = model.special.get("bos_token")
    if bos is not None:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return engine


def byte_of(text: str) -> int | None:
    """Return the byte that a piece such as ``<0x0A>`` stands for, else None."""
    match = _BYTE.fullmatch(text)
    return int(match[1], 16) if match else None
