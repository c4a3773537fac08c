"""Near-duplicates: no pair of a bucket is lost, and a second pass drops nothing."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.core.artifact import write_record
from puna.core.ledger import Ledger
from puna.data.dedup import DedupConfig, deduplicate
from puna.data.kernels.components import components, link_buckets
from puna.data.kernels.minhash import band_keys
from puna.data.testing import Artifact, kept_rows, make_documents, rejected_rows

N_VALUES, N_BANDS, NEAR, LOOSE = 8, 4, 0.75, 0.5


def members(signatures):
    """The rows of the bucket relation, as the engine orders them."""
    keys = band_keys(signatures, N_BANDS)
    rows = sorted(
        (int(keys[node, band]), node) for node in range(len(keys)) for band in range(N_BANDS)
    )
    buckets = np.array([row[0] for row in rows], np.int64)
    nodes = np.array([row[1] for row in rows], np.int64)
    return buckets, nodes


@given(st.lists(st.lists(st.integers(0, 2), min_size=N_VALUES, max_size=N_VALUES), min_size=2,
                max_size=14))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_links_connect_what_all_pairs_of_the_buckets_connect(values):
    signatures = np.array(values, np.uint32)
    buckets, nodes = members(signatures)
    pairs, similarities = link_buckets(
        buckets, nodes, signatures[nodes], n_bands=N_BANDS, near=NEAR, loose=LOOSE
    )
    n = len(signatures)
    similarity = (signatures[:, None] == signatures[None]).mean(2)
    for (a, b), found in zip(pairs, similarities, strict=True):
        assert a < b
        assert found == similarity[a, b] >= LOOSE
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    shared = [
        (a, b) for a in range(n) for b in range(a + 1, n)
        if any((signatures[a, 2 * k : 2 * k + 2] == signatures[b, 2 * k : 2 * k + 2]).all()
               for k in range(N_BANDS))
    ]  # fmt: skip
    for threshold in (NEAR, LOOSE):
        every = [pair for pair in shared if similarity[pair] >= threshold]
        expected = components(n, np.array(every, np.int64).reshape(-1, 2))
        found = components(n, pairs[similarities >= threshold])
        assert (found == expected).all()


words = st.sampled_from([f"word{i}" for i in range(40)])
base_texts = st.lists(st.lists(words, min_size=12, max_size=30), min_size=2, max_size=5)
edits = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 29), words), max_size=8)


@given(base_texts, edits)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_second_pass_drops_nothing_and_keepers_are_kept(bases, changes):
    texts = [list(base) for base in bases] + [list(bases[0])]
    for which, where, word in changes:  # near-duplicates of one of the base texts
        copy = list(bases[which % len(bases)])
        copy[where % len(copy)] = word
        texts.append(copy)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = [("s", f"p{i}", " ".join(text)) for i, text in enumerate(texts)]
        documents = make_documents(root / "in", rows, n_shards=2, stage="data.filter")
        first, second = root / "first", root / "second"
        cfg = DedupConfig(workers=1)
        first.mkdir()
        second.mkdir()
        metrics = deduplicate(cfg, {"documents": documents}, first, Ledger(None))
        write_record(
            first, {"stage": "data.dedup", "fingerprint": "x", "config": {}, "metrics": {}}
        )
        kept = kept_rows(first)
        assert len(kept) == metrics["groups"]["n"]
        ids = {row["id"] for row in kept}
        for row in rejected_rows(first):
            assert row["reason"] in ("duplicate.exact", "duplicate.near")
            assert row["detail"] in ids
            assert row["value"] >= row["threshold"]
        again = deduplicate(cfg, {"documents": Artifact(first)}, second, Ledger(None))
        assert again["kept_docs"] == len(kept)
        assert not rejected_rows(second)
