"""Budgets and the held-out part: deterministic, by whole clusters, nothing leaks."""

from dataclasses import dataclass

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.schema import document_id
from puna.data.split import SplitConfig, split_documents, split_folder
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

N = 240


def corpus(n=N):
    """Documents of two sources in clusters of one, two and (across sources) three."""
    random = np.random.default_rng(1)
    rows, clusters = [], []
    for i in range(n):
        source = "code" if i % 3 else "docs"
        rows.append((source, f"p{i}", "x" * int(random.integers(20, 200))))
        clusters.append(f"c{i}" if i % 10 < 5 else f"c{i - i % 10}-several")
    return rows, clusters


def run(tmp_path, name="out", n_shards=3, rows=None, **settings):
    texts, clusters = rows or corpus()
    documents = make_documents(
        tmp_path / f"{name}.in", texts, n_shards=n_shards, stage="data.dedup",
        extra={"cluster": clusters},
    )  # fmt: skip
    out = tmp_path / name
    out.mkdir()
    cfg = SplitConfig(**{"workers": 1, "bytes_per_token": 1.0, **settings})
    return out, split_documents(cfg, {"documents": documents}, out, Ledger(None))


def test_no_cluster_is_on_both_sides_and_the_share_is_met(tmp_path):
    out, metrics = run(tmp_path, heldout_fraction=0.1)
    rows = kept_rows(out)
    assert len(rows) == N
    sides = {}
    for row in rows:
        sides.setdefault(row["cluster"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert any(row["split"] == "heldout" and row["cluster"].endswith("several") for row in rows)
    for source in ("code", "docs"):
        tokens = {split: sum(row["n_bytes"] for row in rows
                             if (row["source"], row["split"]) == (source, split))
                  for split in ("train", "heldout")}  # fmt: skip
        counts = metrics["splits"][source]
        assert {split: counts[split]["tokens"] for split in counts} == tokens
        assert 0.05 < tokens["heldout"] / sum(tokens.values()) < 0.2


def test_the_split_does_not_depend_on_shards_or_workers_but_on_the_seed(tmp_path):
    def heldout(name, **settings):
        out, _ = run(tmp_path, name, heldout_fraction=0.1, **settings)
        return {row["id"] for row in kept_rows(out) if row["split"] == "heldout"}

    first = heldout("a")
    assert first == heldout("b", n_shards=1)
    assert first != heldout("c", seed=1)
    again, _ = run(tmp_path, "d", heldout_fraction=0.1)
    assert folder_bytes(again) == folder_bytes(tmp_path / "a")


def test_budget_is_a_prefix_of_a_seeded_order(tmp_path):
    small, metrics = run(tmp_path, "small", budget_tokens={"code": 2000})
    large, _ = run(tmp_path, "large", budget_tokens={"code": 5000})
    ids = [
        {row["id"] for row in kept_rows(out) if row["source"] == "code"} for out in (small, large)
    ]
    assert ids[0] < ids[1]
    kept = [row for row in kept_rows(small) if row["source"] == "code"]
    total = sum(row["n_bytes"] for row in kept)
    assert 2000 <= total < 2000 + 200
    rejected = rejected_rows(small)
    assert {(row["source"], row["reason"], row["threshold"]) for row in rejected} == {
        ("code", "budget", 2000.0)
    }
    assert min(row["value"] for row in rejected) == total  # what came before the first one left out
    flow = metrics["flow"]
    assert flow["docs"]["rejected"] == {}
    assert flow["code"]["kept_docs"] == len(kept)


@dataclass(frozen=True)
class CountLetters:
    """A counter of tokens that reads the text."""

    columns: tuple[str, ...] = ("text",)

    def __call__(self, batch):
        return np.array([len(text) // 2 for text in batch.column("text").to_pylist()])


def test_any_counter_of_tokens(tmp_path):
    texts, clusters = corpus()
    documents = make_documents(tmp_path / "in", texts, extra={"cluster": clusters})
    out = tmp_path / "out"
    out.mkdir()
    cfg = SplitConfig(workers=1)
    metrics = split_folder(cfg, documents.path / "documents", out, Ledger(None), CountLetters())
    tokens = sum(
        part["tokens"] for splits in metrics["splits"].values() for part in splits.values()
    )
    assert tokens == sum(len(text) // 2 for _, _, text in texts)


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"heldout_fraction": 0.0}, 0, 0),
        ({"heldout_fraction": 0.01, "heldout_min_tokens": 1500}, 1500, 2200),
        ({"heldout_fraction": 0.5, "heldout_max_tokens": 800}, 800, 1100),
    ],
)
def test_limits_of_the_held_out_part(tmp_path, settings, low, high):
    _, metrics = run(tmp_path, **settings)
    found = metrics["splits"]["code"].get("heldout", {"tokens": 0})["tokens"]
    assert low <= found <= high


def test_one_cluster_stays_in_training_and_a_giant_is_not_held_out(tmp_path):
    rows = [("s", f"p{i}", "x" * 100) for i in range(50)]
    giant = [("one", [f"all{i // 50}" for i in range(50)]),
             ("two", ["giant" if i else "small" for i in range(50)])]  # fmt: skip
    found = {}
    for name, clusters in giant:
        out, _ = run(tmp_path, name, rows=(rows, clusters), heldout_fraction=0.1)
        found[name] = [row["path"] for row in kept_rows(out) if row["split"] == "heldout"]
    assert found == {"one": [], "two": ["p0"]}


def test_a_document_keeps_its_place_when_others_come_and_go(tmp_path):
    texts, clusters = corpus()
    full, _ = run(tmp_path, "full", budget_tokens={"code": 4000})
    half, _ = run(tmp_path, "half", rows=(texts[::2], clusters[::2]), budget_tokens={"code": 4000})
    rejected = {row["id"] for row in rejected_rows(half)}
    assert rejected <= {row["id"] for row in rejected_rows(full)}
    assert document_id("code", "p1") not in rejected  # it is not in the half


def test_bad_settings_and_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"heldout_min_tokens \(5\) is above"):
        SplitConfig(heldout_min_tokens=5, heldout_max_tokens=4)
    with pytest.raises(ValueError, match=r"budget_tokens\.code is 0"):
        SplitConfig(budget_tokens={"code": 0})
    with pytest.raises(PunaError, match="'coed', of which there are no documents") as caught:
        run(tmp_path, budget_tokens={"coed": 5})
    assert "code, docs" in caught.value.fix
    documents = make_documents(tmp_path / "plain", [("s", "a", "text")])
    with pytest.raises(PunaError, match="no column `cluster`"):
        split_documents(SplitConfig(), {"documents": documents}, tmp_path, Ledger(None))
