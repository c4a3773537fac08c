"""Weights that change and sources that run out: exact counts, nothing skipped, nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.tokens.curriculum import Curriculum, Phase, plan_weights
from puna.tokens.lineage import open_source
from puna.tokens.mixing import Assignment, check_weights
from puna.tokens.ramp import Ramp
from puna.tokens.shards import TokenShards
from puna.train.config import PretrainConfig
from tests.unit.token_shards import SIZES, arrays, loader, write_shards

NAMES = ("a", "b", "c", "d")
N_TOKENS = {"a": 1000, "b": 700, "c": 5000, "d": 100_000}
weights = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from([0.01, 0.3, 1, 2, 7]), min_size=1
).map(lambda given_weights: {name: given_weights.get(name, 0) for name in NAMES})


@st.composite
def curricula(draw: Any) -> Curriculum:
    phases, least = [], 1
    for _ in range(draw(st.integers(0, 3))):
        phase = Phase(least + draw(st.integers(0, 40)), draw(weights), draw(st.integers(0, 90)))
        phases.append(phase)
        least = phase.first_step + phase.blend_steps + 1
    return Curriculum(phases)


def expected(stretches: Any, n_rows: int) -> dict[str, list[Fraction]]:
    """Sum of the shares of each source before each row, and after the last."""
    totals = {name: [Fraction(0)] for name in NAMES}
    changes = dict(stretches)
    now = changes[0]
    for row in range(n_rows):
        now = changes.get(row, now)
        for name, sums in totals.items():
            sums.append(sums[-1] + now.get(name, 0))
    return totals


@settings(max_examples=60, deadline=None)
@given(weights, curricula(), st.integers(1, 5))
def test_every_prefix_has_its_share_within_a_row(
    first: dict[str, float], curriculum: Curriculum, global_batch: int
) -> None:
    stretches = plan_weights(first, curriculum, N_TOKENS, "test", seq_len=8,
                             ramp=Ramp(global_batch))  # fmt: skip
    n_rows = stretches[-1][0] + 200
    assignment = Assignment(stretches[0][1], stretches[1:])
    sources, numbers = assignment.rows(0, n_rows)
    wanted = expected(stretches, n_rows)
    counts = dict.fromkeys(assignment.sources, 0)
    for row, (index, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True), 1):
        name = assignment.sources[index]
        assert number == counts[name]  # the next row of its source: none skipped, none twice
        counts[name] += 1
        assert all(abs(counts[one] - wanted[one][row]) < 1 for one in counts)
    middle = n_rows * 2 // 3
    again = Assignment(stretches[0][1], stretches[1:]).rows(middle, n_rows - middle)
    np.testing.assert_array_equal(again[0], sources[middle:])
    np.testing.assert_array_equal(again[1], numbers[middle:])


def test_a_blend_moves_in_a_straight_line() -> None:
    before, after = {"a": 1, "b": 0}, {"a": 0, "b": 1}
    tokens = {"a": 1, "b": 1}
    curriculum = Curriculum([Phase(10, after, 40)])
    stretches = plan_weights(before, curriculum, tokens, "t", seq_len=1, ramp=Ramp(4))
    assignment = Assignment(stretches[0][1], stretches[1:])
    for step in range(10, 51):
        part = (step - 10) / 40
        rows_of_b = 4 * 40 * part**2 / 2
        assert abs(assignment.counts(4 * step)[1] - rows_of_b) < 1.01
    assert assignment.counts(4 * 60)[1] - assignment.counts(4 * 50)[1] == 40


def test_far_rows_after_a_change_are_found_at_once() -> None:
    early = check_weights({"a": 0.7, "b": 0.3}, {"a": 1, "b": 1}, "test")
    late = check_weights({"a": 0.1, "b": 0.9}, {"a": 1, "b": 1}, "test")
    far = Assignment(early, [(10**9, late)])
    assert far.counts(10**9).tolist() == [7 * 10**8, 3 * 10**8]
    assert far.counts(3 * 10**9).tolist() == [9 * 10**8, 21 * 10**8]


def test_the_compiled_loop_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    early = check_weights({"a": 0.71, "b": 0.2, "c": 3}, dict.fromkeys("abc", 1), "test")
    late = check_weights({"a": 0, "b": 0.9, "c": 0.001}, dict.fromkeys("abc", 1), "test")
    plain = Assignment(early, [(700, late), (1100, early)]).rows(0, 2000)
    monkeypatch.setattr("puna.tokens.mixing._COMPILE_ROWS", 1)
    compiled = Assignment(early, [(700, late), (1100, early)]).rows(0, 2000)
    np.testing.assert_array_equal(plain, compiled)


@settings(max_examples=60, deadline=None)
@given(weights, curricula(), st.dictionaries(st.sampled_from(NAMES), st.floats(0.05, 5)))
def test_no_source_is_read_more_often_than_it_may(
    first: dict[str, float], curriculum: Curriculum, max_epochs: dict[str, float]
) -> None:
    unlimited = plan_weights(first, curriculum, N_TOKENS, "test", seq_len=8, ramp=Ramp(2))
    n_steps = unlimited[-1][0] // 2 + 100
    limited = Curriculum(curriculum.phases, max_epochs, "share", n_steps)
    try:
        stretches = plan_weights(first, limited, N_TOKENS, "test", seq_len=8, ramp=Ramp(2))
    except PunaError as error:
        assert "used up" in error.message  # noqa: PT017
        return
    n_rows = 2 * n_steps
    assignment = Assignment(stretches[0][1], stretches[1:])
    counts = dict(zip(assignment.sources, assignment.counts(n_rows).tolist(), strict=True))
    assert sum(counts.values()) == n_rows
    for name, epochs in max_epochs.items():
        assert counts.get(name, 0) * 8 <= Fraction(str(epochs)) * N_TOKENS[name]
    refused = Curriculum(curriculum.phases, max_epochs, "refuse", n_steps)
    try:
        kept = plan_weights(first, refused, N_TOKENS, "test", seq_len=8, ramp=Ramp(2))
    except PunaError as error:
        assert "epochs" in error.message  # noqa: PT017
    else:
        assert kept == unlimited


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), {"train": SIZES})


CURRICULUM = Curriculum(
    [Phase(3, {"web": 0, "code": 1, "notes": 1}, 4), Phase(12, {"web": 3, "code": 1, "notes": 0})],
    {"code": 2.5},
    "share",
    60,
)


def test_an_epoch_is_every_token_once_though_phases_change(shards: Path) -> None:
    one = loader(shards, curriculum=CURRICULUM)
    seen: Counter[tuple[str, int, str, int]] = Counter()
    for step in range(60):
        for row in one.lineage(step):
            for s in row["segments"]:
                tokens = range(*s["tokens"])
                seen.update((s["source"], s["epoch"], s["document_id"], at) for at in tokens)
    assert set(seen.values()) == {1}
    for source, epochs in one.epochs(60).items():
        shard = TokenShards(shards).open("train", source)
        for epoch in range(int(epochs)):
            assert sum(1 for key in seen if key[:2] == (source, epoch)) == shard.n_tokens
    assert one.epochs(60)["code"] <= 2.5
    assert one.epochs(60)["code"] > 2.3


def test_batches_are_equal_for_every_world_and_every_way_to_a_step(shards: Path) -> None:
    one = loader(shards, curriculum=CURRICULUM)
    in_order = [arrays(one.batch(step, 0, 1)) for step in range(40)]
    again = open_source(json.loads(json.dumps(one.spec())))
    for step in (39, 0, 5, 12, 11):
        for world in (1, 2, 4, 8):
            parts = [arrays(again.batch(step, rank, world)) for rank in range(world)]
            for full, pieces in zip(in_order[step], zip(*parts, strict=True), strict=True):
                np.testing.assert_array_equal(full, np.concatenate(pieces))
        assert again.lineage(step) == one.lineage(step)
    assert one.weights_at(0) != one.weights_at(5) != one.weights_at(12)
    assert set(one.weights_at(20)) == {"web"} | set(one.weights_at(20))
    counts = one.rows_per_source(60)
    mean = one.mean_weights(60)
    assert all(abs(counts[name] - 480 * mean[name]) < 1 for name in counts)


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        (Curriculum([], {"code": 1}, "refuse", 100), "'code' has 125 tokens .*read 1 .*3.2 k"),
        (Curriculum([], dict.fromkeys(SIZES, 1), "share", 100), "all sources .* are used up"),
        (Curriculum([], {"books": 1}), "max_epochs of an unknown source 'books'"),
        (Curriculum([Phase(0, {})]), "phase 1 begins at step 0"),
        (Curriculum([Phase(3, {"web": 1, "code": 1, "notes": 1}, 4), Phase(7, {})]),
         "phase 2 begins at step 7, but the weights before it last to step 7"),
        (Curriculum([Phase(30, {"web": 1, "code": 1, "notes": 1})], n_steps=30), "after the last"),
        (Curriculum([Phase(3, {"web": 1})]), "no weight for source 'code'.*phase 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_names(
    shards: Path, curriculum: Curriculum, words: str
) -> None:
    with pytest.raises(PunaError, match=words) as raised:
        loader(shards, curriculum=curriculum)
    assert raised.value.fix


def test_the_recipe_gives_phases_as_shares_steps_or_tokens() -> None:
    def phase(**values: Any) -> dict[str, Any]:
        return {"weights": {"a": 1.0}, **values}

    cfg = PretrainConfig(
        steps=200, seq_len=16, global_batch=4, max_epochs={"a": 2.0}, used_up="share",
        phases=[phase(start=0.25, blend=0.1), phase(start=120), phase(start_tokens=10_001)],
    )  # fmt: skip
    found = cfg.curriculum
    assert [(one.first_step, one.blend_steps) for one in found.phases] == [
        (50, 20), (120, 0), (157, 0),
    ]  # fmt: skip
    assert (found.max_epochs, found.used_up, found.n_steps) == ({"a": 2.0}, "share", 200)
    for bad in ({}, {"start": 0.5, "start_tokens": 5}):
        with pytest.raises(ValueError, match="give either start or start_tokens"):
            PretrainConfig(steps=2, phases=[phase(**bad)])
