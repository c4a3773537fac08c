"""Whether a checkpoint and the tokenizer beside it belong together; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.model.formats.checkpoint import SpecialIds
from puna.tokens.outline import Outline, outline_tokenizer

_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class TokenizerMatch:
    """A tokenizer, held against the rows of the embedding.

    Attributes:
        outline: Its size, special tokens and chat format.
        rows: Rows of the embedding.
        stop_ids: End a generation: those of the tokenizer and those that the model's files name.
        problems: What does not fit, one sentence each.
    """

    outline: Outline
    rows: int
    stop_ids: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def unused_rows(self) -> int:
        """Rows of the embedding that no token refers to."""
        return max(self.rows - self.outline.vocab_size, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the match as JSON values."""
        return {
            "path": str(self.outline.file),
            "vocab_size": self.outline.vocab_size,
            "embedding_rows": self.rows,
            "unused_rows": self.unused_rows,
            "bos_id": self.outline.bos_id,
            "stop_ids": list(self.stop_ids),
            "special_tokens": len(self.outline.special),
            "chat_format": self.outline.chat,
            "fits": not self.problems,
            "problems": list(self.problems),
        }


def has_tokenizer(path: Path) -> bool:
    """Tell whether a checkpoint has a tokenizer in or beside it."""
    if path.is_file():  # GGUF
        from puna.core.gguf import read_gguf

        return "tokenizer.ggml.model" in read_gguf(path, skip_arrays=True).metadata
    places = [path / name for name in _FILES]
    if (path / "params.json").is_file():  # Llama 2's folders share the one above them
        places.append(path.parent / "tokenizer.model")
    return any(place.is_file() for place in places)


def match_tokenizer(path: Path, rows: int, model_ids: SpecialIds) -> TokenizerMatch:
    """Hold the tokenizer of a checkpoint against the model, without building it.

    Args:
        path: The checkpoint.
        rows: Rows of the embedding.
        model_ids: What the model's files say about special tokens.

    Raises:
        PunaError: The tokenizer is damaged.
    """
    outline = outline_tokenizer(path)
    stop_ids = tuple(sorted({*outline.stop_ids, *model_ids.eos_ids}))
    problems = tuple(_problems(outline, rows, model_ids))
    return TokenizerMatch(outline, rows, stop_ids, problems)


def _problems(outline: Outline, rows: int, model_ids: SpecialIds) -> Iterator[str]:
    if outline.vocab_size > rows:
        lost = [f"{text} = {id_}" for text, id_ in outline.special.items() if id_ >= rows]
        first = f", among them {lost[0]}" if lost else ""
        yield (
            f"the tokenizer has {outline.vocab_size:,} ids, the embedding {rows:,} rows: "
            f"{outline.vocab_size - rows:,} ids have none{first}"
        )
    named = [("bos", model_ids.bos_id), ("pad", model_ids.pad_id)]
    named += [("eos", eos_id) for eos_id in model_ids.eos_ids]
    for role, id_ in named:
        if id_ is not None and id_ >= rows:
            yield f"the model's files name {role} = {id_}, outside the {rows:,} rows"
    if None not in (model_ids.bos_id, outline.bos_id) and model_ids.bos_id != outline.bos_id:
        yield (
            f"texts begin with id {model_ids.bos_id} in the model's files, with {outline.bos_id} "
            "in the tokenizer's"
        )
    if model_ids.eos_ids and outline.stop_ids and not outline.stop_ids & set(model_ids.eos_ids):
        yield (
            f"texts end with id {_join(model_ids.eos_ids)} in the model's files, with "
            f"{_join(sorted(outline.stop_ids))} in the tokenizer's"
        )


def _join(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))
