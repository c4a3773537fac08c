"""Walks the graph of a recipe: skips the finished, resumes the rest, refuses what differs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from puna.core.artifact import ARTIFACT_FILE, CONFIG_FILE, Artifact, write_record
from puna.core.config import Config, identity
from puna.core.errors import PunaError, explain_environment_error
from puna.core.fsio import commit_dir, hash_json, remove_tree, write_json, write_text
from puna.core.ledger import LEDGER_FILE, Ledger
from puna.core.plan import Step, plan_steps
from puna.core.progress import say
from puna.core.recipe import Recipe, flatten, toml_values
from puna.core.units import format_bytes, format_duration

IDENTITY_FILE = ".identity.json"
LOCK_FILE = ".lock"
LOCK_WAIT_S = 20.0
_SHOWN_DIFFERENCES = 6


@dataclass
class RunResult:
    """What a call of :func:`run_recipe` did."""

    run_dir: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_recipe(
    recipe: Recipe, *, only: str | None = None, rebuild: Sequence[str] = ()
) -> RunResult:
    """Bring a run up to date: run every stage that is not finished.

    Args:
        recipe: The resolved recipe.
        only: Run just this stage; its inputs must be finished.
        rebuild: Stages to make anew, with all that follow from them.

    Returns:
        Which stages were run and which were finished already.

    Raises:
        PunaError: A cached artifact was made by another recipe (the differing fields are named), an
            input is missing, another process works on this run, or a stage failed on bad input.
    """
    started_s = time.monotonic()
    steps = plan_steps(recipe)
    for name in [*rebuild, *([only] if only else [])]:
        if name not in steps:
            raise PunaError(
                f"stage {name!r} is not in the recipe", f"its stages: {', '.join(steps)}"
            )
    remake = _with_descendants(steps, rebuild)
    run_dir = recipe.run_dir
    _make_run_dir(run_dir)
    result = RunResult(run_dir)
    with run_lock(run_dir):
        events = Ledger(run_dir / LEDGER_FILE)
        for name, step in steps.items():
            if only is not None and name != only:
                continue
            if _run_step(run_dir, step, events, rebuild=name in remake):
                result.done.append(name)
            else:
                result.skipped.append(name)
    result.seconds = time.monotonic() - started_s
    return result


def _with_descendants(steps: Mapping[str, Step], rebuild: Sequence[str]) -> set[str]:
    remake = set(rebuild)
    for name, step in steps.items():  # in order, so one pass reaches everything
        if remake.intersection(step.upstream):
            remake.add(name)
    return remake


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        explained = explain_environment_error(error, run_dir)
        raise (explained or error) from error


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock; a run that was just killed is given a moment to let go of it.

    Raises:
        PunaError: Another process holds it.
    """
    path = run_dir / LOCK_FILE
    with path.open("a+") as file:
        deadline_s = time.monotonic() + LOCK_WAIT_S
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if not waiting:
                    waiting = True
                    say(f"another process ({holder}) holds {run_dir}; waiting ...")
                if time.monotonic() > deadline_s:
                    raise PunaError(
                        f"{run_dir} is in use by process {holder}",
                        "wait for it, or end it, then run the same command again",
                    ) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _run_step(run_dir: Path, step: Step, events: Ledger, *, rebuild: bool) -> bool:
    """Run one step unless it is finished; tell whether it ran."""
    name = step.stage.name
    final, partial = run_dir / name, run_dir / f"{name}.partial"
    inputs = _open_inputs(run_dir, step)
    identity_record = _identity_record(step, inputs)
    if rebuild:
        remove_tree(partial)
    elif (final / ARTIFACT_FILE).exists():
        _check_cached(Artifact(final), identity_record, step)
        return False
    if (partial / ARTIFACT_FILE).exists():  # killed between the record and the rename
        if Artifact(partial).fingerprint == identity_record["fingerprint"]:
            _publish(partial, final)
            return True
        remove_tree(partial)
    resumed = _prepare_partial(partial, step, identity_record)
    write_text(partial / CONFIG_FILE, _config_toml(step.config))
    bound = events.bind(stage=name)
    say((name, "bold"), f"  {step.stage.summary}", (" (resumed)" if resumed else "", "dim"))
    bound.emit("stage.start", resumed=resumed, fingerprint=identity_record["fingerprint"])
    start_wall_s, start_s = time.time(), time.monotonic()
    state = step.stage.external_state(step.config) if step.stage.external_state else None
    try:
        metrics = step.stage.function(step.config, inputs, partial, bound)
        seconds = time.monotonic() - start_s
        (partial / IDENTITY_FILE).unlink()
        record = {
            **identity_record,
            "seed": getattr(step.config, "seed", None),
            "external_state": state,
            "started_at": start_wall_s,
            "ended_at": time.time(),
            "seconds": seconds,
            "resumed": resumed,
            "status": "done",
            "metrics": metrics,
        }
        write_record(partial, record)
        _publish(partial, final)
    except BaseException as error:
        _record_failure(bound, error)
        explained = explain_environment_error(error, partial)
        if explained is not None and explained is not error:
            raise explained from error
        raise
    bound.emit("stage.done", durable=True, seconds=seconds)
    size = sum(entry["n_bytes"] for entry in Artifact(final).record["files"])
    say(("  done", "green"), f" in {format_duration(seconds)}, {format_bytes(size)} in {final}")
    return True


def _record_failure(events: Ledger, error: BaseException) -> None:
    with contextlib.suppress(OSError):  # the disk may be full: the error itself matters more
        events.emit("stage.failed", error=f"{type(error).__name__}: {error}"[:2000])


def _publish(partial: Path, final: Path) -> None:
    remove_tree(final)
    commit_dir(partial, final)


def _open_inputs(run_dir: Path, step: Step) -> dict[str, Artifact]:
    inputs = {}
    for key, source in step.sources.items():
        folder = run_dir / source if isinstance(source, str) else source
        if not (folder / ARTIFACT_FILE).exists():
            what = f"stage {source}" if isinstance(source, str) else f"the artifact {source}"
            raise PunaError(
                f"{step.stage.name} needs {what}, which is not finished",
                "run the whole recipe (`puna run RECIPE`), or that stage first",
            )
        inputs[key] = Artifact(folder)
        _check_payload(inputs[key])
    return inputs


def _identity_record(step: Step, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    config = identity(step.config)
    upstream = {
        key: {
            "stage": artifact.stage,
            "fingerprint": artifact.fingerprint,
            "content_hash": artifact.content_hash,
        }
        for key, artifact in sorted(inputs.items())
    }
    identity_values = {
        "stage": step.stage.name,
        "schema_version": step.stage.schema_version,
        "config": config,
        "inputs": {key: value["fingerprint"] for key, value in upstream.items()},
    }
    return {
        "stage": step.stage.name,
        "schema_version": step.stage.schema_version,
        "config": step.config.model_dump(mode="json"),
        "identity": config,
        "inputs": upstream,
        "fingerprint": hash_json(identity_values),
    }


def _prepare_partial(partial: Path, step: Step, record: Mapping[str, Any]) -> bool:
    """Make the work folder; tell whether an earlier attempt's work is continued."""
    note = partial / IDENTITY_FILE
    if note.exists() and step.stage.resumable:
        earlier = _read_identity(note)
        differences = _differences(earlier, record) if earlier is not None else []
        if earlier is not None and not differences:
            return True
        if differences and _holds_work(partial):
            raise PunaError(
                f"{partial} holds unfinished work of another recipe; it differs in: "
                + "; ".join(differences),
                f"undo the change, choose another `name`, or pass --rebuild {step.stage.name}",
            )
    remove_tree(partial)
    partial.mkdir(parents=True)
    keys = ("stage", "schema_version", "identity", "inputs", "fingerprint")
    write_json(note, {key: record[key] for key in keys})
    return False


def _holds_work(partial: Path) -> bool:
    """Tell whether a failed attempt left more than its notes, which a change may cost."""
    notes = {IDENTITY_FILE, CONFIG_FILE}
    return any(path.is_file() and path.name not in notes for path in partial.rglob("*"))


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _check_cached(artifact: Artifact, record: Mapping[str, Any], step: Step) -> None:
    name = step.stage.name
    differences = _differences(artifact.record, record)
    if differences:
        raise PunaError(
            f"{artifact.path} was made by another recipe; it differs in: " + "; ".join(differences),
            f"choose another `name` for this run, or pass --rebuild {name} (it makes anew what "
            "follows from it, too)",
        )
    _check_payload(artifact)
    if step.stage.external_state is not None:
        now = step.stage.external_state(step.config)
        if now != artifact.record.get("external_state"):
            say(
                ("note", "yellow"),
                f": the input of {name} has changed since it was made; it is "
                f"kept as it is (--rebuild {name} reads it again)",
            )


def _check_payload(artifact: Artifact) -> None:
    damaged = artifact.damaged_files()
    if damaged:
        raise PunaError(
            f"{artifact.path} is damaged: {', '.join(damaged[:3])} missing or of another size",
            f"make it anew: `puna run RECIPE --rebuild {artifact.stage}`",
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two identities differ."""
    found = []
    if old.get("schema_version") != new["schema_version"]:
        found.append(f"schema version {old.get('schema_version')} -> {new['schema_version']}")
    before, after = flatten(old.get("identity", {})), flatten(new["identity"])
    found += [
        f"{old['stage']}.{key} {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    earlier = old.get("inputs", {})
    found += [
        f"input {key!r} ({new['inputs'].get(key, earlier.get(key))['stage']}) was made anew"
        for key in sorted(earlier.keys() | new["inputs"].keys())
        if earlier.get(key) != new["inputs"].get(key)
    ]
    if len(found) > _SHOWN_DIFFERENCES:
        found = [*found[:_SHOWN_DIFFERENCES], f"and {len(found) - _SHOWN_DIFFERENCES} more"]
    return found


def _config_toml(config: Config) -> str:
    return tomli_w.dumps(toml_values(config))
