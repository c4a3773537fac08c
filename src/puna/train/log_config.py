"""Where the numbers of a training go beside the ledger, and what must be installed for it.

Imports no torch and none of the packages.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from pydantic import Field

from puna.core.config import Config
from puna.core.errors import PunaError

Target = Literal["tensorboard", "wandb", "mlflow"]
_MODULES: dict[Target, str] = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow",
}  # fmt: skip


class LogConfig(Config):
    """Where the numbers of each step go, beside the ledger and the terminal."""

    to: list[Target] = Field(default_factory=list)
    """`tensorboard` (event files), `wandb` (Weights & Biases), `mlflow`; each is an extra of the
    same name."""
    project: str = Field(default="puna", min_length=1)
    """Project in Weights & Biases, experiment in MLflow."""
    name: str = ""
    """Name of the run there; the job's id when empty."""
    offline: bool = False
    """Write to a folder instead of to a server: `wandb sync` sends it later; MLflow keeps files
    even if MLFLOW_TRACKING_URI is set."""


def check_log(config: LogConfig) -> None:
    """Look whether what the configuration needs is there; before anything is started.

    Raises:
        PunaError: A package is not installed, or Weights & Biases has no key.
    """
    for target in config.to:
        if importlib.util.find_spec(_MODULES[target]) is None:
            raise PunaError(
                f'log.to = ["{target}"] needs the package {_MODULES[target]}',
                f"pip install 'puna[{target}]', or take it out of log.to",
            )
    if "wandb" in config.to and not config.offline and not _has_wandb_key():
        raise PunaError(
            'log.to = ["wandb"] finds no key of Weights & Biases',
            "run `wandb login`, set WANDB_API_KEY, or set log.offline = true",
        )


def _has_wandb_key() -> bool:
    """Tell whether the package would find a key, without a question to a person."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "") in (
        "offline", "disabled", "dryrun"
    ):  # fmt: skip
        return True
    import wandb  # type: ignore[import-not-found]

    return bool(wandb.api.api_key)
