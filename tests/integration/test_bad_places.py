"""Full disks, read-only folders, impossible worlds and plugins, through the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, puna

RECIPE = """
name = "r"
[[data.ingest.sources]]
kind = "files"
name = "notes"
paths = ["notes/*.txt"]
[data.filter]
default = { profile = "none" }
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with a small corpus and its recipe."""
    (tmp_path / "notes").mkdir()
    for index in range(40):
        text = f"note {index}: " + os.urandom(20_000).hex()
        (tmp_path / f"notes/{index:02d}.txt").write_text(text)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def mounted(folder: Path, options: str) -> bool:
    """Mount a small memory file system; tell whether this machine allows it."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(
    shutil.which("mount") is None or os.geteuid() != 0, reason="needs root and mount"
)


@needs_mount
def test_a_full_disk_is_one_message_and_the_run_goes_on_after_the_fix(notes: Path) -> None:
    if not mounted(notes / "runs", "size=700k"):
        pytest.skip("this machine forbids mounting")
    try:
        done = puna(notes, "run", "r.toml")
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr
        assert "fix:" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (notes / "runs/r/data.ingest").exists()
        remount = ["mount", "-o", "remount,size=200m", str(notes / "runs")]
        subprocess.run(remount, check=True, capture_output=True)
        again = puna(notes, "run", "r.toml")
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", str(notes / "runs")], check=True, capture_output=True)


@needs_mount
def test_a_read_only_folder_is_one_message(notes: Path) -> None:
    if not mounted(notes / "runs", "size=1m,ro"):
        pytest.skip("this machine forbids mounting")
    try:
        done = puna(notes, "run", "r.toml")
    finally:
        subprocess.run(["umount", str(notes / "runs")], check=True, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert "read-only" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.pretrain.nproc=3"], ["global_batch", "nproc"]),
        (["train.pretrain.weights={code=-1.0}"], ["weights", "-1"]),
        (["train.pretrain.weights={kode=1.0}"], ["kode"]),
        (["train.pretrain.optim.lr=0"], ["train.pretrain.optim.lr", "got 0"]),
        (["train.pretrain.model.preset=lama3"], ["lama3", "llama3"]),
    ],
)
def test_impossible_training_is_refused_before_it_starts(
    small_demo_copy: Path, overrides: list[str], words: list[str]
) -> None:
    command = ("run", "recipes/demo.toml", *overrides, "--rebuild", "train.pretrain")
    done = puna(small_demo_copy, *command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    # Nothing that was finished is lost.
    assert puna(small_demo_copy, "run", "recipes/demo.toml").returncode == 0


def test_a_plugin_is_installed_and_used_by_its_name(notes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(ROOT / "examples/plugin")], check=True)
    (notes / "notes/loud.txt").write_text("THIS NOTE IS WRITTEN IN CAPITAL LETTERS " * 10)
    recipe = RECIPE.replace('profile = "none"', 'profile = "none", filters = ["shouting"]')
    (notes / "loud.toml").write_text(recipe)
    without = puna(notes, "run", "loud.toml")
    assert without.returncode == 2
    assert "shouting" in without.stderr
    environment = {**os.environ, "PYTHONPATH": str(site)}
    program = [sys.executable, "-m", "puna.cli.main"]
    for arguments in (["run", "loud.toml"], ["data", "why", "loud.txt", "--run", "runs/r"]):
        done = subprocess.run(
            [*program, *arguments],
            cwd=notes, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "shouting" in done.stdout
    assert "more capital letters" in done.stdout
