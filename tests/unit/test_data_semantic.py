"""Semantic deduplication: k-means, links, keepers, the stage, indexes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate
from puna.data.kernels.components import components
from puna.data.semantic import SemanticConfig, deduplicate_semantically
from puna.data.semantic.clusters import cosines, k_means, largest_step, nearest, quantise
from puna.data.semantic.links import choose_keepers, link_cluster
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

N_MEANINGS, DIM = 60, 32
FORMS = ("", "x", "y")
"""Every meaning has three words that share (almost) one vector."""


def word(meaning: int, form: int = 0) -> str:
    return f"w{meaning}{FORMS[form]}"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    rng = np.random.default_rng(0)
    words = [word(m, f) for m in range(N_MEANINGS) for f in range(len(FORMS))]
    meanings = rng.normal(size=(N_MEANINGS, DIM)).repeat(len(FORMS), 0)
    table = np.concatenate([np.zeros((1, DIM)), meanings + 0.05 * rng.normal(size=meanings.shape)])
    vocabulary = {"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"embeddings": table.astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    return folder


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
