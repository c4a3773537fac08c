"""Averages of the weights: a model that is often better than the last weights, for no more work.

The average is sharded as the parameters are and is in every checkpoint. Which step counts how much
is a function of the step alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.train.optim import Parameters
from puna.train.optim_config import AverageConfig, EmaConfig
from puna.train.parallel.shards import local
from puna.train.schedule_config import steps_of

AVERAGE = "average."
"""Begins the names of the averaged parameters in a checkpoint."""


def weight_of(config: AverageConfig, step: int, n_steps: int) -> float:
    """Return the share that the weights after a step get in the average; 0 leaves it as it is.

    Args:
        config: Kind of average.
        step: Step that is done (0-based).
        n_steps: Steps of the whole run; its last step always counts.
    """
    if isinstance(config, EmaConfig):
        done = step + 1
        since = done % config.every or config.every
        if since != config.every and done != n_steps:
            return 0.0
        return 1.0 if done <= config.every else 1.0 - config.decay**since
    left = n_steps - 1 - step
    window = min(n_steps, max(1, steps_of(config.steps, n_steps)))
    n_counted = 1 + (window - 1) // config.every
    number = n_counted - left // config.every  # of this step among those that count, from 1
    return 1.0 / number if left % config.every == 0 and number >= 1 else 0.0


class WeightAverage:
    """An average of a model's weights.

    Args:
        config: Kind of average; None for none, which costs nothing.
        model: Its parameters, maybe sharded. Of copies, the first stands for all.
        n_steps: Steps of the whole run.

    Attributes:
        tensors: The average by ``average.<parameter>``, live, for checkpoints.
    """

    def __init__(self, config: AverageConfig | None, model: Parameters, n_steps: int) -> None:
        self._config, self._n_steps = config, n_steps
        named = dict(reversed(list(model.named_parameters()))) if config else {}
        self._weights = [p.detach() for p in named.values()]
        self.tensors: dict[str, Tensor] = {
            f"{AVERAGE}{name}": torch.zeros_like(p, requires_grad=False)
            for name, p in named.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        if self._config is None:
            return
        weight = weight_of(self._config, step, self._n_steps)
        if weight:
            averages = [local(x) for x in self.tensors.values()]
            torch._foreach_lerp_(averages, [local(p) for p in self._weights], weight)

    def reset(self) -> None:
        """Begin again, whatever was loaded."""
        for value in self.tensors.values():
            value.zero_()
