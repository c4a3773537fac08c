"""The libraries of the extra ``mix``, imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from puna.core.errors import PunaError


def load(name: str, what: str) -> ModuleType:
    """Import a library of the extra.

    Args:
        name: Module to import.
        what: What needs it, for the message.

    Raises:
        PunaError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PunaError(
            f"{what} needs {name.partition('.')[0]}, which cannot be imported: {error}",
            "install the extra: pip install 'puna[mix]'",
        ) from error


def minimize(
    value_and_gradient: Callable[..., tuple[float, np.ndarray]],
    start: np.ndarray,
    *,
    args: tuple[object, ...] = (),
    bounds: Sequence[tuple[float, float]] | None = None,
    n_steps: int = 200,
) -> np.ndarray:
    """Minimise a smooth function in a box by L-BFGS-B of scipy.

    Raises:
        PunaError: scipy is not installed.
    """
    optimize = load("scipy.optimize", "fitting")
    found = optimize.minimize(
        value_and_gradient, start, args=args, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": n_steps, "maxfun": 2 * n_steps},
    )  # fmt: skip
    return np.asarray(found.x, dtype=np.float64)
