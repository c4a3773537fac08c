"""Complete dumps of every shipped recipe: a review shows what a change of a default changes.

After a meant change: ``python tests/golden/test_golden.py`` writes the dumps anew.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from puna.cli.common import load_stages
from puna.core.recipe import load_recipe, resolve

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def golden_path(recipe: Path) -> Path:
    return Path(__file__).parent / recipe.name


@pytest.fixture(autouse=True, scope="module")
def _stages() -> None:
    load_stages()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dump_is_the_golden_one(recipe: Path) -> None:
    assert load_recipe(recipe).dump_toml() == golden_path(recipe).read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dump_reloads_to_an_equal_recipe(recipe: Path) -> None:
    first = load_recipe(recipe)
    assert resolve(tomllib.loads(first.dump_toml())).config == first.config


if __name__ == "__main__":
    load_stages()
    for path in RECIPES:
        golden_path(path).write_text(load_recipe(path).dump_toml(), encoding="utf-8")
