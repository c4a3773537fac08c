"""Telephone numbers: the international form, and national forms by their shape or their context."""

from __future__ import annotations

import re

from puna.data.safety.context import before

_CODES = """1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61
62 63 64 65 66 81 82 84 86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227
228 229 230 231 232 233 234 235 236 237 238 239 240 241 242 243 244 245 246 248 249 250 251 252 253
254 255 256 257 258 260 261 262 263 264 265 266 267 268 269 290 291 297 298 299 350 351 352 353 354
355 356 357 358 359 370 371 372 373 374 375 376 377 378 380 381 382 383 385 386 387 389 420 421 423
500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595 596 597 598 599 670 672 673 674 675
676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 850 852 853 855 856 880 886 960 961
962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 992 993 994 995 996 998"""
CALLING_CODES = frozenset(_CODES.split())
"""Country codes of ITU-T E.164."""

_LENGTHS = {"1": (10, 10), "7": (10, 10), "33": (9, 9), "34": (9, 9), "31": (9, 9), "32": (8, 9),
            "39": (6, 11), "41": (9, 9), "43": (6, 13), "44": (9, 10), "45": (8, 8), "46": (7, 10),
            "47": (8, 8), "48": (9, 9), "49": (6, 13), "52": (10, 10), "55": (10, 11),
            "61": (9, 9), "81": (9, 10), "82": (8, 10), "86": (10, 11), "90": (10, 10),
            "91": (10, 10), "351": (9, 9), "353": (7, 9), "358": (6, 11)}  # fmt: skip
"""Least and most digits after the country code; 6 to 12 for others."""

_WORDS = """tel telephone telefon telefono teléfono tél téléphone phone fax mobile mobil mob
móvil cell cellular cellulare cellphone whatsapp sms handy handynummer rufnummer telefonnummer
durchwahl portable hotline"""
_CONTEXT = frozenset(word.encode() for word in _WORDS.split())
_WORD = re.compile(rb"[a-z\x80-\xff]+(?![a-z\x80-\xff(])")
_CALL = re.compile(
    rb"(?<![a-z_])(?:call|ring|reach|text|dial)(?: (?:me|us|him|her|them))?"
    rb"(?: (?:at|on|under))?[: ]{0,3}\Z"
)
_SIGNS = tuple(sign.encode() for sign in ("☎", "☏", "📞", "📱", "电话", "電話", "手机"))
_CONTEXT_BYTES = 40
_SEP = rb"(?:[ .\-]|\xc2\xa0|\xe2\x80[\xaf\x91\x93])"
_EXTENSION = rb"(?: ?(?:x|ext\.?|extension) ?\d{1,5}(?!\w))?"
_NANP = re.compile(
    rb"(?<![\w.\-/+])(?:1[ .\-])?"
    rb"(?:\(([2-9]\d\d)\)[ \-]?([2-9]\d\d)[ .\-]|([2-9]\d\d)([.\-])([2-9]\d\d)\4)(\d{4})"
    + _EXTENSION
    + rb"(?!\w|[.\-/]\d|-\w)"
)
_AREA_CODE = re.compile(
    rb"(?<![\w.\-/+])(?:"
    rb"\(0\d{1,4}\)[ \-]?\d{3,4}[ \-]?\d{2,5}|"  # (0161) 496 0377, (03449) 78690
    rb"\([1-9]\d\) ?9?\d{4}-\d{4}|"  # Brazil
    rb"0[5789]0-\d{4}-\d{4}"  # Japan
    rb")(?!\w|[.\-/ ]\d|-\w)"
)
_FRENCH = re.compile(
    rb"(?<![\w.,\-/+])(?<!\d )0[1-9](" + _SEP + rb")\d\d(?:\1\d\d){3}(?!\w|[.,\-/ ]\d)"
)
_JOINED = (b"(", b".", b",", b"-", b"/")
# 00 and a country code; groups behind it begin with 0 in no number, and are not set apart by dots.
_DIALLED = re.compile(rb"00[1-9]\d{0,2}(?:[ \-](?!0)|[ \-]?\(0\)|39 ?0)")
_AFTER = re.compile(_EXTENSION)
_GROUP = re.compile(rb"\d+")
_LOOSE = re.compile(
    rb"(?<![\w.,])[(]?\d"
    rb"(?:(?:[ .\-/()]|\xc2\xa0|\xe2\x80[\xaf\x91\x93]){0,2}\d){6,14}(?!\w|[ \-]\d)"
)
_FICTIONAL = re.compile(rb"555[ .\-]?01\d\d(?!\d)")
_DATE = re.compile(
    rb"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./](?:19|20)\d\d|"
    rb"(?:19|20)\d\d ?[-/] ?(?:19|20)\d\d|"
    rb"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"
)


def find_phones(view: memoryview, start: int, end: int) -> list[tuple[int, int]]:
    """Find the numbers in a run of digits and separators.

    Args:
        view: UTF-8 of the document.
        start: First digit of the run.
        end: End of the run.
    """
    sign = bytes(view[max(0, start - 2) : start])
    if sign.endswith(b"+") and not sign[:-1].isalnum():
        found = _international(view, start, end, start - 1)
        return [found] if found else []
    if sign[-1:] not in _JOINED and _DIALLED.match(view, start, end):
        found = _international(view, start + 2, end, start)
        if found:
            return [found]
    low = start - 1 if sign.endswith(b"(") else start
    found_spans = _strong(view, low, end)
    if not found_spans and not _DATE.match(view, start):
        match = _LOOSE.match(view, low, min(len(view), end + 4))
        if match and not _FICTIONAL.fullmatch(match[0]) and _has_context(view, low):
            found_spans.append(match.span())
    return found_spans


def _has_context(view: memoryview, start: int) -> bool:
    """Tell whether a word for telephone stands shortly before, as it must for a weak shape."""
    line = before(view, start, _CONTEXT_BYTES)
    lower = line.lower()
    if not _CONTEXT.isdisjoint(_WORD.findall(lower)) or _CALL.search(lower):
        return True
    return not line.isascii() and any(sign in line for sign in _SIGNS)


def _international(view: memoryview, start: int, end: int, first: int) -> tuple[int, int] | None:
    """Take groups of digits after the country code as long as the number may be."""
    head = bytes(view[start : start + 3])
    code = next((head[:n].decode() for n in (1, 2, 3) if head[:n].decode() in CALLING_CODES), None)
    if code is None:
        return None
    low, high = _LENGTHS.get(code, (6, 12))
    n, stop = -len(code), start
    for group in _GROUP.finditer(view, start, end):
        size = group.end() - group.start()
        if group.group() == b"0" and bytes(view[group.start() - 1 : group.start()]) == b"(":
            continue  # +49 (0)30
        if n + size > high:
            break
        n, stop = n + size, group.end()
    if n < low or _FICTIONAL.search(view, start + 4, stop):
        return None
    extension = _AFTER.match(view, stop)
    stop = extension.end() if extension else stop
    return None if bytes(view[stop : stop + 1]).isalnum() else (first, stop)


def _strong(view: memoryview, start: int, end: int) -> list[tuple[int, int]]:
    """Find forms that hardly anything else has."""
    stop = min(len(view), end + 16)
    spans = [match.span() for match in _AREA_CODE.finditer(view, start, stop)]
    for match in _NANP.finditer(view, start, stop):
        area, exchange = match[1] or match[3], match[2] or match[5]
        fictional = exchange == b"555" and match[6][:2] == b"01"
        if area[1:] == b"11" or exchange[1:] == b"11" or fictional:
            continue
        if match[4] != b"." or _is_prose(view, match.start(), match.end()):
            spans.append(match.span())
    spans += [
        match.span()
        for match in _FRENCH.finditer(view, start, stop)
        if _is_prose(view, match.start(), match.end())
    ]
    return [span for span in spans if span[0] < end]


def _is_prose(view: memoryview, start: int, end: int) -> bool:
    """Tell whether the number's line holds a letter: rows of tables of numbers do not."""
    line = bytes(view[max(0, start - 80) : start]).rpartition(b"\n")[2]
    after = bytes(view[end : end + 80]).partition(b"\n")[0]
    return re.search(rb"[A-Za-z\x80-\xff]", line + after) is not None
