"""What is looked for: one value of several losses, the mixes allowed, the mixes to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix import baselines
from puna.mix.sources import Manifest, shares_of

_LN2 = float(np.log(2.0))


@dataclass(frozen=True)
class Task:
    """An objective over mixes; lower is better.

    Attributes:
        sources: Names of the sources, K.
        targets: Names of the targets, T.
        weight_T: Weights of the targets; they sum to 1.
        factor_T: What turns a loss of the table to the unit that is reported.
        natural_K: The mix that needs no decision; the divergence is taken from it.
        caps_K: Largest share of each source.
        worst: Whether the worst target counts instead of the mean.
        kl: Weight of the divergence.
        baselines: Mixes to beat, by name.
        manifest: Where it comes from; None without one.
        notes: What is assumed, in sentences.
    """

    sources: list[str]
    targets: list[str]
    weight_T: Float64[np.ndarray, " T"]
    factor_T: Float64[np.ndarray, " T"]
    natural_K: Float64[np.ndarray, " K"]
    caps_K: Float64[np.ndarray, " K"]
    worst: bool = False
    kl: float = 0.0
    baselines: dict[str, Float64[np.ndarray, " K"]] = field(default_factory=dict)
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)

    def effective(self, shares: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, "M K"]:
        """Return shares after the loss of value by repetition."""
        return shares if self.manifest is None else self.manifest.effective(shares)

    def value(
        self, loss_TM: Float64[np.ndarray, "... T M"], shares_MK: Float64[np.ndarray, "M K"],
        reference_T: Float64[np.ndarray, "... T"],
    ) -> Float64[np.ndarray, "... M"]:  # fmt: skip
        """Return the objective.

        Args:
            loss_TM: Losses of the mixes.
            shares_MK: The mixes.
            reference_T: Losses of the natural mix, which the worst target is measured against.
        """
        if self.worst:
            made = np.max(loss_TM / reference_T[..., None], axis=-2) * float(
                np.mean(reference_T * self.factor_T)
            )
        else:
            made = np.einsum("...tm,t->...m", loss_TM, self.weight_T * self.factor_T)
        return made + self.kl * divergence(shares_MK, self.natural_K)

    def allowed(self, shares: Float64[np.ndarray, "M K"]) -> Float64[np.ndarray, "M K"]:
        """Move mixes below the caps: what is too much goes to the other sources."""
        out = shares / shares.sum(axis=1, keepdims=True)
        for _ in range(50):
            over = out > self.caps_K + 1e-12
            if not over.any():
                break
            out = np.minimum(out, self.caps_K)
            free = np.where(out < self.caps_K - 1e-12, np.maximum(out, 1e-9), 0.0)
            left = 1 - out.sum(axis=1, keepdims=True)
            total = free.sum(axis=1, keepdims=True)
            out = out + left * np.divide(free, total, out=np.zeros_like(free), where=total > 0)
        return out


def make_task(
    sources: Sequence[str], targets: Sequence[str], manifest: Manifest | None = None
) -> Task:
    """Make the task of a table of runs.

    Args:
        sources: Sources of the table.
        targets: Targets of the table.
        manifest: Sources, targets and objective; None takes equal weights, no limits, and the
            uniform mix for the natural one.

    Raises:
        PunaError: The manifest and the table do not name the same sources, or a target is missing.
    """
    k, names = len(sources), list(sources)
    uniform = np.full(k, 1 / k)
    if manifest is None:
        even = np.full(len(targets), 1 / len(targets))
        return Task(
            names, list(targets), even, np.ones(len(targets)), uniform, np.ones(k),
            baselines={"uniform": uniform},
            notes=["no manifest: no limits on repetition, and the uniform mix stands for natural"],
        )  # fmt: skip
    missing = [name for name in names if name not in manifest.names]
    more = [name for name in manifest.names if name not in names]
    if missing or more:
        raise PunaError(
            f"the table of runs and the manifest differ in their sources: only in the table: "
            f"{', '.join(missing) or 'none'}; only in the manifest: {', '.join(more) or 'none'}",
            "name the same sources in both",
        )
    order = [manifest.names.index(name) for name in names]
    wanted = {one.name: one for one in manifest.target} or None
    if wanted is not None and (gone := [name for name in wanted if name not in targets]):
        raise PunaError(
            f"target {gone[0]!r} has no column in the table of runs",
            f"use targets of the table: {', '.join(targets)}",
        )
    weight = np.array([1.0 if wanted is None else getattr(wanted.get(t), "weight", 0.0)
                       for t in targets])  # fmt: skip
    if weight.sum() <= 0:
        raise PunaError("all targets have weight 0", "give one of them a positive weight")
    per_byte = [wanted[t].bytes_per_token if wanted and t in wanted else None for t in targets]
    if any(per_byte) and not all(
        b for b, w in zip(per_byte, weight, strict=True) if w
    ):  # bits per byte and something else in one mean
        raise PunaError(
            "only some targets have bytes_per_token: their mean would mix units",
            "give it for all targets, or for none",
        )
    factor = np.array([1.0 if b is None else 1 / (_LN2 * b) for b in per_byte])
    natural = manifest.natural()[order]
    mixes = {"natural": natural, "uniform": uniform, "temperature": baselines.temperature(natural)}
    for name, weights in manifest.reference.items():
        mixes[name] = shares_of(weights, names, f"reference.{name}")
    goal = manifest.objective
    ordered = manifest.model_copy(update={"source": tuple(manifest.source[i] for i in order)})
    return Task(
        names, list(targets), weight / weight.sum(), factor, natural, ordered.caps(),
        goal.kind == "worst", goal.kl, mixes, ordered,
    )  # fmt: skip


def divergence(
    shares_MK: Float64[np.ndarray, "M K"], prior_K: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, " M"]:
    """Return the Kullback-Leibler divergence of mixes from a prior, in nats."""
    safe = np.maximum(shares_MK, 1e-12)
    return np.sum(np.where(shares_MK > 0, shares_MK * np.log(safe / prior_K), 0.0), axis=1)
