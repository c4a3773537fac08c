"""Keys, tokens and passwords in text and code."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from puna.data.safety.numbers import Span

MIN_ENTROPY = 3.0
"""Bits per character that an assigned value needs (ours); English words have about 2.5 to 3."""
_MIN_KEY_ENTROPY = 2.5

_TOKENS: tuple[tuple[bytes, str, re.Pattern[bytes]], ...] = tuple(
    (prefix, kind, re.compile(pattern + rb"(?![A-Za-z0-9_])"))
    for prefix, kind, pattern in (
        (b"AKIA", "aws_key", rb"AKIA[A-Z2-7]{16}"),
        (b"ASIA", "aws_key", rb"ASIA[A-Z2-7]{16}"),
        (b"github_pat_", "github_token", rb"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
        (b"gh", "github_token", rb"gh[pousr]_[A-Za-z0-9]{36,251}"),
        (b"xox", "slack_token", rb"xox[abeoprs]-(?:[A-Za-z0-9]+-)*[A-Za-z0-9]{10,}"),
        (b"hooks.", "slack_token",
         rb"hooks\.slack\.com/services/T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{20,28}"),
        (b"AIza", "google_key", rb"AIza[A-Za-z0-9_\-]{35}"),
        (b"GOCSPX-", "google_key", rb"GOCSPX-[A-Za-z0-9_\-]{28}"),
        (b"sk_live_", "service_token", rb"sk_live_[A-Za-z0-9]{24,99}"),
        (b"rk_live_", "service_token", rb"rk_live_[A-Za-z0-9]{24,99}"),
        (b"sk-", "openai_key", rb"sk-(?:[a-z]+\d*-)*[A-Za-z0-9_\-]{20,200}"),
        (b"glpat-", "service_token", rb"glpat-[A-Za-z0-9_\-]{20,60}"),
        (b"hf_", "service_token", rb"hf_[A-Za-z0-9]{34}"),
        (b"npm_", "service_token", rb"npm_[A-Za-z0-9]{36}"),
        (b"pypi-", "service_token", rb"pypi-AgE[A-Za-z0-9_\-]{50,250}"),
        (b"SG.", "service_token", rb"SG\.[A-Za-z0-9_\-]{20,24}\.[A-Za-z0-9_\-]{39,50}"),
    )
)  # fmt: skip
_JWT = re.compile(rb"eyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{4,}\.[A-Za-z0-9_\-]{16,}")
_PEM = re.compile(
    rb"-----BEGIN ((?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?)-----(.{40,16384}?)-----END \1-----",
    re.DOTALL,
)
_NAME = re.compile(
    rb"(?i)(?:pass(?:word|wd|phrase)|pwd|secret|(?<![a-z])token|[_\-.]token|(?:auth|access|api|bearer|"
    rb"refresh|bot|session|client)token|(?:api|access|secret|private|auth|encryption|signing|account|"
    rb"master|service|shared)[_\-. ]?key|credentials?)[\"'\]]{0,2} {0,3}:?$"
)
_VALUE = re.compile(
    rb"[=:]?[=>]? {0,4}(?:[bru]?([\"'`])([^\s\"'`]{8,512})\1|"
    rb"([^\s\"'`,;<>()\[\]{}]{8,512})(?=[\s,;}\"'<]|$))"
)
_PLACEHOLDER = re.compile(
    rb"(?i)example|sample|dummy|placeholder|change.?me|change.?it|replace|your|insert|redacted|"
    rb"x{4}|\*{3}|\.{3}|todo|fixme|default|password|passwd|secret|token|api.?key|test|foo|1234567|"
    rb"abcdef|<|>|\$\{|\{\{|\$\(|\{|\}|://"
)
_CODE = re.compile(rb"[A-Za-z_][\w]*(?:(?:\.|->|::)[A-Za-z_]\w*)+|[A-Za-z_]\w*[(\[].*")
_VARIABLE = re.compile(rb"[$%@](?:[A-Z][A-Z0-9_]*|[a-z_][a-z0-9_]*|[A-Za-z]+)%?|\$\(.*")
_SLUG = re.compile(
    rb"(?:[A-Za-z]{2,}|[vV]?\d{1,4}|[a-z])(?:[_\-./:][A-Za-z]{2,}|[_\-./:][vV]?\d{1,4})*"
)
_USER = re.compile(rb"[^\s/@\"'<>]*")
_USER_PASSWORD = re.compile(rb"[^\s/@:\"'<>]{0,64}:([^\s@\"'<>/]{1,128})")
_URL_PLACEHOLDER = re.compile(
    rb"(?i)[\w\-%]*(?:pass(?:word|wort|wd|phrase)?|secret|token|example|changeme)[a-z_\-]*|"
    rb"(?:[a-z]+[_\-]?)?(?:pwd|pw|key)|x+|\*+|\.+|foo|bar|test"
)


def with_prefix(view: memoryview, start: int) -> Iterator[Span]:
    """Find the key, token or private key that begins at ``start``."""
    head = bytes(view[start : start + 12])
    if head.startswith(b"-----BEGIN"):
        match = _PEM.match(view, start)
        if match and len(re.findall(rb"[A-Za-z0-9+/]", match[2])) >= 40:
            yield *match.span(), "private_key"
    elif head.startswith(b"eyJ"):
        match = _JWT.match(view, start)
        if match and _is_jwt_header(match[0].partition(b".")[0]):
            yield *match.span(), "jwt"
    else:
        for prefix, kind, pattern in _TOKENS:
            if head.startswith(prefix):
                match = pattern.match(view, start)
                if match and _is_random(match[0][len(prefix) :]):
                    yield *match.span(), kind
                return


def assigned(view: memoryview, start: int) -> Iterator[Span]:
    """Find the secret that ``name = value`` gives away; ``start`` is the place of ``=`` or ``:``.

    Values that are placeholders, code, or words joined by hyphens are none.
    """
    name = bytes(view[max(0, start - 48) : start])
    if not _NAME.search(name):
        return
    match = _VALUE.match(view, start)
    if match is None:
        return
    group = 2 if match[2] is not None else 3
    value = match[group]
    if (group == 3 and _CODE.fullmatch(value)) or _VARIABLE.fullmatch(value):
        return
    if is_secret(value):
        yield match.start(group), match.end(group), "password"


def is_secret(value: bytes) -> bool:
    """Tell whether an assigned value looks like a real secret."""
    if _PLACEHOLDER.search(value) or _SLUG.fullmatch(value) or value.startswith((b"/", b".")):
        return False
    kinds = sum(
        re.search(kind, value) is not None for kind in (rb"[a-z]", rb"[A-Z]", rb"\d", rb"[^\w]")
    )
    needed = 2 if len(value) >= 16 else 3  # a short value of two kinds is a word and a number
    return kinds >= needed and entropy(value) >= min(MIN_ENTROPY, math.log2(len(value)) * 0.85)


def in_url(view: memoryview, at: int) -> tuple[bool, Span | None]:
    """Tell whether the ``@`` at ``at`` ends the login of a URL, and find the password in it."""
    scheme, mark, login = bytes(view[max(0, at - 220) : at]).rpartition(b"://")
    if not mark or not scheme[-1:].isalnum() or not _USER.fullmatch(login):
        return False, None
    match = _USER_PASSWORD.fullmatch(login)
    if match is None:
        return True, None
    password = match[1]
    if (
        _URL_PLACEHOLDER.fullmatch(password)
        or _VARIABLE.fullmatch(password)
        or re.match(rb"[{<*\[(]|\$\{|\$\(", password)
    ):
        return True, None
    return True, (at - len(password), at, "url_password")


def entropy(value: bytes) -> float:
    """Return Shannon's entropy of the bytes of a value, in bits per byte."""
    n = len(value)
    return -sum(count / n * math.log2(count / n) for count in Counter(value).values())


def _is_random(body: bytes) -> bool:
    """Tell a key's random part from words: letters, digits or both cases, entropy, no EXAMPLE."""
    if b"EXAMPLE" in body.upper() or re.search(rb"(?i)x{6}|\*{3}|(?<![a-z0-9])your", body):
        return False
    mixed = re.search(rb"\d", body) or (re.search(rb"[a-z]", body) and re.search(rb"[A-Z]", body))
    letters = re.search(rb"[A-Za-z]", body)
    return bool(letters and mixed) and entropy(body) >= _MIN_KEY_ENTROPY


def _is_jwt_header(part: bytes) -> bool:
    try:
        header = json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(header, dict) and "alg" in header
