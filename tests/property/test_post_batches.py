"""SFT batches: labels are exactly what the assistant says, conversations stay whole and apart."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.post.batches import Conversations, SftBatches, build_source, check_labels, encode_pairs
from puna.tokens.rows import pack_rows

SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PAD = 300


class ByteChat:
    """A tokenizer of bytes with Llama 3's chat format, written apart from the real one."""

    pad_id = PAD

    def encode_chat_with_mask(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        ids, mask = [256], [False]
        for message in messages:
            head = [257, *message["role"].encode(), 258, *b"\n\n"]
            body = [*message["content"].strip().encode(), 259]
            ids += head + body
            mask += [False] * len(head) + [message["role"] == "assistant"] * len(body)
        return ids, mask

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        pieces = [bytes([i]) if i < 256 else SPECIALS[i - 256].encode() for i in ids]
        return b"".join(pieces).decode()


def conversation(turns: list[tuple[str, str]], number: int) -> dict[str, Any]:
    messages = [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]
    return {"id": f"p{number}", "document_id": f"d{number}", "source": "s", "messages": messages}


texts = st.text(st.characters(codec="utf-8"), max_size=30)
conversations = st.lists(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3), min_size=1, max_size=12
).map(lambda all_turns: [conversation(turns, i) for i, turns in enumerate(all_turns)])


def make(pairs: list[dict], seq_len: int, batch: int, seed: int = 0) -> SftBatches | None:
    encoded, counts = encode_pairs(pairs, ByteChat(), seq_len)
    assert counts.n_in == counts.n_kept + sum(counts.rejected.values())
    return SftBatches(encoded, seq_len, batch, seed, PAD) if len(encoded) else None


@given(conversations, st.integers(20, 400), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_labels_decode_to_the_assistants_texts(
    pairs: list[dict], seq_len: int, batch: int, seed: int
) -> None:
    batches = make(pairs, seq_len, batch, seed)
    if batches is None:
        return
    messages_of = {pair["id"]: pair["messages"] for pair in pairs}
    checked = check_labels(batches, messages_of, ByteChat())
    assert checked["n_conversations"] >= 1
    assert checked["n_labels"] >= 1


@given(conversations, st.integers(20, 400), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_conversations_are_whole_and_apart(pairs: list[dict], seq_len: int, batch: int) -> None:
    batches = make(pairs, seq_len, batch)
    if batches is None:
        return
    expected = {}
    for pair in pairs:
        ids, mask = ByteChat().encode_chat_with_mask(pair["messages"])
        said = [token if is_said else -100 for token, is_said in zip(ids, mask, strict=True)]
        expected[pair["id"]] = (ids[:-1], said[1:])
    for step in range(3):
        whole = batches.batch(step, 0, 1)
        for row, told in enumerate(batches.lineage(step)):
            doc_ids = whole.doc_ids_BT[row]
            n_segments = len(told["segments"])
            assert sorted(set(doc_ids.tolist()) - {-1}) == list(range(n_segments))
            used = int((doc_ids >= 0).sum())
            assert (doc_ids[used:] == -1).all()
            assert (whole.labels_BT[row, used:] == -100).all()
            assert (whole.tokens_BT[row, used:] == PAD).all()
            assert (np.diff(doc_ids[:used]) >= 0).all()
            for segment, source in enumerate(told["segments"]):
                here = doc_ids == segment
                inputs, labels = expected[source["pair_id"]]
                assert whole.tokens_BT[row, here].tolist() == inputs
                assert whole.labels_BT[row, here].tolist() == labels
                assert whole.positions_BT[row, here].tolist() == list(range(len(inputs)))
                assert source["tokens"] == [0, len(inputs) + 1]


@given(conversations, st.integers(60, 200))
@settings(max_examples=40, deadline=None)
def test_each_epoch_holds_every_conversation_once(pairs: list[dict], seq_len: int) -> None:
    batches = make(pairs, seq_len, 1)
    if batches is None:
        return
    n_kept = len(batches.conversations)
    seen: dict[int, Counter[str]] = {}
    for step in range(batches.steps_of(3)):
        for segment in batches.lineage(step)[0]["segments"]:
            seen.setdefault(segment["epoch"], Counter())[segment["pair_id"]] += 1
    assert set(seen) == {0, 1, 2}
    for counts in seen.values():
        assert len(counts) == n_kept
        assert set(counts.values()) == {1}


@given(conversations, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_global_batch_is_the_same_for_any_world(pairs: list[dict], step: int) -> None:
    batches = make(pairs, 500, 12)
    assert batches is not None
    whole = batches.batch(step, 0, 1)
    for world in (2, 3, 4, 12):
        parts = [batches.batch(step, rank, world) for rank in range(world)]
        for name in ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def many(n: int) -> list[dict]:
    return [conversation([(f"What is {i}?" + "x" * (i % 17), f"It is {i}.")], i) for i in range(n)]


def test_batches_do_not_depend_on_what_was_asked_before_and_survive_the_disk() -> None:
    first = make(many(50), 160, 4)
    assert first is not None
    with tempfile.TemporaryDirectory() as folder:
        first.conversations.save(Path(folder))
        second = build_source(folder, 160, 4, 0, PAD)
        for step in (40, 3, 0, 41, 7):
            np.testing.assert_array_equal(
                first.batch(step, 0, 1).tokens_BT, second.batch(step, 0, 1).tokens_BT
            )
            assert first.lineage(step) == second.lineage(step)


def test_epochs_differ_and_seeds_differ() -> None:
    one, two = make(many(50), 160, 1, seed=1), make(many(50), 160, 1, seed=2)
    assert one is not None
    assert two is not None
    per_epoch = one.steps_of(1)
    assert one.members(0) != one.members(per_epoch)
    assert one.members(0) != two.members(0)


def test_rows_are_filled_well() -> None:
    batches = make(many(400), 512, 4)
    assert batches is not None
    assert batches.fill() > 0.95


def test_too_long_conversations_are_dropped_whole_and_counted() -> None:
    pairs = [conversation([("short?", "yes")], 0), conversation([("long?", "y" * 500)], 1),
             conversation([], 2)]  # fmt: skip
    encoded, counts = encode_pairs(pairs, ByteChat(), 100)
    assert counts.rejected == {"too_long": 1, "no_answer": 1}
    assert encoded.pair_ids.tolist() == ["p0"]


def test_a_conversation_that_just_fits_is_kept() -> None:
    pair = conversation([("q", "a")], 0)
    n_tokens = len(ByteChat().encode_chat_with_mask(pair["messages"])[0])
    assert len(encode_pairs([pair], ByteChat(), n_tokens - 1)[0]) == 1
    assert len(encode_pairs([pair], ByteChat(), n_tokens - 2)[0]) == 0


def test_wrong_labels_are_found() -> None:
    pairs = many(5)
    batches = make(pairs, 200, 2)
    assert batches is not None
    messages_of = {pair["id"]: pair["messages"] for pair in pairs}
    broken = np.array(batches.conversations.is_assistant)
    broken[np.flatnonzero(broken)[0] - 1] = True  # one token of the header is trained on
    data = Conversations(**{**batches.conversations.__dict__, "is_assistant": broken})
    wrong = SftBatches(data, 2000, 1, 0, PAD)  # all conversations in the first batch
    with pytest.raises(RuntimeError, match="the labels decode to"):
        check_labels(wrong, messages_of, ByteChat())


def test_world_must_divide_the_batch() -> None:
    batches = make(many(5), 200, 4)
    assert batches is not None
    with pytest.raises(PunaError, match="cannot be divided among 3 ranks"):
        batches.batch(0, 0, 3)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_packing_places_every_piece_once_within_capacity(lengths: list[int], window: int) -> None:
    members, offsets = pack_rows(lengths, 50, window)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    for start, end in itertools.pairwise(offsets):
        assert 0 < sum(lengths[i] for i in members[start:end]) <= 50


@pytest.mark.parametrize("length", [0, 11])
def test_packing_refuses_what_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length}"):
        pack_rows([5, length], 10)
