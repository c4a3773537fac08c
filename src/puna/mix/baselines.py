"""Mixes to beat: natural, uniform, temperature, DoReMi, MixMin."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

TEMPERATURE = 0.5


def temperature(
    natural: Float64[np.ndarray, " K"], power: float = TEMPERATURE
) -> Float64[np.ndarray, " K"]:
    """Return natural shares to a power, normalised: 1 keeps them, 0 makes them equal."""
    made = natural**power
    return made / made.sum()


def mixmin(
    log_p_XK: Float64[np.ndarray, "X K"], *, n_steps: int = 100, rate: float = 1.0
) -> Float64[np.ndarray, " K"]:
    """Return the mix of one model per source that gives a target text the highest likelihood.

    Convex: minus the mean over texts x of log sum_j w_j p_j(x), by exponentiated gradient (Thudi et
    al. 2025, MixMin, algorithm 1). It takes a mixture of models for a model of the mixture.

    Args:
        log_p_XK: Log likelihood of each text under the model of each source, in nats.
        n_steps: Steps.
        rate: Step size.
    """
    p = np.exp(log_p_XK - log_p_XK.max(axis=1, keepdims=True))
    w = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(n_steps):
        gradient = -np.mean(p / (p @ w)[:, None], axis=0)
        w = w * np.exp(-rate * gradient)
        w /= w.sum()
    return w


def doremi(
    excess_SK: Float64[np.ndarray, "S K"], *, eta: float = 1.0, smoothing: float = 1e-3
) -> Float64[np.ndarray, " K"]:
    """Return the weights of DoReMi from the excess losses that a proxy model had.

    Xie et al. 2023 (DoReMi, algorithm 1): weights grow with the positive part of loss minus
    reference loss; the result is their mean over the steps.

    Args:
        excess_SK: Loss of the proxy minus that of the reference model, per step and source, in
            nats per token.
        eta: Step size.
        smoothing: Share that is spread evenly.
    """
    k = excess_SK.shape[1]
    log_a, total = np.zeros(k), np.zeros(k)
    for excess in excess_SK:
        log_a = log_a + eta * np.maximum(excess, 0.0)
        a = np.exp(log_a - log_a.max())
        a = (1 - smoothing) * a / a.sum() + smoothing / k
        total += a
        log_a = np.log(a)
    return total / total.sum()
