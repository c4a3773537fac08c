"""The loader: a pure function of the step, the same for any world size, exact in its mix."""

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
from puna.tokens.lineage import open_source
from puna.tokens.loader import NO_LABEL
from puna.tokens.mixing import Assignment, check_weights
from puna.tokens.shards import TokenShards
from tests.unit.token_shards import SIZES, arrays, loader, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, {"train": {**SIZES, "empty": []}, "heldout": {"web": [5]}})


def test_any_world_size_reads_the_same_rows(shards: Path) -> None:
    for step in (0, 1, 7, 1000):
        whole = arrays(loader(shards).batch(step, 0, 1))
        for world in (1, 2, 4, 8):
            parts = [arrays(loader(shards).batch(step, rank, world)) for rank in range(world)]
            for full, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                np.testing.assert_array_equal(full, np.concatenate(pieces))


def test_random_access_equals_reading_in_order(shards: Path) -> None:
    one = loader(shards)
    in_order = [arrays(one.batch(step, 0, 1)) for step in range(40)]
    for step in (39, 0, 17, 18, 5):
        for left, right in zip(
            in_order[step], arrays(loader(shards).batch(step, 0, 1)), strict=True
        ):
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype


def test_shapes_and_types(shards: Path) -> None:
    batch = loader(shards).batch(0, 1, 2)
    assert [(a.shape, str(a.dtype)) for a in arrays(batch)] == [
        ((4, 16), "int64"), ((4, 16), "int64"), ((4, 16), "int32"), ((4, 16), "int32"),
    ]  # fmt: skip


def test_labels_never_cross_documents(shards: Path) -> None:
    """Each token of the shards is unique, so the label of a token is known without the loader."""
    opened = TokenShards(shards)
    follower: dict[tuple[str, int], int] = {}
    for source in SIZES:
        shard = opened.open("train", source)
        for i in range(shard.n_docs):
            tokens = shard.document(i).tolist()
            follower.update(
                {
                    (shard.document_id(i), at): after
                    for at, after in enumerate([*tokens[1:], NO_LABEL])
                }
            )
    one = loader(shards)
    for step in range(30):
        batch = one.batch(step, 0, 1)
        for row, entry in enumerate(one.lineage(step)):
            at = 0
            for number, segment in enumerate(entry["segments"]):
                start, end = segment["tokens"]
                here = slice(at, at + end - start)
                expected = [follower[segment["document_id"], i] for i in range(start, end)]
                assert batch.labels_BT[row, here].tolist() == expected
                assert set(batch.doc_ids_BT[row, here]) == {number}
                assert batch.positions_BT[row, here].tolist() == list(range(end - start))
                at = here.stop
            assert at == one.seq_len


def test_lineage_names_the_tokens_of_the_batch(shards: Path) -> None:
    opened = {source: TokenShards(shards).open("train", source) for source in SIZES}
    one = loader(shards)
    for step in (0, 3, 50):
        batch = one.batch(step, 0, 1)
        for row, entry in enumerate(one.lineage(step)):
            tokens: list[int] = []
            for segment in entry["segments"]:
                assert segment["source"] == entry["source"]
                shard = opened[segment["source"]]
                index = shard.find(segment["document_id"])
                assert index is not None
                start, end = segment["tokens"]
                tokens += shard.document(index)[start:end].tolist()
            assert batch.tokens_BT[row].tolist() == tokens


def test_an_epoch_is_every_token_once_in_a_new_order(shards: Path) -> None:
    one = loader(shards, weights={"web": 1, "code": 0, "notes": 0}, seq_len=5, global_batch=1)
    shard = TokenShards(shards).open("train", "web")
    n = shard.n_tokens
    stream = np.concatenate([one.batch(step, 0, 1).tokens_BT[0] for step in range(-(-3 * n // 5))])
    epochs = [stream[i * n : (i + 1) * n].tolist() for i in range(3)]
    assert all(sorted(epoch) == sorted(shard.tokens.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    segments = [s for step in range(n // 5) for s in one.lineage(step)[0]["segments"]]
    read = Counter()
    for segment in segments:
        if segment["epoch"] == 0:
            read[segment["document_id"]] += segment["tokens"][1] - segment["tokens"][0]
    assert sum(read.values()) >= n - 5
    assert one.epochs(2 * n)["web"] == pytest.approx(10)
    other = loader(shards, weights={"web": 1, "code": 0, "notes": 0}, seq_len=5, seed=4)
    assert other.lineage(0) != one.lineage(0)


def test_a_new_source_does_not_reshuffle_the_others(shards: Path) -> None:
    alone = loader(shards, weights={"web": 1, "code": 0, "notes": 0}, global_batch=1)
    mixed = loader(shards, weights={"web": 1, "code": 1, "notes": 1}, global_batch=1)
    of_web = [row for step in range(30) for row in mixed.lineage(step) if row["source"] == "web"]
    assert [row["segments"] for row in of_web] == [
        alone.lineage(step)[0]["segments"] for step in range(len(of_web))
    ]


def test_rows_per_source_are_those_of_the_batches(shards: Path) -> None:
    one = loader(shards, weights={"web": 0.5, "code": 0.3, "notes": 0.2})
    counted: Counter[str] = Counter()
    for step in range(25):
        assert one.rows_per_source(step) == {source: counted[source] for source in one.weights}
        counted.update(row["source"] for row in one.lineage(step))


weight = st.one_of(
    st.integers(1, 20), st.floats(1e-4, 1), st.fractions(Fraction(1, 50), 3, max_denominator=50)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(weight, min_size=1, max_size=7), st.integers(1, 1500))
def test_every_prefix_has_its_exact_share(weights: list[Any], n_rows: int) -> None:
    given_weights = {f"source{i}": weight for i, weight in enumerate(weights)}
    shares = check_weights(given_weights, dict.fromkeys(given_weights, 1), "test")
    total = sum(Fraction(str(w)) for w in weights)
    assert sum(shares.values()) == 1
    for source, share in shares.items():
        assert abs(share - Fraction(str(given_weights[source])) / total) < Fraction(1, 2**18)
    assignment = Assignment(shares)
    sources, numbers = assignment.rows(0, n_rows)
    counts = [0] * len(weights)
    for n, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True), 1):
        assert number == counts[source]
        counts[source] += 1
        for i, name in enumerate(assignment.sources):
            assert abs(counts[i] - n * shares[name]) < 1
    middle = n_rows // 2
    again = Assignment(shares).rows(middle, n_rows - middle)
    np.testing.assert_array_equal(again[0], sources[middle:])
    np.testing.assert_array_equal(again[1], numbers[middle:])


def test_far_rows_are_found_at_once() -> None:
    shares = check_weights({"a": 0.7, "b": 0.3}, {"a": 1, "b": 1}, "test")
    assert shares == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    far = Assignment(shares)
    assert far.counts(10**15).tolist() == [7 * 10**14, 3 * 10**14]
    np.testing.assert_array_equal(far.rows(10**15, 10)[0], Assignment(shares).rows(0, 10)[0])


def test_no_weights_mean_shares_by_tokens(shards: Path) -> None:
    one = loader(shards, weights=None)
    n_tokens = {s: TokenShards(shards).open("train", s).n_tokens for s in SIZES}
    assert one.weights == pytest.approx(
        {s: n / sum(n_tokens.values()) for s, n in n_tokens.items()}
    )


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"web": 1, "code": 1}, "no weight for source 'notes'"),
        ({"web": 1, "code": 1, "notes": 1, "books": 1}, "unknown source 'books'"),
        ({"web": 1, "code": -1, "notes": 1}, "'code' is -1"),
        ({"web": 1, "code": float("nan"), "notes": 1}, "'code' is nan"),
        ({"web": 1, "code": float("inf"), "notes": 1}, "'code' is inf"),
        ({"web": 1, "code": "much", "notes": 1}, "'code' is 'much'"),
        ({"web": 1, "code": True, "notes": 1}, "'code' is True"),
        ({"web": 0, "code": 0, "notes": 0}, "all weights"),
        ({"web": 1, "code": 1, "notes": 1, "empty": 1}, "'empty' has weight 1 but no tokens"),
    ],
)
def test_bad_weights_are_named(shards: Path, weights: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError, match=words) as raised:
        loader(shards, weights=weights)
    assert raised.value.fix


def test_a_world_that_does_not_divide_the_batch_is_refused(shards: Path) -> None:
    with pytest.raises(PunaError, match="8 rows cannot be divided among 3") as raised:
        loader(shards).batch(0, 0, 3)
    assert "6 or 9" in str(raised.value)
    assert "2 or 4 ranks" in str(raised.value)


@pytest.mark.parametrize("changes", [{"seq_len": 0}, {"global_batch": 0}, {"split": "test"}])
def test_bad_settings_are_named(shards: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PunaError, match=str(next(iter(changes.values())))):
        loader(shards, **changes)


def damage_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train/web/tokens.bin", damage_size),
        ("train/web/tokens.bin", Path.unlink),
        ("train/web/offsets.npy", damage_size),
        ("train/web/offsets.npy", lambda path: np.save(path, np.zeros(9, np.int64))),
        ("train/web/offsets.npy", lambda path: np.save(path, np.arange(5))),
        ("train/code/ids.npy", damage_size),
        ("train/code/ids.npy", lambda path: path.write_bytes(b"")),
        ("train/notes/n_bytes.npy", Path.unlink),
        ("index.json", damage_size),
        ("index.json", lambda path: path.write_text('{"dtype": "uint16"}')),
        ("index.json", Path.unlink),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, name: str, damage: Any) -> None:
    folder = write_shards(tmp_path / "x", {"train": SIZES})
    damage(folder / name)
    with pytest.raises(PunaError, match=name.rpartition("/")[2]) as raised:
        loader(folder)
    assert str(folder) in str(raised.value)
    assert raised.value.fix


def test_the_specification_opens_the_same_loader(shards: Path, tmp_path: Path) -> None:
    one = loader(shards)
    spec = json.loads(json.dumps(one.spec()))

    def in_folder(folder: Path) -> dict[str, Any]:
        return {**spec, "kwargs": {**spec["kwargs"], "folder": str(folder)}}

    assert open_source(spec).lineage(5) == one.lineage(5)
    moved = write_shards(
        tmp_path / "moved", {"train": {**SIZES, "empty": []}, "heldout": {"web": [5]}}
    )
    assert open_source(in_folder(moved)).lineage(5) == one.lineage(5)
    other = write_shards(tmp_path / "other", {"train": {**SIZES, "code": [3], "empty": []}})
    with pytest.raises(PunaError, match="have changed"):
        open_source(in_folder(other))
    with pytest.raises(PunaError, match="cannot open"):
        open_source({**spec, "kwargs": {"seed": 1}})
