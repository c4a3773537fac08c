"""A stage: one function that is one command and one step of a recipe.

::

    @stage("data.filter", needs={"documents": "data.ingest"})
    def filter_documents(
        cfg: FilterConfig, inputs: Artifacts, out: Path, events: Ledger
    ) -> Metrics: ...

The function writes its payload into ``out`` and returns metrics. Everything else (fingerprint,
skipping what is finished, the atomic rename, ``artifact.json``) is done by :mod:`puna.core.run`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from puna.core.artifact import Artifact
from puna.core.config import Config
from puna.core.ledger import Ledger

Artifacts = Mapping[str, Artifact]
"""The inputs of a stage: name of the input -> finished artifact."""

Metrics = dict[str, Any]
"""JSON values that a stage measured: counts, seconds, rates."""

StageFunction = Callable[[Any, Artifacts, Path, Ledger], Metrics]

PLUGIN_GROUP = "puna.plugins"


@dataclass(frozen=True)
class Stage:
    """What the runner knows about a stage.

    Attributes:
        name: Dotted name, also its section in the recipe and its folder in the run.
        function: The function itself.
        config: Its configuration class.
        needs: Input name -> name of the stage that makes it, unless the recipe says otherwise.
            An input whose name ends with ``?`` is optional: it is given when the recipe has that
            stage. Several stages, ``a|b``: the first of them that the recipe has and that does not
            itself read from this stage (see :mod:`puna.core.plan`).
        resumable: The function continues from what an earlier, killed attempt left in ``out``.
        schema_version: Raised when the payload or the meaning of the configuration changes.
        external_state: Tells, as JSON values, what outside the recipe the result depends on
            (a listing of input files); a change is reported on a rerun. None when nothing.
    """

    name: str
    function: StageFunction
    config: type[Config]
    needs: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = False
    schema_version: int = 1
    external_state: Callable[[Any], Any] | None = None

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or self.name).splitlines()[0]


_STAGES: dict[str, Stage] = {}


def stage(
    name: str,
    *,
    needs: Mapping[str, str] | None = None,
    resumable: bool = False,
    schema_version: int = 1,
    external_state: Callable[[Any], Any] | None = None,
) -> Callable[[StageFunction], StageFunction]:
    """Register a function as a stage; the function itself is returned unchanged.

    The configuration class is read from the annotation of the first parameter.

    Raises:
        TypeError: The first parameter is not annotated with a :class:`Config` class.
        ValueError: Another function already has this name.
    """

    def register(function: StageFunction) -> StageFunction:
        hints = typing.get_type_hints(function)
        first = next(iter(inspect.signature(function).parameters))
        config = hints.get(first)
        if not (isinstance(config, type) and issubclass(config, Config)):
            raise TypeError(f"stage {name}: annotate `{first}` with a Config class")
        known = _STAGES.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"stage {name} is already registered by {known.function.__module__}")
        _STAGES[name] = Stage(
            name, function, config, dict(needs or {}), resumable, schema_version, external_state
        )
        return function

    return register


def stages() -> Mapping[str, Stage]:
    """All registered stages by name, in the order of registration."""
    return dict(_STAGES)


def arrange(modules: Sequence[str]) -> None:
    """Put the stages of these modules or packages first, in this order."""

    def place(known: Stage) -> int:
        defined_in = f"{known.function.__module__}."
        places = (at for at, module in enumerate(modules) if defined_in.startswith(f"{module}."))
        return next(places, len(modules))

    by_place = sorted(_STAGES.values(), key=place)
    _STAGES.clear()
    _STAGES.update((known.name, known) for known in by_place)


def load_plugins() -> list[str]:
    """Import the modules of third parties (entry points ``puna.plugins``); return their names.

    A plugin module registers sources, filters, stages and so on when it is imported.
    """
    loaded = []
    for point in sorted(entry_points(group=PLUGIN_GROUP), key=lambda point: point.name):
        point.load()
        loaded.append(point.name)
    return loaded
