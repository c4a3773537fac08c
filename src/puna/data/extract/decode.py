"""From bytes to text: byte order mark, declared encoding, UTF-8, then detection."""

from __future__ import annotations

import codecs
import re

from resiliparse.parse.encoding import detect_encoding

from puna.data.readers.records import UnusableError

UTF8 = "utf-8"
MIXED = "utf-8+cp1252"

_BOMS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 1 << 16
_MAX_NUL_SHARE = 0.01
_MAX_CONTROL_SHARE = 0.05
_WIDE_NUL_SHARE = 0.3
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
_HIGH = bytes(range(0x80, 0x100))
_MAX_MIXED_SHARE = 0.05
_C1_CONTROL = re.compile("[\x80-\x84\x86-\x9f\ufffd]")  # U+0085 is a line end in some encodings

_DECLARATIONS = {
    # PEP 263, HTML 4/5 meta elements, and the Emacs line that man-db reads in manual pages.
    "text/x-python": re.compile(rb"\A(?:.*\n)?[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)"),
    "text/html": re.compile(rb"<meta[^>]{0,200}charset=[\"' ]*([-\w.:]+)|\A<\?xml[^>]*encoding="
                            rb"[\"']([-\w.:]+)", re.IGNORECASE),
    "text/troff": re.compile(rb"\A['.]\\\".*?coding:[ \t]*([-\w.]+)"),
}  # fmt: skip
_DECLARATION_BYTES = 1024


def decode(data: bytes, declared: str | None = None, media_type: str = "") -> tuple[str, str]:
    """Decode a document.

    The order is: byte order mark; declared encoding (by the caller, or inside the document:
    PEP 263, HTML meta, man page); UTF-8; UTF-8 and Windows-1252 line by line, for a text that is
    nearly all ASCII and has both; detection. Each must decode the whole text without an error.

    Args:
        data: The bytes.
        declared: Encoding that the transport declares, if any; unknown names are ignored.
        media_type: Tells where to look for a declaration inside the document.

    Returns:
        The text without byte order mark, and the name of the encoding (ASCII counts as UTF-8).

    Raises:
        UnusableError: ``binary`` when this is no text, ``encoding`` when no encoding fits.
    """
    has_nul = b"\0" in data
    if not has_nul and data.isascii():
        return data.decode("ascii"), UTF8
    for bom, name in _BOMS:
        if data.startswith(bom):
            return _strictly(data[len(bom) :], name), name
    if has_nul and (name := _wide_encoding(data)):
        return _strictly(data, name), name
    for name in filter(None, (declared, _declaration(data, media_type), UTF8)):
        text = _try(data, name)
        if text is not None:
            if has_nul and data.count(0) > _MAX_NUL_SHARE * len(data):
                break
            return text, _canonical(name)
    if is_binary(data):
        raise UnusableError("binary", "the content is no text")
    mixed, has_utf8 = _line_by_line(data)
    if mixed is not None and has_utf8:  # a detector would take the UTF-8 lines for another encoding
        return mixed, MIXED
    detected = detect_encoding(data, html5_compatible=True) or UTF8
    text = _try(data, detected) if detected != UTF8 else None
    if text is not None and not _C1_CONTROL.search(text):
        return text, _canonical(detected)
    if mixed is None:
        raise UnusableError("encoding", "neither UTF-8 nor a detected encoding fits")
    return mixed, "cp1252"


def _line_by_line(data: bytes) -> tuple[str | None, bool]:
    """Decode a text that is nearly all ASCII, in which lines of UTF-8 and Windows-1252 are mixed.

    Changelogs that many people have written to look like this.

    Returns:
        The text, None when this does not fit; and whether a line beyond ASCII is UTF-8.
    """
    n_high = len(data) - len(data.translate(None, _HIGH))
    if n_high > _MAX_MIXED_SHARE * len(data):
        return None, False
    lines, has_utf8 = [], False
    for line in data.split(b"\n"):
        text = _try(line, UTF8)
        has_utf8 |= text is not None and not line.isascii()
        lines.append(_try(line, "cp1252") if text is None else text)
    whole = "\n".join(line for line in lines if line is not None)
    return (None if None in lines or _C1_CONTROL.search(whole) else whole), has_utf8


def is_binary(data: bytes) -> bool:
    """Tell whether bytes that are not valid UTF-8 look like something else than text."""
    sample = data[:_SAMPLE_BYTES]
    n_control = len(sample) - len(sample.translate(None, _CONTROL))
    return b"\0" in sample or n_control > _MAX_CONTROL_SHARE * len(sample)


def _wide_encoding(data: bytes) -> str | None:
    """Recognise UTF-16 of mostly Latin text without a byte order mark by its zero bytes."""
    sample = data[: _SAMPLE_BYTES & ~1]
    half = len(sample) / 2
    if len(data) % 2 or not half:
        return None
    even, odd = sample[::2].count(0) / half, sample[1::2].count(0) / half
    if odd > _WIDE_NUL_SHARE and even < odd / 10:
        return "utf-16-le"
    return "utf-16-be" if even > _WIDE_NUL_SHARE and odd < even / 10 else None


def _declaration(data: bytes, media_type: str) -> str | None:
    pattern = _DECLARATIONS.get(media_type)
    found = pattern.search(data[:_DECLARATION_BYTES]) if pattern else None
    if found is None:
        return None
    name = next(group for group in found.groups() if group is not None)
    return name.decode("ascii", "replace")


def _try(data: bytes, name: str) -> str | None:
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError, ValueError):
        return None


def _strictly(data: bytes, name: str) -> str:
    text = _try(data, name)
    if text is None:
        raise UnusableError("encoding", f"marked as {name}, but it does not decode")
    return text


def _canonical(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError:
        return name.lower()
