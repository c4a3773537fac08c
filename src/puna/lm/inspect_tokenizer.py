"""Whether a checkpoint and the tokenizer beside it belong together; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.model.formats.checkpoint import SpecialIds
from puna.tokens.special import EOT, START_HEADER
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class TokenizerMatch:
    """A tokenizer, held against the rows of the embedding.

    Attributes:
        path: Where it was found.
        vocab_size: Its ids, special ones included.
        rows: Rows of the embedding.
        bos_id: Begins a text.
        stop_ids: End a generation: those of the tokenizer and those that the model's files name.
        special: Text -> id of the special tokens.
        chat_format: Its conversations' format, or None.
        problems: What does not fit, one sentence each.
    """

    path: Path
    vocab_size: int
    rows: int
    bos_id: int
    stop_ids: tuple[int, ...]
    special: dict[str, int]
    chat_format: str | None
    problems: tuple[str, ...]

    @property
    def unused_rows(self) -> int:
        """Rows of the embedding that no token refers to."""
        return max(self.rows - self.vocab_size, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the match as JSON values."""
        return {
            "path": str(self.path),
            "vocab_size": self.vocab_size,
            "embedding_rows": self.rows,
            "unused_rows": self.unused_rows,
            "bos_id": self.bos_id,
            "stop_ids": list(self.stop_ids),
            "special_tokens": len(self.special),
            "chat_format": self.chat_format,
            "fits": not self.problems,
            "problems": list(self.problems),
        }


def has_tokenizer(path: Path) -> bool:
    """Tell whether a checkpoint has a tokenizer in or beside it."""
    return path.is_file() or any((path / name).is_file() for name in _FILES)


def match_tokenizer(path: Path, rows: int, model_ids: SpecialIds) -> TokenizerMatch:
    """Load the tokenizer of a checkpoint and hold it against the model.

    Args:
        path: The checkpoint.
        rows: Rows of the embedding.
        model_ids: What the model's files say about special tokens.

    Raises:
        PunaError: The tokenizer is damaged.
    """
    tokenizer = load_tokenizer(path)
    stop_ids = sorted({*tokenizer.stop_ids, *model_ids.eos_ids})
    return TokenizerMatch(
        path, tokenizer.vocab_size, rows, tokenizer.bos_id, tuple(stop_ids),
        dict(tokenizer.special_ids), _chat_format(tokenizer),
        tuple(_problems(tokenizer, rows, model_ids)),
    )  # fmt: skip


def _problems(tokenizer: Tokenizer, rows: int, model_ids: SpecialIds) -> Iterable[str]:
    if tokenizer.vocab_size > rows:
        lost = [f"{text} = {id_}" for text, id_ in tokenizer.special_ids.items() if id_ >= rows]
        first = f", among them {lost[0]}" if lost else ""
        yield (
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the embedding {rows:,} rows: "
            f"{tokenizer.vocab_size - rows:,} ids have none{first}"
        )
    named = [("bos", model_ids.bos_id), ("pad", model_ids.pad_id)]
    named += [("eos", eos_id) for eos_id in model_ids.eos_ids]
    for role, id_ in named:
        if id_ is not None and id_ >= rows:
            yield f"the model's files name {role} = {id_}, outside the {rows:,} rows"
    if model_ids.bos_id not in (None, tokenizer.bos_id):
        yield f"the model's files begin with id {model_ids.bos_id}, the tokenizer with " + str(
            tokenizer.bos_id
        )
    if model_ids.eos_ids and not set(model_ids.eos_ids) & tokenizer.stop_ids:
        yield (
            f"the model's files end with {', '.join(map(str, model_ids.eos_ids))}, the tokenizer "
            f"with {', '.join(map(str, sorted(tokenizer.stop_ids)))}"
        )


def _chat_format(tokenizer: Tokenizer) -> str | None:
    special = tokenizer.special_ids
    if START_HEADER in special and EOT in special:
        return "llama3"
    if "<|im_start|>" in special and "<|im_end|>" in special:
        return "chatml"
    return None
