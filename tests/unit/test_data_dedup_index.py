"""Duplicates by URL and quality, exact similarities, the report, and indexes of earlier runs."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate
from puna.data.dedup.sets import open_store, pack_sets, write_store
from puna.data.dedup.stage import external_state
from puna.data.engine.shards import write_shard
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.jaccard import shingle_sets, similarities
from puna.data.kernels.minhash import band_keys, sign
from puna.data.schema import document_id, shard_name
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

Row = tuple[str, str, str]


def documents_in(
    folder: Path, rows: list[Row], quality: list[Any] | None = None, n_shards: int = 2
) -> Artifact:
    """Make documents, with a column of numbers if given."""
    extra = None if quality is None else {"quality": [json.dumps(value) for value in quality]}
    artifact = make_documents(folder, rows, n_shards=n_shards, extra=extra)
    if quality is not None:
        for path in sorted((folder / "documents").iterdir()):
            table = pq.read_table(path)
            numbers = [json.loads(value) for value in table["quality"].to_pylist()]
            at = table.column_names.index("quality")
            write_shard(path, table.set_column(at, "quality", pa.array(numbers, pa.float64())))
    return artifact


def run(documents: Artifact, out: Path, **settings: Any) -> dict[str, Any]:
    out.mkdir()
    return deduplicate(
        DedupConfig(workers=1, **settings), {"documents": documents}, out, Ledger(None)
    )


def kept_paths(out: Path) -> list[str]:
    return sorted(row["path"] for row in kept_rows(out))


def report(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "pairs.parquet").to_pylist()


def words(seed: int, n: int = 120) -> list[str]:
    return [f"w{seed}x{at}" for at in range(n)]


def copy_of(text: list[str], changed: int) -> str:
    """Change words at the end: each costs one shingle, the first one five."""
    return " ".join([*text[: len(text) - changed], *(f"new{at}" for at in range(changed))])


def test_one_of_the_documents_of_a_url_stays(tmp_path: Path) -> None:
    rows = [
        ("crawl", "https://x.org/a", "the page as it was in spring"),
        ("crawl", "http://www.x.org/a/?utm_source=feed", "the page in autumn, other words"),
        ("files", "https://x.org/b", "another page"),
        ("files", "a", "no address at all"),
        ("files", "b", "no address either"),
    ]
    metrics = run(documents_in(tmp_path / "in", rows), tmp_path / "out")
    first, second = (document_id(*row[:2]) for row in rows[:2])
    (lost,) = rejected_rows(tmp_path / "out")
    assert (lost["id"], lost["detail"]) == (max(first, second), min(first, second))
    assert (lost["reason"], lost["value"], lost["threshold"]) == ("duplicate.url", 1.0, 1.0)
    assert metrics["dropped_between"] == [{"kept": "crawl", "dropped": "crawl", "docs": 1}]
    run(documents_in(tmp_path / "in2", rows), tmp_path / "off", urls=False)
    assert len(kept_rows(tmp_path / "off")) == 5


def test_what_goes_by_its_url_stands_for_nothing(tmp_path: Path) -> None:
    """A loses its URL to b; c, a near-copy of a, stays: nothing that is kept resembles it."""
    text = words(1)
    rows = [("s", "https://x.org/p", copy_of(text, 0)), ("s", "http://x.org/p", "short and other"),
            ("s", "c", copy_of(text, 2))]  # fmt: skip
    run(documents_in(tmp_path / "in", rows, [0.1, 0.9, 0.5]), tmp_path / "out")
    assert kept_paths(tmp_path / "out") == ["c", "http://x.org/p"]


def test_the_best_quality_stays_then_the_smallest_id(tmp_path: Path) -> None:
    text = words(2)
    rows = [("s", name, copy_of(text, at)) for at, name in enumerate("abcd")]
    ids = {name: document_id("s", name) for name in "abcd"}
    for number, (quality, best) in enumerate([
        ([0.2, 0.9, 0.4, None], "b"), ([None, None, None, 0.0], "d"),
        ([float("nan"), -3.0, None, -4.0], "b"),
        ([0.5] * 4, min(ids, key=ids.__getitem__)), ([None] * 4, min(ids, key=ids.__getitem__)),
    ]):  # fmt: skip
        out = tmp_path / f"out{number}"
        run(documents_in(tmp_path / f"in{number}", rows, quality), out)
        assert kept_paths(out) == [best]
        assert {row["detail"] for row in rejected_rows(out)} == {ids[best]}


def test_a_quality_that_is_no_number_is_refused(tmp_path: Path) -> None:
    documents = make_documents(tmp_path / "in", [("s", "a", "x")], extra={"quality": ["good"]})
    with pytest.raises(PunaError, match=r"'quality' .* holds string, not numbers"):
        run(documents, tmp_path / "out")


def test_the_report_names_exact_similarities(tmp_path: Path) -> None:
    text = words(3)  # 116 shingles
    rows = [("s", "a", copy_of(text, 0)), ("t", "near", copy_of(text, 3)),
            ("t", "exact", copy_of(text, 0).upper()), ("t", "far", copy_of(text, 60))]  # fmt: skip
    metrics = run(documents_in(tmp_path / "in", rows, [3, 2, 1, 0]), tmp_path / "out")
    ids = {path: document_id(source, path) for source, path, _ in rows}
    found = {row["dropped_id"]: row for row in report(tmp_path / "out")}
    assert set(found) == {ids["near"], ids["exact"]}
    assert found[ids["near"]]["similarity"] == 113 / 119
    assert found[ids["exact"]]["similarity"] == 1.0
    assert found[ids["near"]]["kept_id"] == ids["a"]
    assert found[ids["near"]]["kept_source"] == "s"
    assert found[ids["exact"]]["reason"] == "duplicate.exact"
    rejected = {row["id"]: row for row in rejected_rows(tmp_path / "out")}
    assert {id: row["cluster"] for id, row in found.items()} == {
        id: row["cluster"] for id, row in rejected.items()
    }
    assert metrics["dropped_between"] == [{"kept": "s", "dropped": "t", "docs": 2}]


def test_the_exact_similarity_decides_where_the_estimate_errs(tmp_path: Path) -> None:
    """Around the threshold, estimates err both ways; with verification no decision does."""
    rows, expected, n_errors = [], set(), 0
    for seed in range(40):
        text = words(100 + seed, 400)  # 396 shingles; k changed words leave 396 - k - ... common
        changed = 40 if seed % 2 else 47
        a, b = copy_of(text, 0), copy_of([*text[:-1], f"tail{seed}"], changed)
        sets = shingle_sets(texts_from([a, b]), np.ones(2, bool))
        (exact,) = similarities(np.array([[0, 1]]), sets)
        signatures = sign(texts_from([a, b]))
        n_errors += ((signatures[0] == signatures[1]).mean() >= 0.8) != (exact >= 0.8)
        rows += [("s", f"{seed}/a", a), ("s", f"{seed}/b", b)]
        expected |= {seed} if exact >= 0.8 else set()
    assert n_errors > 5
    assert 0 < len(expected) < 40
    run(documents_in(tmp_path / "in", rows), tmp_path / "out", cluster=0.8)
    assert {int(row["path"].partition("/")[0]) for row in rejected_rows(tmp_path / "out")} == (
        expected
    )


def test_chains(tmp_path: Path) -> None:
    """Each document is near to its neighbours in a chain only."""
    text = words(7, 204)  # 200 shingles; the first step changes 16 of them, the others 20
    rows = []
    for step in range(7):
        changed = [*(f"s{at}" for at in range(16 * step)), *text[16 * step :]]
        rows.append(("s", f"{step}", " ".join(changed)))
    rows.append(("s", "twin", rows[2][2].upper()))
    rows += [("s", "https://x.org/p", "one text"), ("s", "http://x.org/p", rows[5][2])]
    quality = [9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    run(documents_in(tmp_path / "in", rows, quality), tmp_path / "one")
    assert kept_paths(tmp_path / "one") == ["0", "https://x.org/p"]
    metrics = run(documents_in(tmp_path / "in2", rows, quality), tmp_path / "cut", chains=False)
    assert kept_paths(tmp_path / "cut") == ["0", "2", "4", "6", "https://x.org/p"]
    names = {document_id(source, path): path for source, path, _ in rows}
    found = {
        names[row["dropped_id"]]: (names[row["kept_id"]], row["similarity"])
        for row in report(tmp_path / "cut")
    }
    step = 180 / 220
    assert found == {
        "1": ("0", 184 / 216), "3": ("2", step), "5": ("4", step), "twin": ("2", 1.0),
        "http://x.org/p": ("https://x.org/p", None),
    }  # fmt: skip
    values = {row["path"]: row["value"] for row in rejected_rows(tmp_path / "cut")}
    assert values["3"] == step
    assert metrics["groups"]["largest"] == 8
    # The kept ones are known to the next run, and the chain goes on from each of them.
    run(documents_in(tmp_path / "in3", rows[:7], quality[:7]), tmp_path / "old", chains=False,
        write_index=True)  # fmt: skip
    new = [("t", path, text) for _, path, text in rows[:7]]
    run(documents_in(tmp_path / "in4", new), tmp_path / "new", chains=False,
        index=(str(tmp_path / "old"),))  # fmt: skip
    assert kept_paths(tmp_path / "new") == []
    with pytest.raises(ValueError, match="needs verify"):
        DedupConfig(chains=False, verify=False)


def test_an_index_keeps_what_it_knows_and_drops_what_duplicates_it(tmp_path: Path) -> None:
    text, other = words(4), words(5)
    old = [("a", "https://x.org/p", copy_of(text, 0)), ("a", "two", copy_of(other, 0))]
    run(documents_in(tmp_path / "in1", old), tmp_path / "one", write_index=True)
    new = [("b", "near", copy_of(text, 2)), ("b", "exact", copy_of(other, 0).title()),
           ("b", "http://www.x.org/p#1", "a later version"), ("a", "two", "changed since"),
           ("b", "fresh", copy_of(words(6), 0)), ("b", "fresh2", copy_of(words(6), 1))]  # fmt: skip
    metrics = run(
        documents_in(tmp_path / "in2", new, [9.0] * 6), tmp_path / "two",
        index=(str(tmp_path / "one"),), write_index=True,
    )  # fmt: skip
    ids = {path: document_id(source, path) for source, path, _ in [*old, *new]}
    found = {row["path"]: (row["reason"], row["detail"]) for row in rejected_rows(tmp_path / "two")}
    (own,) = [path for path in found if path.startswith("fresh")]
    assert found == {
        "near": ("duplicate.near", ids["https://x.org/p"]),
        "exact": ("duplicate.exact", ids["two"]),
        "http://www.x.org/p#1": ("duplicate.url", ids["https://x.org/p"]),
        "two": ("duplicate.id", ids["two"]),
        own: ("duplicate.near", min(ids["fresh"], ids["fresh2"])),
    }
    assert metrics["dropped_for_index"] == 4
    (near,) = [row for row in report(tmp_path / "two") if row["dropped_id"] == ids["near"]]
    assert (near["kept_source"], near["similarity"]) == ("a", 114 / 118)
    # A third run reads both, by the folder of the stage or of the index itself.
    third = [("c", "1", copy_of(words(6), 2)), ("c", "2", copy_of(text, 1)), ("c", "3", "a fresh")]
    run(
        documents_in(tmp_path / "in3", third), tmp_path / "three",
        index=(str(tmp_path / "one" / "index"), str(tmp_path / "two")),
    )  # fmt: skip
    assert kept_paths(tmp_path / "three") == ["3"]


def test_the_same_documents_against_their_own_index(tmp_path: Path) -> None:
    rows = [("s", f"{seed}", copy_of(words(seed, 30), 0)) for seed in range(50)]
    run(documents_in(tmp_path / "in", rows), tmp_path / "one", write_index=True)
    index = (str(tmp_path / "one"),)
    run(documents_in(tmp_path / "in2", rows), tmp_path / "two", index=index)
    assert {row["reason"] for row in rejected_rows(tmp_path / "two")} == {"duplicate.id"}
    assert not kept_rows(tmp_path / "two")
    moved = [("t", path, text) for _, path, text in rows]
    run(documents_in(tmp_path / "in3", moved), tmp_path / "three", index=index)
    assert len(rejected_rows(tmp_path / "three")) == 50
    assert {row["reason"] for row in rejected_rows(tmp_path / "three")} == {"duplicate.exact"}


def test_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    rows = [("s", f"{i}", copy_of(words(i % 5, 60), i // 5)) for i in range(20)]
    rows += [(f"t{i}", "same", "the same text in every source of this corpus") for i in range(4)]
    run(documents_in(tmp_path / "old", rows[::3]), tmp_path / "index", write_index=True)
    outs = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        out.mkdir()
        cfg = DedupConfig(workers=workers, index=(str(tmp_path / "index"),), write_index=True)
        documents = documents_in(tmp_path / f"in{workers}", rows, list(range(24)))
        deduplicate(cfg, {"documents": documents}, out, Ledger(None))
        outs.append(folder_bytes(out))
    assert outs[0] == outs[1]
    assert {name for name in outs[0] if "index" in name or "pairs" in name} == {
        "index/index.json", "index/manifest.json", "index/rows/part-00000.parquet",
        "index/rows/part-00001.parquet", "pairs.parquet",
    }  # fmt: skip


def test_damaged_and_foreign_indexes_are_refused(tmp_path: Path) -> None:
    rows = [("s", "a", "some text"), ("s", "b", "more text of another kind")]
    documents = documents_in(tmp_path / "in", rows)
    run(documents, tmp_path / "one", write_index=True)
    cfg = DedupConfig(index=(str(tmp_path / "one"),))
    before = external_state(cfg)
    record = tmp_path / "one" / "index" / "index.json"
    whole = record.read_text()
    cases = {
        '"n_permutations": 256': r"n_permutations is 256, not 128",
        '"n_docs": 7': r"2 rows, but 7 were written",
    }
    for change, message in cases.items():
        key = change.partition(":")[0]
        (line,) = [part for part in whole.replace("}", ",").split(",") if key in part]
        record.write_text(whole.replace(line.strip(), change))
        with pytest.raises(PunaError, match=message):
            run(documents, tmp_path / f"out{len(message)}", index=cfg.index)
    record.write_text("{")
    with pytest.raises(PunaError, match=r"index.json: damaged"):
        run(documents, tmp_path / "damaged", index=cfg.index)
    record.unlink()
    with pytest.raises(PunaError, match="holds no index"):
        run(documents, tmp_path / "gone", index=cfg.index)
    assert "content" not in before
    assert len(before["index"]) == 1
    assert "holds no index" in external_state(cfg)["unavailable"]


some_texts = st.lists(
    st.lists(st.sampled_from(["a", "bb", "c1", "d", "中", "!"]), max_size=25).map(" ".join),
    min_size=1, max_size=6,
)  # fmt: skip


@given(some_texts, st.data())
@settings(max_examples=60, deadline=None)
def test_sets_and_their_store(texts: list[str], data: st.DataObject) -> None:
    """Sets are those of plain Python, also from the file, of which only some rows were wanted."""
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts),
                                         max_size=len(texts))), bool)  # fmt: skip
    every = shingle_sets(texts_from(texts), np.ones(len(texts), bool))
    plain = []
    for text in texts:
        found = [word for word in text.split() if word != "!"]
        size = min(5, len(found))
        plain.append({tuple(found[i : i + size]) for i in range(len(found) - size + 1)} if found
                     else {text})  # fmt: skip
    pairs = np.array([(a, b) for a in range(len(texts)) for b in range(len(texts))])
    expected = [len(plain[a] & plain[b]) / len(plain[a] | plain[b]) for a, b in pairs]
    assert similarities(pairs, every).tolist() == expected
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows").mkdir()
        write_shard(folder / "rows" / shard_name(0), pa.table({"shingles": pack_sets(every)}))
        rows = np.flatnonzero(wanted)
        write_store(folder / "store", [(folder / "rows", rows), (folder / "rows", None)])
        stored = open_store(folder / "store")
        some = shingle_sets(texts_from(texts), wanted)
        assert stored.values.tolist() == [*some.values, *every.values]
        assert stored.starts.tolist() == [*some.starts, *(every.starts[1:] + some.starts[-1])]


def test_verified_links_connect_what_exact_similarities_connect() -> None:
    """All pairs that share a bucket, by brute force, against the links of the kernel."""
    from puna.data.kernels.components import components, link_buckets

    random = np.random.default_rng(5)
    texts = []
    for family in range(12):
        base = words(family, 80)
        for _ in range(8):
            copy = list(base)
            for at in random.integers(0, 80, random.integers(0, 5)):
                copy[at] = f"e{random.integers(1000)}"
            texts.append(" ".join(copy))
    batch = texts_from(texts)
    signatures, n = sign(batch), len(texts)
    keys = band_keys(signatures, 32)
    sets = shingle_sets(batch, np.ones(n, bool))
    nodes = np.repeat(np.arange(n), 32)
    order = np.lexsort([nodes, keys.ravel()])
    n_new = 70
    pairs, found = link_buckets(
        keys.ravel()[order], nodes[order], signatures[nodes[order]], n_bands=32, near=0.8,
        loose=0.5, sets=sets, n_new=n_new,
    )  # fmt: skip
    every = np.array([(a, b) for a in range(n_new) for b in range(a + 1, n)
                      if (keys[a] == keys[b]).any()])  # fmt: skip
    exact = similarities(every, sets)
    assert 5 < ((exact >= 0.8).sum()) < len(every)
    near = found >= 0.8
    assert similarities(pairs[near], sets).tolist() == found[near].tolist()
    assert (components(n, pairs[near]) == components(n, every[exact >= 0.8])).all()


def test_a_large_family_takes_no_quadratic_time() -> None:
    """20,000 near-copies in common buckets: each is compared with one, not with all."""
    from puna.data.kernels.components import components, link_buckets

    n = 20_000
    signatures = np.zeros((n, 128), np.uint32)
    signatures[:, 0] = np.arange(n)  # one value of their own, in the first band
    keys = band_keys(signatures, 32)[:, 1:].T.ravel()
    nodes = np.tile(np.arange(n), 31)
    start = time.process_time()
    pairs, found = link_buckets(
        keys, nodes, signatures[nodes], n_bands=32, near=0.8, loose=0.5
    )  # fmt: skip
    assert time.process_time() - start < 5  # all pairs of a bucket are 2e8
    assert (components(n, pairs) == 0).all()
    assert len(pairs) == n - 1
    assert (found == 127 / 128).all()
