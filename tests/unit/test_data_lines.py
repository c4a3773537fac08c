"""Line deduplication, lines that repeat themselves, outlier words: against plain Python."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import resolve
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.normal_words import ASCII, LOWER, most_words, split_words
from puna.data.lines import LinesConfig, rewrite_lines
from puna.data.lines.kernels import count_keys, fold_table, scan_lines
from puna.data.lines.tokens import N_BUCKETS, count_tokens, divergence, log_distribution
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

ONLY_LINES = {"ngram_words": 0, "kl_max_nats": 0, "min_left_bytes": 0}


def run(tmp_path, texts, name="out", n_shards=2, **cfg):
    rows = [("web", f"{i:03}", one) if isinstance(one, str) else one for i, one in enumerate(texts)]
    documents = make_documents(tmp_path / f"{name}.in", rows, n_shards=n_shards)
    out = tmp_path / name
    out.mkdir()
    settings = {"workers": 1, **ONLY_LINES, **cfg}
    return out, rewrite_lines(LinesConfig(**settings), {"documents": documents}, out, Ledger(None))


def kept(out):
    return {row["path"]: row["text"] for row in kept_rows(out)}


def words(text):
    size = len(text.encode())
    normal, bounds = np.empty(2 * size + 2, np.uint8), np.empty(most_words(size) + 1, np.int64)
    places = np.empty((most_words(size), 2), np.int64)
    hashes = np.empty(most_words(size), np.uint64)
    batch = texts_from([text])
    n = split_words(batch.data, 0, size, ASCII, LOWER, normal, bounds, places, hashes)
    raw = text.encode()
    shown = [bytes(normal[bounds[w] : bounds[w + 1] - 1]).decode() for w in range(n)]
    return shown, [raw[a:b].decode() for a, b in places[:n]], hashes[:n]


@given(st.text(alphabet="aB9_ .,-\n\tÉßжЖ“”—–…·\u00a0", max_size=60))
@settings(max_examples=200, deadline=None)
def test_words_are_those_of_a_regular_expression(text):
    shown, places, hashes = words(text)
    raw = re.findall(r"[a-zA-Z0-9Ééßжж Ж]+".replace(" ", ""), text)
    assert places == raw
    assert shown == [word.lower() for word in raw]
    assert len(set(hashes.tolist())) == len(set(shown))


def test_words_of_scripts_without_spaces_and_of_other_lengths():
    assert words("東京 ab京c")[0] == ["東", "京", "ab", "京", "c"]
    assert words("ΆΛΦΑ ὍΜΗΡΟΣ 𝒳y")[0] == ["άλφα", "ὅμηροσ", "𝒳y"]
    assert words("Ⱥ")[0] == ["Ⱥ"]  # its lower case is longer in UTF-8
    assert words("")[0] == []


def plain(texts, max_count, bucket_docs, keep_first):
    """Line deduplication in a few lines of Python; documents in the order of the dataset."""
    counts, firsts = Counter(), {}
    for node, text in enumerate(texts):
        for line in text.splitlines():
            key = (node // bucket_docs, " ".join(line.split()))
            counts[key] += 1
            firsts.setdefault(key, node)
    result = []
    seen = set()
    for node, text in enumerate(texts):
        left = []
        for line in text.splitlines(keepends=True):
            key = (node // bucket_docs, " ".join(line.split()))
            if key[1] and counts[key] > max_count and not (keep_first and key not in seen):
                continue
            seen.add(key)
            left.append(line)
        result.append("".join(left))
    return result


@given(
    st.lists(st.lists(st.sampled_from(["a b", " a  b ", "c", "", "d e", "\t", "f"]), max_size=6),
             min_size=1, max_size=8),
    st.integers(1, 4), st.integers(1, 8), st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_lines_are_cut_as_plain_python_cuts_them(tmp_path_factory, docs, max_count, bucket, first):
    tmp_path = tmp_path_factory.mktemp("lines")
    texts = ["\n".join(lines) for lines in docs]
    out, _ = run(tmp_path, texts, max_count=max_count, bucket_docs=bucket, keep_first=first)
    given_rows = kept_rows(tmp_path / "out.in")
    expected = plain([row["text"] for row in given_rows], max_count, bucket, first)
    found = kept(out)
    assert [found[row["path"]] for row in given_rows] == expected


def test_lines_above_the_count_go_and_what_was_cut_is_said(tmp_path):
    seven = [f"Accept  all\nown {i}\n" for i in range(7)]
    out, metrics = run(tmp_path, [*seven, *(f"six\nmine {i}" for i in range(6))])
    assert set(kept(out).values()) == {f"own {i}\n" for i in range(7)} | {
        f"six\nmine {i}" for i in range(6)
    }
    rows = {row["path"]: row for row in kept_rows(out)}
    assert (rows["000"]["lines_cut"], rows["000"]["bytes_cut"]) == (1, len("Accept  all\n"))
    assert rows["000"]["n_bytes"] == len("own 0\n")
    assert rows["012"]["lines_cut"] == 0
    assert metrics["cut"] == {"web": {"docs": 7, "lines": 7, "ngram_lines": 0, "bytes": 84}}
    (top,) = metrics["top_lines"]
    assert (top["text"], top["n"], top["unit"]) == ("Accept  all", 7, "line")
    assert metrics["frequent_lines"] == 1


def test_what_makes_no_difference_is_a_setting(tmp_path):
    texts = [f"Page {i} of 9\nbody {i}{'x' * i}" for i in range(4)]
    untouched, _ = run(tmp_path, texts, "a", max_count=3)
    assert sum("Page" in text for text in kept(untouched).values()) == 4
    out, _ = run(tmp_path, texts, "b", max_count=3, ignore=["digits"])
    assert not any("Page" in text for text in kept(out).values())
    mixed = ["ABC", "abc", "Abc", "a bc"]
    out, _ = run(tmp_path, mixed, "c", max_count=2, ignore=["case", "space"])
    assert sorted(kept(out).values()) == ["", "", "", "a bc"]
    out, _ = run(tmp_path, ["x  y"] * 2 + ["x y"], "d", max_count=2, ignore=[])
    assert sorted(kept(out).values()) == ["x  y", "x  y", "x y"]


def test_short_lines_blank_lines_and_skipped_sources_stay(tmp_path):
    texts = [f"}}\n\n\nlonger\nown {i}" for i in range(3)]
    out, _ = run(tmp_path, texts, "a", max_count=2, min_bytes=2)
    assert sorted(kept(out).values()) == [f"}}\n\n\nown {i}" for i in range(3)]
    texts = [f"\u00a0\n\u3000 \u200b\nown{nbsp}{i}" for i, nbsp in enumerate(" \u00a0\u3000")]
    for ignore in ([], ["space"]):  # such lines look blank, so they are
        out, metrics = run(tmp_path, texts, f"c{len(ignore)}", max_count=1, ignore=ignore)
        assert (sorted(kept(out).values()), metrics["frequent_lines"]) == (sorted(texts), 0)
    out, _ = run(tmp_path, ["a\u00a0b", "a b"], "nbsp", max_count=1)
    assert set(kept(out).values()) == {""}
    rows = [("code" if i else "web", f"{i}", "same\n") for i in range(4)]
    out, metrics = run(tmp_path, rows, "b", max_count=2, skip_sources=["code"])
    assert set(kept(out).values()) == {"same\n"}  # the skipped ones do not count either
    assert metrics["frequent_lines"] == 0


def test_paragraphs(tmp_path):
    texts = [f"\none\ntwo\n\n\nfree {i}\none" for i in range(3)]
    out, metrics = run(tmp_path, texts, "a", max_count=2, units=["paragraph"])
    assert sorted(kept(out).values()) == [f"\nfree {i}\none" for i in range(3)]
    assert metrics["top_lines"][0]["text"] == "one\ntwo"
    assert metrics["top_lines"][0]["unit"] == "paragraph"
    out, metrics = run(tmp_path, texts, "b", max_count=4, units=["paragraph", "line"])
    assert sorted(kept(out).values()) == [f"\ntwo\n\n\nfree {i}\n" for i in range(3)]
    assert metrics["top_lines"][0]["n"] == 6  # counted over both documents and paragraphs


def test_documents_with_too_little_left_are_dropped_as_they_were(tmp_path):
    texts = [*("menu\nab" for _ in range(3)), "tiny"]
    out, _ = run(tmp_path, texts, max_count=2, min_left_bytes=3)
    dropped = rejected_rows(out)
    assert [row["text"] for row in kept_rows(out)] == ["tiny"]  # nothing was cut from it
    assert {(r["reason"], r["value"], r["threshold"]) for r in dropped} == {("lines.emptied", 0, 3)}
    assert {row["text"] for row in dropped} == {"menu\nab"}
    assert {row["lines_cut"] for row in dropped} == {2}


def test_long_lines_that_repeat_themselves_are_cut(tmp_path):
    log = "ERROR connection to host refused retrying now " * 12
    prose = " ".join(f"word{i}" for i in range(60))
    out, metrics = run(tmp_path, [f"{prose}\n{log}\nend"], ngram_words=5, line_coverage=0.5)
    (row,) = kept_rows(out)
    assert row["text"] == f"{prose}\nend"
    assert (row["lines_cut"], row["ngram_lines_cut"]) == (1, 1)
    assert metrics["cut"]["web"]["ngram_lines"] == 1
    short, _ = run(tmp_path, [f"{prose}\n{log}\nend"], "b", ngram_words=5, line_min_bytes=2000)
    assert log in kept_rows(short)[0]["text"]


def test_documents_that_repeat_themselves_are_dropped_with_the_share(tmp_path):
    text = "\n".join(["a b c d e f"] * 4)
    out, _ = run(tmp_path, [text], ngram_words=5, doc_coverage=0.7)
    (row,) = rejected_rows(out)
    assert (row["reason"], row["value"]) == ("lines.ngram_coverage", pytest.approx(18 / 24))


def token_reference(counts, q, prior):
    n = sum(counts.values())
    p = {t: (counts.get(t, 0) + prior * q[t]) / (n + prior) for t in range(N_BUCKETS)}
    return sum(value * math.log(value / q[t]) for t, value in p.items())


def test_divergence_is_that_of_the_definition():
    corpus = texts_from(["the cat sat on the mat and the dog", "the end of the story"])
    log_q = log_distribution(count_tokens(corpus, np.zeros(2, np.int64), 1))
    text = "the cat zzz zzz yyy The"
    tokens = count_tokens(texts_from([text]), np.zeros(1, np.int64), 1)[0]
    counts = {int(t): int(tokens[t]) for t in np.flatnonzero(tokens)}
    assert sum(counts.values()) == 6
    nats, n_words = divergence(texts_from([text, text]), np.array([0, -1]), log_q, 10)
    expected = token_reference(counts, np.exp(log_q[0]), 10)
    assert nats.tolist() == [pytest.approx(expected, rel=1e-9), 0]
    assert n_words.tolist() == [6, 0]


def test_outliers_of_their_own_source_are_dropped(tmp_path):
    english = " ".join(f"the house of number {i % 20} is on the hill" for i in range(40))
    noise = " ".join(f"qx{i}zz" for i in range(200))
    rows = [("web", f"{i}", f"{english} {i}") for i in range(20)]
    rows += [("web", "noise", noise), ("other", "fine", noise), ("web", "short", "qx1zz " * 9)]
    out, metrics = run(tmp_path, rows, kl_max_nats=1.5, kl_min_words=50)
    (row,) = rejected_rows(out)
    assert (row["path"], row["source"], row["reason"]) == ("noise", "web", "lines.kl_outlier")
    assert row["value"] > row["threshold"] == 1.5
    assert metrics["sources_measured"] == ["other", "web"]


def test_counts_of_a_batch_stand_with_the_document_that_has_the_line_first():
    texts = texts_from(["a\nb\na", "b\nc", ""])
    lines = scan_lines(texts, np.zeros(3, np.int64), np.ones(3, bool), fold_table(False, False),
                       squeeze=True, min_bytes=1)  # fmt: skip
    keys, counts, ends = count_keys(lines.keys, lines.doc_lines)
    assert counts.tolist() == [2, 2, 1]
    assert ends.tolist() == [0, 2, 3, 3]
    assert len(set(keys.tolist())) == 3


def test_the_result_depends_neither_on_workers_nor_on_an_attempt_that_died(tmp_path, monkeypatch):
    texts = [f"menu\nown text number {i}\nfoot {i % 3}\n" * (1 + i % 2) for i in range(60)]
    settings = {"max_count": 3, "kl_max_nats": 9, "n_shards": 3}
    out, _ = run(tmp_path, texts, "one", **settings)
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    other, _ = run(tmp_path, texts, "two", workers=2, **settings)
    assert folder_bytes(out) == folder_bytes(other)
    rows = [("web", f"{i:03}", text) for i, text in enumerate(texts)]
    documents = make_documents(tmp_path / "in", rows, n_shards=3)
    again = tmp_path / "three"
    again.mkdir()
    cfg = LinesConfig(**{"workers": 1, **ONLY_LINES, "max_count": 3, "kl_max_nats": 9})
    with monkeypatch.context() as patch:
        patch.setattr("puna.data.lines.stage.step_metrics", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rewrite_lines(cfg, {"documents": documents}, again, Ledger(None))
    rewrite_lines(cfg, {"documents": documents}, again, Ledger(None))
    assert folder_bytes(out) == folder_bytes(again)


def test_running_it_twice_cuts_no_more(tmp_path):
    texts = [f"menu\nrow {i // 4}\nown {i}\n" for i in range(12)]
    out, _ = run(tmp_path, texts, "a", max_count=3)
    once = kept(out)
    again, _ = run(tmp_path, [("web", path, text) for path, text in once.items()], "b", max_count=3)
    assert kept(again) == once


def test_bad_settings_and_no_documents(tmp_path):
    with pytest.raises(PunaError, match=r"data\.lines: units: .* twice"):
        resolve({"name": "x", "data": {"lines": {"units": ["line", "line"]}}})
    with pytest.raises(PunaError, match=r"data\.lines: there is no document"):
        run(tmp_path, [])
