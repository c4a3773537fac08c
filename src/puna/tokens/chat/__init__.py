"""Conversations as ids: Llama 3's format, Llama 2's, and the template that a model brings.

Whatever the format, the contents of messages never become special ids, and a conversation begins
with exactly one begin id (Llama 2's format begins each turn with one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from puna.tokens.chat.messages import Message
from puna.tokens.special import BOS, END_HEADER, EOT, START_HEADER

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Message", "find_format", "template_to_save"]


class ChatFormat(Protocol):
    """One way to write a conversation as ids.

    Attributes:
        name: ``llama3``, ``llama2`` or ``template``.
        template: The format as a Jinja template, for ``tokenizer_config.json``.
        end_ids: Ids that end what the assistant says.
    """

    name: str
    template: str

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end what the assistant says."""
        ...

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation.

        Args:
            messages: The conversation.
            add_generation_prompt: End with what opens the assistant's next message.

        Raises:
            PunaError: A message is malformed, or has no place in the format.
        """
        ...

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        Raises:
            PunaError: A message is malformed, or has no place in the format.
        """
        ...


def find_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Choose the format of a tokenizer's conversations.

    Llama 3's special tokens mean Llama 3's format. Else the template of ``tokenizer_config.json``
    decides: Llama 2's own is recognised, any other is rendered. A SentencePiece model without a
    template is taken for Llama 2.

    Returns:
        The format, or None when there is neither.
    """
    template = tokenizer.config.get("chat_template")
    template = template if isinstance(template, str) else ""
    knows_llama3 = {BOS, START_HEADER, END_HEADER, EOT} <= tokenizer.special_ids.keys()
    if knows_llama3 and (not template or START_HEADER in template):
        from puna.tokens.chat.llama3 import Llama3Format

        return Llama3Format(tokenizer)
    is_llama2 = "<<SYS>>" in template and "[INST]" in template and not tokenizer.is_byte_level
    if is_llama2 or (not template and tokenizer.sentencepiece is not None):
        from puna.tokens.chat.llama2 import Llama2Format

        return Llama2Format(tokenizer)
    if template:
        from puna.tokens.chat.template import TemplateFormat

        return TemplateFormat(tokenizer, template)
    return None


def template_to_save(tokenizer: Tokenizer) -> str | None:
    """Return the template for ``tokenizer_config.json``: the model's own, else its format's."""
    own = tokenizer.config.get("chat_template")
    if isinstance(own, str):
        return own
    found = find_format(tokenizer)
    return found.template if found else None
