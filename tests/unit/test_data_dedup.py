"""Exact and near-duplicates: what is found at known similarities, who stays, what is reported."""

import itertools

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate, groups
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.components import components, link_buckets
from puna.data.kernels.minhash import band_keys, normalised, sign
from puna.data.schema import document_id
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows


def pair(jaccard, seed, n_shingles=1000):
    """Two texts whose sets of 5-word shingles have (almost) the given Jaccard similarity."""
    n_common = round(2 * n_shingles * jaccard / (1 + jaccard))
    fresh = (f"w{seed}x{index}" for index in itertools.count())
    head = [next(fresh) for _ in range(n_common + 4)]
    tails = [[next(fresh) for _ in range(n_shingles - n_common)] for _ in range(2)]
    return tuple(" ".join(head + tail) for tail in tails)


def run(tmp_path, rows, name="out", n_shards=2, **settings):
    documents = make_documents(
        tmp_path / f"{name}.in", rows, n_shards=n_shards, stage="data.filter"
    )
    out = tmp_path / name
    out.mkdir()
    cfg = DedupConfig(**{"workers": 1, **settings})
    return out, deduplicate(cfg, {"documents": documents}, out, Ledger(None))


def similarity(a, b):
    signatures = sign(texts_from([a, b]))
    return (signatures[0] == signatures[1]).mean()


@pytest.mark.parametrize("jaccard", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_signatures_estimate_the_jaccard_similarity(jaccard):
    found = np.array([similarity(*pair(jaccard, seed)) for seed in range(20)])
    sigma = np.sqrt(jaccard * (1 - jaccard) / 128)
    assert abs(found.mean() - jaccard) <= 3 * sigma / np.sqrt(20) + 1e-3
    assert (np.abs(found - jaccard) <= 4.5 * sigma + 1e-3).all()


def test_words_ignore_punctuation_and_case_and_cut_scripts_without_spaces():
    assert similarity("One two, three: FOUR five six", "one two three four (five) six") == 1
    assert similarity("foo(bar, baz_1)", "FOO bar baz_1;") == 1
    assert similarity("één twee drie vier vijf zes", "een twee drie vier vijf zes") < 1
    a = "東京都は日本の首都であり、世界最大級の都市圏を形成している。" * 3
    assert similarity(a, a.replace("世界", "世間")) > 0.5
    assert similarity("!!! ???", "*** ***") < 0.1  # no words at all: the bytes are compared
    assert similarity("", "") == 1


def test_normalisation():
    raw = ["  A\tB \n\n c\u00c9 ", "", " \n "]
    out = normalised(texts_from(raw))
    assert [bytes(out.bytes_of(i)).decode() for i in range(3)] == ["a b c\u00c9", "", ""]


def test_near_duplicates_at_known_similarities(tmp_path):
    rows = []
    for jaccard in (0.97, 0.65, 0.1):
        for seed in range(8):
            a, b = pair(jaccard, seed + int(1000 * jaccard), n_shingles=200)
            rows += [("s", f"{jaccard}/{seed}/a", a), ("s", f"{jaccard}/{seed}/b", b)]
    out, metrics = run(tmp_path, rows)
    rejected = rejected_rows(out)
    assert sorted(row["path"][:-2] for row in rejected) == [f"0.97/{seed}" for seed in range(8)]
    assert all(row["reason"] == "duplicate.near" and 0.8 <= row["value"] <= 1 for row in rejected)
    clusters = {row["path"]: row["cluster"] for row in [*kept_rows(out), *rejected]}
    together = [all_same for j in ("0.65", "0.1") for all_same in [sum(
        clusters[f"{j}/{seed}/a"] == clusters[f"{j}/{seed}/b"] for seed in range(8))]]  # fmt: skip
    assert together == [8, 0]
    assert metrics["groups"] == {
        "n": 40, "n_with_several": 8, "largest": 2, "docs_in_several": 16, "sizes": {"2-3": 8}
    }  # fmt: skip
    assert metrics["clusters"]["n_with_several"] == 16


def test_the_longest_stays_then_the_smallest_id(tmp_path):
    text = " ".join(f"word{i}" for i in range(100))
    rows = [("s", "short", text), ("s", "long", f"{text}   "), ("s", "near", f"{text} and a tail"),
            ("s", "twin1", "twin text"), ("s", "twin2", "Twin  TEXT"[::1].replace("  ", " ")),
            ("t", "other", "something else entirely")]  # fmt: skip
    out, metrics = run(tmp_path, rows, keep="longest")
    ids = {path: document_id(source, path) for source, path, _ in rows}
    twin = min(ids["twin1"], ids["twin2"])
    assert {row["id"] for row in kept_rows(out)} == {ids["near"], twin, ids["other"]}
    found = {row["id"]: row for row in rejected_rows(out)}
    exact = found[ids["short"]]
    assert (exact["reason"], exact["value"], exact["threshold"]) == ("duplicate.exact", 1.0, 1.0)
    assert exact["detail"] == ids["near"]  # what stays of its group
    near = found[ids["long"]]
    assert (near["reason"], near["threshold"], near["detail"]) == (
        "duplicate.near",
        0.8,
        ids["near"],
    )
    assert near["value"] == 96 / 99  # 96 of its shingles are also in the other, which has 99
    assert near["cluster"] == exact["cluster"] == min(ids["short"], ids["long"], ids["near"])
    assert metrics["flow"]["s"]["rejected"]["duplicate.exact"]["docs"] == 2
    out, _ = run(tmp_path, rows, "estimated", keep="longest", verify=False)
    found = {row["id"]: row for row in rejected_rows(out)}
    assert found[ids["long"]]["value"] == similarity(rows[0][2], rows[2][2])
    for keep in ("smallest_id", "quality"):  # no document has a quality
        out, _ = run(tmp_path, rows, keep, keep=keep)
        assert min(ids["short"], ids["long"], ids["near"]) in {row["id"] for row in kept_rows(out)}


def test_a_broken_attempt_is_continued(tmp_path, monkeypatch):
    rows = [
        ("s", f"{seed}/{i}", text)
        for seed in range(6)
        for i, text in enumerate(pair(0.9, seed, 50))
    ]
    whole, _ = run(tmp_path, rows, "whole")
    documents = make_documents(tmp_path / "in", rows, n_shards=2, stage="data.filter")
    out = tmp_path / "out"
    out.mkdir()
    cfg, calls, whole_function = DedupConfig(workers=1), [], groups.group_nodes

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("puna.data.dedup.groups.group_nodes", stop)
    with pytest.raises(KeyboardInterrupt):
        deduplicate(cfg, {"documents": documents}, out, Ledger(None))
    monkeypatch.setattr("puna.data.dedup.groups.group_nodes", whole_function)
    monkeypatch.setattr(
        "puna.data.dedup.kernels.sign", lambda texts: calls.append(len(texts)) or sign(texts)
    )
    deduplicate(cfg, {"documents": documents}, out, Ledger(None))
    assert calls == [1]  # only to compile: the signatures were there
    assert folder_bytes(out) == folder_bytes(whole)


def test_a_huge_bucket_loses_no_pair():
    """3000 members with one band in common: the planted twins are found, all else stays apart."""
    random = np.random.default_rng(0)
    signatures = random.integers(0, 2**32, (3000, 128), np.uint32)
    signatures[:, :4] = 7
    twins = np.arange(0, 3000, 100)
    for a in twins:
        signatures[a + 50] = signatures[a]
        signatures[a + 50, 100:] = 1
    nodes = np.arange(3000)
    buckets = np.full(3000, band_keys(signatures[:1], 32)[0, 0])
    pairs, found = link_buckets(buckets, nodes, signatures, n_bands=32, near=0.75, loose=0.5)
    assert pairs.tolist() == [[a, a + 50] for a in twins]
    assert found.tolist() == [100 / 128] * len(twins)


def test_components():
    edges = np.array([[5, 3], [1, 2], [3, 1], [7, 8]], np.int64)
    assert components(9, edges).tolist() == [0, 1, 1, 1, 4, 1, 6, 7, 7]
    assert components(2, np.empty((0, 2), np.int64)).tolist() == [0, 1]


def test_the_same_id_twice_is_refused(tmp_path):
    rows = [("s", "a", "one text"), ("s", "a", "another text")]
    with pytest.raises(PunaError, match="1 of 2 documents have the id of another"):
        run(tmp_path, rows, n_shards=2)


def test_bad_settings():
    with pytest.raises(ValueError, match="bands must divide 128, not 24"):
        DedupConfig(bands=24)
    with pytest.raises(ValueError, match=r"cluster \(0\.9\) must not be above near"):
        DedupConfig(cluster=0.9)
