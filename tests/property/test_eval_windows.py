"""Windows of long documents: every token is scored exactly once, with the stated context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.tokens.windows import document_windows, pack_pieces

lengths_overlaps = st.tuples(st.integers(1, 120), st.integers(1, 30)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(0, pair[1] - 1))
)


@given(lengths_overlaps)
@settings(max_examples=150, deadline=None)
def test_each_token_after_the_first_is_scored_once(case: tuple[int, int, int]) -> None:
    n_tokens, seq_len, overlap = case
    document = np.arange(1000, 1000 + n_tokens)
    scored = []
    for number, piece in enumerate(document_windows(document, seq_len, overlap)):
        assert 1 <= len(piece.inputs) == len(piece.labels) <= seq_len
        at = np.flatnonzero(piece.labels != -100)
        assert (piece.labels[at] == piece.inputs[at] + 1).all()
        assert len(at) == at[-1] - at[0] + 1
        if number:
            assert at[0] == min(overlap, len(scored))
        scored += piece.labels[at].tolist()
    assert scored == document[1:].tolist()


def test_the_rule_by_hand() -> None:
    pieces = list(document_windows(np.arange(10), 4, 2))
    assert [piece.inputs.tolist() for piece in pieces] == [
        [0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8],
    ]  # fmt: skip
    assert [piece.labels.tolist() for piece in pieces] == [
        [1, 2, 3, 4], [-100, -100, 5, 6], [-100, -100, 7, 8], [-100, -100, 9],
    ]  # fmt: skip


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_impossible_overlap_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        list(document_windows(np.arange(10), 4, overlap))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 4), st.integers(4, 16))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_label_once(
    lengths: list[int], rows_per_batch: int, seq_len: int
) -> None:
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    pieces = [piece for doc in documents for piece in document_windows(doc, seq_len, 1)]
    labels: list[int] = []
    for batch in pack_pieces(pieces, seq_len, rows_per_batch, pad_id=7):
        assert batch.tokens_BT.shape[0] <= rows_per_batch
        assert batch.tokens_BT.shape[1] == seq_len
        scored = batch.labels_BT != -100
        assert (batch.labels_BT[scored] == batch.tokens_BT[scored] + 1).all()
        assert (batch.doc_ids_BT[scored] >= 0).all()
        labels += batch.labels_BT[scored].tolist()
    assert sorted(labels) == sorted(token for doc in documents for token in doc[1:].tolist())
