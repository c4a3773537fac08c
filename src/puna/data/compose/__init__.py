"""The composition of the training corpus: shares, sampling, repetition."""

from __future__ import annotations

from puna.data.compose.stage import ComposeConfig, compose_documents

__all__ = ["ComposeConfig", "compose_documents"]
