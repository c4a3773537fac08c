"""Stages killed by SIGKILL in the middle, several times, end with the bytes of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import (  # importing them registers them
    compose,
    decontaminate,
    dedup,
    ingest,
    lines,
    quality,
    safety,
    semantic,
    split,
    substrings,
)
from puna.data.quality.train import TrainConfig, train_classifier
from puna.data.testing import folder_bytes
from tests.integration.test_data_chain import EXAMPLE, FOOTER, WORDS, prose
from tests.unit.test_data_quality import BAD, FAST, GOOD, make_examples, make_text
from tests.unit.test_data_semantic import write_embedder

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]

STAGES = (
    compose, decontaminate, dedup, ingest, lines, quality, safety, semantic, split, substrings
)  # fmt: skip
N_KILLS = 2
LIMIT_S = 60.0
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # children that are killed need not import it all


def documents(n: int) -> dict[str, str]:
    """Make texts that give every stage something to do."""
    rng = random.Random(7)
    texts = {}
    for i in range(n):
        text = prose(rng, 9) if i % 3 else make_text(rng, rng.random(), 80)
        if i % 5 == 0:
            text += f" {EXAMPLE}."
        if i % 7 == 0:
            text += " Write to jane.doe@posteo.net about it."
        texts[f"plain-{i:03d}"] = f"{text}\n{FOOTER}"
        if i % 4 == 0:
            texts[f"shuffled-{i:03d}"] = " ".join(rng.sample(text.split(), len(text.split())))
    return texts


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Write the inputs; return stage -> its settings."""
    root = tmp_path_factory.mktemp("inputs")
    rows = [json.dumps({"id": name, "text": text}) for name, text in documents(300).items()]
    (root / "in.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "quiz.jsonl").write_text(json.dumps({"question": EXAMPLE}) + "\n", encoding="utf-8")
    words = sorted({word.lower() for word in (*WORDS, *GOOD, *BAD)})
    vectors = np.random.default_rng(0).normal(size=(len(words), 16))
    write_embedder(root / "embedder", words, vectors)
    train_classifier(TrainConfig(**FAST), make_examples(300), root / "classifier")
    source = {"kind": "files", "name": "web", "paths": [str(root / "in.jsonl")], "id_field": "id"}
    quiz = {"name": "quiz", "paths": [str(root / "quiz.jsonl")], "fields": ["question"]}
    scorer = {"classifier": str(root / "classifier"), "keep_share": 0.7}
    return {
        "ingest": {"sources": [source], "shard_bytes": 20_000},
        "safety": {},
        "lines": {},
        "semantic": {"embedder": str(root / "embedder"), "clusters": 3, "write_index": True},
        "quality": {"scorers": {"quality": scorer}},
        "substrings": {"min_bytes": 40},
        "dedup": {},
        "split": {},
        "decontaminate": {"sets": [quiz]},
        "compose": {"groups": [{"match": {"source": "web"}, "rate": 0.8}]},
    }


def bring_up_to_date(recipe: dict[str, Any]) -> None:
    """Run a recipe as the leader of a process group."""
    os.setsid()
    run_recipe(resolve(recipe))


def run(recipe: dict[str, Any], stop: Callable[[int], bool]) -> tuple[int, bool]:
    """Run a recipe in a process, killed when ``stop`` says so for the number of new files.

    Returns:
        How many paths its unfinished stage has had, and whether it was killed.
    """
    partial = Path(recipe["runs_dir"], recipe["name"], f"data.{list(recipe['data'])[-1]}.partial")
    before = {path for path in partial.rglob("*")}  # noqa: C416 (a folder in motion)
    seen: set[Path] = set()
    process = PROCESSES.Process(target=bring_up_to_date, args=(recipe,))
    process.start()
    deadline_s = time.monotonic() + LIMIT_S
    while process.is_alive() and time.monotonic() < deadline_s:
        for folder, folders, files in os.walk(partial):  # passes over what vanishes meanwhile
            seen.update(Path(folder, name) for name in (*folders, *files))
        if stop(len(seen - before)):
            os.killpg(process.pid or 0, signal.SIGKILL)
            break
        time.sleep(0.002)
    process.join(LIMIT_S)
    assert process.exitcode in (0, -signal.SIGKILL)
    return len(seen - before), process.exitcode != 0


@pytest.mark.parametrize(
    "stage",
    [
        "compose",
        *(
            pytest.param(stage, marks=pytest.mark.exhaustive)
            for stage in ("lines", "semantic", "safety", "quality", "substrings", "decontaminate")
        ),
    ],
)
def test_a_killed_stage_ends_with_the_same_bytes(
    tmp_path: Path, settings: dict[str, dict[str, Any]], stage: str
) -> None:
    def recipe(name: str, *stages: str) -> dict[str, Any]:
        data = {one: settings[one] for one in stages}
        return {"name": name, "runs_dir": str(tmp_path), "workers": 1, "data": data}

    before = ("ingest", "dedup", "split") if stage == "compose" else ("ingest",)
    run_recipe(resolve(recipe("whole", *before)))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    n_paths, _ = run(recipe("whole", *before, stage), stop=lambda n: False)
    assert n_paths > 5
    rng, killed_at = random.Random(stage), []
    for k in range(N_KILLS):
        # not near the end, which may come before it is seen; and what is done is not made again
        at = rng.randrange(1, max(2, n_paths // (2 + k)))
        n, killed = run(recipe("killed", *before, stage), stop=lambda n, at=at: n >= at)
        if not killed:
            break
        killed_at.append(n)
    assert killed_at
    run_recipe(resolve(recipe("killed", *before, stage)))
    one, two = (folder_bytes(tmp_path / name / f"data.{stage}") for name in ("whole", "killed"))
    differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    assert differing <= {"artifact.json"}, f"killed after {killed_at} of {n_paths} paths"
