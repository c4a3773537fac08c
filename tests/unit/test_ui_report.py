"""The report: what it shows equals what the run recorded, and the page asks for nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from puna.core.artifact import Artifact
from puna.core.ledger import Ledger, read_events
from puna.core.stage import stages
from puna.data.chain import DATA_STAGES
from puna.model.accounting import account
from puna.model.config import ModelConfig
from puna.resilience.goodput import job_goodput
from puna.ui.report.collect import collect
from puna.ui.report.collect.data import UNEXPLAINED
from puna.ui.report.collect.record import stage_attempts
from puna.ui.report.collect.training import MOST_ROWS, sampled, training_section
from puna.ui.report.render import render
from puna.ui.report.stage import ReportConfig, make_report
from tests.unit.html_page import Page

_spec = importlib.util.spec_from_file_location("ui_run", Path(__file__).with_name("ui_run.py"))
assert _spec is not None
assert _spec.loader is not None
ui_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ui_run)

STEPS, FAULT_STEP, BACK_STEP = 240, 133, 120
SECTIONS = {
    "documents", "tokens", "model", "training", "goodput", "tuning", "evaluation", "samples",
    "time", "lineage", "recipe",
}  # fmt: skip
ALWAYS = {"time", "lineage", "recipe"}


def make(run: Any, *keys: str, **options: Any) -> tuple[dict[str, Any], str]:
    inputs = {key: run.artifacts[key] for key in keys} if keys else run.artifacts
    value = collect(inputs, run.ledger, title="", **{"max_reasons": 8, **options})
    return value, render(value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ui_run.full_run(tmp_path_factory.mktemp("runs") / "demo", STEPS, FAULT_STEP)


@pytest.fixture(scope="module")
def made(run: Any) -> tuple[dict[str, Any], str]:
    return make(run)


def test_page_loads_nothing(made: tuple[dict[str, Any], str]) -> None:
    page = Page(made[1])
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
        "use",
    }
    for _, attrs in page.tags:
        assert not {"src", "srcset", "action", "data", "poster", "background"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
    assert all(re.fullmatch(r"#[a-z]+", href) for href in page.attributes("href"))
    css = re.findall(r"<style>(.*?)</style>", made[1], re.DOTALL) + page.attributes("style")
    assert css
    assert not re.search(r"url\(|@import|https?:", " ".join(css))


def test_text_from_data_is_shown_and_not_interpreted(made: tuple[dict[str, Any], str]) -> None:
    value, html = made
    page = Page(html)
    assert ui_run.EVIL not in html
    # once in a sample, once for each stage of the recipe that has it in its configuration
    assert "".join(page.text).count("<script>alert('x')</script>") >= 1 + 4
    assert "<b>intelligently</b>" in "".join(page.text)
    evil = json.loads(json.dumps(value).replace("rank 1 was killed", "<svg onload=x>&'\\\" killed"))
    evil["data"]["steps"][0]["reasons"][0]["reason"] = "</svg><script>"
    hostile = Page(render(evil))
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in page.tags}
    assert not [name for _, attrs in hostile.tags for name in attrs if name == "onload"]


def test_every_section_and_picture_is_complete(made: tuple[dict[str, Any], str]) -> None:
    page = Page(made[1])
    assert page.sections() == SECTIONS
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for href in page.attributes("href"):
        assert href[1:] in ids
    for labels in page.attributes("aria-labelledby"):
        assert set(labels.split()) <= set(ids)
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    # funnel (documents, bytes), parts, curves, goodput, attempts, tuning, bits per byte, timeline,
    # lineage; each for three widths
    assert len(drawings) == 10 * 3
    assert all(attrs["role"] == "img" and attrs["aria-labelledby"] for attrs in drawings)
    n_tables = sum(tag == "table" for tag, _ in page.tags)
    assert n_tables == sum(tag == "caption" for tag, _ in page.tags) >= 10
    assert not re.search(r"\b(nan|inf|None|undefined)\b", " ".join(page.text))
    for tag, attrs in page.tags:
        assert "nan" not in " ".join(v or "" for v in attrs.values()).split(), tag


def test_funnel_equals_the_flows(run: Any, made: tuple[dict[str, Any], str]) -> None:
    steps = made[0]["data"]["steps"]
    assert [step["stage"] for step in steps] == list(ui_run.DATA_STAGES)
    for step, key in zip(steps, ("ingest", "filter", "dedup", "split"), strict=True):
        flow = run.artifacts[key].metrics["flow"]
        for name in ("in_docs", "in_bytes", "kept_docs", "kept_bytes"):
            assert step[name] == sum(row[name] for row in flow.values())
        for source, row in flow.items():
            rejected = sum(one["docs"] for one in row["rejected"].values())
            assert step["by_source"][source]["rejected_docs"] == rejected
        named = sum(reason["docs"] for reason in step["reasons"])
        assert named + step["other_reasons_docs"] == step["in_docs"] - step["kept_docs"]
        shares = [reason["share"] for reason in step["reasons"]]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == step["reasons"][0]["docs"] / step["in_docs"]
    filtered = steps[1]
    assert len(filtered["reasons"]) == 8
    assert filtered["n_reasons"] == len(ui_run.REASONS[1])
    tiles = {tile["key"]: tile for tile in made[0]["headline"]}
    assert tiles["documents"]["before"] == f"{steps[0]['in_docs']:,}"
    assert tiles["documents"]["value"] == f"{steps[-1]['kept_docs']:,}"


def test_documents_without_a_reason_are_not_hidden(tmp_path: Path) -> None:
    run = ui_run.FakeRun(tmp_path / "lost")
    flow = {"web": {"in_docs": 10, "in_bytes": 100, "kept_docs": 4, "kept_bytes": 40,
                    "rejected": {"too_short": {"docs": 5, "bytes": 50}}}}  # fmt: skip
    run.begin("data.filter")
    run.end("filter", "data.filter", {}, {"flow": flow})
    value, html = make(run)
    reasons = {one["reason"]: one["docs"] for one in value["data"]["steps"][0]["reasons"]}
    assert reasons == {"too_short": 5, UNEXPLAINED: 1}
    assert UNEXPLAINED in "".join(Page(html).text)


def test_curve_marks_the_fault_and_what_was_done_again(
    run: Any, made: tuple[dict[str, Any], str]
) -> None:
    training = made[0]["training"]
    assert [row[0] for row in training["curve"]] == list(range(STEPS))
    attempts = {row[0]: row[-1] for row in training["curve"]}
    assert attempts[BACK_STEP - 1] == 0
    assert attempts[BACK_STEP] == 1  # the later attempt counts
    (replaced,) = training["replaced"]
    assert [row[0] for row in replaced] == list(range(BACK_STEP, FAULT_STEP))
    assert {row[-1] for row in replaced} == {0}
    (incident,) = training["incidents"]
    assert (incident["step"], incident["rank"], incident["on_purpose"]) == (FAULT_STEP, 1, True)
    assert (incident["detect_s"], incident["steps_lost"]) == (0.07, FAULT_STEP - BACK_STEP)
    events = [e for e in read_events(run.ledger) if e.get("stage") == "train.pretrain"]
    last = [e["loss"] for e in events if e["kind"] == "train.step" and e["attempt"] == 1]
    n = training["final_loss"]["n_steps"]
    assert n == round(STEPS * 0.05)
    assert training["final_loss"]["mean"] == pytest.approx(sum(last[-n:]) / n)
    goodput = job_goodput([e for e in events if e.get("job")])
    assert training["goodput"] == goodput.to_json()
    assert sum(training["goodput"]["buckets"].values()) == pytest.approx(goodput.wall_s)
    classes = Page(made[1]).attributes("class")
    assert classes.count("fault") == classes.count("band") == 3  # once per width
    assert classes.count("mark checkpoint") > 0
    spans = [span for attempt in training["attempts"] for span in attempt["spans"]]
    seconds: dict[str, float] = {}
    for phase, start_s, end_s in spans:
        seconds[phase] = seconds.get(phase, 0.0) + end_s - start_s
    for bucket in ("productive", "recomputed", "detection", "checkpoint"):
        assert seconds[bucket] == pytest.approx(goodput.buckets[bucket], abs=1e-3)


def test_run_without_a_fault_has_no_marks(tmp_path: Path) -> None:
    value, html = make(ui_run.full_run(tmp_path / "calm", steps=20, fault_step=None))
    assert value["training"]["incidents"] == []
    assert value["training"]["goodput"]["n_recomputed"] == 0
    classes = Page(html).attributes("class")
    assert "fault" not in classes
    assert "band" not in classes
    assert "None: the job ran through in one attempt." in html


def test_model_tokens_and_mix_are_the_true_ones(run: Any, made: tuple[dict[str, Any], str]) -> None:
    value = made[0]
    shape = account(ModelConfig(preset="demo").resolve(4096))
    assert value["model"]["n_params"] == shape.n_params == 1_311_872
    assert sum(part["params"] for part in value["model"]["parts"].values()) == shape.n_params
    assert value["model"]["n_bytes"] == 4 * shape.n_params
    mix = {row["source"]: row for row in value["tokens"]["mix"]}
    assert {source: row["wanted"] for source, row in mix.items()} == {
        "code": 0.5, "docs": 0.2, "reference": 0.3,
    }  # fmt: skip
    assert sum(row["read_tokens"] for row in mix.values()) == STEPS * 16 * 256
    for row in mix.values():
        assert row["read"] == pytest.approx(row["wanted"], abs=1 / (STEPS * 16))
        assert row["epochs"] == pytest.approx(row["read_tokens"] / row["n_tokens"], rel=0.02)
    index = json.loads(run.artifacts["tokens"].file("index.json").read_text())
    total = sum(one["n_tokens"] for split in index["splits"].values() for one in split.values())
    assert value["tokens"]["n_tokens"] == total


def test_evaluation_and_samples_are_passed_on(run: Any, made: tuple[dict[str, Any], str]) -> None:
    value, html = made
    assert value["evaluation"]["rows"] == run.artifacts["bpb"].metrics["rows"]
    text = " ".join("".join(Page(html).text).split())
    for bits in ui_run.BITS.values():
        change = f"{100 * (bits[0] - bits[1]) / bits[0]:.1f}"
        assert f"{bits[0]:.4f} {bits[1]:.4f} −{change} %" in text
    assert len(value["samples"]) == len(ui_run.SAMPLES)
    assert "Join two or more path components." in text
    _, fewer = make(run, "samples")
    assert fewer.count('<article class="card">') == 3
    assert render(collect({"samples": run.artifacts["samples"]}, None, title="x", max_reasons=1),
                  max_samples=1).count('<article class="card">') == 1  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "sections"),
    [
        ((), set()),
        (("ingest", "filter"), {"documents"}),
        (("tokens",), {"tokens"}),
        (("tokenizer",), set()),
        (("pretrain",), {"model", "training", "goodput"}),
        (("pairs",), {"tuning"}),
        (("sft",), {"tuning"}),
        (("bpb", "samples"), {"evaluation", "samples"}),
        (("split", "tokens", "pretrain"), {"documents", "tokens", "model", "training", "goodput"}),
    ],
)
def test_partial_run_gives_what_there_is(
    run: Any, keys: tuple[str, ...], sections: set[str]
) -> None:
    inputs = {key: run.artifacts[key] for key in keys}
    html = render(collect(inputs, run.ledger, title="", max_reasons=8))
    page = Page(html)
    assert page.sections() == sections | ALWAYS
    links = {href[1:] for href in page.attributes("href")}
    assert links == sections | ALWAYS


def test_stage_writes_both_files_the_same_each_time(run: Any, tmp_path: Path) -> None:
    needs = {key.rstrip("?") for key in stages()["report"].needs}
    assert set(run.artifacts) <= needs
    assert {name.rpartition(".")[2] for name in DATA_STAGES} <= needs
    pages = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        metrics = make_report(ReportConfig(title="<Title>"), run.artifacts, out, Ledger(run.ledger))
        pages.append((out / "report.html").read_bytes())
        assert metrics["n_bytes"] == len(pages[-1])
        assert metrics["headline"].startswith("11 stages on one page of ")
        value = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert value["run"]["name"] == "demo"
        assert "<h1>&lt;Title&gt;</h1>" in pages[-1].decode()
    assert pages[0] == pages[1]


def test_lineage_follows_fingerprints(run: Any, made: tuple[dict[str, Any], str]) -> None:
    nodes = {node["stage"]: node for node in made[0]["lineage"]}
    assert set(nodes) == {artifact.stage for artifact in run.artifacts.values()}
    for one in nodes["post.sft"]["inputs"]:
        assert nodes[one["stage"]]["fingerprint"] == one["fingerprint"]
        assert one["in_report"]
    text = "".join(Page(made[1]).text)
    for artifact in run.artifacts.values():
        assert artifact.fingerprint[:16] in text
    value, html = make(run, "sft")
    assert {one["in_report"] for one in value["lineage"][0]["inputs"]} == {False}
    assert "pairs (elsewhere)" in html


def _event(kind: str, t: float, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "t_wall_s": t, "t_mono_s": t, "stage": "train.pretrain", **fields}


def _step(t: float, step: int, job: str, **fields: Any) -> dict[str, Any]:
    values = {"attempt": 0, "n_steps": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 8}
    values |= {"tokens_per_s": 8.0, "mfu": 0.5}
    return _event("train.step", t, job=job, step=step, **{**values, **fields})


def test_a_stage_made_anew_shows_only_its_last_job(run: Any) -> None:
    events = [
        _event("stage.start", 0, resumed=False),
        _event("job.start", 1, job="old", resumed=False),
        _step(2, 0, "old"),
        _event("stage.start", 100, resumed=False),
        _event("job.start", 101, job="new", resumed=False),
        _event("attempt.start", 102, job="new", attempt=0),
        _step(103, 0, "new", loss="nan"),
        _step(104, 1, "new", loss=0.5),
    ]
    found = training_section(run.artifacts["pretrain"], {"train.pretrain": events})
    assert found is not None
    assert found["goodput"]["wall_s"] == 3
    assert [row[1] for row in found["curve"]] == [None, 0.5]  # the ledger writes NaN as a word
    assert found["final_loss"] == {"mean": 0.5, "n_steps": 1}


def test_a_stopped_run_and_bad_checkpoints_are_incidents(run: Any) -> None:
    events = [
        _event("stage.start", 0, resumed=False),
        _event("job.start", 1, job="j", resumed=False),
        _event("attempt.start", 2, job="j", attempt=0),
        _step(10, 0, "j"),
        _event("train.checkpoint_failed", 11, job="j", step=1, error="the disk is full"),
        _step(12, 1, "j"),  # then everything is killed, and started again a day later
        _event("stage.start", 90_000, resumed=True),
        _event("job.start", 90_001, job="j", resumed=True),
        _event("attempt.start", 90_002, job="j", attempt=1),
        _event("train.checkpoint_damaged", 90_003, job="j", step=1, why="size 3, expected 9"),
        _event("train.restore", 90_004, job="j", attempt=1, step=0),
        _step(90_010, 0, "j", attempt=1),
        _step(90_012, 1, "j", attempt=1),
    ]
    found = training_section(run.artifacts["pretrain"], {"train.pretrain": events})
    assert found is not None
    assert [(one["message"], one["is_fault"]) for one in found["incidents"]] == [
        ("the checkpoint of step 1 was not saved: the disk is full", False),
        ("the whole run was stopped and started again", False),
        ("the checkpoint of step 1 was damaged: size 3, expected 9", False),
    ]
    assert found["goodput"]["buckets"]["stopped"] == 90_001 - 12
    # the picture of the attempts leaves the day out
    assert found["attempts"][-1]["end_s"] == (12 - 1) + (90_012 - 90_001)
    assert [row[0] for row in found["replaced"][0]] == [0, 1]


def test_long_runs_are_thinned_to_their_end() -> None:
    rows = [[step] for step in range(5 * MOST_ROWS + 3)]
    kept = sampled(rows)
    assert MOST_ROWS <= len(kept) <= 1.3 * MOST_ROWS
    assert kept[-1] == rows[-1]
    assert sampled(rows[:10]) == rows[:10]


def test_attempts_of_a_stage_that_was_killed() -> None:
    events = [
        _event("stage.start", 0, resumed=False),
        _event("stage.failed", 4),
        _event("stage.start", 10, resumed=False),
        _event("train.step", 30),  # killed after this
        _event("stage.start", 1000, resumed=True),
        _event("stage.done", 1050),
    ]
    assert stage_attempts(events) == [
        {"started_at": 10, "ended_at": 30, "status": "killed"},
        {"started_at": 1000, "ended_at": 1050, "status": "done"},
    ]


def test_access_to_stores_is_not_shown(tmp_path: Path) -> None:
    run = ui_run.FakeRun(tmp_path / "stores")
    run.begin("data.ingest")
    sources = [{"name": "web", "storage_options": {"key": "VERY-SECRET"}}]
    run.end("ingest", "data.ingest", {"sources": sources}, {})
    value, html = make(run)
    assert "VERY-SECRET" not in html + json.dumps(value)
    assert 'key = "(not shown)"' in value["run"]["recipe_toml"]


def test_input_from_another_run_brings_its_own_ledger(run: Any, tmp_path: Path) -> None:
    here = tmp_path / "here" / "events.jsonl"
    pretrain: Artifact = run.artifacts["pretrain"]
    value = collect({"pretrain": pretrain}, here, title="", max_reasons=8)
    assert value["run"]["name"] == "here"
    assert value["training"]["n_steps"] == STEPS


def test_stage_module_is_light() -> None:
    code = (
        "import sys, puna.ui.report.stage; "
        "print(sorted({'torch', 'jinja2', 'matplotlib', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
