"""One function from raw record to text: decode, extract by media type, normalise."""

from __future__ import annotations

from collections.abc import Callable

from puna.data.extract.decode import UTF8, decode
from puna.data.extract.html import extract_html
from puna.data.extract.normalise import normalise
from puna.data.extract.roff import extract_roff
from puna.data.readers.records import UnusableError

MEDIA_TYPES: dict[str, Callable[[str], str] | None] = {
    "text/plain": None,
    "text/markdown": None,
    "text/x-rst": None,
    "text/x-python": None,
    "text/html": extract_html,
    "text/troff": extract_roff,
}
"""Media type -> extraction; None keeps the text as it is."""


def extract(
    content: bytes | str, media_type: str, declared_encoding: str | None = None
) -> tuple[str, str]:
    """Turn the content of a record into the text of a document.

    Args:
        content: Bytes to decode, or text.
        media_type: A key of :data:`MEDIA_TYPES`.
        declared_encoding: Encoding that the transport declares for bytes.

    Returns:
        Normalised text (may be empty) and the encoding that the bytes were in.

    Raises:
        UnusableError: Not decodable, or no valid Unicode (``surrogate``), or the extraction failed.
    """
    if isinstance(content, bytes):
        text, encoding = decode(content, declared_encoding, media_type)
    else:
        text, encoding = content, UTF8
    if media_type not in MEDIA_TYPES:
        raise KeyError(f"no extraction for media type {media_type!r}; known: {sorted(MEDIA_TYPES)}")
    extraction = MEDIA_TYPES[media_type]
    if extraction is not None:
        try:
            text = extraction(text)
        except UnicodeEncodeError as error:
            raise UnusableError("surrogate", f"lone surrogate at {error.start:,}") from error
        except (ValueError, RuntimeError, RecursionError) as error:
            raise UnusableError("extract", f"{media_type}: {error}") from error
    return normalise(text, media_type), encoding
