"""Which rank does what, and which layouts are refused; without processes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.model.config import PRESETS, LlamaConfig
from puna.train.config import ParallelConfig, TrainingConfig
from puna.train.parallel.layout import DIMS, Layout, check_layout, plan_stages

MODEL = LlamaConfig(
    vocab_size=64, dim=32, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=48, max_seq_len=64
)


def config(nproc: int, micro_batch: int = 1, **values) -> TrainingConfig:
    seq_len, batch = values.pop("seq_len", 64), values.pop("global_batch", 16)
    return TrainingConfig(
        steps=1, seq_len=seq_len, global_batch=batch, nproc=nproc, micro_batch=micro_batch,
        parallel=ParallelConfig(**values),
    )  # fmt: skip


def test_neighbours_share_a_tensor_then_a_context_then_a_pipeline():
    layout = Layout.of(ParallelConfig(tp=8, cp=2, pp=16), 16384)
    assert layout == Layout(replicate=1, shard=64, pp=16, cp=2, tp=8)
    places = [layout.coordinates(rank) for rank in (0, 7, 8, 16, 255, 256)]
    assert [tuple(place[dim] for dim in DIMS) for place in places] == [
        (0, 0, 0, 0, 0), (0, 0, 0, 0, 7), (0, 0, 0, 1, 0), (0, 0, 1, 0, 0), (0, 0, 15, 1, 7),
        (0, 1, 0, 0, 0),
    ]  # fmt: skip
    seen = {tuple(Layout(2, 3, 2, 1, 2).coordinates(rank).values()) for rank in range(24)}
    assert len(seen) == 24


@given(
    n_layers=st.integers(1, 130), pp=st.integers(1, 16), per_rank=st.integers(1, 3),
    less=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)  # fmt: skip
def test_stages_hold_every_layer_once_and_are_even(n_layers, pp, per_rank, less):
    schedule = "1f1b" if per_rank == 1 else "interleaved_1f1b"
    parallel = ParallelConfig(
        pp=pp, stages=pp * per_rank, schedule=schedule, less_first=less[0], less_last=less[1]
    )
    try:
        plan = plan_stages(parallel, n_layers)
    except PunaError:
        assert n_layers < 2 * pp * per_rank
        return
    assert [n for first, last in plan.layers for n in range(first, last)] == list(range(n_layers))
    if plan.n_stages > 1:
        sizes = [last - first for first, last in plan.layers]
        full = [sizes[0] + less[0], *sizes[1:-1], sizes[-1] + less[1]]
        assert max(full) - min(full) <= 1
    assert sorted(itertools.chain(*(plan.of(rank) for rank in range(pp)))) == list(
        range(plan.n_stages)
    )


def test_llama_3_405b_has_a_layer_less_at_both_ends():
    plan = plan_stages(ParallelConfig(pp=16, less_first=1, less_last=1), 126)
    assert [last - first for first, last in plan.layers] == [7, *[8] * 14, 7]


def test_the_stages_of_a_v_meet_on_the_last_rank():
    plan = plan_stages(ParallelConfig(pp=2, schedule="zbv"), 6)
    assert plan.owners == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("nproc", "values", "says", "fix"),
    [
        (3, {"tp": 3}, "parallel.tp = 3 does not divide the model's n_heads = 8", "tp = 1 or 2"),
        (8, {"tp": 8}, "does not divide the model's n_kv_heads = 4", "tp = 1 or 2 or 4"),
        (2, {"tp": 2, "seq_len": 63}, "seq_len = 63 does not divide into the 2", "62 or 64"),
        (2, {"cp": 2, "seq_len": 50}, "does not divide into the 4 pieces", "48 or 52"),
        (2, {"pp": 2, "micro_batch": 0}, "a step has 1 micro-batches", "global_batch = 2"),
        (
            4,
            {"pp": 4, "schedule": "zbv", "micro_batch": 4, "global_batch": 24},
            "a step has 6 micro-batches per data-parallel rank; the schedule zbv needs at least 4",
            "global_batch = 16",
        ),
        (2, {"pp": 2, "stages": 3, "schedule": "zbv"}, "stages = 3 do not divide", "2 or 4"),
        (2, {"pp": 2, "stages": 4}, "the schedule 1f1b has one stage per rank", "stages = 2"),
        (9, {"pp": 9, "global_batch": 9}, "6 layers give 9 stages", "fewer stages"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(nproc, values, says, fix):
    with pytest.raises(PunaError) as caught:
        check_layout(config(nproc, **values), MODEL)
    assert says in caught.value.message
    assert fix in str(caught.value)


def test_ranks_and_rows_must_divide():
    with pytest.raises(ValidationError, match=r"does not divide nproc=6; use nproc=4 or 8"):
        config(6, tp=2, pp=2)
    with pytest.raises(ValidationError, match=r"3 data-parallel ranks of nproc=6; use .*=15 or 18"):
        config(6, tp=2)


def test_shipped_models_have_the_layouts_they_were_trained_with():
    training = config(
        16384, tp=8, pp=16, less_first=1, less_last=1, seq_len=8192, global_batch=2048
    )
    check_layout(training, PRESETS.get("llama3.1-405b"))
