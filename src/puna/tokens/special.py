"""Special tokens: Llama 3.1's layout after the ranks, and what other tokenizers call theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOM = "<|eom_id|>"
EOT = "<|eot_id|>"

PYTHON_TAG = "<|python_tag|>"

Version = Literal["3.0", "3.1"]
"""Which names Llama 3's special tokens have: those of April 2024, or those since Llama 3.1."""

_NAMED = (
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|step_id|>",
    START_HEADER,
    END_HEADER,
    EOM,
    EOT,
    PYTHON_TAG,
    "<|image|>",
)
_NAMED_IN_LLAMA3 = {_NAMED.index(name) for name in (BOS, EOS, START_HEADER, END_HEADER, EOT)}
MIN_SPECIAL = len(_NAMED)
"""Fewest special tokens: those that have a meaning."""
LLAMA3_SPECIAL = 256
"""Number of special tokens of Llama 3."""

_ROLES = {
    "bos": ("<s>", "<|startoftext|>", "<|endoftext|>", "[CLS]"),
    "eos": ("</s>", "<|endoftext|>", "<|im_end|>", "[SEP]"),
    "eot": ("<|im_end|>", "<|end|>", "<end_of_turn>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<unk>"),
}
_LLAMA3 = {"bos": BOS, "eos": EOS, "eot": EOT, "pad": PAD}


def special_names(n_special: int, version: Version = "3.1") -> list[str]:
    """Return the names of the special tokens in the order of their ids.

    Llama 3.1's order (llama-models, ``models/llama3/tokenizer.py``): twelve named ones, then
    reserved ones numbered from 2. Llama 3's (llama3, ``llama/tokenizer.py``) has the same ids, five
    of the twelve named ones being reserved.

    Args:
        n_special: How many, at least :data:`MIN_SPECIAL`.
        version: ``"3.1"``, or ``"3.0"`` for the names of Llama 3.
    """
    if n_special < MIN_SPECIAL:
        raise ValueError(f"{n_special} special tokens, {MIN_SPECIAL} have a meaning")
    if version == "3.0":
        numbers = iter(range(n_special))
        return [
            _NAMED[i] if i in _NAMED_IN_LLAMA3 else f"<|reserved_special_token_{next(numbers)}|>"
            for i in range(n_special)
        ]
    reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(n_special - MIN_SPECIAL)]
    return [*_NAMED, *reserved]


def find_roles(added: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int | None]:
    """Find which ids begin and end a text, end a turn and pad.

    What ``tokenizer_config.json`` names counts first, then Llama 3's names, then names that other
    families use.

    Args:
        added: Text -> id of the added tokens.
        config: Content of ``tokenizer_config.json``; may be empty.

    Returns:
        ``bos``, ``eos``, ``eot``, ``pad`` -> id, or None.
    """
    found: dict[str, int | None] = {}
    for role, names in _ROLES.items():
        named = config.get(f"{role}_token")
        if isinstance(named, dict):
            named = named.get("content")
        candidates = [named, _LLAMA3[role], *names]
        found[role] = next((added[name] for name in candidates if name in added), None)
    return found
