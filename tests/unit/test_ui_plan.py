"""The page of the planner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.cli.plan_estimate import shown_name
from puna.plan.energy import Bill
from puna.plan.job import Layout
from puna.plan.search import Candidate
from puna.ui.plan_page import worth_drawing
from tests.unit.html_page import Page

COMMON = ["--model", "llama3.1-405b", "--gpus", "1024", "--batch", "512"]


def _page(path: Path, *words: str) -> Page:
    done = CliRunner().invoke(cli, ["plan", *words, "--html", str(path)], catch_exceptions=False)
    assert f"page: {path}" in done.output
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|<script|https?://(?!www\.w3\.org)", text)
    return Page(text)


def test_a_search_is_one_page_without_a_request(tmp_path: Path) -> None:
    page = _page(
        tmp_path / "search.html", "search", *COMMON, "--also-gpus", "2048", "--tokens", "15T",
        "--fabric", "roce:400g:oversub=4",
    )  # fmt: skip
    assert page.sections() == {
        "waterfall", "time", "memory", "layouts", "front", "upgrades", "assumptions",
    }  # fmt: skip
    text = " ".join(" ".join(page.text).split())
    assert "llama3.1-405b on 1,024 h100" in text
    assert "no oversubscription" in text
    assert "2.5 USD per GPU-hour" in text
    assert "80% to 95% (a prior, not measured" in text
    names = page.attributes("id")
    assert len(names) == len(set(names))
    assert {f"money-{size}" for size in "lms"} <= {name.rpartition("-title")[0] for name in names}


def test_a_search_of_one_number_of_gpus_has_no_picture_of_money(tmp_path: Path) -> None:
    page = _page(tmp_path / "search.html", "search", *COMMON, "--tokens", "15T")
    names = [name for name in page.attributes("id") if name.startswith(("money-", "room-"))]
    assert names
    assert all(name.startswith("room-") for name in names)


def test_an_estimate_s_page_has_its_intervals(tmp_path: Path) -> None:
    page = _page(tmp_path / "one.html", "estimate", *COMMON, "--tp", "8", "--pp", "16")
    assert page.sections() == {"waterfall", "time", "memory", "assumptions"}
    text = " ".join(" ".join(page.text).split())
    assert "DOES NOT FIT" in text
    assert text.count("90 %") >= 4
    assert "stage 15" in text


def _candidate(n_gpus: int, days: float) -> Candidate:
    bill = Bill(gpu_hours=24 * days * n_gpus, usd=1.0, kwh=1.0, tonnes_co2e=1.0)
    return Candidate(n_gpus, Layout(), 1.0, 1.0, 10.0, 70.0, days, bill, "")


def test_layouts_that_take_far_longer_are_not_drawn() -> None:
    front = [_candidate(8, 10), _candidate(8, 19), _candidate(8, 21), _candidate(64, 3)]
    assert [one.days for one in worth_drawing(front)] == [10, 19, 3]


@pytest.mark.parametrize(
    ("name", "shown"), [("llama3.1-405b", "llama3.1-405b"), ("models/mine/config.json", "mine")]
)
def test_a_model_s_name_keeps_its_dots(name: str, shown: str) -> None:
    assert shown_name(name) == shown
