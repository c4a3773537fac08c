"""Composition: shares, rates, repetition and their limits; nothing reaches the held-out side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.compose import ComposeConfig, compose_documents
from puna.data.compose.solve import Part, solve
from puna.data.quality.balance import draws
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

N = 600


def corpus(n=N):
    """Documents of three sources and two languages; a seventh is held out, clusters of three."""
    random = np.random.default_rng(3)
    texts, extra = [], {"split": [], "language": [], "cluster": []}
    for i in range(n):
        source = ("web", "web", "web", "code", "books")[i % 5]
        texts.append((source, f"p{i}", "x" * int(random.integers(20, 200))))
        extra["split"].append("heldout" if (i // 3) % 7 == 0 else "train")
        extra["language"].append("de" if i % 4 == 0 else "en")
        extra["cluster"].append(f"c{i // 3}")
    return texts, extra


def run(tmp_path, name="out", n_shards=3, workers=1, data=None, **values):
    texts, extra = data or corpus()
    documents = make_documents(
        tmp_path / f"{name}.in", texts, n_shards=n_shards, stage="data.split", extra=extra
    )
    out = tmp_path / name
    out.mkdir()
    cfg = ComposeConfig(**{"workers": workers, "bytes_per_token": 1.0, **values})
    return out, compose_documents(cfg, {"documents": documents}, out, Ledger(None))


def tokens_read(rows, **match):
    return sum(
        row["n_bytes"] * row["repeat"]
        for row in rows
        if row["split"] == "train" and all(row[key] == value for key, value in match.items())
    )


def rule(source, **wish):
    return {"match": {"source": source}, **wish}


def test_without_rules_every_document_is_read_once(tmp_path):
    out, metrics = run(tmp_path)
    rows = kept_rows(out)
    assert len(rows) == N
    assert {row["repeat"] for row in rows} == {1}
    assert metrics["train_tokens"] == tokens_read(rows)
    assert metrics["unreached"] == []


def test_shares_of_a_budget_are_met_to_a_document(tmp_path):
    groups = [rule("web", share=0.3), rule("code", share=0.5)]
    out, metrics = run(tmp_path, budget_tokens=20_000, groups=groups)
    rows = kept_rows(out)
    for source, share in (("web", 0.3), ("code", 0.5), ("books", 0.2)):
        assert abs(tokens_read(rows, source=source) - share * 20_000) <= 200
    read = {part["name"]: part["tokens"] for part in metrics["parts"]}
    names = {"web": "source=web", "code": "source=code", "books": "all others"}
    assert read == {name: tokens_read(rows, source=one) for one, name in names.items()}
    assert len(rows) + len(rejected_rows(out)) == N


def test_what_is_sampled_out_tells_its_draw_and_the_rate(tmp_path):
    out, metrics = run(tmp_path, groups=[rule("web", rate=0.25)])
    dropped = rejected_rows(out)
    assert dropped
    for row in dropped:
        assert row["source"] == "web"
        assert row["split"] == "train"
        assert row["reason"] == "compose.sampled_out"
        assert row["threshold"] == 0.25
        assert row["value"] == draws([row["id"]], "compose", 0)[0] >= 0.25
    kept = {row["id"] for row in kept_rows(out) if row["source"] == "web"}
    train = next(row for row in metrics["parts"] if row["name"] == "source=web")
    assert 0.15 < train["docs"] / train["in_docs"] < 0.35
    more, _ = run(tmp_path, "more", groups=[rule("web", rate=0.5)])
    assert kept < {row["id"] for row in kept_rows(more) if row["source"] == "web"}


def test_up_sampling_repeats_by_hash_and_never_touches_the_held_out_side(tmp_path):
    out, metrics = run(tmp_path, groups=[rule("books", repeat=1.5)])
    rows = kept_rows(out)
    assert len(rows) == N
    books = [row for row in rows if row["source"] == "books" and row["split"] == "train"]
    for row in books:
        assert row["repeat"] == 1 + (draws([row["id"]], "compose", 0)[0] < 0.5)
    assert 0.35 < sum(row["repeat"] == 2 for row in books) / len(books) < 0.65
    assert {row["repeat"] for row in rows if row["split"] == "heldout"} == {1}
    assert {row["repeat"] for row in rows if row["source"] != "books"} == {1}
    assert metrics["parts"][0]["epochs"] == tokens_read(rows, source="books") / sum(
        row["n_bytes"] for row in books
    )


def test_a_source_left_out_of_training_stays_on_the_held_out_side(tmp_path):
    out, _ = run(tmp_path, groups=[rule("code", rate=0)])
    assert {row["split"] for row in kept_rows(out) if row["source"] == "code"} == {"heldout"}


def test_the_repetition_limit_holds_and_what_is_not_reached_is_told(tmp_path):
    out, metrics = run(tmp_path, budget_tokens=100_000, groups=[rule("books", share=0.6)])
    rows = kept_rows(out)
    books = sum(
        row["n_bytes"] for row in rows if (row["source"], row["split"]) == ("books", "train")
    )
    assert 4 * books < 60_000
    assert tokens_read(rows, source="books") == 4 * books
    assert metrics["train_tokens"] == pytest.approx(100_000, rel=0.01)
    part = metrics["parts"][0]
    assert part["is_limited"]
    assert part["reached_share"] == pytest.approx(4 * books / 100_000, rel=0.01)
    assert metrics["unreached"][0].startswith("source=books: share 4")


def test_strict_refuses_before_anything_is_written(tmp_path):
    groups = [rule("books", share=0.9)]
    with pytest.raises(PunaError, match=r"source=books: share .* instead of 90\.0%"):
        run(tmp_path, budget_tokens=200_000, groups=groups, strict=True)
    assert not (tmp_path / "out" / "documents").exists()


def test_shrink_keeps_the_shares(tmp_path):
    groups = [rule("books", share=0.8)]
    out, metrics = run(
        tmp_path, budget_tokens=80_000, groups=groups, shortfall="shrink", max_epochs=2
    )
    assert abs(metrics["parts"][0]["reached_share"] - 0.8) < 0.01
    assert "of the budget" in metrics["unreached"][0]
    assert max(row["repeat"] for row in kept_rows(out)) == 2


def test_whole_clusters_stay_together(tmp_path):
    by = ("language",)
    groups = [{"match": {"language": "en"}, "share": 0.5}]
    out, _ = run(tmp_path, by=by, groups=groups, budget_tokens=15_000, whole_clusters=True)
    fates = {}
    for row in [*kept_rows(out), *rejected_rows(out)]:
        if row["split"] == "train":
            fates.setdefault((row["cluster"], row["language"]), set()).add(row["repeat"])
    assert all(len(fate) == 1 for fate in fates.values())
    assert {0} in fates.values()
    assert {1} in fates.values()


def test_the_choice_does_not_depend_on_shards_or_workers(tmp_path):
    values = {"groups": [rule("web", share=0.3), rule("books", repeat=2.5)], "seed": 4}
    chosen = []
    for name, n_shards in (("a", 1), ("b", 4)):
        out, _ = run(tmp_path, name, n_shards, **values)
        chosen.append({row["id"]: row["repeat"] for row in kept_rows(out)})
    assert chosen[0] == chosen[1]
    two, _ = run(tmp_path, "two", 4, 2, **values)
    assert folder_bytes(two) == folder_bytes(tmp_path / "b")
    other, _ = run(tmp_path, "other", 1, **{**values, "seed": 5})
    assert {row["id"]: row["repeat"] for row in kept_rows(other)} != chosen[0]


def test_groups_by_metadata_and_missing_values(tmp_path):
    texts, extra = corpus(60)
    documents = make_documents(tmp_path / "in", texts, stage="data.split", extra=extra)
    out = tmp_path / "out"
    out.mkdir()
    cfg = ComposeConfig(workers=1, by=("source", "metadata.licence"))
    metrics = compose_documents(cfg, {"documents": documents}, out, Ledger(None))
    assert {group["values"]["metadata.licence"] for group in metrics["groups"]} == {"(none)"}


def test_too_many_groups_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("puna.data.compose.measure.MAX_GROUPS", 5)
    with pytest.raises(PunaError, match="groups, more than 5"):
        run(tmp_path, by=("cluster",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"by": ("topic",)}, "column 'topic'"),
        ({"groups": [rule("wob", share=0.5)]}, "no training document matches source=wob"),
        (
            {"groups": [rule(one, share=0.3) for one in ("web", "code", "books")]},
            "90.0% of the bud",
        ),
        ({"groups": [rule("web", repeat=3), rule("code", share=0.9)]}, "exceed the budget"),
    ],
)
def test_wrong_wishes_are_named(tmp_path, values, message):
    with pytest.raises(PunaError, match=message):
        run(tmp_path, budget_tokens=10_000, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": [rule("a", share=0.7), rule("b", share=0.7)]}, "add up to 1.4"),
        ({"groups": [rule("a", share=0.7, rate=0.5)]}, "give one of"),
        ({"groups": [rule("a", repeat=5)]}, "above its repetition limit 4"),
        ({"groups": [{"match": {"language": "de"}, "rate": 0.5}]}, "not among by"),
    ],
)
def test_contradictions_in_the_configuration_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        ComposeConfig(**values)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    weights=st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    limits=st.lists(st.floats(0.5, 8), min_size=6, max_size=6),
    budget=st.integers(1, 10**7),
    shortfall=st.sampled_from(["fill", "shrink"]),
)
def test_solutions_respect_limits_and_meet_what_can_be_met(
    sizes, weights, limits, budget, shortfall
):
    total = sum(weights[: len(sizes)])
    parts = [Part(f"p{i}", size, share=weights[i] / total, limit=limits[i])
             for i, size in enumerate(sizes)]  # fmt: skip
    solved = solve(parts, budget, shortfall)
    read = sum(part.target for part in solved)
    most = sum(part.most for part in parts)
    assert all(part.factor <= part.limit * (1 + 1e-9) for part in solved)
    assert read <= budget * (1 + 1e-6)
    if shortfall == "fill":
        assert read == pytest.approx(min(budget, most), rel=1e-6)
    else:
        for part in solved:
            assert part.target == pytest.approx(part.share * read, rel=1e-6)
        free = read < budget * (1 - 1e-6)
        assert not free or any(part.factor == pytest.approx(part.limit) for part in solved)
