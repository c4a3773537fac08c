"""The manifest of a lab: what sources there are, what the model is for, and how much is trained."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from pydantic import Field, ValidationError

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.explain import explain_validation
from puna.mix.proxy.config import ProxyConfig

REPEAT_HALF = 15.4
"""R* of Muennighoff et al. 2023 (Scaling data-constrained language models, equation 5)."""


class Source(Config):
    """Text that may be trained on."""

    name: str = Field(min_length=1)
    """Name, as in the table of runs."""
    unique_tokens: int = Field(gt=0)
    """Tokens after deduplication."""
    bytes_per_token: float = Field(default=4.0, gt=0)
    """Bytes of text that a token stands for, on average."""
    quality: str = ""
    """Bucket of a quality classifier, for the report."""
    licence: str = ""
    """Licence of the text, for the report."""
    max_epochs: float = Field(default=4.0, gt=0)
    """Most passes over it."""


class Target(Config):
    """Held-out text or a task that tells how good a model is; lower is better."""

    name: str = Field(min_length=1)
    """Name, as in the table of runs."""
    weight: float = Field(default=1.0, ge=0)
    """Weight in the mean."""
    bytes_per_token: float | None = Field(default=None, gt=0)
    """Given when losses are nats per token: they are then turned to bits per byte."""


class Objective(Config):
    """What the best mix is."""

    kind: Literal["mean", "worst"] = "mean"
    """Weighted mean of the targets, or the target that is worst off against the natural mix."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the natural mix, in units of the loss per nat."""
    n_tokens: float = Field(default=1e9, gt=0)
    """Tokens of the training that the mix is for."""


class Manifest(Config):
    """Sources, targets and the training that the mix is for."""

    source: tuple[Source, ...] = Field(min_length=2)
    """The sources."""
    target: tuple[Target, ...] = ()
    """The targets; none takes every loss of the table of runs, with equal weights."""
    objective: Objective = Objective()
    """What the best mix is."""
    reference: dict[str, dict[str, float]] = Field(default={})
    """Named mixes to compare with, such as the weights that DoReMi found."""
    proxy: ProxyConfig = ProxyConfig()
    """The small models that are trained on mixes."""

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [one.name for one in self.source]

    def natural(self) -> Float64[np.ndarray, " K"]:
        """Return shares in proportion to unique tokens."""
        tokens = np.array([one.unique_tokens for one in self.source], dtype=np.float64)
        return tokens / tokens.sum()

    def caps(self) -> Float64[np.ndarray, " K"]:
        """Return the largest share of each source that its repetition limit allows."""
        most = [one.max_epochs * one.unique_tokens for one in self.source]
        return np.minimum(np.array(most) / self.objective.n_tokens, 1.0)

    def epochs(self, shares: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """Return passes over each source."""
        unique = np.array([one.unique_tokens for one in self.source], dtype=np.float64)
        return shares * self.objective.n_tokens / unique

    def effective(self, shares: Float64[np.ndarray, "... K"]) -> Float64[np.ndarray, "... K"]:
        """Return shares after the loss of value by repetition.

        D tokens of U unique ones are worth U + U R* (1 - exp(-(D/U - 1) / R*)) (Muennighoff et al.
        2023, equation 5). Such shares sum to less than 1.
        """
        epochs = self.epochs(shares)
        more = np.maximum(epochs - 1, 0.0)
        worth = np.minimum(epochs, 1.0) + REPEAT_HALF * (1 - np.exp(-more / REPEAT_HALF))
        return np.where(epochs > 1, shares * worth / np.maximum(epochs, 1.0), shares)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest (TOML).

    Raises:
        PunaError: The file is missing, is no TOML, has a wrong value or names a source twice, or
            the limits on repetition leave too few tokens.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise PunaError(f"{path}: no valid TOML: {error}", "correct that line") from error
    except FileNotFoundError as error:
        raise PunaError(f"{path}: no such file", "check the path") from error
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error, Manifest, values, str(path), set()) from error
    check_manifest(manifest, str(path))
    return manifest


def check_manifest(manifest: Manifest, where: str) -> None:
    """Refuse a manifest that no mix can satisfy.

    Raises:
        PunaError: As of :func:`read_manifest`.
    """
    for kind, names in (
        ("source", manifest.names), ("target", [one.name for one in manifest.target])
    ):  # fmt: skip
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PunaError(f"{where}: {kind} {twice[0]!r} is named twice", "rename one of them")
    room = float(manifest.caps().sum())
    if room < 1:
        need = manifest.objective.n_tokens
        raise PunaError(
            f"{where}: all sources, repeated as often as max_epochs allows, give "
            f"{room * need:.3g} of the {need:.3g} tokens of objective.n_tokens",
            "train on fewer tokens, raise max_epochs, or add a source",
        )
    for name, weights in manifest.reference.items():
        shares_of(weights, manifest.names, f"{where}: reference.{name}")


def shares_of(weights: dict[str, float], names: list[str], where: str) -> Float64[np.ndarray, " K"]:
    """Turn named weights into shares in the order of ``names``; a missing name is 0.

    Raises:
        PunaError: A name is unknown, a weight is negative or no number, or they do not sum to 1
            (within 0.01, for rounding).
    """
    import difflib

    for name, value in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise PunaError(
                f"{where}: unknown source {name!r}",
                f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}",
            )
        if not (np.isfinite(value) and value >= 0):
            raise PunaError(f"{where}: weight of {name!r} is {value}", "use a number from 0 on")
    total = sum(weights.values())
    if abs(total - 1) > 0.01:
        raise PunaError(f"{where}: weights sum to {total:.4g}", "make them sum to 1")
    shares = np.array([weights.get(name, 0.0) for name in names])
    return shares / shares.sum()


def named(shares: Float64[np.ndarray, " K"], names: list[str]) -> dict[str, Any]:
    """Return shares by name, rounded to 4 digits."""
    return {name: round(float(share), 4) for name, share in zip(names, shares, strict=True)}
