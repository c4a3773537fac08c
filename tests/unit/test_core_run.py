"""The runner: skip, resume, refuse, rebuild, locks, failures."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import Field

from puna.cli.common import load_stages
from puna.core import run as run_module
from puna.core import stage as stage_module
from puna.core.artifact import Artifact, code_version
from puna.core.config import Config, Execution
from puna.core.errors import PunaError
from puna.core.ledger import Ledger, read_events
from puna.core.plan import plan_steps
from puna.core.recipe import Recipe, resolve
from puna.core.run import run_lock, run_recipe
from puna.core.stage import stage


class MakeConfig(Config):
    n: int = Field(default=3, ge=0)
    """Lines."""
    label: Execution[str] = ""
    """Label."""


class SumConfig(Config):
    factor: int = 1
    """Factor."""


class Calls(list[str]):
    """Names of the stages that really ran, and a switch that makes one fail."""

    fail: BaseException | None = None
    state: object = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(stage_module, "_STAGES", {})
    calls = Calls()

    @stage("lab.sum", needs={"lines": "lab.make", "extra?": "lab.extra"}, resumable=True)
    def total(cfg: SumConfig, inputs: dict[str, Artifact], out: Path, events: Ledger) -> dict:
        """Sum the lines."""
        calls.append("lab.sum" + ("+" if (out / "half").exists() else ""))
        (out / "half").write_text("x")
        if calls.fail is not None:
            raise calls.fail
        numbers = inputs["lines"].file("lines.txt").read_text().split()
        (out / "sum.txt").write_text(str(cfg.factor * sum(map(int, numbers))))
        return {"inputs": sorted(inputs)}

    @stage("lab.make", external_state=lambda cfg: calls.state)
    def make(cfg: MakeConfig, inputs: dict[str, Artifact], out: Path, events: Ledger) -> dict:
        """Make lines."""
        calls.append("lab.make")
        (out / "lines.txt").write_text("\n".join(map(str, range(cfg.n))))
        return {"n": cfg.n}

    return calls


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    raw = {"name": "r", "runs_dir": str(folder), "lab": {"make": {}, "sum": {}}}
    return resolve(raw, overrides)


def test_order_follows_the_inputs_and_a_rerun_is_a_no_op(calls: Calls, tmp_path: Path) -> None:
    first = run_recipe(recipe_in(tmp_path))
    assert calls == ["lab.make", "lab.sum"] == first.done
    assert (tmp_path / "r/lab.sum/sum.txt").read_text() == "3"
    again = run_recipe(recipe_in(tmp_path, "lab.make.label=other"))
    assert again.skipped == ["lab.make", "lab.sum"]
    assert len(calls) == 2


def test_an_input_is_the_first_of_several_stages_that_the_recipe_has(
    calls: Calls, tmp_path: Path
) -> None:
    @stage("lab.late", needs={"sum": "lab.missing|lab.sum|lab.make"})
    def late(cfg: SumConfig, inputs: dict[str, Artifact], out: Path, events: Ledger) -> dict:
        """Look."""
        return {"stage": inputs["sum"].path.name}

    def source(*names: str) -> object:
        raw = {"name": "r", "runs_dir": str(tmp_path), "lab": {name: {} for name in names}}
        return plan_steps(resolve(raw))["lab.late"].sources["sum"]

    assert source("make", "sum", "late") == "lab.sum"
    assert source("make", "late") == "lab.make"
    with pytest.raises(PunaError, match=r"needs 'sum' from lab\.missing, which is not in"):
        source("late")


def test_of_several_stages_none_is_chosen_that_reads_from_the_stage_itself(tmp_path: Path) -> None:
    load_stages()

    def sources(*names: str, **top: object) -> dict[str, dict[str, object]]:
        raw: dict = {"name": "r", **top}
        for name in ("data.ingest", "data.split", "tokens.train", "tokens.encode", *names):
            part, _, key = name.partition(".")
            raw.setdefault(part, {})[key] = {}
        raw["data"]["ingest"] = {"sources": [{"kind": "files", "name": "a", "paths": ["."]}]}
        steps = plan_steps(resolve(raw))
        assert list(steps)[:2] == ["data.ingest", "data.split"]
        return {name: dict(step.sources) for name, step in steps.items()}

    plain = sources("post.pairs")
    assert {plain[name]["documents"] for name in ("tokens.train", "tokens.encode", "post.pairs")} \
        == {"data.split"}  # fmt: skip
    composed = sources("data.compose", "post.pairs")
    for name in ("tokens.train", "tokens.encode", "post.pairs"):
        assert composed[name]["documents"] == "data.compose"
    exact = sources("data.compose", "tokens.count", "post.pairs")
    assert exact["tokens.train"]["documents"] == exact["tokens.count"]["documents"] == "data.split"
    assert exact["data.compose"]["documents"] == "tokens.count"
    assert exact["tokens.encode"]["documents"] == exact["post.pairs"]["documents"] == "data.compose"
    inputs = {"data.compose.documents": "data.split"}
    wired = sources("data.compose", "tokens.count", inputs=inputs)
    assert wired["tokens.train"]["documents"] == "data.compose"
    inputs = {"tokens.train.documents": "data.compose"}
    turned = sources("data.compose", "tokens.count", inputs=inputs)
    assert turned["data.compose"]["documents"] == "data.split"
    inputs["data.compose.documents"] = "tokens.count"
    with pytest.raises(PunaError, match="circle"):
        sources("data.compose", "tokens.count", inputs=inputs)


def test_the_record_tells_how_the_artifact_was_made(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    record = json.loads((tmp_path / "r/lab.sum/artifact.json").read_text())
    assert record["inputs"]["lines"]["stage"] == "lab.make"
    assert record["status"] == "done"
    assert record["metrics"] == {"inputs": ["lines"]}
    assert {entry["path"] for entry in record["files"]} == {"half", "sum.txt"}
    assert record["packages"]["numpy"]
    assert [e["kind"] for e in read_events(tmp_path / "r/events.jsonl")] == [
        "stage.start", "stage.done", "stage.start", "stage.done",
    ]  # fmt: skip
    assert not list((tmp_path / "r").glob("*.partial"))


def test_another_recipe_is_refused_with_the_fields_named(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    with pytest.raises(PunaError, match=r"lab\.make\.n 3 -> 4") as caught:
        run_recipe(recipe_in(tmp_path, "lab.make.n=4"))
    assert "--rebuild lab.make" in str(caught.value)
    run_recipe(recipe_in(tmp_path, "lab.make.n=4"), rebuild=["lab.make"])
    assert (tmp_path / "r/lab.sum/sum.txt").read_text() == "6"
    assert calls == ["lab.make", "lab.sum"] * 2


def test_a_rebuild_reaches_what_follows(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    run_recipe(recipe_in(tmp_path), rebuild=["lab.sum"])
    assert calls == ["lab.make", "lab.sum", "lab.sum"]
    with pytest.raises(PunaError, match=r"'lab\.smu' is not in the recipe"):
        run_recipe(recipe_in(tmp_path), rebuild=["lab.smu"])


def test_a_resumable_stage_finds_its_own_work(calls: Calls, tmp_path: Path) -> None:
    calls.fail = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        run_recipe(recipe_in(tmp_path))
    assert (tmp_path / "r/lab.sum.partial/half").exists()
    calls.fail = None
    with pytest.raises(PunaError, match=r"unfinished work of another recipe.*factor 1 -> 2"):
        run_recipe(recipe_in(tmp_path, "lab.sum.factor=2"))
    run_recipe(recipe_in(tmp_path))
    assert calls == ["lab.make", "lab.sum", "lab.sum+"]
    failed = list(read_events(tmp_path / "r/events.jsonl", "stage.failed"))
    assert "boom" in failed[0]["error"]


def test_a_failed_attempt_without_work_does_not_hold_a_corrected_recipe_up(
    calls: Calls, tmp_path: Path
) -> None:
    calls.fail = PunaError("wrong path", "correct it")
    with pytest.raises(PunaError, match="wrong path"):
        run_recipe(recipe_in(tmp_path))
    (tmp_path / "r/lab.sum.partial/half").unlink()  # as if it had failed before it wrote anything
    calls.fail = None
    run_recipe(recipe_in(tmp_path, "lab.sum.factor=2"))
    assert (tmp_path / "r/lab.sum/sum.txt").read_text() == "6"


def test_killed_between_record_and_rename(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    (tmp_path / "r/lab.sum").rename(tmp_path / "r/lab.sum.partial")
    run_recipe(recipe_in(tmp_path))
    assert calls == ["lab.make", "lab.sum"]
    assert (tmp_path / "r/lab.sum/sum.txt").read_text() == "3"


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied")]
)
def test_errors_of_the_machine_are_explained(
    calls: Calls, tmp_path: Path, code: int, words: str
) -> None:
    calls.fail = OSError(code, "x", "some/file")
    with pytest.raises(PunaError, match=f"some/file: .*{words}"):
        run_recipe(recipe_in(tmp_path))
    calls.fail = None
    run_recipe(recipe_in(tmp_path))


def test_read_only_place_is_one_message(calls: Calls, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(PunaError, match=r"not a folder|is a folder|exists"):
        run_recipe(recipe_in(blocked))


def test_damage_is_found(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    (tmp_path / "r/lab.make/lines.txt").write_text("truncated and changed")
    with pytest.raises(PunaError, match=r"(?s)lines\.txt .*--rebuild lab\.make"):
        run_recipe(recipe_in(tmp_path))
    with pytest.raises(PunaError, match=r"(?s)lines\.txt .*--rebuild lab\.make"):
        run_recipe(recipe_in(tmp_path), only="lab.sum", rebuild=["lab.sum"])
    for damage in ("{", "[]", "{}"):
        (tmp_path / "r/lab.make/artifact.json").write_text(damage)
        with pytest.raises(PunaError, match="damaged"):
            run_recipe(recipe_in(tmp_path))


def test_a_damaged_json_file_of_an_artifact_is_named(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    artifact = Artifact(tmp_path / "r/lab.make")
    artifact.path.joinpath("lines.txt").write_text('{"a": 1}')
    assert artifact.read_json("lines.txt") == {"a": 1}
    artifact.path.joinpath("lines.txt").write_text("{")
    with pytest.raises(PunaError, match=r"(?s)lines\.txt is damaged.*lab\.make again"):
        artifact.read_json("lines.txt")


def test_changed_input_files_are_mentioned(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(recipe_in(tmp_path))
    calls.state = {"files": 2}
    assert run_recipe(recipe_in(tmp_path)).skipped == ["lab.make", "lab.sum"]
    assert "has changed since" in capsys.readouterr().err


def test_only_one_stage_needs_finished_inputs(calls: Calls, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"needs stage lab\.make, which is not finished"):
        run_recipe(recipe_in(tmp_path), only="lab.sum")
    run_recipe(recipe_in(tmp_path), only="lab.make")
    run_recipe(recipe_in(tmp_path), only="lab.sum")
    assert calls == ["lab.make", "lab.sum"]


def test_inputs_can_be_rewired_to_a_finished_folder(calls: Calls, tmp_path: Path) -> None:
    run_recipe(recipe_in(tmp_path))
    lines = tmp_path / "r/lab.make"
    raw = {"name": "s", "runs_dir": str(tmp_path), "inputs": {"lab.sum.lines": str(lines)}}
    run_recipe(resolve({**raw, "lab": {"sum": {"factor": 5}}}))
    assert (tmp_path / "s/lab.sum/sum.txt").read_text() == "15"
    with pytest.raises(PunaError, match=r'inputs\."lab\.sum\.lines" is .*nowhere.*no.*finished'):
        plan_steps(resolve({**raw, "inputs": {"lab.sum.lines": "nowhere"}, "lab": {"sum": {}}}))
    with pytest.raises(PunaError, match="not in the recipe"):
        plan_steps(resolve({"name": "s", "lab": {"sum": {}}}))
    with pytest.raises(PunaError, match="no stage"):
        plan_steps(resolve({"name": "s"}))


def test_a_second_run_is_told_who_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
        import time
        from pathlib import Path
        from puna.core.run import run_lock
        with run_lock(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0.3)
        with pytest.raises(PunaError, match=f"in use by process {holder.pid}"), run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run_lock(tmp_path):  # a killed holder lets go
        time.sleep(0)


def test_the_code_version_is_the_checkouts() -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode != 0:
        pytest.skip("not a checkout")
    assert code_version()["commit"] == head.stdout.strip()
