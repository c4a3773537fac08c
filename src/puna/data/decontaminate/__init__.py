"""Stage ``data.decontaminate``: documents and passages that are in the evaluation sets too."""

from __future__ import annotations

from puna.data.decontaminate.stage import DecontaminateConfig, decontaminate

__all__ = ["DecontaminateConfig", "decontaminate"]
