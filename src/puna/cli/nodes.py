"""Commands that train, on one of several nodes: node 0 does the work, the others follow it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.core.recipe import Recipe
    from puna.train.launch_config import LaunchConfig


def widest_launch(recipe: Recipe) -> LaunchConfig | None:
    """Return the configuration of the stage that takes the most nodes; None when all take one."""
    from puna.train.config import TrainingConfig

    launches = [
        config.launch
        for _, config in recipe.stage_configs().values()
        if isinstance(config, TrainingConfig) and config.launch.nodes > 1
    ]
    return max(launches, key=lambda launch: launch.nodes, default=None)


def follow_if_told(recipe: Recipe) -> int | None:
    """Be a node that follows, if the recipe takes several and the environment says so.

    Returns:
        The exit code of the run; None on node 0 and where there is but one.

    Raises:
        PunaError: Node 0 does not come, or the number of this node is wrong.
    """
    launch = widest_launch(recipe)
    if launch is None:
        return None
    from puna.train.nodes import node_rank

    node = node_rank()
    if node == 0:
        return None
    from puna.train.follow import follow

    return follow(_folder(recipe), node, launch)


@contextlib.contextmanager
def leading(recipe: Recipe) -> Iterator[None]:
    """Be node 0 while a recipe is run: show signs of life, and tell the others the end."""
    launch = widest_launch(recipe)
    if launch is None:
        yield
        return
    from puna.core.errors import USER_ERROR_EXIT_CODE
    from puna.train.nodes import Leader

    leader, code = Leader.of(_folder(recipe)), USER_ERROR_EXIT_CODE
    try:
        yield
        code = 0
    finally:
        call = leader.call("end", nodes=launch.nodes + launch.spares, code=code)
        leader.wait_for(call, launch.node_timeout_s)


def _folder(recipe: Recipe) -> Path:
    """Where the nodes agree, under the very name that the training has for it."""
    from puna.train.nodes import NODES_DIR

    return Path(os.path.abspath(recipe.run_dir)) / NODES_DIR
