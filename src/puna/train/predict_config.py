"""Predicted against actual step time while a training runs; imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from puna.core.config import Config


class PredictConfig(Config):
    """Compare the time of steps with what the planner predicts; it changes no result."""

    hardware: str = Field(min_length=1)
    """Preset of a GPU, or a hardware file of `puna plan calibrate`."""
    tolerance: float = Field(default=0.1, gt=0, lt=1)
    """Share by which steps may take longer or shorter before it is told (`train.deviation`)."""
    over: int = Field(default=20, ge=1)
    """Steps whose median counts; the first event of an attempt is left out."""


def deviation_in_words(event: dict[str, Any]) -> str:
    """Tell an event ``train.deviation`` or ``train.deviation_over`` in words."""
    actual, predicted = event["actual_s"], event["predicted_s"]
    if event["kind"] == "train.deviation_over":
        return f"steps take {actual:.3g} s again, as predicted ({predicted:.3g} s)"
    share = abs(event["ratio"] - 1)
    longer = "longer" if event["ratio"] > 1 else "shorter"
    suspect = f"; most of it in {event['suspect']}" if event.get("suspect") else ""
    return (
        f"up to step {event['step']} a step takes {actual:.3g} s, {share:.0%} {longer} than the "
        f"{predicted:.3g} s predicted{suspect}"
    )
