"""One function from raw record to text: decode, extract by media type, repair, normalise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puna.data.extract.decode import UTF8, decode
from puna.data.extract.html import extract_html
from puna.data.extract.normalise import CODE_MEDIA_TYPES, normalise
from puna.data.extract.notebook import extract_notebook
from puna.data.extract.repair import check_repair, repair
from puna.data.extract.rights import merge_rights, refused_by
from puna.data.extract.roff import extract_roff
from puna.data.extract.trafilatura_text import check_trafilatura
from puna.data.extract_config import DEFAULT_EXTRACT, ExtractConfig
from puna.data.readers.records import RawRecord, UnusableError

_Extraction = Callable[[str, ExtractConfig], tuple[str, dict[str, Any]]]


def _roff(text: str, _: ExtractConfig) -> tuple[str, dict[str, Any]]:
    return extract_roff(text), {}


MEDIA_TYPES: dict[str, _Extraction | None] = {
    "text/plain": None,
    "text/markdown": None,
    "text/x-rst": None,
    "text/x-python": None,
    "text/x-source": None,
    "text/html": extract_html,
    "text/troff": _roff,
    "application/x-ipynb+json": extract_notebook,
}
"""Media type -> extraction; None keeps the text as it is."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What came out of a record.

    Attributes:
        text: Normalised text, may be empty.
        encoding: Encoding that the bytes were in; UTF-8 for a record that was text already.
        metadata: Metadata of the record and what the extraction has added.
        refused_by: Directive of the owner that the settings reject; None when there is none.
    """

    text: str
    encoding: str
    metadata: dict[str, Any]
    refused_by: str | None = None


def check_extract(config: ExtractConfig) -> None:
    """See that the packages are there that the settings need.

    Raises:
        PunaError: One is not installed.
    """
    if config.extractor == "trafilatura":
        check_trafilatura()
    if config.repair:
        check_repair()


def extract_record(record: RawRecord, config: ExtractConfig = DEFAULT_EXTRACT) -> Extracted:
    """Turn a record into the text of a document, with metadata.

    Raises:
        UnusableError: Not decodable, or no valid Unicode (``surrogate``), or the extraction failed.
        PunaError: An extractor is not installed.
    """
    media_type = record.media_type
    if isinstance(record.content, bytes):
        text, encoding = decode(record.content, record.encoding, media_type)
    else:
        text, encoding = record.content, UTF8
    if media_type not in MEDIA_TYPES:
        raise KeyError(f"no extraction for media type {media_type!r}; known: {sorted(MEDIA_TYPES)}")
    metadata = record.metadata
    extraction = MEDIA_TYPES[media_type]
    if extraction is not None:
        try:
            text, found = extraction(text, config)
        except UnicodeEncodeError as error:
            raise UnusableError("surrogate", f"lone surrogate at {error.start:,}") from error
        except (ValueError, RuntimeError, RecursionError) as error:
            raise UnusableError("extract", f"{media_type}: {error}") from error
        if found:
            metadata = merge_rights(metadata, found)
    if config.repair and media_type not in CODE_MEDIA_TYPES:
        repaired = repair(text)
        if repaired != text:
            text, metadata = repaired, {**metadata, "repaired": True}
    refusal = refused_by(metadata, config.reject_robots)
    return Extracted(normalise(text, media_type), encoding, metadata, refusal)


def extract(
    content: bytes | str, media_type: str, declared_encoding: str | None = None
) -> tuple[str, str]:
    """Turn content into text by the default settings; see :func:`extract_record`.

    Args:
        content: Bytes to decode, or text.
        media_type: A key of :data:`MEDIA_TYPES`.
        declared_encoding: Encoding that the transport declares for bytes.

    Returns:
        Normalised text (may be empty) and the encoding that the bytes were in.

    Raises:
        UnusableError: Not decodable, or no valid Unicode (``surrogate``), or the extraction failed.
    """
    done = extract_record(RawRecord("", media_type, content, 0, encoding=declared_encoding))
    return done.text, done.encoding
