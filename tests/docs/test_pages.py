"""The code in the documentation runs as it stands, and the generated pages are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from puna.data.filters.base import FILTERS
from puna.data.reasons import REASONS
from tests.conftest import ROOT, SmallDemo
from tests.docs.markdown import blocks_of, run_page

HOWTOS = sorted((ROOT / "docs/howto").glob("*.md"))
SHOWN_ONLY = {
    "checkpoints",  # needs machines and stores to lose
    "deduplicate-by-meaning",  # needs the weights of an encoder
    "parallelism",  # needs many processes
    "train-at-scale",  # needs many machines
}


LONG = {
    "compose-and-export", "corruption", "decontamination", "deduplicate", "filter-like-datatrove",
    "optimise", "own-corpus", "quality", "run-on-spark", "safety", "train",
}  # fmt: skip
"""Pages that take the better part of a minute each; all of them are eight minutes of a core."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow, pytest.mark.exhaustive])
        if page.stem in LONG
        else page
        for page in HOWTOS
    ],
    ids=lambda page: page.stem,
)
def test_howto_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # What a page registers must not be there for other tests of this process.
    monkeypatch.setattr(FILTERS, "_entries", dict(FILTERS._entries))
    monkeypatch.setattr(REASONS, "_entries", dict(REASONS._entries))
    assert (run_page(page, tmp_path) > 0) == (page.stem not in SHOWN_ONLY)


@pytest.mark.xdist_group("small_demo")
def test_tutorial_runs(small_demo: SmallDemo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_demo.folder)
    assert run_page(ROOT / "docs/tutorial/demo.md", small_demo.folder) > 8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tutorial_on_mixtures_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "docs/tutorial/mixture.md", tmp_path) == 13


def test_generated_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/reference/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_targets_commands_and_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z][a-z-]*)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    from puna.cli.main import COMMANDS

    for block in blocks_of(ROOT / "README.md"):
        for command in re.findall(r"^(?:\$ )?puna ([a-z]+)", block.body, re.MULTILINE):
            assert command in COMMANDS, f"puna {command}"
