"""The ``tokenizers`` library: making its tokenizer, and looking at the parts of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError

if TYPE_CHECKING:
    import tokenizers


def make_engine(definition: str | tokenizers.Tokenizer, where: str) -> tokenizers.Tokenizer:
    """Make the library's tokenizer of a definition.

    Args:
        definition: Content of a ``tokenizer.json``; what is made already is returned.
        where: Named in messages.

    Raises:
        PunaError: The definition is damaged.
    """
    import tokenizers

    if isinstance(definition, tokenizers.Tokenizer):
        return definition
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises plain Exception
        raise PunaError(
            f"{where} is damaged: {(str(error).splitlines() or ['?'])[0]}",
            "copy it again, or train a tokenizer (stage tokens.train)",
        ) from error


def part_of(component: Any) -> dict[str, Any]:
    """Return a part of the library's tokenizer as ``tokenizer.json`` holds it; empty for none."""
    return {} if component is None else json.loads(component.__getstate__())


def once(ids: list[int], bos_id: int) -> list[int]:
    """Return ids that begin with exactly one begin id."""
    first = next((i for i, id_ in enumerate(ids) if id_ != bos_id), len(ids))
    return [bos_id, *ids[first:]]
