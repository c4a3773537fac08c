"""Fixtures of several test folders: the demo's recipe, made small, run once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two test processes share the cores
ROOT = Path(__file__).resolve().parents[1]

# Everything stays, the sizes shrink: the same twelve stages, two ranks and the fault.
SMALL = (
    "data.ingest.sources.0.max_bytes=1_500_000",
    "data.ingest.sources.1.max_bytes=800_000",
    "data.ingest.sources.2.max_bytes=1_200_000",
    "tokens.train.vocab_size=768",
    "train.pretrain.model.preset=tiny",
    "train.pretrain.seq_len=128",
    "train.pretrain.global_batch=4",
    "train.pretrain.steps=12",
    "train.pretrain.schedule.warmup=2",
    "train.pretrain.checkpoint.every=4",
    "train.pretrain.fault.step=6",
    "post.sft.seq_len=128",
    "post.sft.global_batch=4",
    "post.sft.steps=4",
    "eval.bpb.max_tokens_per_source=2000",
    "eval.samples.sampling.max_new_tokens=8",
    "eval.samples.chat_sampling.max_new_tokens=8",
)


@dataclass(frozen=True)
class SmallDemo:
    """A finished small run: its work folder (with ``recipes/demo.toml``) and what it printed."""

    folder: Path
    output: str

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder / "runs/demo"


def puna(folder: Path, *arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "puna.cli.main", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout_s,
        check=False,
    )


def write_small_recipe(folder: Path) -> Path:
    """Write the demo's recipe with small sizes to ``recipes/demo.toml`` of a folder."""
    from puna.cli.common import load_stages
    from puna.core.recipe import load_recipe

    load_stages()
    path = folder / "recipes/demo.toml"
    path.parent.mkdir(parents=True)
    path.write_text(load_recipe(ROOT / "recipes/demo.toml", SMALL).dump_toml(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> SmallDemo:
    """The whole main job at small sizes, through the command line.

    Tests that use it carry ``xdist_group("small_demo")`` so that one worker runs it once.
    """
    folder = tmp_path_factory.mktemp("demo")
    write_small_recipe(folder)
    done = puna(folder, "run", "recipes/demo.toml")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return SmallDemo(folder, done.stdout + done.stderr)


@pytest.fixture
def small_demo_copy(small_demo: SmallDemo, tmp_path: Path) -> Path:
    """A copy of the small run's work folder, for tests that change it."""
    shutil.copytree(small_demo.folder, tmp_path / "copy")
    return tmp_path / "copy"
