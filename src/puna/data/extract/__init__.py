"""Extraction: from the bytes of a record to normalised text, by media type."""

from puna.data.extract.text import (
    MEDIA_TYPES,
    Extracted,
    check_extract,
    extract,
    extract_record,
)
from puna.data.extract_config import ExtractConfig

__all__ = [
    "MEDIA_TYPES",
    "ExtractConfig",
    "Extracted",
    "check_extract",
    "extract",
    "extract_record",
]
