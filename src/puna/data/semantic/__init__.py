"""Semantic deduplication: embeddings, k-means, cosine inside clusters."""

from __future__ import annotations

from puna.data.semantic.stage import SemanticConfig, deduplicate_semantically

__all__ = ["SemanticConfig", "deduplicate_semantically"]
