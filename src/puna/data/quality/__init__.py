"""Stage ``data.quality`` and its classifiers: quality, perplexity, domains, grades."""

from __future__ import annotations

from puna.data.quality.stage import QualityConfig, judge_quality

__all__ = ["QualityConfig", "judge_quality"]
