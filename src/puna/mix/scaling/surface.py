"""The surface L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3).

Five parameters at once are badly conditioned. For given exponents the law is linear in E, A and B,
so only two are searched, and the other three follow by non-negative least squares (variable
projection, Golub and Pereyra 1973). From there Huber's loss on log L is minimised as in the paper,
its sum over points of the logarithm of a sum of exponentials.

Parameters N, tokens D, compute C = 6 N D in FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from puna.core.errors import PunaError
from puna.mix.extra import load, minimize

HUBER = 1e-3
FEWEST_POINTS = 8
Values = Float64[np.ndarray, " P"]


@dataclass(frozen=True)
class Surface:
    """A fitted law."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    objective: float
    """Huber loss on log L, summed over the points."""

    @property
    def exponent(self) -> float:
        """Exponent of the optimal N in C: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, n_params: Values, n_tokens: Values) -> Values:
        """Return the expected loss."""
        return self.e + self.a * n_params**-self.alpha + self.b * n_tokens**-self.beta

    def optimum(self, flop: float) -> tuple[float, float]:
        """Return the parameters and tokens that make the lowest loss of a budget (equation 4)."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n_params = g * (flop / 6) ** self.exponent
        return float(n_params), float(flop / 6 / n_params)

    def to_json(self) -> dict[str, float]:
        """Return JSON values."""
        return {"E": self.e, "A": self.a, "B": self.b, "alpha": self.alpha, "beta": self.beta,
                "exponent": self.exponent, "objective": self.objective}  # fmt: skip


def fit_projected(n_params: Values, n_tokens: Values, loss: Values) -> Surface:
    """Fit by variable projection: least squares of relative errors.

    Raises:
        PunaError: There are too few points, or one is no positive number.
    """
    _check(n_params, n_tokens, loss)
    nnls = load("scipy.optimize", "fitting a scaling law").nnls
    n0, d0 = np.exp(np.log(n_params).mean()), np.exp(np.log(n_tokens).mean())

    def linear(alpha: float, beta: float) -> tuple[float, np.ndarray]:
        columns = [np.ones_like(loss), (n_params / n0) ** -alpha, (n_tokens / d0) ** -beta]
        design = np.column_stack(columns) / loss[:, None]
        found, residual = nnls(design, np.ones_like(loss))
        return float(residual**2), found

    low, high, best = 0.02, 1.5, (0.4, 0.4)
    for level in range(7):
        steps = [np.linspace(low, high, 12)] * 2
        if level:
            width = 1.5 / 3**level
            steps = [np.clip(x + width * np.linspace(-1, 1, 7), 0.01, 2.0) for x in best]
        pairs = [(float(x), float(y)) for x in steps[0] for y in steps[1]]
        best = min(pairs, key=lambda pair: linear(*pair)[0])
    _, (e, a, b) = linear(*best)
    alpha, beta = best
    made = Surface(float(e), float(a * n0**alpha), float(b * d0**beta), alpha, beta, 0.0)
    return _with_objective(made, n_params, n_tokens, loss)


def fit_surface(
    n_params: Values, n_tokens: Values, loss: Values, *, start: Surface | None = None
) -> Surface:
    """Fit Huber's loss on log L, from the projected solution and a few points around it.

    Raises:
        PunaError: As of :func:`fit_projected`.
    """
    first = start or fit_projected(n_params, n_tokens, loss)
    logs = np.log(n_params), np.log(n_tokens), np.log(loss)
    centre = _theta(first)
    starts = [centre]
    if start is None:
        for scale in (0.85, 1.15):
            for at in (3, 4):
                moved = centre.copy()
                moved[at] *= scale
                moved[at - 3] += (moved[at] - centre[at]) * logs[at - 3].mean()
                starts.append(moved)
    found = [_descend(one, *logs) for one in starts]
    theta = min(found, key=lambda one: _huber(one, *logs)[0])
    value = _huber(theta, *logs)[0]
    a, b, e, alpha, beta = theta.tolist()
    return Surface(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta, value)


def bootstrap(
    fit: Callable[[Values, Values, Values], Surface], n_params: Values, n_tokens: Values,
    loss: Values, *, n: int = 100, seed: int = 0, level: float = 0.9,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Return intervals of the parameters over draws of the points."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, float]] = []
    for _ in range(n):
        drawn = rng.integers(len(loss), size=len(loss))
        rows.append(fit(n_params[drawn], n_tokens[drawn], loss[drawn]).to_json())
    tail = 50 * (1 - level)
    made = {}
    for name in rows[0]:
        low, high = np.percentile([row[name] for row in rows], [tail, 100 - tail])
        made[name] = (float(low), float(high))
    return made


def _check(n_params: Values, n_tokens: Values, loss: Values) -> None:
    if len(loss) < FEWEST_POINTS:
        raise PunaError(
            f"{len(loss)} points are too few for a law of 5 parameters",
            f"give at least {FEWEST_POINTS} runs of different sizes and lengths",
        )
    for name, values in (("n_params", n_params), ("n_tokens", n_tokens), ("loss", loss)):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            raise PunaError(
                f"point {int(np.argmax(bad))}: {name} is {values[bad][0]}",
                "use finite numbers above 0",
            )
    for name, values in (("n_params", n_params), ("n_tokens", n_tokens)):
        if len(np.unique(values)) < 3:
            raise PunaError(
                f"{name} takes {len(np.unique(values))} different values: its exponent cannot "
                "be told",
                "give runs with at least 3",
            )


def _theta(one: Surface) -> np.ndarray:
    tiny = 1e-8
    logs = [np.log(max(value, tiny)) for value in (one.a, one.b, one.e)]
    return np.array([*logs, one.alpha, one.beta])


def _huber(
    theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray
) -> tuple[float, np.ndarray]:
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    total = parts.sum(axis=0)
    residual = top + np.log(total) - log_l
    size = np.abs(residual)
    value = np.where(size <= HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER)).sum()
    pull = np.clip(residual, -HUBER, HUBER)
    share = parts / total
    gradient = np.array([
        pull @ share[0], pull @ share[1], pull @ share[2],
        -pull @ (share[0] * log_n), -pull @ (share[1] * log_d),
    ])  # fmt: skip
    return float(value), gradient


def _descend(theta: np.ndarray, *logs: np.ndarray) -> np.ndarray:
    """Minimise, with exponents turned about the mean of log N and log D, where they are apart.

    a - alpha log N = a' - alpha (log N - mean): a' and alpha are nearly independent.
    """
    log_n, log_d, log_l = logs
    m_n, m_d = float(log_n.mean()), float(log_d.mean())
    scale = 1e4  # the objective is small beside the tolerance of the minimiser

    def value(moved: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient = _huber(moved, log_n - m_n, log_d - m_d, log_l)
        return scale * found, scale * gradient

    start = theta.copy()
    start[0] -= theta[3] * m_n
    start[1] -= theta[4] * m_d
    free = (-50.0, 50.0)
    bounds = [free, free, free, (0.005, 3.0), (0.005, 3.0)]
    best = minimize(value, start, bounds=bounds, n_steps=2000)
    best[0] += best[3] * m_n
    best[1] += best[4] * m_d
    return best


def _with_objective(made: Surface, n: Values, d: Values, loss: Values) -> Surface:
    value = _huber(_theta(made), np.log(n), np.log(d), np.log(loss))[0]
    return Surface(made.e, made.a, made.b, made.alpha, made.beta, value)


def objective(one: Surface, n_params: Values, n_tokens: Values, loss: Values) -> float:
    """Return the Huber loss of a law on points, summed."""
    return _with_objective(one, n_params, n_tokens, loss).objective


def table_of(values: dict[str, Any]) -> tuple[Values, Values, Values]:
    """Return n_params, n_tokens and loss of columns; tokens may be given as ``flop`` instead.

    Raises:
        PunaError: A column is missing.
    """
    n = np.asarray(values.get("n_params", []), dtype=np.float64)
    loss = np.asarray(values.get("loss", []), dtype=np.float64)
    if "n_tokens" in values:
        d = np.asarray(values["n_tokens"], dtype=np.float64)
    elif "flop" in values:
        d = np.asarray(values["flop"], dtype=np.float64) / (6 * n)
    else:
        d = np.array([])
    if not (len(n) and len(d) and len(loss)):
        raise PunaError(
            f"the table has the columns {', '.join(values)}",
            "give n_params, loss and n_tokens (or flop)",
        )
    return n, d, loss
