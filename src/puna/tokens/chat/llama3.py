r"""Llama 3's chat format.

::

    <|begin_of_text|> (<|start_header_id|> role <|end_header_id|> "\n\n" content <|eot_id|>)*

Contents are stripped of whitespace at both ends. Since Llama 3.1 an assistant's message may call
tools: a call of the code interpreter opens with ``<|python_tag|>``, and a message after which the
assistant goes on (``stop_reason`` ``"end_of_message"``) ends with ``<|eom_id|>``.

Source: meta-llama/llama3 ``llama/tokenizer.py``, class ``ChatFormat`` (which strips contents);
meta-llama/llama-models ``models/llama3/chat_format.py`` (which has the tools).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.tokens.chat.messages import Message, check_messages
from puna.tokens.special import BOS, END_HEADER, EOM, EOT, PYTHON_TAG, START_HEADER

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

LLAMA3_TEMPLATE = (
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
"""The same format, without calls of tools, as a Jinja template for ``tokenizer_config.json``."""

_SEARCHES = ("brave_search", "wolfram_alpha", "photogen")
_INTERPRETER = "code_interpreter"


class Llama3Format:
    """Llama 3's format.

    Args:
        tokenizer: A tokenizer with Llama 3's special tokens.
    """

    name = "llama3"
    template = LLAMA3_TEMPLATE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """``<|eot_id|>``, and ``<|eom_id|>`` where there is one."""
        ids = self._tokenizer.special_ids
        return frozenset(ids[name] for name in (EOT, EOM) if name in ids)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation.

        Args:
            messages: ``role`` and ``content`` each; an assistant's may have ``tool_calls`` (as in
                OpenAI's interface) and ``stop_reason``.
            add_generation_prompt: End with the header of the assistant's next message.

        Raises:
            PunaError: A message is malformed.
        """
        ids, _ = self.encode_with_mask(messages)
        return ids + self._header("assistant") if add_generation_prompt else ids

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        Raises:
            PunaError: A message is malformed.
        """
        check_messages(messages, list(ROLES))
        ids, mask = [self._special(BOS)], [False]
        for index, message in enumerate(messages):
            role = message["role"]
            opening = self._header(ROLES[role])
            said = self._said(index, message)
            ids += opening + said
            mask += [False] * len(opening) + [role == "assistant"] * len(said)
        return ids, mask

    def _header(self, role: str) -> list[int]:
        return [
            self._special(START_HEADER),
            *self._tokenizer.encode(role),
            self._special(END_HEADER),
            *self._tokenizer.encode("\n\n"),
        ]

    def _said(self, index: int, message: Message) -> list[int]:
        content = self._tokenizer.encode((message.get("content") or "").strip())
        if message["role"] != "assistant":
            return [*content, self._special(EOT)]
        calls = [_call(index, call) for call in message.get("tool_calls") or ()]
        if calls and calls[0][0] == _INTERPRETER:
            content.insert(0, self._special(PYTHON_TAG))
        for name, arguments in calls:
            content += self._tokenizer.encode(_written(index, name, arguments))
        goes_on = message.get("stop_reason") == "end_of_message"
        return [*content, self._special(EOM if goes_on else EOT)]

    def _special(self, name: str) -> int:
        found = self._tokenizer.special_ids.get(name)
        if found is None:
            raise PunaError(f"the tokenizer has no {name}, which this conversation needs",
                            "load it with Llama 3.1's names of the special tokens")  # fmt: skip
        return found


def _call(index: int, call: Any) -> tuple[str, Mapping[str, Any]]:
    """Return name and arguments of a call of a tool."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise PunaError(f"message {index} has a tool call without name and arguments: "
                        f"{str(call)[:80]}",
                        'write {"function": {"name": ..., "arguments": {...}}}')  # fmt: skip
    return name, arguments


def _written(index: int, name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as the model writes it: built-in tools in Python, others in JSON."""
    needed = "code" if name == _INTERPRETER else "query" if name in _SEARCHES else None
    if needed is None:
        call = {"type": "function", "name": name, "parameters": dict(arguments)}
        return json.dumps(call)
    if not isinstance(arguments.get(needed), str):
        raise PunaError(f"message {index} calls {name} without `{needed}`", f"give `{needed}`")
    return arguments["code"] if needed == "code" else f'{name}.call(query="{arguments["query"]}")'
