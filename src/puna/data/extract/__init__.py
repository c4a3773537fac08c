"""Extraction: from the bytes of a record to normalised text, by media type."""

from puna.data.extract.text import MEDIA_TYPES, extract

__all__ = ["MEDIA_TYPES", "extract"]
