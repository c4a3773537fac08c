"""The graph of a recipe: which stage reads from which, and in what order they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from puna.core.artifact import ARTIFACT_FILE
from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.recipe import Recipe
from puna.core.stage import Stage


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its inputs resolved.

    Attributes:
        stage: The stage.
        config: Its configuration.
        sources: Input name -> stage of this recipe, or folder of a finished artifact.
    """

    stage: Stage
    config: Config
    sources: Mapping[str, str | Path]

    @property
    def upstream(self) -> list[str]:
        """Stages of this recipe that it reads from."""
        return [source for source in self.sources.values() if isinstance(source, str)]


def plan_steps(recipe: Recipe) -> dict[str, Step]:
    """Order the stages of a recipe so that every stage comes after its inputs.

    Raises:
        PunaError: A needed stage is not in the recipe, the inputs form a circle, or an input is
            wired to a folder that is no finished artifact.
    """
    configs = recipe.stage_configs()
    if not configs:
        raise PunaError(
            f"{recipe.path or 'recipe'} has no stage",
            "add sections such as [data.ingest]; `puna config schema` lists them",
        )
    chosen = _choose(configs, recipe.settings.inputs)
    steps: dict[str, Step] = {}
    for name, (stage, config) in configs.items():
        sources: dict[str, str | Path] = {}
        for need, makers in stage.needs.items():
            key = need.rstrip("?")
            default = chosen.get((name, key), makers.split("|")[0])
            wired = recipe.settings.inputs.get(f"{name}.{key}", default)
            if wired in configs:
                sources[key] = wired
            elif wired != default:
                sources[key] = _finished_folder(wired, f'inputs."{name}.{key}"', configs)
            elif not need.endswith("?"):
                raise PunaError(
                    f"stage {name} needs {key!r} from {default}, which is not in the recipe",
                    f'add a section [{default}], or set inputs."{name}.{key}" to a finished '
                    "artifact's folder",
                )
        steps[name] = Step(stage, config, sources)
    try:
        order = list(TopologicalSorter({n: s.upstream for n, s in steps.items()}).static_order())
    except CycleError as error:
        raise PunaError(
            f"the inputs form a circle: {' -> '.join(error.args[1])}", "correct the table [inputs]"
        ) from error
    return {name: steps[name] for name in order}


def _choose(
    configs: Mapping[str, tuple[Stage, Config]], wired: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    """Choose the maker of each input among the stages that the recipe has.

    Of several, the first that does not itself read from the stage. Later stages choose first: what
    comes early in the story takes what they leave (`tokens.train` reads the composed documents,
    unless the composition waits for its tokenizer).

    Returns:
        (stage, input) -> stage, for the inputs that a stage of the recipe can make.
    """
    makers = {
        (name, need.rstrip("?")): [
            maker
            for maker in (wired.get(f"{name}.{need.rstrip('?')}") or choices).split("|")
            if maker in configs
        ]
        for name, (stage, _) in configs.items()
        for need, choices in stage.needs.items()
    }
    reads: dict[str, set[str]] = {name: set() for name in configs}
    for (name, _), found in makers.items():
        if len(found) == 1:
            reads[name].add(found[0])
    chosen = {}
    for (name, key), found in reversed(makers.items()):
        if found:
            free = (maker for maker in found if not _reaches(maker, name, reads))
            chosen[name, key] = next(free, found[0])
            reads[name].add(chosen[name, key])
    return chosen


def _reaches(start: str, goal: str, reads: Mapping[str, Iterable[str]]) -> bool:
    """Tell whether one stage reads from another, perhaps through stages between them."""
    seen, todo = {start}, [start]
    while todo:
        for name in reads[todo.pop()]:
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return goal in seen


def _finished_folder(wired: str, where: str, stages: Iterable[str]) -> Path:
    """Check the folder that an input is wired to before the first stage runs, not hours later."""
    if not (Path(wired) / ARTIFACT_FILE).is_file():
        raise PunaError(
            f"{where} is {wired!r}: neither a stage of the recipe nor a finished stage's folder",
            f"give a folder that holds {ARTIFACT_FILE}, or one of {', '.join(stages)}",
        )
    return Path(wired)
