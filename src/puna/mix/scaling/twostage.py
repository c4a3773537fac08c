"""Llama 3's prediction of a task in two steps: compute to likelihood, likelihood to accuracy.

Grattafiori et al. 2024 (The Llama 3 herd of models, section 3.2.1): the negative log likelihood of
the right answer is linear in log compute for compute-optimal models; accuracy is a sigmoid of it,
for which models trained on more than that may be used too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.extra import minimize

Values = Float64[np.ndarray, " P"]


@dataclass(frozen=True)
class TwoStage:
    """Both steps.

    Attributes:
        intercept: Likelihood at 1 FLOP, of the line in log10 compute.
        slope: Change per factor of ten of compute.
        low: Accuracy of guessing.
        high: Accuracy of the best model.
        steepness: Of the sigmoid, per unit of likelihood.
        middle: Likelihood halfway.
        sd: Standard deviation of the line's residuals.
    """

    intercept: float
    slope: float
    low: float
    high: float
    steepness: float
    middle: float
    sd: float

    def likelihood(self, flop: float) -> float:
        """Return the negative log likelihood that a budget will reach."""
        return float(self.intercept + self.slope * np.log10(flop))

    def accuracy_of(self, nll: Values) -> Values:
        """Return the accuracy that goes with a likelihood."""
        z = np.clip(self.steepness * (self.middle - nll), -60, 60)
        return self.low + (self.high - self.low) / (1 + np.exp(-z))

    def accuracy(self, flop: float) -> tuple[float, float, float]:
        """Return the accuracy that a budget will reach, with a 90 % interval of the first step."""
        nll = self.likelihood(flop)
        at = np.array([nll, nll + 1.645 * self.sd, nll - 1.645 * self.sd])
        mid, low, high = self.accuracy_of(at).tolist()
        return mid, low, high


def fit_two_stage(
    flop: Values, nll: Values, all_nll: Values, accuracy: Values, *, chance: float = 0.0
) -> TwoStage:
    """Fit both steps.

    Args:
        flop: Compute of compute-optimal models.
        nll: Their normalised negative log likelihood of the right answer.
        all_nll: Likelihoods of all models whose accuracy is known.
        accuracy: Their accuracies, 0 to 1.
        chance: Accuracy of guessing, the lower end of the sigmoid.

    Raises:
        PunaError: There are fewer than 3 points in a step, or likelihood does not fall with
            compute.
    """
    if len(flop) < 3 or len(all_nll) < 3:
        raise PunaError(
            f"{len(flop)} budgets and {len(all_nll)} accuracies are too few", "give 3 of each"
        )
    slope, intercept = np.polyfit(np.log10(flop), nll, 1)
    if slope >= 0:
        raise PunaError(
            f"likelihood does not improve with compute (slope {slope:+.3g})",
            "leave this task out of the prediction: these models do not learn it",
        )
    left = nll - intercept - slope * np.log10(flop)
    sd = float(np.sqrt((left**2).sum() / max(len(nll) - 2, 1)))

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        high, log_k, middle = theta
        k = np.exp(log_k)
        s = 1 / (1 + np.exp(-np.clip(k * (middle - all_nll), -60, 60)))
        off = chance + (high - chance) * s - accuracy
        inner = off * (high - chance) * s * (1 - s)
        gradient = np.array([off @ s, inner @ (middle - all_nll) * k, inner.sum() * k])
        return 1e3 * float(0.5 * off @ off), 1e3 * gradient

    best, lowest = None, np.inf
    span = float(np.ptp(all_nll)) or 1.0
    for high in (1.0, min(float(accuracy.max()) + 0.05, 1.0)):
        for share in (0.25, 0.5, 0.75):
            start = np.array([high, np.log(4 / span), np.quantile(all_nll, share)])
            bounds = [(chance + 1e-3, 1.0), (-5.0, 8.0),
                      (all_nll.min() - 3 * span, all_nll.max() + 3 * span)]  # fmt: skip
            found = minimize(value, start, bounds=bounds, n_steps=1000)
            if (reached := value(found)[0]) < lowest:
                best, lowest = found, reached
    assert best is not None
    high, log_k, middle = best.tolist()
    return TwoStage(float(intercept), float(slope), chance, high, float(np.exp(log_k)), middle, sd)
