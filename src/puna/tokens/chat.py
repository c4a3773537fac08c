r"""Llama 3's chat format.

::

    <|begin_of_text|> (<|start_header_id|> role <|end_header_id|> "\n\n" content <|eot_id|>)*

Source: meta-llama/llama3, ``llama/tokenizer.py``, class ``ChatFormat``. Contents are stripped of
whitespace at both ends and never produce special ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.tokens.special import BOS, END_HEADER, EOT, START_HEADER

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
"""Role of a message -> its name in the header."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
"""The same format as a Jinja template, for ``tokenizer_config.json``."""


def header(tokenizer: Tokenizer, role: str) -> list[int]:
    """Return the ids that open a message.

    Args:
        tokenizer: A tokenizer with Llama 3's special tokens.
        role: Name as it stands in the header.

    Raises:
        PunaError: The tokenizer has no such tokens.
    """
    return [
        _special(tokenizer, START_HEADER),
        *tokenizer.encode(role),
        _special(tokenizer, END_HEADER),
        *tokenizer.encode("\n\n"),
    ]


def encode(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and which of them the assistant says.

    Args:
        tokenizer: A tokenizer with Llama 3's special tokens.
        messages: ``{"role", "content"}`` each, at least one.

    Returns:
        Ids with exactly one begin id, and a mask that is true on the assistant's content and on the
        ``<|eot_id|>`` after it.

    Raises:
        PunaError: A message is malformed, or the tokenizer has no such tokens.
    """
    if not messages:
        raise PunaError("a conversation without messages", "give at least one message")
    ids = [_special(tokenizer, BOS)]
    mask = [False]
    end_of_turn = _special(tokenizer, EOT)
    for index, message in enumerate(messages):
        role, content = _check(index, message)
        opening = header(tokenizer, ROLES[role])
        said = [*tokenizer.encode(content.strip()), end_of_turn]
        ids += opening + said
        mask += [False] * len(opening) + [role == "assistant"] * len(said)
    return ids, mask


def _check(index: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise PunaError(f"message {index} has no `role` and `content`: {str(message)[:80]}",
                        'write each message as {"role": ..., "content": ...}')  # fmt: skip
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PunaError(f"message {index} has the role {role!r}",
                        "use one of " + ", ".join(sorted(ROLES)))  # fmt: skip
    if not isinstance(content, str):
        raise PunaError(f"message {index} has a content of type {type(content).__name__}",
                        "give the content as text")  # fmt: skip
    return role, content


def _special(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.special_ids.get(name)
    if found is None:
        raise PunaError(f"the tokenizer has no {name}: it does not know Llama 3's chat format",
                        "use a tokenizer that puna trained, or Llama 3's")  # fmt: skip
    return found
