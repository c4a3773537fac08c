"""What all launchers need to know of a job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from puna.core.errors import PunaError
from puna.train.config import TrainingConfig

PORT = 29500
"""Where the ranks meet when the recipe does not say."""
_LABEL_CHARACTERS = 40  # Kubernetes appends to it: 63 are allowed


@dataclass(frozen=True)
class LaunchJob:
    """A training to start on several nodes.

    Attributes:
        name: Of the run.
        recipe: Path of the recipe, the same on all nodes.
        overrides: ``key=value`` arguments.
        nodes: Machines.
        per_node: Ranks of each.
        is_gpu: Ranks have a GPU each.
        endpoint: ``host:port`` from the recipe; empty when it does not say.
        folder: Where the command is started; the run's folder is relative to it.
        command: What starts puna.
        environment: Variables to set.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    nodes: int
    per_node: int
    is_gpu: bool
    endpoint: str
    folder: Path
    command: tuple[str, ...] = ("puna",)
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        cfg: TrainingConfig,
        recipe: Path,
        overrides: tuple[str, ...],
        folder: Path,
        command: tuple[str, ...] = ("puna",),
    ) -> LaunchJob:
        """Take what a training's configuration says.

        Raises:
            PunaError: A path or an argument has a line break, which no job file can hold.
        """
        for text in (str(recipe), str(folder), *overrides, *command):
            if any(ord(character) < 32 for character in text):
                raise PunaError(f"{text!r} has a control character", "write it without")
        nodes = cfg.launch.nodes
        return cls(
            name, recipe, overrides, nodes + cfg.launch.spares, cfg.nproc // nodes,
            cfg.device != "cpu", cfg.launch.rdzv_endpoint, folder, command,
        )  # fmt: skip

    @property
    def arguments(self) -> list[str]:
        """The command that every node runs."""
        return [*self.command, "run", str(self.recipe), *self.overrides]

    @property
    def shell_command(self) -> str:
        """The same, quoted for a shell."""
        return shlex.join(self.arguments)

    @property
    def port(self) -> int:
        """Where the ranks meet on node 0."""
        return int(self.endpoint.rpartition(":")[2]) if self.endpoint else PORT

    @property
    def label(self) -> str:
        """The name as a DNS label (RFC 1123): lower case, digits, dashes."""
        text = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:_LABEL_CHARACTERS]
        text = text.strip("-") or "run"
        return text if text[0].isalpha() else f"run-{text}"[:_LABEL_CHARACTERS].strip("-")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; ``sh`` quotes a value for a shell."""
    environment = Environment(
        loader=PackageLoader("puna.train.launchers"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(template).render(**values)
