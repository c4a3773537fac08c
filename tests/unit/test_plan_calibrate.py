"""Hardware files: measured curves, trainings of one's own, and the commands that make them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.plan.estimate import estimate
from puna.plan.fabric import Fabric
from puna.plan.hardware import Gpu, find_gpu, preset_in, write_gpu
from puna.plan.job import Job, Layout, find_model
from puna.plan.measured import Curve, Measured, Products, fit_curve, fit_products
from puna.plan.own import OwnRun
from puna.plan.runs import BETWEEN_JOBS, read_run, steady_steps
from puna.plan.search import search
from puna.train.config import PretrainConfig
from puna.train.predict_config import deviation_in_words
from puna.train.watch.prediction import PredictionWatch, check_prediction, predict_training

SHAPES = [(m, n, k) for m in (128, 512, 2048) for n, k in ((256, 256), (1024, 4096), (2048, 2048))]


def test_products_are_fitted_by_rate_traffic_and_call() -> None:
    rate, bandwidth, call = 1e12, 2e10, 5e-5
    seconds = [
        2 * m * n * k / rate + 2 * (m * k + k * n + m * n) / bandwidth + call for m, n, k in SHAPES
    ]
    found = fit_products(SHAPES, seconds, 2)
    assert found.tflops == pytest.approx(1.0, rel=1e-6)
    assert found.gb_s == pytest.approx(20.0, rel=1e-6)
    assert found.call_s == pytest.approx(call, rel=1e-6)
    assert found.scatter < 1e-6


def test_what_a_grid_does_not_show_is_not_made_up() -> None:
    """Times without any trend: the rate stays near what was reached, nothing is negative."""
    found = fit_products(SHAPES, [1e-3] * len(SHAPES), 2)
    best = max(rate for *_, rate in found.points)
    assert best <= found.tflops <= 1.25 * best * 1.0001
    assert found.scatter > 0.1
    assert found.call_s >= 0


def test_a_collective_is_fitted_by_latency_and_bandwidth() -> None:
    sizes = [2**power for power in range(12, 26, 2)]
    moved = {"all_gather": 3 / 4, "all_reduce": 6 / 4}
    for op, share in moved.items():
        seconds = [2e-5 + share * size / 5e10 for size in sizes]
        curve = fit_curve(op, 4, sizes, seconds)
        assert curve.latency_s == pytest.approx(2e-5)
        assert curve.bus_gb_s == pytest.approx(50.0)
    noisy = np.array(seconds) * np.exp(np.random.default_rng(0).normal(0, 0.2, len(sizes)))
    assert 0.05 < fit_curve("all_reduce", 4, sizes, noisy.tolist()).scatter < 0.4


def _machine(**changes: object) -> Gpu:
    values = {
        "device": "cpu", "n_ranks": 2, "seconds": 1.0, "copy_gb_s": 9.0,
        "bf16": Products(tflops=0.5, gb_s=10, scatter=0.05),
        "fp32": Products(tflops=0.1, gb_s=10, scatter=0.05),
        "curves": [Curve(op="all_gather", n_ranks=2, latency_s=1e-4, bus_gb_s=1, scatter=0.1)],
    }  # fmt: skip
    return Gpu(
        name="own", bf16_tflops=0.5, fp32_tflops=0.1, hbm_tb_s=0.01, memory_gib=16, nvlink_gb_s=1,
        domain=2, measured=Measured.model_validate({**values, **changes}),
    )  # fmt: skip


def _job(gpu: Gpu, **changes: object) -> Job:
    values = {
        "model": find_model("tiny"), "gpu": gpu, "fabric": Fabric(), "n_gpus": 2,
        "layout": Layout(), "seq_len": 256, "global_batch": 8,
    }  # fmt: skip
    return Job(**{**values, **changes})


def test_measured_curves_price_a_job() -> None:
    plain = estimate(_job(_machine()))
    fast = _machine(bf16=Products(tflops=2.0, gb_s=40, scatter=0.05))
    assert estimate(_job(fast)).parts["gemm"].mid == pytest.approx(plain.parts["gemm"].mid / 4)
    slow = Curve(op="all_gather", n_ranks=2, latency_s=1e-2, bus_gb_s=0.01, scatter=0.1)
    assert estimate(_job(_machine(curves=[slow]))).parts["data"].mid > plain.parts["data"].mid
    wide = estimate(_job(_machine(), precision="fp32"))
    assert wide.parts["gemm"].mid > 3 * plain.parts["gemm"].mid
    assert plain.step_s.high / plain.step_s.mid > 2.9  # nothing was fitted on a CPU
    with pytest.raises(PunaError, match="no fp32"):
        estimate(_job(find_gpu("h100"), precision="fp32"))


@pytest.mark.parametrize("name", ["own.toml", "own.json"])
def test_a_hardware_file_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    gpu = _machine(device="cuda").model_copy(update={"runs": [_run(0.5)]})
    write_gpu(tmp_path / name, gpu)
    assert find_gpu(str(tmp_path / name)) == gpu
    with pytest.raises(PunaError, match="TOML or JSON"):
        write_gpu(tmp_path / "own.txt", gpu)
    with pytest.raises(PunaError, match="no such hardware file"):
        find_gpu(str(tmp_path / f"other-{name}"))


def test_a_driver_s_name_finds_its_preset() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100", "AMD Instinct MI300X": "mi300x", "NVIDIA GB200": "gb200",
    }  # fmt: skip
    for text, name in names.items():
        found = preset_in(text)
        assert found is not None
        assert found.name == name
    assert preset_in("NVIDIA GeForce RTX 4090") is None


def _run(step_s: float, gpu: Gpu | None = None) -> OwnRun:
    values = _job(gpu or _machine()).model_dump(
        mode="json", exclude={"gpu", "fabric"}, exclude_none=True
    )  # fmt: skip
    return OwnRun(name=f"run-{step_s}", step_s=step_s, job=values)


def test_own_runs_move_the_prediction_and_narrow_its_interval() -> None:
    gpu = _machine()
    before = estimate(_job(gpu))
    seen = 2.0 * before.step_s.mid
    halves, errors = [], []
    for n in (1, 3, 30):
        runs = [_run(seen * (1 + 0.01 * k / n)) for k in range(n)]
        after = estimate(_job(gpu.model_copy(update={"runs": runs})))
        assert sum(part.mid for part in after.parts.values()) == pytest.approx(after.step_s.mid)
        assert after.step_s.low < seen < after.step_s.high
        halves.append(math.log(after.step_s.high / after.step_s.mid))
        errors.append(abs(after.step_s.mid / seen - 1))
    assert halves == sorted(halves, reverse=True)
    assert halves[-1] >= 1.6 * BETWEEN_JOBS  # two jobs of a cluster differ, however many are known
    assert errors[0] < 0.05
    noisy = _run(seen).model_copy(update={"scatter": 0.3})
    wide = estimate(_job(gpu.model_copy(update={"runs": [noisy]})))
    assert math.log(wide.step_s.high / wide.step_s.mid) > 2 * halves[0]
    slow = gpu.model_copy(update={"runs": [_run(seen)]})
    days = [search(_job(one), 1e9).best[0].days for one in (gpu, slow)]
    assert days[1] > 1.8 * days[0]


def _finished_run(folder: Path, seconds: list[float]) -> Path:
    """A run as the training leaves it: artifact, model, ledger; one restart in the middle."""
    stage = "train.pretrain"
    cfg = PretrainConfig(steps=20, seq_len=256, global_batch=8, nproc=2, micro_batch=2)
    model = {
        "vocab_size": 768, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128,
    }  # fmt: skip
    (folder / stage / "model").mkdir(parents=True)
    (folder / stage / "model/config.json").write_text(json.dumps(model))
    record = {"stage": stage, "status": "done", "config": cfg.model_dump(mode="json"), "files": [],
              "fingerprint": "f", "content_hash": "c", "metrics": {}}  # fmt: skip
    (folder / stage / "artifact.json").write_text(json.dumps(record))
    events = Ledger(folder / LEDGER_FILE, stage=stage, job="j")
    for attempt, times in enumerate((seconds[: len(seconds) // 2], seconds[len(seconds) // 2 :])):
        events.emit("train.start", attempt=attempt, dtype="bfloat16")
        for step, step_s in enumerate((9.0, *times)):  # the first one compiles
            events.emit("train.step", attempt=attempt, step=step, step_s=step_s, tokens=8 * 256,
                        n_steps=1)  # fmt: skip
    return folder


def test_a_run_s_ledger_becomes_a_row(tmp_path: Path) -> None:
    times = [0.5, 0.51, 0.49, 0.5, 0.5, 0.52, 0.48, 0.5]
    run = read_run(_finished_run(tmp_path / "one", times), _machine())
    assert run.step_s == 0.5
    assert run.n_steps == 8
    assert 0 < run.scatter < 0.05
    assert run.job["layout"]["micro_batch"] == 2
    assert run.job["n_gpus"] == 2
    assert run.job["model"]["vocab_size"] == 768
    with pytest.raises(PunaError, match="recorded 2 steps"):
        read_run(_finished_run(tmp_path / "two", times[:2]), _machine())
    with pytest.raises(PunaError, match="not the folder of a run"):
        read_run(tmp_path, _machine())
    with pytest.raises(PunaError, match=r"no finished post\.sft"):
        read_run(tmp_path / "one", _machine(), "post.sft")


def test_steps_of_a_batch_ramp_do_not_count() -> None:
    steps = [{"tokens": n, "step_s": float(n)} for n in (4, 4, 8, 8, 8)]
    assert steady_steps(steps, 8) == [8.0, 8.0, 8.0]


def test_the_command_adds_a_run_to_a_hardware_file(tmp_path: Path) -> None:
    run = _finished_run(tmp_path / "mine", [0.5] * 8)
    write_gpu(tmp_path / "a.toml", _machine())
    call = ["plan", "calibrate", "--hardware", str(tmp_path / "a.toml"), "--run", str(run)]
    for out in ("b.toml", "c.json"):
        done = CliRunner().invoke(cli, [*call, "--out", str(tmp_path / out)])
        assert "1 run: predicted times are multiplied by" in done.output
        assert [one.name for one in find_gpu(str(tmp_path / out)).runs] == ["mine"]
    again = [*call[:3], str(tmp_path / "b.toml"), *call[4:], "--out", str(tmp_path / "b.toml")]
    CliRunner().invoke(cli, again)
    assert len(find_gpu(str(tmp_path / "b.toml")).runs) == 1  # replaced, not counted twice
    refused = {
        ("--run", str(run)): "added to a hardware file",
        ("--measure", "--hardware", "h100"): "--measure makes a hardware file",
        ("rows.csv", "--measure"): "is for constants",
    }
    for words, says in refused.items():
        done = CliRunner().invoke(cli, ["plan", "calibrate", *words, "--out", "x.toml"])
        assert done.exit_code != 0
        assert says in str(done.exception)


@pytest.mark.distributed
def test_this_machine_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    call = ["plan", "calibrate", "--measure", "--quick", "--minutes", "0.02", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*call, "--ranks", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "not measured, assumed: nic_gb_s" in done.output
    gpu = find_gpu(str(out))
    measured = gpu.measured
    assert measured is not None
    assert measured.n_ranks == gpu.domain == 2
    assert {(one.op, one.n_ranks) for one in measured.curves} == {
        ("all_gather", 2), ("all_reduce", 2)
    }  # fmt: skip
    assert all(one.bus_gb_s > 0 and len(one.points) >= 5 for one in measured.curves)
    assert measured.fp32 is not None
    assert len(measured.bf16.points) == len(measured.fp32.points) == 6
    answer = CliRunner().invoke(
        cli, ["plan", "estimate", "--gpu", str(out), "--gpus", "2", "--batch", "8", "--model",
              "tiny", "--seq-len", "256", "--json"],
    )  # fmt: skip
    assert json.loads(answer.output)["step_s"]["mid"] > 0


def _watch(tmp_path: Path, over: int = 4) -> tuple[PredictionWatch, float, Path]:
    """A watch of a training with its prediction in seconds, and its ledger."""
    write_gpu(tmp_path / "own.toml", _machine())
    cfg = PretrainConfig.model_validate({
        "steps": 99, "seq_len": 256, "global_batch": 8, "nproc": 2,
        "predict": {"hardware": str(tmp_path / "own.toml"), "over": over},
    })  # fmt: skip
    found = predict_training(cfg, find_model("tiny"), 2, "bfloat16")
    assert found is not None
    ledger = tmp_path / LEDGER_FILE
    return PredictionWatch(found, cfg, Ledger(ledger), 0), found.step_s.mid, ledger


def test_a_deviation_from_the_prediction_is_told_when_it_begins_and_ends(tmp_path: Path) -> None:
    watch, predicted_s, ledger = _watch(tmp_path)
    pace = [30.0] + [1.05] * 6 + [1.05, 3.0, 1.05] + [1.4] * 8 + [1.0] * 8
    for step, ratio in enumerate(pace):
        excess = max(ratio - 1, 0) * predicted_s
        values = {"step_s": ratio * predicted_s, "tokens": 8 * 256, "data_s": 0.9 * excess}
        watch.see(step, values)
    events = list(read_events(ledger))
    assert [e["kind"] for e in events] == [
        "train.predicted", "train.deviation", "train.deviation_over",
    ]  # fmt: skip
    assert events[0]["step_s"] == predicted_s
    first = events[1]
    assert 10 <= first["step"] <= 13  # not at the one slow step, soon after the pace changed
    assert first["ratio"] == pytest.approx(1.4, rel=0.2)
    assert first["suspect"] == "data"
    assert "longer than the" in deviation_in_words(first)
    assert "as predicted" in deviation_in_words(events[2])


def test_where_the_excess_is(tmp_path: Path) -> None:
    for part, says in (("communication_s", "communication"), ("forward_s", "computation")):
        folder = tmp_path / says
        folder.mkdir()
        watch, predicted_s, ledger = _watch(folder, over=1)
        for step in range(2):
            watch.see(step, {"step_s": 2 * predicted_s, "tokens": 2048, part: predicted_s})
        (event,) = read_events(ledger, "train.deviation")
        assert event["suspect"] == says


def test_a_wrong_prediction_section_is_refused_before_anything_starts() -> None:
    cfg = PretrainConfig.model_validate({"steps": 1, "predict": {"hardware": "h1000"}})
    with pytest.raises(PunaError, match=r"predict\.hardware = 'h1000': unknown GPU"):
        check_prediction(cfg, find_model("tiny"))
    narrow = PretrainConfig.model_validate(
        {"steps": 1, "precision": "fp32", "predict": {"hardware": "h100"}}
    )
    with pytest.raises(PunaError, match="no fp32"):
        check_prediction(narrow, find_model("tiny"))
