"""Traces broken down by part and kernel, and the command that makes them."""

from __future__ import annotations

import json

import pytest

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.train.config import TrainingConfig
from puna.train.profile import profile_training, random_source
from puna.train.watch.random_rows import RandomRows
from puna.train.watch.trace import PARTS, break_down, product_flops, read_trace
from puna.ui.profile_page import write_page

MODEL = LlamaConfig(
    vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, max_seq_len=64
)
BACKWARD = "autograd::engine::evaluate_function: MmBackward0"


def event(name: str, start: float, length: float, cat: str = "cpu_op", tid: int = 1, **args):
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": start, "dur": length,
            "args": args}  # fmt: skip


def mark(name: str, start: float, length: float):
    return event(f"puna.{name}", start, length, "user_annotation")


def test_time_counts_to_the_innermost_part_and_gradients_to_the_part_they_belong_to():
    found = break_down([
        mark("step", 0, 1000),
        mark("forward", 0, 400),
        mark("attention", 0, 300),
        event("aten::mm", 50, 200, **{"Sequence number": 7, "Input Dims": [[4, 8], [8, 2]]}),
        event("c10d::allreduce_", 260, 30),
        mark("norm", 310, 40),
        event(BACKWARD, 500, 200, **{"Sequence number": 7, "Fwd thread id": 1}),
        event("aten::mm", 520, 100, **{"Input Dims": [[2, 4], [4, 8]]}),
        mark("optimizer", 800, 100),
        event("aten::mm", 5000, 100),  # after the step
        event("aten::sleep", 0, 900, tid=2),  # another thread
    ])  # fmt: skip
    parts = {name: round(seconds * 1e6) for name, seconds in found.parts.items() if seconds}
    assert parts == {
        "attention": 300 - 30 + 200, "communication": 30, "norm": 40, "optimizer": 100,
        "other": 1000 - 300 - 40 - 200 - 100,
    }  # fmt: skip
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    (product,) = [kernel for kernel in found.kernels if kernel.name == "aten::mm"]
    assert (product.n_calls, round(product.seconds * 1e6)) == (2, 300)
    assert product.flops == 2 * 4 * 8 * 2 + 2 * 2 * 4 * 8


def test_the_gap_adds_up_to_the_step_and_shows_what_is_faster_than_the_peak():
    found = break_down([
        mark("step", 0, 1000),
        mark("feed_forward", 0, 600),
        event("aten::mm", 0, 500, **{"Input Dims": [[100, 100], [100, 100]]}),
    ])  # fmt: skip
    for peak_flops in (1e10, 1e9):
        gap = dict(found.gap(peak_flops))
        assert sum(gap.values()) == pytest.approx(1e-3)
        assert gap["all products at the peak"] == pytest.approx(2e6 / peak_flops)
        assert gap["matrix products below the peak"] == pytest.approx(5e-4 - 2e6 / peak_flops)
        assert gap["operations without products"] == pytest.approx(1e-4)
        assert gap["other"] == pytest.approx(4e-4)


def test_kernels_of_a_gpu_count_to_what_launched_them_and_idle_time_to_other():
    dims = {"Input Dims": [[4, 8], [8, 2]], "External id": 5}
    found = break_down([
        mark("step", 0, 1000),
        mark("attention", 0, 100),
        event("aten::mm", 10, 20, **dims),
        event("sgemm_1", 200, 300, "kernel", 99, **{"External id": 5}),
        event("sgemm_2", 500, 100, "kernel", 99, **{"External id": 5}),
        event("ncclDevKernel_AllGather", 600, 50, "kernel", 98),
    ])  # fmt: skip
    assert found.is_gpu
    parts = {name: round(seconds * 1e6) for name, seconds in found.parts.items() if seconds}
    assert parts == {"attention": 400, "communication": 50, "other": 550}
    assert found.kernels[0].flops == 2 * 4 * 8 * 2  # once, not once per kernel


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"puna\.step"):
        break_down([event("aten::mm", 0, 1)])


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("aten::mm", [[3, 5], [5, 7]], ("product", 2 * 3 * 5 * 7)),
        ("aten::addmm", [[7], [3, 5], [5, 7]], ("product", 2 * 3 * 5 * 7)),
        ("aten::bmm", [[2, 3, 5], [2, 5, 7]], ("product", 2 * 2 * 3 * 5 * 7)),
        ("aten::_scaled_dot_product_flash_attention_for_cpu",
         [[1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 5, 4]], ("attention", 4 * 2 * 3 * 5 * 4)),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",
         [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 5, 4]],
         ("attention", 10 * 2 * 3 * 5 * 4)),
        ("aten::mul", [[3, 5], [3, 5]], ("other", 0.0)),
        ("aten::mm", [], ("product", 0.0)),
    ],
)  # fmt: skip
def test_products_are_counted_from_their_shapes(name, dims, expected):
    assert product_flops(name, {"Input Dims": dims}) == expected


def test_random_rows_are_documents_and_the_same_on_any_number_of_ranks():
    rows = RandomRows(50, 64, 4, 12)
    whole = rows.batch(3, 0, 1)
    halves = [rows.batch(3, rank, 2) for rank in range(2)]
    for name in ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT"):
        parts = [getattr(half, name) for half in halves]
        assert (getattr(whole, name) == [*parts[0], *parts[1]]).all()
    starts = whole.positions_BT == 0
    assert starts.sum() > 8
    assert (starts[:, 1:] == (whole.doc_ids_BT[:, 1:] != whole.doc_ids_BT[:, :-1])).all()
    inside = ~starts[:, 1:]
    assert (whole.labels_BT[:, :-1][inside] == whole.tokens_BT[:, 1:][inside]).all()
    assert (whole.labels_BT[:, :-1][~inside] == -100).all()


def test_a_profiled_training_leaves_traces_a_breakdown_and_a_page(tmp_path):
    cfg = TrainingConfig(steps=50, seq_len=64, global_batch=4, precision="fp32")
    found = profile_training(cfg, MODEL, random_source(cfg, MODEL, 20), tmp_path, 2)
    assert json.loads((tmp_path / "profile.json").read_text())["n_steps"] == 2
    events = read_trace(tmp_path / found["traces"][0])
    assert sum(event["name"] == "puna.step" for event in events) == 2
    assert all({"ph", "pid"} <= event.keys() for event in events)
    assert set(found["parts"]) == set(PARTS.values())
    total = sum(found["parts"].values())
    assert sum(seconds for _, seconds in found["gap"]) == pytest.approx(total)
    for part in ("attention", "feed-forward", "norms", "head and loss", "embedding", "optimiser"):
        assert found["parts"][part] > 0, part
    # Products of the layers and the head, forward and backward.
    tokens = 4 * 64
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert found["flops"] > 3 * 2 * tokens * layers
    page = write_page(found, tmp_path, "<small>").read_text()
    assert "<svg" in page
    assert "&lt;small&gt;" in page
    assert "aten::mm" in page
    assert not list(tmp_path.glob("model*"))


def test_bad_input_is_told_before_anything_starts(tmp_path):
    cfg = TrainingConfig(steps=5, seq_len=64, global_batch=4, nproc=2, parallel={"tp": 2})  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="n_kv_heads"):
        profile_training(cfg, MODEL, random_source(cfg, MODEL, 20), tmp_path, 1)
