"""Checking the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.core.errors import PunaError

Message = Mapping[str, Any]
"""``role`` and ``content``, both text; an assistant's may have ``tool_calls`` and no content."""


def check_messages(messages: Sequence[Message], roles: Sequence[str]) -> None:
    """Check that each message has a known role and text.

    Args:
        messages: The conversation.
        roles: Roles that the format has.

    Raises:
        PunaError: There is no message, or one is malformed; it is named by its position.
    """
    if isinstance(messages, (str, bytes, Mapping)):
        raise PunaError(f"a conversation is a list of messages, not a {type(messages).__name__}",
                        'write [{"role": "user", "content": ...}]')  # fmt: skip
    if not messages:
        raise PunaError("a conversation without messages", "give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise PunaError(f"message {index} has no `role` and `content`: {str(message)[:80]}",
                            'write each message as {"role": ..., "content": ...}')  # fmt: skip
        role, content = message["role"], message.get("content")
        if role not in roles:
            raise PunaError(f"message {index} has the role {role!r}",
                            "use one of " + ", ".join(sorted(roles)))  # fmt: skip
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if "content" not in message:
            raise PunaError(f"message {index} has no `content`",
                            'write each message as {"role": ..., "content": ...}')  # fmt: skip
        if not isinstance(content, str):
            raise PunaError(f"message {index} has a content of type {type(content).__name__}",
                            "give the content as text")  # fmt: skip
