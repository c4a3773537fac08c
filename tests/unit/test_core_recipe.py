"""Recipes: precedence, origins, messages, tag resets, round trips."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from puna.core import stage as stage_module
from puna.core.artifact import Artifact
from puna.core.config import Config, Execution, Seed, Workers, identity
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import load_recipe, resolve
from puna.core.stage import stage


class AdamW(Config):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)


class Muon(Config):
    kind: Literal["muon"] = "muon"
    lr: float = Field(default=0.02, gt=0)


class Item(Config):
    path: str
    weight: float = Field(default=1.0, ge=0)


class FitConfig(Config):
    steps: int = Field(default=10, ge=1)
    """Steps."""
    seed: Seed = 0
    """Seed."""
    workers: Workers = 0
    """Workers."""
    device: Execution[str] = "cpu"
    """Device."""
    optim: Annotated[AdamW | Muon, Field(discriminator="kind")] = AdamW()
    """Optimiser."""
    items: tuple[Item, ...] = ()
    """Items."""
    parts: tuple[Item, ...] = Field(default=(Item(path="a"),), min_length=1)
    """Parts."""


@pytest.fixture(autouse=True)
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "_STAGES", {})

    @stage("lab.fit")
    def fit(cfg: FitConfig, inputs: dict[str, Artifact], out: Path, events: Ledger) -> dict:
        """Fit."""
        return {}


def fit_of(raw: dict, *overrides: str) -> FitConfig:
    return resolve({"name": "t", **raw}, overrides).stage_configs()["lab.fit"][1]


def test_precedence_is_default_then_recipe_then_override() -> None:
    recipe = resolve({"name": "t", "lab": {"fit": {"steps": 20}}}, ["lab.fit.optim.lr=0.5"])
    config = recipe.stage_configs()["lab.fit"][1]
    assert (config.steps, config.optim.lr, config.device) == (20, 0.5, "cpu")
    assert recipe.origins["lab.fit.steps"] == "recipe"
    assert recipe.origins["lab.fit.device"] == "default"


def test_a_union_without_kind_means_the_default_kind() -> None:
    raw = {"lab": {"fit": {"optim": {"lr": 0.1}}}}
    assert fit_of(raw).optim == AdamW(lr=0.1)
    assert fit_of(raw, "lab.fit.optim.kind=adamw").optim == AdamW(lr=0.1)
    assert fit_of(raw, "lab.fit.optim.kind=muon").optim == Muon(lr=0.02)


def test_seed_and_workers_are_inherited_and_say_so() -> None:
    recipe = resolve({"name": "t", "seed": 7, "lab": {"fit": {}}}, ["workers=3"])
    config = recipe.stage_configs()["lab.fit"][1]
    assert (config.seed, config.workers) == (7, 3)
    assert recipe.origins["lab.fit.seed"] == "recipe (seed)"
    assert recipe.origins["lab.fit.workers"] == "override (workers)"


def test_own_seed_wins() -> None:
    assert fit_of({"seed": 7, "lab": {"fit": {"seed": 1}}}).seed == 1


def test_absent_section_is_no_stage() -> None:
    assert resolve({"name": "t"}).stage_configs() == {}


def test_changing_the_kind_drops_the_other_kinds_values() -> None:
    raw = {"lab": {"fit": {"optim": {"kind": "adamw", "lr": 1e-4}}}}
    assert fit_of(raw, "lab.fit.optim.kind=muon").optim == Muon(lr=0.02)
    both = fit_of(raw, "lab.fit.optim.lr=0.3", "lab.fit.optim.kind=muon")
    assert both.optim == Muon(lr=0.3)


@pytest.mark.parametrize(
    ("raw", "overrides", "words"),
    [
        ({"lab": {"fit": {"stepz": 1}}}, [], ["lab.fit.stepz", "did you mean 'steps'"]),
        ({"lab": {"fitt": {}}}, [], ["lab.fitt", "did you mean 'fit'"]),
        ({"labb": {}}, [], ["labb", "did you mean 'lab'"]),
        ({"lab": {"fit": {"steps": 0}}}, [], ["lab.fit.steps", "got 0"]),
        ({"lab": {"fit": {"steps": "abc"}}}, [], ["lab.fit.steps", "got 'abc'"]),
        ({"lab": {"fit": {}}}, ["lab.fit.steps=x"], ["override", "lab.fit.steps", "got 'x'"]),
        ({"lab": {"fit": {"optim": {"kind": "sgd"}}}}, [], ["lab.fit.optim", "adamw", "muon"]),
        (
            {"lab": {"fit": {"optim": {"kind": "adamw", "lrr": 1}}}},
            [],
            ["lab.fit.optim.lrr", "did you mean 'lr'"],
        ),
        ({"lab": {"fit": {"items": [{"weight": -1}]}}}, [], ["lab.fit.items.0.path", "required"]),
        ({"lab": {"fit": {"items": [{"pth": "a"}]}}}, [], ["items.0.pth", "did you mean 'path'"]),
        ({"lab": {"fit": {}}, "inputs": {"lab.fit.x": "y"}}, [], ["lab.fit.x", "no input"]),
        ({"lab": {"fit": {}}}, ["lab.fit.steps"], ["key=value"]),
        ({"lab": {"fit": {"items": []}}}, ["lab.fit.items.3.path=a"], ["'3'", "list of 0"]),
        ({"lab": {"fit": {"items": [3]}}}, ["lab.fit.items.0.path=a"], ["items.0 is 3, not a t"]),
        ({"name": "a/b"}, [], ["name", "a/b"]),
    ],
)
def test_wrong_values_name_path_value_and_nearest_key(
    raw: dict, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(PunaError) as caught:
        resolve({"name": "t", **raw}, overrides)
    for word in words:
        assert word in str(caught.value)


def test_the_origin_of_a_wrong_value_inside_an_override_is_named() -> None:
    with pytest.raises(PunaError, match=r"^override: lab\.fit\.items\.0\.path"):
        resolve({"name": "t", "lab": {"fit": {}}}, ["lab.fit.items=[{path=3}]"])


def test_a_list_is_not_called_too_short_because_its_items_are_wrong() -> None:
    raw = {"name": "t", "lab": {"fit": {"parts": [{"path": 3}]}}}
    with pytest.raises(PunaError, match=r"parts\.0\.path") as caught:
        resolve(raw)
    assert len(caught.value.message.splitlines()) == 1
    with pytest.raises(PunaError, match="at least 1 item"):
        resolve({"name": "t", "lab": {"fit": {"parts": []}}})


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(PunaError, match="is a folder"):
        load_recipe(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "x"\nseed = = 3\n')
    with pytest.raises(PunaError, match="line 2"):
        load_recipe(broken)
    broken.write_bytes(b'name = "\xff"\n')
    with pytest.raises(PunaError, match="not UTF-8"):
        load_recipe(broken)


def test_identity_leaves_execution_fields_out() -> None:
    assert identity(FitConfig(device="cuda", workers=9)) == identity(FitConfig())
    assert identity(FitConfig(steps=11)) != identity(FitConfig())


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-9, 10, exclude_min=True),
    muon=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    items=st.lists(
        st.builds(
            Item, path=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
        ),
        max_size=3,
    ),
)
def test_a_dump_is_complete_and_reloads_to_an_equal_object(
    steps: int, lr: float, muon: bool, seed: int, items: list[Item]
) -> None:
    optim = {"kind": "muon" if muon else "adamw", "lr": lr}
    raw_items = [item.model_dump() for item in items]
    raw = {
        "name": "t",
        "seed": seed,
        "lab": {"fit": {"steps": steps, "optim": optim, "items": raw_items}},
    }
    first = resolve(raw)
    again = resolve(tomllib.loads(first.dump_toml()))
    assert again.config == first.config
    assert set(again.origins) == set(first.origins)
