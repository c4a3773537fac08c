"""Readers: files of every supported format, whole or damaged, as raw records."""
