r"""Llama 2's chat format.

::

    (<s> "[INST] " user " [/INST] " assistant " " </s>)*  <s> "[INST] " user " [/INST]"

A system message goes into the first user's, between ``<<SYS>>\n`` and ``\n<</SYS>>\n\n``. Users and
assistants alternate. The tags are ordinary text to the model, so a message that holds one could
pose as another: as in Meta's code such a conversation is refused.

Source: meta-llama/llama ``llama/generation.py``, ``chat_completion``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.tokens.chat.messages import Message, check_messages

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""What no message may hold."""

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('users and assistants must alternate') }}{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""The same format as a Jinja template, for ``tokenizer_config.json``."""


class Llama2Format:
    """Llama 2's format.

    Args:
        tokenizer: A tokenizer of Llama 2's kind.
    """

    name = "llama2"
    template = LLAMA2_TEMPLATE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """``</s>``."""
        return frozenset({self._tokenizer.eos_id})

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation.

        Args:
            messages: A system message at most, first; then users and assistants in turn.
            add_generation_prompt: The assistant speaks next, so the last message is a user's. (The
                format has nothing that opens an assistant's message.)

        Raises:
            PunaError: A message is malformed, out of turn, or holds one of the :data:`TAGS`.
        """
        ids, _ = self.encode_with_mask(messages)
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            raise PunaError(f"message {len(messages) - 1} is the assistant's: nothing to answer",
                            "end the conversation with a user's message")  # fmt: skip
        return ids

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        Raises:
            PunaError: As for :meth:`encode`.
        """
        turns = _turns(messages)
        ids: list[int] = []
        mask: list[bool] = []
        for first in range(0, len(turns), 2):
            asked = f"[INST] {turns[first].strip()} [/INST]"
            prompt = self._tokenizer.encode(asked, bos=True)
            if first + 1 == len(turns):
                ids += prompt
                mask += [False] * len(prompt)
                continue
            answer = turns[first + 1].strip()
            whole = self._tokenizer.encode(f"{asked} {answer} ", bos=True, eos=True)
            n_asked = _shared(prompt, whole)
            ids += whole
            mask += [False] * n_asked + [True] * (len(whole) - n_asked)
        return ids, mask


def _turns(messages: Sequence[Message]) -> list[str]:
    """Return what users and assistants say in turn, the system's message inside the first."""
    check_messages(messages, ["system", "user", "assistant"])
    for index, message in enumerate(messages):
        found = next((tag for tag in TAGS if tag in (message.get("content") or "")), None)
        if found is not None:
            raise PunaError(f"message {index} holds {found}, a tag of Llama 2's chat format",
                            "remove the tag; it could pose as another message")  # fmt: skip
        if message.get("tool_calls"):
            raise PunaError(f"message {index} calls tools, which Llama 2's chat format cannot say",
                            "use Llama 3.1 or newer")  # fmt: skip
    has_system = messages[0]["role"] == "system"
    spoken = list(messages[1:] if has_system else messages)
    if not spoken:
        raise PunaError("the conversation has a system message only", "add a user's message")
    for number, message in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise PunaError(
                f"message {number + has_system} has the role {message['role']!r}, not {expected!r}:"
                " in Llama 2's format users and assistants alternate",
                "join messages of one role, and begin with a user's",
            )
    contents = [message["content"] for message in spoken]
    if has_system:
        contents[0] = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{contents[0]}"
    return contents


def _shared(left: list[int], right: list[int]) -> int:
    """Return how many ids two lists begin with in common."""
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n
