"""What items and answers may look like, and the vote that an answer casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.core.errors import PunaError
from puna.post.annotate.settings import KINDS, SPLITS, Rules

SIDES = ("first", "second")
_CHAT_ROLES = ("system", "user", "assistant")


def read_item(raw: Any, where: str) -> dict[str, Any]:
    """Check an item to import and bring it into its one form.

    Args:
        raw: ``messages`` (ending with the user) or ``prompt``; for ``rank`` two ``responses``;
            for ``write`` perhaps a ``draft``. ``key``, ``source``, ``split``, ``gold`` if any.
        where: Names the record in errors.

    Raises:
        PunaError: Something of it is not as it should be.
    """
    if not isinstance(raw, dict):
        raise PunaError(f"{where} is no JSON object", "write one object per line")
    kind = raw.get("kind") or ("rank" if raw.get("responses") else "write")
    if kind not in KINDS:
        raise PunaError(f"{where}: kind {kind!r} is unknown", f"choose one of {', '.join(KINDS)}")
    prompt = raw.get("prompt")
    messages = raw.get("messages") or ([{"role": "user", "content": prompt}] if prompt else None)
    messages = read_messages(messages, where)
    draft = raw.get("draft")
    if kind == "write" and messages[-1]["role"] == "assistant":
        last = messages.pop()
        draft = draft or last["content"]
    item: dict[str, Any] = {"kind": kind, "messages": messages}
    if not messages:
        raise PunaError(f"{where}: no prompt is left", "give messages that begin with the user")
    if kind == "rank":
        item["responses"] = _texts(raw.get("responses"), 2, where)
    if draft is not None:
        item["draft"] = _texts([draft], 1, where)[0]
    for name in ("source", "split", "document_id"):
        if raw.get(name) is not None:
            item[name] = str(raw[name])
    if item.get("split", "train") not in SPLITS:
        raise PunaError(f"{where}: split {item['split']!r} is unknown",
                        f"choose one of {', '.join(SPLITS)}")  # fmt: skip
    return item


def read_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Check the messages of a conversation.

    Raises:
        PunaError: They are none, or have other roles or no text.
    """
    if not isinstance(messages, list) or not messages:
        raise PunaError(f"{where} has no messages and no prompt", "give one of the two")
    found = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in _CHAT_ROLES or not isinstance(text, str) or not text.strip():
            raise PunaError(
                f"{where}: message {str(message)[:80]!r} is not {{role, content}}",
                f"use the roles {', '.join(_CHAT_ROLES)} and text",
            )
        found.append({"role": role, "content": text})
    return found


def _texts(values: Any, n: int, where: str) -> list[str]:
    if (
        not isinstance(values, list)
        or len(values) != n
        or not all(isinstance(one, str) and one.strip() for one in values)
    ):
        raise PunaError(f"{where}: {n} texts are needed, got {str(values)[:80]}", "give them")
    return list(values)


def read_answer(kind: str, raw: Any, rules: Rules) -> dict[str, Any]:
    """Check an answer and bring it into its one form.

    Raises:
        PunaError: It lacks what its kind needs.
    """
    if not isinstance(raw, dict):
        raise PunaError("the answer is no JSON object", "send an object")
    answer: dict[str, Any] = {}
    if kind == "label":
        answer["label"] = _choice(raw.get("label"), rules.labels, "label")
    elif kind == "rank":
        degree = raw.get("preference")
        if not isinstance(degree, int) or isinstance(degree, bool) or not 1 <= abs(degree) <= 4:
            raise PunaError(
                f"preference {degree!r} is not -4 to -1 (first is better) or 1 to 4 (second)",
                "choose a degree",
            )
        answer["preference"] = degree
        edited = str(raw.get("edited") or "").strip()
        if edited:
            answer["edited"] = edited
    else:
        answer["text"] = str(raw.get("text") or "").strip()
    for name, allowed in (("safety", rules.labels), ("topic", rules.topics)):
        if raw.get(name):
            answer[name] = _choice(raw[name], allowed, name)
    return answer


def _choice(value: Any, allowed: Sequence[str], name: str) -> str:
    if value not in allowed:
        raise PunaError(f"{name} {value!r} is unknown", f"choose one of {', '.join(allowed)}")
    return str(value)


def labels_of(kind: str, rules: Rules) -> tuple[str, ...]:
    """Return what can be voted for on items of a kind."""
    return SIDES if kind == "rank" else rules.labels


def vote_of(kind: str, answer: dict[str, Any]) -> str | None:
    """Return the vote that an answer casts: its label, the better side, or its safety mark."""
    if kind == "label":
        return answer["label"]
    if kind == "rank":
        return SIDES[answer["preference"] > 0]
    return answer.get("safety")


def text_of(kind: str, answer: dict[str, Any]) -> str | None:
    """Return the text that somebody wrote, None when the answer has none."""
    return {"write": answer.get("text"), "rank": answer.get("edited")}.get(kind)
