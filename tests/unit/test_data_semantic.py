"""Semantic deduplication: k-means, links, keepers, the stage, indexes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.engine.shards import write_shard
from puna.data.kernels.components import components
from puna.data.semantic import SemanticConfig, deduplicate_semantically
from puna.data.semantic.clusters import cosines, k_means, largest_step, nearest, quantise
from puna.data.semantic.links import choose_keepers, link_cluster
from puna.data.semantic.static import load_static
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

N_MEANINGS, DIM = 60, 32
FORMS = ("", "x", "y")
"""Every meaning has three words that share (almost) one vector."""


def word(meaning: int, form: int = 0) -> str:
    return f"w{meaning}{FORMS[form]}"


def write_embedder(folder: Path, words: list[str], vectors: np.ndarray) -> Path:
    """Write a static embedder that knows some words; their vectors: float [n_words, dim]."""
    folder.mkdir(exist_ok=True)
    vocabulary = {"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.concatenate([np.zeros((1, vectors.shape[1])), vectors])
    save_file({"embeddings": table.astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = [word(m, f) for m in range(N_MEANINGS) for f in range(len(FORMS))]
    meanings = rng.normal(size=(N_MEANINGS, DIM)).repeat(len(FORMS), 0)
    vectors = meanings + 0.05 * rng.normal(size=meanings.shape)
    return write_embedder(tmp_path_factory.mktemp("embedder"), words, vectors)


def some_text(seed: int, n: int = 30) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_MEANINGS, n).tolist()


def say(meanings: list[int], form: int = 0) -> str:
    return " ".join(word(m, form) for m in meanings)


def run(documents: Artifact, out, embedder, **values) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    cfg = SemanticConfig(**{"embedder": str(embedder), "workers": 1, **values})
    return deduplicate_semantically(cfg, {"documents": documents}, out, Ledger(None))


def test_paraphrases_are_dropped_for_the_document_that_is_kept(tmp_path, embedder):
    texts = [("a", f"p{k}", say(some_text(k))) for k in range(20)]
    texts += [("b", f"q{k}", say(some_text(k)[::-1], 1)) for k in range(5)]
    documents = make_documents(tmp_path / "in", texts, n_shards=3)
    out = tmp_path / "out"
    metrics = run(documents, out, embedder, threshold=0.95)
    assert sum(row["docs"] for row in metrics["dropped_between"]) == 5
    kept, rejected = kept_rows(out), rejected_rows(out)
    assert len(kept) == 20
    assert len(rejected) == 5
    ids = {row["id"]: row for row in [*kept, *rejected]}
    for row in rejected:
        keeper = ids[row["detail"]]
        assert row["reason"] == "semantic_duplicate"
        assert keeper["path"][1:] == row["path"][1:]
        assert keeper["id"] < row["id"]
        assert row["threshold"] == 0.95 <= row["value"] <= 1
    pairs = pq.read_table(out / "pairs.parquet").to_pylist()
    assert {(p["kept_id"], p["dropped_id"]) for p in pairs} == {
        (row["detail"], row["id"]) for row in rejected
    }


def test_the_result_does_not_depend_on_workers_or_shards_that_are_done(
    tmp_path, embedder, monkeypatch
):
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    texts = [("a", f"p{k}-{f}", say(some_text(k), f)) for k in range(40) for f in range(2)]
    documents = make_documents(tmp_path / "in", texts, n_shards=3)
    for name, n_workers in (("one", 1), ("two", 2)):
        run(documents, tmp_path / name, embedder, workers=n_workers, clusters=5, write_index=True)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_a_second_run_drops_nothing(tmp_path, embedder):
    texts = [("a", f"p{k}-{f}", say(some_text(k), f)) for k in range(10) for f in range(3)]
    documents = make_documents(tmp_path / "in", texts, n_shards=2)
    run(documents, tmp_path / "once", embedder, threshold=0.9)
    kept = [(row["source"], row["path"], row["text"]) for row in kept_rows(tmp_path / "once")]
    again = make_documents(tmp_path / "in2", kept)
    assert run(again, tmp_path / "twice", embedder, threshold=0.9)["kept_docs"] == len(kept) == 10


def test_the_best_of_a_group_stays(tmp_path, embedder):
    texts = [("a", f"p{f}", say(some_text(1), f)) for f in range(3)]
    documents = make_documents(tmp_path / "in", texts)
    path = tmp_path / "in" / "documents" / "part-00000.parquet"
    table = pq.read_table(path)
    best = table["path"].to_pylist().index("p1")
    quality = [float("nan"), 0.1, 0.1]
    quality[best] = 0.9
    write_shard(path, table.append_column("quality", pa.array(quality)))
    run(documents, tmp_path / "out", embedder, threshold=0.9)
    assert [row["path"] for row in kept_rows(tmp_path / "out")] == ["p1"]


def test_texts_without_a_known_word_are_never_duplicates(tmp_path, embedder):
    documents = make_documents(tmp_path / "in", [("a", f"p{k}", "nothing known") for k in range(3)])
    assert run(documents, tmp_path / "out", embedder)["kept_docs"] == 3


def test_an_index_tells_later_runs_what_was_kept(tmp_path, embedder):
    first = make_documents(
        tmp_path / "in1", [("a", f"p{k}", say(some_text(k))) for k in range(8)], n_shards=2
    )
    run(first, tmp_path / "out1", embedder, write_index=True)
    later = [("b", f"q{k}", say(some_text(k), 1)) for k in range(4, 12)]
    second = make_documents(tmp_path / "in2", [*later, ("b", "r", say(some_text(11), 2))])
    out = tmp_path / "out2"
    metrics = run(second, out, embedder, index=(str(tmp_path / "out1"),), write_index=True)
    assert metrics["dropped_for_index"] == 4
    known = {row["id"]: row["path"] for row in kept_rows(tmp_path / "out1")}
    lost = {row["path"]: row["detail"] for row in rejected_rows(out)}
    assert {path: known[lost[path]] for path in ("q4", "q7")} == {"q4": "p4", "q7": "p7"}
    assert metrics["kept_docs"] == 4
    both = (str(tmp_path / "out1"), str(out / "index"))
    third = make_documents(tmp_path / "in3", [("c", "s", say(some_text(9), 2))])
    assert run(third, tmp_path / "out3", embedder, index=both)["kept_docs"] == 0
    with pytest.raises(PunaError, match="passages is 4, not 2"):
        run(third, tmp_path / "out4", embedder, index=both, passages=2)
    (tmp_path / "out1" / "index" / "index.json").write_text("{")
    with pytest.raises(PunaError, match="damaged"):
        run(third, tmp_path / "out5", embedder, index=both)


def test_wrong_embedders_are_refused(tmp_path, embedder):
    documents = make_documents(tmp_path / "in", [("a", "p", "w1")])
    with pytest.raises(PunaError, match="holds no embedder") as caught:
        run(documents, tmp_path / "out", tmp_path / "missing")
    assert "puna data embedder distil" in caught.value.fix
    with pytest.raises(PunaError, match="has the digest"):
        run(documents, tmp_path / "out", embedder, digest="0" * 32)
    broken = tmp_path / "broken"
    shutil.copytree(embedder, broken)
    save_file({"embeddings": np.zeros((3, 4), np.float32)}, broken / "model.safetensors")
    with pytest.raises(PunaError, match=r"shape \(3, 4\) for 181 tokens"):
        run(documents, tmp_path / "out", broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(PunaError, match="is damaged"):
        run(documents, tmp_path / "out", broken)


def test_large_clusters_are_split(tmp_path, embedder):
    texts = [("a", f"p{k}-{f}", say(some_text(k), f)) for k in range(60) for f in range(2)]
    documents = make_documents(tmp_path / "in", texts)
    metrics = run(documents, tmp_path / "out", embedder, max_cluster=20, probes=1)
    assert metrics["n_clusters"] > 6
    assert metrics["largest_cluster"] <= 20
    assert metrics["kept_docs"] < 70


def test_model2vec_weights_and_mapping_are_used(tmp_path, embedder):
    folder = tmp_path / "mapped"
    shutil.copytree(embedder, folder)
    table = load_static(embedder).table
    weights = np.linspace(1, 2, len(table))
    mapping = np.arange(len(table))[::-1].copy()
    tensors = {"embeddings": table[mapping], "mapping": mapping, "weights": weights}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    expected = table * weights[:, None].astype(np.float32)
    np.testing.assert_allclose(load_static(folder).table, expected, rtol=1e-6)


vectors_of = st.integers(0, 2**32 - 1).map(
    lambda seed: quantise(np.random.default_rng(seed).normal(size=(30, 6)))
)


@pytest.mark.parametrize("dim", [8, 384, 1040, 1041, 4096])
def test_products_of_quantised_vectors_are_exact_in_float32(dim):
    step = largest_step(dim)
    assert step <= 127
    assert dim * step**2 < 2**24
    full = np.full((2, dim), step, np.int8)
    assert cosines(full, full).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    rng = np.random.default_rng(dim)
    vectors = quantise(rng.normal(size=(20, dim)))
    assert np.abs(vectors).max() == step
    wide = vectors.astype(np.int64)
    squares = (wide**2).sum(1)
    expected = (wide @ wide.T) / np.sqrt(squares[:, None] * squares[None, :])
    np.testing.assert_array_equal(cosines(vectors, vectors), expected)


def test_quantised_cosines_are_near():
    vectors = np.random.default_rng(1).normal(size=(100, 256))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    got = cosines(quantise(vectors), quantise(vectors))
    assert np.abs(got - unit @ unit.T).max() < 0.003


@settings(deadline=None, max_examples=25)
@given(vectors_of, st.randoms())
def test_k_means_does_not_depend_on_the_order(vectors, random):
    order = list(range(len(vectors)))
    random.shuffle(order)
    first = k_means(vectors, 5, seed=3, n_iterations=4)
    np.testing.assert_array_equal(first, k_means(vectors[order], 5, seed=3, n_iterations=4))
    assert len(first) <= 5
    assert len(np.unique(first, axis=0)) == len(first)


def test_k_means_finds_separate_clusters():
    rng = np.random.default_rng(2)
    centres = np.eye(8)[:4]
    points = quantise(centres.repeat(50, 0) + 0.05 * rng.normal(size=(200, 8)))
    found = [k_means(points, 4, seed=seed, n_iterations=20) for seed in range(8)]
    labels = [nearest(points, one, 1)[0][:, 0] for one in found]
    best = max(labels, key=lambda one: len(set(one.tolist())))
    assert [len(set(part)) for part in best.reshape(4, 50).tolist()] == [1, 1, 1, 1]


@settings(deadline=None, max_examples=40)
@given(vectors_of, st.floats(0.3, 0.99), st.integers(0, 30))
def test_links_connect_what_all_pairs_connect(vectors, threshold, n_new):
    nodes = np.arange(len(vectors))
    edges, found = link_cluster(nodes, vectors, threshold=threshold, n_new=n_new)
    likeness = cosines(vectors, vectors)
    a, b = np.nonzero(np.triu(likeness >= threshold, 1))
    new = a < n_new
    expected = components(len(nodes), np.stack([a[new], b[new]], 1))
    np.testing.assert_array_equal(components(len(nodes), edges), expected)
    assert (found >= threshold).all()
    np.testing.assert_allclose(found, likeness[edges[:, 0], edges[:, 1]], rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(vectors_of, st.floats(0.3, 0.99), st.integers(1, 30))
def test_what_is_dropped_is_like_what_it_is_dropped_for(vectors, threshold, n_new):
    nodes = np.concatenate([np.arange(n_new, 30), np.arange(n_new)])  # of the index first
    keeper, found = choose_keepers(nodes, vectors, threshold=threshold, n_new=n_new, chains=False)
    likeness = cosines(vectors, vectors)
    at = {node: k for k, node in enumerate(nodes)}
    dropped = keeper != nodes
    assert not dropped[: 30 - n_new].any()
    kept_nodes = set(nodes[~dropped])
    for k in np.flatnonzero(dropped):
        assert keeper[k] in kept_nodes
        assert likeness[k, at[keeper[k]]] == pytest.approx(found[k])
        assert found[k] >= threshold
    new = np.array([k for k in np.flatnonzero(~dropped) if nodes[k] < n_new], np.int64)
    others = likeness[np.ix_(new, np.flatnonzero(~dropped))]
    assert (others >= threshold - 1e-12).sum() <= len(new)  # each with itself only


def test_a_chain_keeps_one_or_several():
    angles = np.deg2rad([0, 20, 40])
    vectors = quantise(np.stack([np.cos(angles), np.sin(angles)], 1))
    near = {"threshold": 0.9, "n_new": 3}
    nodes = np.arange(3)
    assert choose_keepers(nodes, vectors, chains=True, **near)[0].tolist() == [0, 0, 0]
    assert choose_keepers(nodes, vectors, chains=False, **near)[0].tolist() == [0, 0, 2]
