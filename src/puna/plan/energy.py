"""Money, energy and emissions of GPU-hours."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import Field

from puna.core.config import Config
from puna.plan.shipped import FACTS

CARD_KG_PER_KWH = 0.42
"""Emissions per kWh of GPU power limit that reproduce Meta's three model cards: grid and building
(PUE) folded into one constant."""


class Site(Config):
    """What a GPU-hour costs beside its price."""

    load: float = Field(default=0.85, gt=0, le=1.2)
    """Mean power of a GPU over its limit."""
    pue: float = Field(default=1.1, ge=1)
    """Power of the building over power of its machines."""
    host_share: float = Field(default=0.25, ge=0)
    """Power of hosts and network, as a share of the GPUs'."""
    kg_per_kwh: float = Field(default=0.37, ge=0)
    """Emissions of the grid; a world mean of about 0.48, much less with hydro or nuclear power."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price; the GPU's assumed one when absent."""


@dataclass(frozen=True)
class Bill:
    """What a training takes."""

    gpu_hours: float
    usd: float
    kwh: float
    tonnes_co2e: float


def bill(gpu_hours: float, watts: float, usd_per_hour: float, site: Site) -> Bill:
    """Return money, energy and emissions of GPU-hours.

    Args:
        gpu_hours: GPUs times hours.
        watts: Power limit of a GPU.
        usd_per_hour: Its assumed price, unless the site has one.
        site: Power and price.
    """
    kwh = gpu_hours * watts / 1000 * site.load * (1 + site.host_share) * site.pue
    price = usd_per_hour if site.usd_per_gpu_hour is None else site.usd_per_gpu_hour
    return Bill(gpu_hours, gpu_hours * price, kwh, kwh * site.kg_per_kwh / 1000)


def card_tonnes(gpu_hours: float, watts: float) -> float:
    """Return tCO2e as Meta's model cards count them: power limit times hours times a constant.

    Args:
        gpu_hours: GPUs times hours.
        watts: Power limit of a GPU.
    """
    return gpu_hours * watts / 1000 * CARD_KG_PER_KWH / 1000


@dataclass(frozen=True)
class Card:
    """One published model card."""

    model: str
    gpu_hours: float
    watts: float
    tonnes: float
    ref: str


def model_cards() -> list[Card]:
    """Return the bundled model cards of Llama 2, 3 and 3.1."""
    values = json.loads(FACTS.joinpath("model_cards.json").read_text(encoding="utf-8"))
    return [Card(**card) for card in values["cards"]]
