"""The main job at small sizes: what it leaves, a rerun, kills, and the tools that read it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.core.artifact import Artifact
from puna.core.ledger import read_events
from tests.conftest import SmallDemo, puna, write_small_recipe

pytestmark = pytest.mark.xdist_group("small_demo")

STAGES = (
    "data.ingest", "data.filter", "data.dedup", "data.split", "tokens.train", "tokens.encode",
    "train.pretrain", "post.pairs", "post.sft", "eval.bpb", "eval.samples", "report",
)  # fmt: skip


def test_every_stage_is_finished_and_says_what_it_measured(small_demo: SmallDemo) -> None:
    for name in STAGES:
        artifact = Artifact(small_demo.run_dir / name)
        assert artifact.damaged_files(content=True) == []
        assert artifact.metrics["seconds"] >= 0
        assert name in small_demo.output
    assert "report.html" in small_demo.output
    assert small_demo.output.count("completion, pretrained model") == 3
    assert not list(small_demo.run_dir.glob("*.partial"))


def test_the_fault_was_injected_found_and_survived(small_demo: SmallDemo) -> None:
    ledger = small_demo.run_dir / "events.jsonl"
    kinds = [event["kind"] for event in read_events(ledger)]
    for kind in ("fault.injected", "fault.detected", "recovery.start", "recovery.done"):
        assert kinds.count(kind) == 1
    (detected,) = read_events(ledger, "fault.detected")
    assert detected["rank"] == 1
    report = (small_demo.run_dir / "report/report.html").read_text(encoding="utf-8")
    assert "killed" in report
    assert "Goodput" in report or "goodput" in report


def test_documents_are_conserved_from_stage_to_stage(small_demo: SmallDemo) -> None:
    flows = [Artifact(small_demo.run_dir / name).metrics["flow"] for name in STAGES[:4]]
    for flow in flows:
        for row in flow.values():
            rejected = sum(entry["docs"] for entry in row["rejected"].values())
            assert row["in_docs"] == row["kept_docs"] + rejected
    for earlier, later in itertools.pairwise(flows):
        assert {s: r["kept_docs"] for s, r in earlier.items()} == {
            source: row["in_docs"] for source, row in later.items()
        }
    tokens = Artifact(small_demo.run_dir / "tokens.encode").metrics
    assert tokens["docs"] == sum(row["kept_docs"] for row in flows[-1].values())


def test_a_rerun_is_a_no_op_and_says_so(small_demo: SmallDemo) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_demo.run_dir.rglob("*.json")}
    done = puna(small_demo.folder, "run", "recipes/demo.toml", "workers=1")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    after = {path: path.stat().st_mtime_ns for path in small_demo.run_dir.rglob("*.json")}
    assert after == before


def test_lineage_why_and_generate_read_the_run(small_demo: SmallDemo) -> None:
    rows = puna(small_demo.folder, "lineage", "runs/demo", "--step", "3", "--json").stdout
    segment = json.loads(rows.splitlines()[0])["segments"][0]
    why = puna(small_demo.folder, "data", "why", segment["document_id"], "--run", "runs/demo")
    assert "kept" in why.stdout
    assert segment["path"] in why.stdout
    arguments = ("generate", "runs/demo", "import os", "--max-new-tokens", "5", "--seed", "3")
    first, second = (puna(small_demo.folder, *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert puna(small_demo.folder, "data", "why", "nowhere", "--run", "runs/demo").returncode == 2


def test_a_change_is_refused_with_its_name(small_demo: SmallDemo) -> None:
    done = puna(small_demo.folder, "run", "recipes/demo.toml", "data.dedup.near=0.9")
    assert done.returncode == 2
    assert "data.dedup.near 0.8 -> 0.9" in done.stderr
    assert "Traceback" not in done.stderr


def _weights(folder: Path) -> dict[str, str]:
    return {
        name: entry["xxh3_128"]
        for name in ("train.pretrain", "post.sft")
        for entry in Artifact(folder / "runs/demo" / name).record["files"]
        if entry["path"] == "model/model.safetensors"
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_any_moment_it_ends_with_the_same_model(
    small_demo: SmallDemo, tmp_path: Path
) -> None:
    """Kill the whole program with SIGKILL again and again, at moments spread over the run."""
    write_small_recipe(tmp_path)
    kills = 0
    for attempt in range(30):
        process = subprocess.Popen(
            [sys.executable, "-m", "puna.cli.main", "run", "recipes/demo.toml"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # Later rounds leave more time: a busy machine takes that long to start a training.
            left_s = 4.0 + 2.3 * (attempt % 5) + 3.0 * (attempt // 5)
            _, errors = process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    else:
        pytest.fail("the run did not end")
    assert kills >= 3
    assert _weights(tmp_path) == _weights(small_demo.folder)
    time.sleep(0.5)
    listing = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True)
    orphans = [line for line in listing.stdout.splitlines() if str(tmp_path) in line]
    assert orphans == []


def test_the_generated_text_is_what_the_report_shows(small_demo: SmallDemo) -> None:
    report = (small_demo.run_dir / "report/report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"']https?://", report)
    assert "<script src" not in report
