"""The template that a model brings, rendered as transformers does, with contents kept apart.

A template (Jinja, from ``tokenizer_config.json``) writes a conversation as one text. The special
tokens in that text are meant when the template wrote them and must stay text when a message holds
them. So before rendering, the first character of every special token's name inside a message is
exchanged for a stand-in that occurs nowhere. In the rendered text the names that remain are the
template's own; they are renamed to names that nobody can guess, the stand-ins are turned back, and
a copy of the tokenizer that knows the special tokens by those names only makes the ids.

Source: huggingface/transformers ``utils/chat_template_utils.py`` (what a template may use).
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from puna.core.errors import PunaError
from puna.tokens.chat.messages import Message, check_messages
from puna.tokens.chat.standins import StandIns
from puna.tokens.library import once

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from puna.tokens.tokenizer import Tokenizer

_ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")


class TemplateFormat:
    """The format that a Jinja template describes.

    Args:
        tokenizer: Its tokenizer.
        template: The template.

    Raises:
        PunaError: The template is damaged.
    """

    name = "template"

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        import jinja2

        self._tokenizer, self.template = tokenizer, template
        try:
            self._compiled = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise PunaError(
                f"the chat template is damaged: {error}",
                "correct `chat_template` in tokenizer_config.json",
            ) from error
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._key = secrets.token_hex(8)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The first special token that the template writes behind what an assistant says."""
        text = "answer"
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": text}]
        try:
            rendered = self._render(messages, False)
        except PunaError:  # a template for something else than plain conversations
            return frozenset()
        match = self._names.search(rendered, rendered.rfind(text) + len(text))
        return frozenset({self._tokenizer.special_ids[match[0]]} if match else ())

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation.

        Args:
            messages: ``role`` and ``content`` each.
            add_generation_prompt: End with what opens the assistant's next message.

        Raises:
            PunaError: A message is malformed, or the template refuses the conversation.
        """
        safe, stand_ins = self._hidden(messages)
        rendered = self._render(safe, add_generation_prompt)
        return self._with_bos(self._encoding(rendered, stand_ins).ids)

    def encode_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        Raises:
            PunaError: As for :meth:`encode`, or the template writes the begin of a conversation
                differently once more follows, so that nobody can tell who says what.
        """
        safe, stand_ins = self._hidden(messages)
        rendered = self._render(safe, False)
        encoding = self._encoding(rendered, stand_ins)
        starts = [match.start() for match in self._names.finditer(rendered)]

        def named(at: int) -> int:  # the place in the text with the longer names
            return at + len(self._key) * bisect_left(starts, at)

        spans = [(named(left), named(right)) for left, right in self._spans(safe, rendered)]
        mask = [
            any(left <= start < end <= right for left, right in spans)
            for start, end in encoding.offsets
        ]
        ids = self._with_bos(encoding.ids)
        n_kept = min(len(ids), len(mask))
        return ids, [False] * (len(ids) - n_kept) + mask[len(mask) - n_kept :]

    def _hidden(self, messages: Sequence[Message]) -> tuple[list[Message], StandIns]:
        check_messages(messages, _ROLES)
        stand_ins = StandIns(messages, list(self._tokenizer.special_ids))
        return [stand_ins.hide(dict(message)) for message in messages], stand_ins

    def _encoding(self, rendered: str, stand_ins: StandIns) -> tokenizers.Encoding:
        """Encode a rendered conversation; the special tokens left in it are the template's."""
        named = self._names.sub(lambda match: self._key + match[0], rendered)
        return self._guarded.encode(stand_ins.show(named), add_special_tokens=False)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Return ids with exactly one begin id, where the model's texts begin with one."""
        bos = self._tokenizer.bos_id
        return once(ids, bos) if ids[:1] == [bos] or self._tokenizer.adds_bos else ids

    def _spans(self, messages: Sequence[Message], rendered: str) -> list[tuple[int, int]]:
        """Return where in a rendered conversation the assistant speaks, its end token included."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            until = self._render(messages[: index + 1], False)
            if not rendered.startswith(before) or not rendered.startswith(until):
                raise PunaError(
                    f"the chat template writes what stands before message {index} differently once "
                    "more follows: nobody can tell which tokens the assistant says",
                    "train on conversations with one answer each, or correct `chat_template`",
                )
            ends = [match.end() for match in self._names.finditer(until, len(before))]
            spans.append((len(before), ends[-1] if ends else len(until)))
        return spans

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        import jinja2

        special = {
            role: name.get("content") if isinstance(name, dict) else name
            for role, name in self._tokenizer.config.items()
            if role.endswith("_token") and isinstance(name, (str, dict))
        }
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **special,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise PunaError(f"the chat template refuses the conversation: {error}",
                            "change the messages, or correct `chat_template` in "
                            "tokenizer_config.json") from error  # fmt: skip

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer, with the special tokens under names that nobody can guess."""
        import tokenizers

        definition = json.loads(self._tokenizer.text)
        definition["post_processor"] = None
        renamed = {name: f"{self._key}{name}" for name in self._tokenizer.special_ids}
        for entry in definition["added_tokens"]:
            entry["content"] = renamed.get(entry["content"], entry["content"])
        model = definition["model"]
        vocab = model["vocab"]
        model["vocab"] = (
            {renamed.get(text, text): id_ for text, id_ in vocab.items()}
            if isinstance(vocab, dict)
            else [[renamed.get(text, text), score] for text, score in vocab]
        )
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _environment() -> jinja2.Environment:
    """The environment that transformers renders templates in; it reaches nothing outside."""
    from jinja2 import ext, nodes, parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The block ``generation``, with which some templates mark what the assistant says."""

        tags: set[str] = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
