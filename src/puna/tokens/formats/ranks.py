"""Llama 3's ``tokenizer.model``: one line per token, its bytes in base64 and its rank.

The file holds neither the pattern nor the special tokens; both are Llama 3's. The 256 special
tokens stand after the ranks, under one of two lists of names: Llama 3's own, and Llama 3.1's, which
names five that were reserved before.

Source: meta-llama/llama3 ``llama/tokenizer.py``; meta-llama/llama-models
``models/llama3/tokenizer.py``; openai/tiktoken ``tiktoken/load.py``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.fsio import atomic_path
from puna.tokens.special import LLAMA3_SPECIAL, Version

_SCALED_NAMES = re.compile(r"llama-?3[._][1-9]", re.IGNORECASE)
_FIRST_NAMES = re.compile(r"llama-?3-\d+b", re.IGNORECASE)
LLAMA3_RANKS = 128_000
"""Number of ranks of Meta's own file."""


def read_ranks(path: Path) -> list[bytes]:
    """Read the tokens of a ranks file in the order of their ranks.

    Args:
        path: The file.

    Raises:
        PunaError: A line cannot be read (it is named), a rank is missing or occurs twice, a token
            occurs twice, or a byte has no token.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if int(rank) in tokens or not token:
                raise ValueError(f"rank {int(rank)} occurs twice" if token else "an empty token")
            tokens[int(rank)] = token
        except (ValueError, binascii.Error) as error:
            shown = line[:60].decode("utf-8", "backslashreplace")
            raise PunaError(f"{path}, line {number}: {shown!r} is not a token in base64 and a rank"
                            f" ({error})", "copy the file again") from error  # fmt: skip
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None or not tokens:
        raise PunaError(f"{path}: rank {missing or 0} is missing, {len(tokens)} ranks are there",
                        "copy the file again, it is cut short")  # fmt: skip
    ordered = [tokens[rank] for rank in range(len(tokens))]
    known = set(ordered)
    if len(known) < len(ordered):
        raise PunaError(f"{path}: a token occurs under two ranks", "copy the file again")
    unknown = [byte for byte in range(256) if bytes((byte,)) not in known]
    if unknown:
        raise PunaError(f"{path}: the byte 0x{unknown[0]:02X} has no token",
                        "a ranks file holds all 256 bytes; copy it again")  # fmt: skip
    return ordered


def write_ranks(path: Path, tokens: Iterable[bytes]) -> None:
    """Write a ranks file.

    Args:
        path: The file, replaced as a whole.
        tokens: Tokens in the order of their ranks.
    """
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    with atomic_path(path) as partial:
        partial.write_bytes(b"".join(lines))


def version_of(path: Path, n_ranks: int, params: dict[str, object]) -> Version:
    """Choose between the names of Llama 3 and those of Llama 3.1.

    A name such as ``Llama-3.1-8B`` or ``Meta-Llama-3-8B`` in the path decides. Else Llama 3.1's
    names are taken, except for Meta's vocabulary beside a ``params.json`` with Llama 3's base of
    the rotary embedding (500,000) and without scaled positions, which only Llama 3 has.

    Args:
        path: The ranks file.
        n_ranks: Number of its tokens.
        params: Content of ``params.json`` beside it; may be empty.
    """
    folder = str(path.parent.absolute())
    if _SCALED_NAMES.search(folder) or params.get("use_scaled_rope"):
        return "3.1"
    if _FIRST_NAMES.search(folder):
        return "3.0"
    unscaled = bool(params) and params.get("rope_theta") == 500_000.0
    return "3.0" if n_ranks == LLAMA3_RANKS and unscaled else "3.1"


def special_count(path: Path, n_ranks: int, params: dict[str, object]) -> int:
    """Return how many special tokens stand after the ranks: the rows of the model say, else 256.

    Args:
        path: The ranks file, named in messages.
        n_ranks: Number of its tokens.
        params: Content of ``params.json`` beside it; may be empty.

    Raises:
        PunaError: The model has fewer rows than there are ranks.
    """
    rows = params.get("vocab_size")
    if not isinstance(rows, int) or rows < 0:
        return LLAMA3_SPECIAL
    if rows <= n_ranks:
        raise PunaError(f"{path} has {n_ranks} ranks, params.json beside it says vocab_size {rows}",
                        "the file belongs to another model; copy the right one")  # fmt: skip
    return rows - n_ranks


def in_alphabet(tokens: Sequence[bytes]) -> list[str]:
    """Write tokens in the byte alphabet of ``tokenizer.json``."""
    from puna.tokens.pretokens import byte_alphabet

    table = {byte: char for char, byte in byte_alphabet().items()}
    return [token.decode("latin-1").translate(table) for token in tokens]
