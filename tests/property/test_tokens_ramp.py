"""Batches that grow: the rows of a run are those of a run with equal batches, in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from puna.tokens.curriculum import Curriculum, Phase
from puna.tokens.lineage import open_source
from puna.tokens.loader import NO_LABEL, Batch
from puna.tokens.ramp import Ramp, Stair, cut_rows
from puna.train.config import PretrainConfig
from tests.unit.token_shards import SIZES, loader, write_shards

RAMPS = st.builds(
    lambda n_rows, stairs: Ramp(
        n_rows,
        tuple(
            Stair(sum(n for n, _ in stairs[: i + 1]), rows) for i, (_, rows) in enumerate(stairs)
        ),
    ),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=3),
)


@given(RAMPS)
def test_the_rows_before_a_step_are_those_of_all_earlier_steps(ramp: Ramp) -> None:
    total = 0
    for step in range(20):
        assert ramp.rows_before(step) == total
        assert ramp.steps_for(total) == step
        assert ramp.steps_for(total + 1) == step + 1
        total += ramp.at(step).n_rows
    assert Ramp.of(ramp.n_rows, ramp.to_json()) == ramp


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("ramp"), {"train": SIZES})


def test_a_growing_batch_reads_the_same_rows(shards: Path) -> None:
    stairs = [Stair(3, 2), Stair(5, 4)]
    growing, fixed = loader(shards, stairs=stairs), loader(shards, global_batch=2)
    wanted = [fixed.batch(step, 0, 1) for step in range(3 + 2 * 2 + 4 * 2)]
    got = [growing.batch(step, 0, 1) for step in range(7)]
    assert [len(batch.tokens_BT) for batch in got] == [2, 2, 2, 4, 4, 8, 8]
    for name in ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(batch, name) for batch in got]),
            np.concatenate([getattr(batch, name) for batch in wanted]),
        )
    for step in range(7):
        parts = [growing.batch(step, rank, 2).tokens_BT for rank in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), got[step].tokens_BT)
        assert len(growing.lineage(step)) == len(got[step].tokens_BT)
    assert growing.rows_per_source(5) == fixed.rows_per_source(7)
    again = open_source(growing.spec())
    np.testing.assert_array_equal(again.batch(5, 0, 1).tokens_BT, got[5].tokens_BT)


def test_phases_begin_at_their_step_whatever_the_batches_before(shards: Path) -> None:
    first, after = {"web": 1, "code": 0, "notes": 0}, {"web": 0, "code": 1, "notes": 0}
    one = loader(
        shards, weights=first, curriculum=Curriculum([Phase(4, after)]), stairs=[Stair(3, 2)]
    )
    assert one.rows_per_source(4) == {"code": 0, "web": 2 * 3 + 8}
    assert one.rows_per_source(5)["code"] == 8


def test_cut_rows_are_rows_of_their_own() -> None:
    doc_ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, -1, -1]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 0, 0]], np.int32)
    tokens = np.arange(16).reshape(2, 8)
    labels = tokens + 1
    labels[1, 6:] = NO_LABEL
    whole = Batch(tokens, labels, doc_ids, positions, ("a", "b"), np.array([0, 1]))
    cut = cut_rows(whole, 2)
    assert cut.tokens_BT.tolist() == tokens.reshape(4, 4).tolist()
    assert cut.labels_BT[0].tolist() == [1, 2, 3, 4]  # the label over the cut stays
    assert cut.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert cut.source_B is not None
    assert cut.source_B.tolist() == [0, 0, 1, 1]
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]  # the whole rows are as they were
    assert cut_rows(whole, 1) is whole


def config(**values) -> PretrainConfig:
    return PretrainConfig(
        **{"tokens": 100_000, "seq_len": 64, "global_batch": 16, "micro_batch": 2, **values}
    )


def test_a_token_budget_counts_the_ramp() -> None:
    ramp = [{"until_tokens": 1000, "global_batch": 4, "seq_len": 32},
            {"until_tokens": 4000, "global_batch": 8}]  # fmt: skip
    cfg = config(batch_ramp=ramp)
    assert cfg.ramp == Ramp(16, (Stair(4, 4, 2), Stair(10, 8, 1)))
    assert cfg.tokens_before(4) == 4 * 4 * 64
    assert cfg.tokens_before(cfg.n_steps - 1) < 100_000 <= cfg.tokens_before(cfg.n_steps)
    assert cfg.batch_shapes == [(4, 32), (8, 64), (16, 64)]
    phase = {"start_tokens": 2000, "weights": {"a": 1.0}}
    phased = config(batch_ramp=ramp, phases=[phase]).curriculum.phases[0]
    assert cfg.tokens_before(phased.first_step - 1) < 2000 <= cfg.tokens_before(phased.first_step)


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ([(1000, 4, None), (1000, 8, None)], "until_tokens=1000 is not after the 1024 tokens"),
        ([(1000, 4, 48)], "seq_len=48 does not divide"),
        ([(1000, 3, None)], "micro_batch=2 does not divide the 3 rows"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp, words) -> None:
    names = ("until_tokens", "global_batch", "seq_len")
    with pytest.raises(ValidationError, match=words):
        config(batch_ramp=[dict(zip(names, one, strict=True)) for one in ramp])
