"""Substring deduplication: against a suffix array over all texts."""

import itertools
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import resolve
from puna.data.engine.shards import list_shards, write_shard
from puna.data.kernels.buffers import texts_from
from puna.data.lines.kernels import fill_table
from puna.data.schema import document_id
from puna.data.substrings import SubstringsConfig, cut_substrings
from puna.data.substrings.compare import first_places
from puna.data.substrings.spans import without_spans
from puna.data.substrings.winnow import describe_blocks, find_blocks
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

NOTHING_DROPPED = {"max_share": 1, "min_left_bytes": 0}


def run(tmp_path, texts, name="out", n_shards=2, extra=None, **cfg):
    rows = [("web", f"{i:03}", one) if isinstance(one, str) else one for i, one in enumerate(texts)]
    documents = make_documents(tmp_path / f"{name}.in", rows, n_shards=n_shards, extra=extra)
    out = tmp_path / name
    out.mkdir()
    values = {"workers": 1, "border": "character", **NOTHING_DROPPED, **cfg}
    config = SubstringsConfig(**values)
    return out, cut_substrings(config, {"documents": documents}, out, Ledger(None))


def kept(out):
    return {row["path"]: row["text"] for row in kept_rows(out)}


def ids_in_order(n):
    return sorted(range(n), key=lambda i: document_id("web", f"{i:03}"))


def suffix_array(symbols):
    """Sort the suffixes (prefix doubling, Manber and Myers 1990)."""
    rank, step = np.unique(symbols, return_inverse=True)[1], 1
    while True:
        behind = np.full(len(rank), -1)
        behind[: max(len(rank) - step, 0)] = rank[step:]
        order = np.lexsort((behind, rank))
        is_new = np.ones(len(rank), bool)
        is_new[1:] = (np.diff(rank[order]) != 0) | (np.diff(behind[order]) != 0)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.cumsum(is_new) - 1
        if rank.max(initial=0) == len(order) - 1 or step > len(order):
            return order
        step *= 2


def common_prefixes(symbols, order):
    """Symbols that each suffix has in common with the one before it (Kasai et al. 2001)."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    common, n = np.zeros(len(order), np.int64), 0
    for i in range(len(order)):
        if place[i] == 0:
            n = 0
            continue
        j = order[place[i] - 1]
        while i + n < len(order) and j + n < len(order) and symbols[i + n] == symbols[j + n]:
            n += 1
        common[place[i]] = n
        n = max(n - 1, 0)
    return common


def duplicated(raws, size, within):
    """Mark the bytes of windows that stand in an earlier document, from a suffix array."""
    symbols, owner, local = [], [], []
    for number, raw in enumerate(raws):
        symbols += [*raw, 256 + number]  # no match goes across the end of a document
        owner += [number] * (len(raw) + 1)
        local += range(len(raw) + 1)
    symbols = np.array(symbols)
    order = suffix_array(symbols)
    common = common_prefixes(symbols, order)
    marked = [np.zeros(len(raw), bool) for raw in raws]
    group = []
    for k in range(len(order) + 1):
        if k == len(order) or common[k] < size:
            if len(group) > 1:
                first = min((owner[i], local[i]) for i in group)
                for i in group:
                    d, at = owner[i], local[i]
                    if d > first[0] or (within and at - first[1] >= size):
                        marked[d][at : at + size] = True
            group = []
        if k < len(order):
            group.append(int(order[k]))
    return marked


def without(raw, marked):
    """Cut marked bytes, whole characters only."""
    heads = [i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80] + [len(raw)]
    spans = itertools.pairwise(heads)
    return b"".join(raw[a:b] for a, b in spans if not marked[a:b].all()).decode()


def expected_texts(texts, size, within=False, max_share=1):
    """What the stage should keep and reject (path -> text, path -> share)."""
    order = ids_in_order(len(texts))
    raws = [texts[i].encode() for i in order]
    shares = {
        i: marked.mean() if len(marked) else 0
        for i, marked in zip(order, duplicated(raws, size, within), strict=True)
    }
    dropped = {i: share for i, share in shares.items() if share > max_share}
    order = [i for i in order if i not in dropped] + [i for i in order if i in dropped]
    raws = [texts[i].encode() for i in order]
    marked = duplicated(raws, size, within)
    left = {f"{i:03}": without(raw, one) for i, raw, one in zip(order, raws, marked, strict=True)
            if i not in dropped}  # fmt: skip
    return left, {f"{i:03}": share for i, share in dropped.items()}


pieces = st.lists(
    st.one_of(
        st.text("ab", max_size=12), st.text("aé京", max_size=6),
        st.sampled_from(["the llama rests. ", "ab" * 9, "a" * 20, "京都" * 4, "abcabcabd" * 3]),
    ),
    max_size=4,
).map("".join)  # fmt: skip


@given(st.lists(pieces, min_size=1, max_size=6), st.integers(8, 13), st.booleans(),
       st.sampled_from([1, 0.5]))  # fmt: skip
@example(["a" * 40, "a" * 30, "b" + "a" * 9], 8, True, 1)
@example(["a" * 40, "ab" * 20, "aba" * 12, "ba" * 30], 8, False, 0.5)
@example(["xabcdefgh", "ijklmnopy", "abcdefghijklmnop"], 8, False, 1)
@example(["abcdefghijklmnop", "qrstuvwxyz012345", "ghijklmnopqrstuv"], 9, False, 1)
@example(["0110100110010110" * 4, "1001011001101001" * 4], 16, False, 1)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_cut_is_what_a_suffix_array_finds(tmp_path_factory, texts, size, within, share):
    tmp_path = tmp_path_factory.mktemp("substrings")
    out, _ = run(tmp_path, texts, min_bytes=size, within=within, max_share=share,
                 keep="smallest_id")  # fmt: skip
    left, dropped = expected_texts(texts, size, within, share)
    assert kept(out) == left
    found = {row["path"]: row["value"] for row in rejected_rows(out)}
    assert found == {path: pytest.approx(value) for path, value in dropped.items()}


def test_random_documents_with_edited_copies_are_cut_as_the_suffix_array_says(tmp_path):
    rng = random.Random(3)
    base = ["".join(rng.choices("abcdef ", k=rng.randint(20, 400))) for _ in range(30)]
    texts = list(base)
    for _ in range(60):
        parts = []
        for _ in range(rng.randint(1, 5)):
            one = rng.choice(base)
            start = rng.randrange(len(one))
            parts.append(one[start : start + rng.randint(1, 120)])
            parts.append("".join(rng.choices("abc", k=rng.randint(0, 9))))
        texts.append("".join(parts))
    for within in (False, True):
        out, metrics = run(tmp_path, texts, f"w{within}", n_shards=3, min_bytes=24, within=within,
                           keep="smallest_id")  # fmt: skip
        left, _ = expected_texts(texts, 24, within)
        assert kept(out) == left
        n_cut = sum(len(a) for a in texts) - sum(map(len, left.values()))
        assert metrics["cut"]["web"]["bytes"] == n_cut > 3000


@given(st.text("abé", max_size=80), st.integers(8, 20))
@settings(max_examples=200, deadline=None)
def test_blocks_have_each_window_once_and_equal_windows_have_equal_fingerprints(text, size):
    raw = text.encode()
    texts = texts_from([text, "", text[1:]])
    blocks = find_blocks(texts, np.array([True, True, True]), size)
    windows = {}
    for d in (0, 2):
        at = int(texts.offsets[d])
        for b in range(blocks.bounds[d], blocks.bounds[d + 1]):
            assert blocks.starts[b] == at
            for i in range(at, at + int(blocks.n_windows[b])):
                window = bytes(texts.data[i : i + size])
                assert windows.setdefault(window, blocks.keys[b]) == blocks.keys[b]
            at += int(blocks.n_windows[b])
        assert at - int(texts.offsets[d]) == max(len(raw if d == 0 else text[1:].encode())
                                                 - size + 1, 0)  # fmt: skip
    assert (blocks.keys != 0).all()
    assert blocks.bounds[2] == blocks.bounds[1]


def test_blocks_are_few_and_a_short_period_is_one_row():
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghij ", k=100_000))
    texts = texts_from([text, "=" * 100_000])
    blocks = find_blocks(texts, np.ones(2, bool), 200)
    assert blocks.bounds[1] < 2.2 * 100_000 / 102  # expected density of 2 / (w + 1)
    table, used = np.zeros(1 << 19, np.uint64), np.zeros(1 << 19, np.int64)
    keys = np.unique(blocks.keys).view(np.int64)
    fill_table(table, used, keys, np.zeros(len(keys), np.int64))
    rows, ends = describe_blocks(texts, blocks, 200, table, used)
    assert ends[1] == blocks.bounds[1]
    assert ends[2] - ends[1] == 1
    assert rows[-1, 4:].tolist() == [1, 100_000 - 199]


def test_many_members_of_one_group_do_not_cost_pairs():
    def seconds(n):
        rng = np.random.default_rng(0)
        block = np.tile(np.arange(60, dtype=np.uint8), (n, 1))
        block[:, 50:] = rng.integers(0, 256, (n, 10))
        started = time.process_time()
        runs = first_places(np.zeros(n, np.int64), np.arange(n) << 30, block.ravel(),
                            np.arange(n + 1) * 60, 40)  # fmt: skip
        assert (runs[:, 3] < 60).sum() == n  # the first windows of all are those of the first one
        return time.process_time() - started

    seconds(10)
    assert seconds(40_000) < 40 * max(seconds(4_000), 0.01)


def test_borders_of_words_lines_and_characters():
    def cut(text, begin, end, border):
        raw = text.encode()
        spans = np.array([raw.index(begin.encode()), raw.index(end.encode()) + len(end.encode())])
        left, n_cut = without_spans(texts_from([text]), spans, np.array([0, 2]), border)
        return bytes(left.data).decode(), n_cut.tolist()

    assert cut("one two three four", "ne", "thre", "character") == ("oe four", [1])
    assert cut("one two three four", "ne", "thre", "word") == ("one three four", [1])
    assert cut("one two three four", "one", "three ", "word") == ("four", [1])
    assert cut("one two", "ne", "tw", "word") == ("one two", [0])
    assert cut("a\nb c\nd\ne", "\nb", "d\n", "line") == ("a\ne", [1])
    assert cut("a\nb c\nd\ne", "b", "c", "line") == ("a\nb c\nd\ne", [0])
    assert cut("x東京都y", "東", "京", "word") == ("x都y", [1])
    spans = np.array([1, 8])  # from the middle of one character to the middle of another
    left, _ = without_spans(texts_from(["é東éé"]), spans, np.array([0, 2]), "character")
    assert bytes(left.data).decode() == "éé"


PASSAGE = "Llamas are pack animals of the Andes and they hum when they are tired or worried."


def test_passages_stay_in_the_best_document_and_what_was_cut_is_said(tmp_path):
    texts = [f"Text number {i} {chr(97 + i) * 9} {PASSAGE} {chr(107 + i) * 9}" for i in range(5)]
    out, metrics = run(tmp_path, texts, min_bytes=60, border="word")
    first = ids_in_order(5)[0]
    assert [path for path, text in kept(out).items() if PASSAGE in text] == [f"{first:03}"]
    rows = {row["path"]: row for row in kept_rows(out)}
    cut = {(r["passages_cut"], r["passage_bytes_cut"]) for r in rows.values()}
    assert cut == {(0, 0), (1, len(PASSAGE) + 1)}
    assert rows["003"]["n_bytes"] == len(rows["003"]["text"])
    assert metrics["cut"] == {"web": {"docs": 4, "passages": 4, "bytes": 4 * (len(PASSAGE) + 1)}}
    (top,) = pq.read_table(out / "passages.parquet").to_pylist()
    assert (top["occurrences"], top["first_id"]) == (5, document_id("web", f"{first:03}"))
    assert top["excerpt"].strip() == PASSAGE
    assert top["n_bytes"] == len(PASSAGE) + 2
    longest = [text + " more" * (i == 3) for i, text in enumerate(texts)]
    out, _ = run(tmp_path, longest, "b", min_bytes=60, keep="longest")
    assert [path for path, text in kept(out).items() if PASSAGE in text] == ["003"]


def test_the_quality_column_decides_who_keeps(tmp_path):
    texts = [f"{i} {chr(97 + i) * 9} {PASSAGE}" for i in range(4)]
    rows = [("web", f"{i:03}", text) for i, text in enumerate(texts)]
    documents = make_documents(tmp_path / "in", rows, n_shards=2)
    for shard in list_shards(tmp_path / "in" / "documents"):
        table = pq.read_table(shard.path)
        quality = [0.9 if path == "002" else 0.1 for path in table["path"].to_pylist()]
        write_shard(shard.path, table.append_column("quality", pa.array(quality)))
    out = tmp_path / "out"
    out.mkdir()
    cfg = SubstringsConfig(workers=1, min_bytes=60, **NOTHING_DROPPED)
    cut_substrings(cfg, {"documents": documents}, out, Ledger(None))
    assert [path for path, text in kept(out).items() if PASSAGE in text] == ["002"]


def test_documents_of_which_too_little_is_left_are_dropped_as_they_were(tmp_path):
    texts = [f"{PASSAGE}{PASSAGE[::-1]}", f"x{PASSAGE}{PASSAGE[::-1]}y", "z" * 50 + PASSAGE]
    out, _ = run(tmp_path, texts, min_bytes=60, max_share=0.9, min_left_bytes=55, keep="longest")
    rows = {row["path"]: row for row in rejected_rows(out)}
    assert (rows["000"]["reason"], rows["000"]["value"], rows["000"]["threshold"]) == (
        "substring.mostly_duplicate", 1.0, 0.9)  # fmt: skip
    assert rows["000"]["text"] == texts[0]
    assert (rows["002"]["reason"], rows["002"]["value"], rows["002"]["threshold"]) == (
        "substring.emptied", 50, 55)  # fmt: skip
    assert kept(out) == {"001": texts[1]}


def test_a_passage_is_not_lost_with_a_rejected_document(tmp_path):
    common, rare = "c" * 30 + "d" * 200, PASSAGE
    texts = [common + "e" * 300, common + rare, "f" * 100 + rare]
    # 001 has most of its bytes from 000, and is the first with the rare passage
    out, _ = run(tmp_path, texts, min_bytes=60, max_share=0.5, keep="longest")
    assert {row["path"] for row in rejected_rows(out)} == {"001"}
    assert kept(out) == {"000": texts[0], "002": texts[2]}


def test_skipped_sources_neither_lose_nor_count(tmp_path):
    rows = [("code" if i else "web", f"{i}", f"{i}{PASSAGE}{i}") for i in range(3)]
    out, metrics = run(tmp_path, rows, min_bytes=60, skip_sources=["code"])
    assert kept(out) == {path: text for _, path, text in rows}
    assert metrics["passages"] == 0


def test_the_result_depends_neither_on_workers_nor_on_an_attempt_that_died(tmp_path, monkeypatch):
    texts = [f"Own text {i} {i * 7919} {PASSAGE} {i % 3} {PASSAGE[::-1]}" for i in range(40)]
    values = {"min_bytes": 60, "max_share": 0.95, "n_shards": 3}
    out, _ = run(tmp_path, texts, "one", **values)
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    other, _ = run(tmp_path, texts, "two", workers=2, **values)
    assert folder_bytes(out) == folder_bytes(other)
    with monkeypatch.context() as patch:
        patch.setattr("puna.data.substrings.stage.step_metrics", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, texts, "three", **values)
    rows = [("web", f"{i:03}", text) for i, text in enumerate(texts)]
    documents = make_documents(tmp_path / "in", rows, n_shards=3)
    cfg = SubstringsConfig(workers=1, border="character", min_bytes=60, max_share=0.95,
                           min_left_bytes=0)  # fmt: skip
    cut_substrings(cfg, {"documents": documents}, tmp_path / "three", Ledger(None))
    assert folder_bytes(out) == folder_bytes(tmp_path / "three")


def test_bad_settings_and_no_documents(tmp_path, monkeypatch):
    with pytest.raises(PunaError, match=r"data\.substrings.*min_bytes"):
        resolve({"name": "x", "data": {"substrings": {"min_bytes": 7}}})
    with pytest.raises(PunaError, match=r"data\.substrings: there is no document"):
        run(tmp_path, [])
    monkeypatch.setattr("puna.data.substrings.passes.PLACE", 600)
    with pytest.raises(PunaError, match=r"document [0-9a-f]{32} of .* has 600 bytes; at most 599"):
        run(tmp_path, ["x" * 600], "large")
