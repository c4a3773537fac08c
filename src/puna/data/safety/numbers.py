"""What runs of digits are: addresses, cards, accounts, national ids, telephone numbers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from puna.data.safety import checks
from puna.data.safety.context import before
from puna.data.safety.phones import find_phones

_AMBIGUOUS = (12, 13, 19)
"""Digits of the rarer cards; time stamps, EAN codes and ids of messages have as many."""
_AFTER_BYTES = 24
Span = tuple[int, int, str]
"""Start and end (byte offsets in the document) and kind."""

_IPV4 = re.compile(
    rb"(?<![\w.])(?<![A-Za-z]-)(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}"
    rb"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?!\w|\.\d|-[A-Za-z]|\.in-addr)"
)
_IPV6 = re.compile(rb"[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){1,7}(?:::)?(?![\w:]|\.\d)")
_VERSION_CONTEXT = re.compile(
    rb"(?i)(?:version|release|revision|build|firmware|driver|section|chapter|clause|rfc|oid|"
    rb"update|upgrade[d]?(?: to)?|requires?|[=~<>!^]=|/|\bv|\bver)[ :\"'=.]{0,3}\Z"
)
_ADDRESS_CONTEXT = re.compile(
    rb"(?i)(?<![a-z])(?:ip|ipv4|addr(?:ess(?:es)?)?|hosts?|servers?|clients?|ping|dns|from|peer|"
    rb"remote|connect(?:ed|ion)?|proxy|gateway|logged in|ssh|nmap|curl)(?![a-z]).{0,24}\Z|://\Z"
)
_VERSION_WORD = re.compile(
    rb"(?i)version|release|upgrade|update|bump|patch|require|depend|section|chapter|\bv\d"
)
_RESOLVERS = frozenset(
    ("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220")
)
_CARD = re.compile(
    rb"(?<![\w.,\-/])(?<!\d )(?<![0-9A-F]{4} )"
    rb"(?:\d{4}([ \-])\d{4}\1\d{4}\1\d{4}|3\d{3}([ \-])\d{6}\2\d{4,5}|\d{12,19})"
    rb"(?!\w|[.,]\d|-\d|\.\w| \d{4}\b)"
)
_CARD_CONTEXT = re.compile(rb"(?i)card|visa|master|amex|kart|carte|tarjeta|carta|cc ?[#:n]|payment")
_SSN = re.compile(rb"(?<![\w.\-/+])(\d{3})([\- ]?)(\d\d)\2(\d{4})(?!\w|-\w|[./]\d)")
_SSN_CONTEXT = re.compile(rb"(?i)(?<![a-z])(?:ssn|social[ -]security|soc\. ?sec)")
_PART_CONTEXT = re.compile(
    rb"(?i)(?:part|serial|model|order|item|sku|catalog(?:ue)?|isbn|case|invoice|ref)"
    rb"(?:[ -]?(?:number|no|nr|num|id))?[.:#]{0,2} ?#?\Z"
)
_TAX_ID = re.compile(rb"(?<![\w.,\-+/])(\d\d)( ?)(\d{3})\2(\d{3})\2(\d{3})(?!\w|[.,\-/]\d| \d)")
_NIR = re.compile(
    rb"(?<![\w.,\-])[12]([ .]?)\d\d\1(?:0[1-9]|1[0-2]|[2-9]\d)\1(?:\d\d|2[AB])\1\d{3}\1\d{3}"
    rb"[ .]?\d\d(?!\w|[.,]\d)"
)
_DNI = re.compile(rb"(?<![\w.,\-/])(\d\d)(\.?)(\d{3})\2(\d{3})[\- ]?([A-HJ-NP-TV-Z])(?!\w|-\w)")
_DNI_CONTEXT = re.compile(
    rb"(?i)(?<![a-z])(?:d\.?n\.?i|n\.?i\.?f|document[o]? nacional|identidad|titular|identificaci)"
)
_NIE = re.compile(rb"(?<![\w\-])([XYZ])[\- ]?(\d{7})[\- ]?([A-HJ-NP-TV-Z])(?!\w|-\w)")
_CODICE = re.compile(
    rb"(?<!\w)[A-Z]{6}[\dLMNP-V]{2}[A-EHLMPRST][\dLMNP-V]{2}[A-Z][\dLMNP-V]{3}[A-Z](?!\w)"
)


def in_number(
    view: memoryview, start: int, end: int, n_digits: int, n_dots: int, ids: frozenset[str]
) -> Iterator[Span]:
    """Find what a run of digits and separators holds.

    Args:
        view: UTF-8 of the document.
        start: First digit.
        end: End of the run.
        n_digits: Digits in it.
        n_dots: Dots in it.
        ids: National ids to look for.
    """
    if n_dots >= 3:
        for match in _matches(_IPV4, view, start, end):
            if _is_public_ipv4(view, match.start(), match[0].decode()):
                yield *match.span(), "ip"
    if n_digits >= 12:
        for match in _matches(_CARD, view, start, end):
            digits = _digits(match[0])
            plain = len(digits) in _AMBIGUOUS
            if checks.is_card(digits) and (not plain or _near(_CARD_CONTEXT, view, start)):
                yield *match.span(), "credit_card"
    yield from _national(view, start, end, n_digits, ids)
    if n_digits >= 7:
        for low, high in find_phones(view, start, end):
            yield low, high, "phone"


def _national(
    view: memoryview, start: int, end: int, n_digits: int, ids: frozenset[str]
) -> Iterator[Span]:
    n = 15 if bytes(view[end : end + 1]) in (b"A", b"B") else n_digits  # Corsica's numbers
    for kind, least, pattern, accept in _IDS:
        if kind in ids and n >= least:
            for match in _matches(pattern, view, start, end):
                if accept(match, view):
                    yield *match.span(), kind
    if "es_nie" in ids:
        yield from _nies(view, max(0, start - 2), end)


def _is_ssn(match: re.Match[bytes], view: memoryview) -> bool:
    if not checks.is_us_ssn(_digits(match[0])):
        return False
    dashed = match[2] == b"-" and not _near(_PART_CONTEXT, view, match.start())
    return dashed or _near(_SSN_CONTEXT, view, match.start())


def _is_dni(match: re.Match[bytes], view: memoryview) -> bool:
    text = match[0].translate(None, b". -").decode()
    return checks.is_es_dni(text) and _near(_DNI_CONTEXT, view, match.start())


_IDS = (
    ("us_ssn", 9, _SSN, _is_ssn),
    ("de_tax_id", 11, _TAX_ID, lambda match, _: checks.is_de_tax_id(_digits(match[0]))),
    ("fr_nir", 15, _NIR, lambda match, _: checks.is_fr_nir(_plain(match[0]))),
    ("es_dni", 8, _DNI, _is_dni),
)


def after_capitals(view: memoryview, start: int, ids: frozenset[str]) -> Iterator[Span]:
    """Find an IBAN, a codice fiscale or an NIE that begins with a capital letter at ``start``."""
    found = _iban(view, start)
    if found is not None:
        yield start, found, "iban"
    if "it_codice_fiscale" in ids:
        match = _CODICE.match(view, start)
        if match and checks.is_it_codice_fiscale(match[0].decode()):
            yield *match.span(), "it_codice_fiscale"
    if "es_nie" in ids:
        yield from _nies(view, start, start + 1)


def in_colons(view: memoryview, start: int) -> Iterator[Span]:
    """Find an IPv6 address; the candidate's own test has left global unicast addresses only."""
    match = _IPV6.match(view, start)
    if match:
        try:
            address = ipaddress.IPv6Address(match[0].decode())
        except ValueError:
            return
        if address.is_global:
            yield *match.span(), "ip"


def _nies(view: memoryview, start: int, end: int) -> Iterator[Span]:
    for match in _matches(_NIE, view, start, end):
        if checks.is_es_dni((match[1] + match[2] + match[3]).decode()):
            yield *match.span(), "es_nie"


def _matches(
    pattern: re.Pattern[bytes], view: memoryview, start: int, end: int
) -> Iterator[re.Match[bytes]]:
    """Yield the matches that begin in a run; they may end a little behind it."""
    for match in pattern.finditer(view, start, min(len(view), end + _AFTER_BYTES)):
        if match.start() >= end:
            return
        yield match


def _plain(text: bytes) -> str:
    return text.translate(None, b" .").decode()


def _digits(text: bytes) -> str:
    return re.sub(rb"\D", b"", text).decode()


def _near(context: re.Pattern[bytes], view: memoryview, start: int) -> bool:
    return context.search(before(view, start)) is not None


def _is_public_ipv4(view: memoryview, start: int, text: str) -> bool:
    """Tell an address of the public internet from a version, a section or a private address.

    Versions have small numbers: what begins with less than 20, or has none from 64 on, needs a word
    for address before it, or the form of a web server's log behind it (the limits are ours).
    """
    address = ipaddress.IPv4Address(text)
    if not address.is_global or address.is_multicast or address.is_reserved or text in _RESOLVERS:
        return False
    if bytes(view[start + len(text) : start + len(text) + 4]) == b" - -":
        return True
    if address.packed[0] >= 20 and max(address.packed) >= 64:
        return not _near(_VERSION_CONTEXT, view, start) or _near(_ADDRESS_CONTEXT, view, start)
    return _near(_ADDRESS_CONTEXT, view, start) and not _near(_VERSION_WORD, view, start)


def _iban(view: memoryview, start: int) -> int | None:
    """Return the end of the IBAN at ``start``: as many characters as its country has."""
    window = bytes(view[start : start + 44])
    length = checks.IBAN_LENGTHS.get(window[:2].decode("latin-1"))
    if length is None:
        return None
    chars, at = "", 0
    while at < len(window) and len(chars) < length:
        byte = window[at : at + 1]
        if byte.isdigit() or byte.isupper():
            chars += byte.decode()
        elif byte != b" " or window[at - 1 : at] == b" ":
            return None
        at += 1
    if window[at : at + 1].isalnum() or not checks.is_iban(chars):
        return None
    return start + at
