"""The cost model: parts sum up, better hardware is never slower, infinite networks cost nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.plan.estimate import estimate
from puna.plan.fabric import Fabric, parse_fabric
from puna.plan.hardware import GPUS
from puna.plan.job import Job, Layout, check, find_model, problems, workload_of_job
from puna.plan.memory import MEMORY_PARTS, peak_memory, stage_memory
from puna.plan.shipped import calibration
from puna.plan.step import ALPHA_NETWORK, PARTS, step_time
from puna.plan.workload import Workload, stack

CONSTANTS = calibration().constants


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    power = lambda most: st.sampled_from([2**k for k in range(most + 1)])  # noqa: E731
    tp, cp, pp, dp = draw(power(3)), draw(power(2)), draw(power(3)), draw(power(4))
    chunks = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    micro = draw(power(2))
    layout = Layout(
        tp=tp, cp=cp, pp=pp, chunks=chunks, micro_batch=micro,
        schedule="interleaved_1f1b" if chunks > 1 else "1f1b",
        sharding=draw(st.sampled_from(["zero1", "zero2", "zero3"])),
        recompute=draw(st.sampled_from(["none", "selective", "sac", "full"])),
    )  # fmt: skip
    gpu = GPUS.get(draw(st.sampled_from(list(GPUS))))
    return Job(
        model=find_model(draw(st.sampled_from(["llama3-8b", "llama3-70b", "llama2-13b"]))),
        gpu=gpu, fabric=draw(st.sampled_from([Fabric(), parse_fabric("roce:200g:qps=1")])),
        n_gpus=tp * cp * pp * dp, layout=layout, seq_len=draw(st.sampled_from([2048, 8192])),
        global_batch=dp * micro * pp * draw(st.sampled_from([1, 2, 8])),
    )  # fmt: skip


def seconds(w: Workload) -> float:
    return step_time(w, CONSTANTS).total


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_parts_sum_to_the_whole_and_none_is_negative(job: Job) -> None:
    found = estimate(job)
    assert all(part.mid >= 0 and part.low <= part.mid <= part.high for part in found.parts.values())
    assert sum(part.mid for part in found.parts.values()) == pytest.approx(found.step_s.mid)
    assert sum(found.memory_parts.values()) == pytest.approx(found.memory.mid)
    assert max(sum(stage.values()) for stage in found.stages) == pytest.approx(found.memory.mid)
    levels = [level.tflops for level in found.waterfall(0.9, 0.01)]
    assert levels == sorted(levels, reverse=True)
    assert levels[-3] == pytest.approx(found.tflops().mid)
    assert levels[-1] == pytest.approx(found.tflops().mid * 0.99 * 0.9)


@settings(max_examples=80, deadline=None)
@given(jobs(), st.sampled_from(["peak", "hbm", "nvlink", "nic"]), st.floats(1.0, 4.0))
def test_better_hardware_is_never_slower(job: Job, what: str, factor: float) -> None:
    w = workload_of_job(job)
    better = {what: getattr(w, what) * factor}
    if what == "peak":
        better["peak_low"] = w.peak_low * factor
    assert seconds(replace(w, **better)) <= seconds(w) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_more_rows_take_longer_and_never_less_time_per_row_than_many(job: Job) -> None:
    w = workload_of_job(job)
    double = replace(w, batch=2 * w.batch)
    assert seconds(w) < seconds(double) <= 2 * seconds(w)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_an_infinite_network_leaves_latency_only(job: Job) -> None:
    w = replace(workload_of_job(job), nvlink=1e30, nic=1e30)
    time = step_time(w, CONSTANTS)
    calls = w.batch / w.dp / w.micro * w.layers * 20 + 3 * w.layers + 10
    latency = ALPHA_NETWORK * 20 * calls
    assert time.tensor + time.context + time.pipeline + time.data <= latency


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_recomputing_costs_time_and_saves_memory(job: Job) -> None:
    def with_recompute(kind: str) -> Workload:
        layout = job.layout.model_copy(update={"recompute": kind})
        return workload_of_job(job.model_copy(update={"layout": layout}))

    none, full = with_recompute("none"), with_recompute("full")
    assert seconds(full) > seconds(none)
    kept = [stage_memory(w, 0.0).activations for w in (none, full)]
    assert kept[1] < kept[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(jobs(), min_size=1, max_size=8))
def test_many_jobs_at_once_are_priced_as_one_by_one(many: list[Job]) -> None:
    ws = [workload_of_job(job) for job in many]
    time, memory = step_time(stack(ws), CONSTANTS), peak_memory(stack(ws))
    for name in PARTS:
        alone = [getattr(step_time(w, CONSTANTS), name) for w in ws]
        np.testing.assert_allclose(np.broadcast_to(getattr(time, name), len(ws)), alone, rtol=1e-12)
    for name in MEMORY_PARTS:
        alone = [getattr(peak_memory(w), name) for w in ws]
        got = np.broadcast_to(getattr(memory, name), len(ws))
        np.testing.assert_allclose(got, alone, rtol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    jobs(), st.sampled_from(["tp", "cp", "pp", "micro_batch", "replicate"]),
    st.sampled_from([3, 5, 7, 48]),
)  # fmt: skip
def test_a_layout_is_priced_or_refused_with_a_fix(job: Job, field: str, value: int) -> None:
    layout = job.layout.model_copy(update={field: value})
    broken = job.model_copy(update={"layout": layout})
    found = list(problems(broken))
    for problem in found:
        assert field.split("_")[0] in problem.message or "GPUs" in problem.message
        assert problem.fix
    if found:
        with pytest.raises(PunaError):
            check(broken)
    else:
        assert all(np.isfinite(getattr(workload_of_job(broken), f.name)) for f in fields(Workload))
