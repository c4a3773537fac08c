"""Planted duplicates: their ground truth agrees with the kernels, a seed plants the same again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from debian_corpus import SCHEMA, kind_of, number, source_of
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import KINDS, WORD, jaccard, plant

from puna.data.dedup.urls import normal_url
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.jaccard import shingle_sets, similarities
from puna.data.schema import document_id

texts = st.text(alphabet="aB1_é ßд中文ไทย、\u00a0\U00020000.-\n", max_size=60)


@given(texts, texts)
@settings(max_examples=200, deadline=None)
def test_plain_python_and_the_kernels_agree(a: str, b: str) -> None:
    if WORD.search(a) and WORD.search(b):
        sets = shingle_sets(texts_from([a, b]), np.ones(2, bool))
        assert similarities(np.array([[0, 1]]), sets)[0] == jaccard(a, b)


def test_every_kind_is_planted_and_does_what_it_says() -> None:
    rows = []
    for at in range(40):
        text = "\n\n".join(" ".join(f"d{at}b{block}w{word}" for word in range(40))
                           for block in range(10))  # fmt: skip
        row = (document_id("s", f"{at}"), "s", f"{at}", text, "{}", len(text),
               f"https://s.example.org/{at}", "MIT")  # fmt: skip
        rows.append(row)
    columns = zip(*sorted(rows), strict=True)
    arrays = [pa.array(values, f.type) for values, f in zip(columns, SCHEMA, strict=True)]
    documents = pa.Table.from_arrays(arrays, schema=SCHEMA)
    copies, truth = plant(documents, 3, seed=1)
    assert plant(documents, 3, seed=1) == (copies, truth)
    assert plant(documents, 3, seed=2)[1] != truth
    by_id = {row["id"]: row for row in [*documents.to_pylist(), *copies.to_pylist()]}
    assert sorted(truth["kind"].to_pylist()) == sorted(KINDS * 3)
    for row in truth.to_pylist():
        copy, original = by_id[row["id"]], by_id[row["original_id"]]
        words, of = WORD.findall(copy["text"]), WORD.findall(original["text"])
        assert row["jaccard"] == jaccard(copy["text"], original["text"])
        assert row["n_words"] == len(of) == 400
        if row["kind"].startswith("edit"):
            percent = int(row["kind"].partition("-")[2])
            assert sum(a != b for a, b in zip(words, of, strict=True)) <= 4 * percent
            assert row["jaccard"] < 1
        elif row["kind"] == "moved":
            assert words != of
            assert sorted(words) == sorted(of)
        same_page = normal_url(copy["url"]) == normal_url(original["url"])
        assert same_page == (row["kind"] == "url")


def test_how_files_of_packages_are_read() -> None:
    assert kind_of("usr/share/games/fortunes/de/zitate") == "fortunes"
    assert kind_of("usr/share/games/fortunes/de/zitate.dat") is None
    assert kind_of("usr/share/man/de/man1/ls.1.gz") == "roff"
    assert kind_of("usr/share/doc/x/a.rst.txt") == "text"
    assert kind_of("usr/share/dictd/foldoc.dict.dz") == "dict"
    assert source_of("manpages-zh", "usr/share/man/zh_CN/man1/ls.1.gz", "roff") == "man_zh_CN"
    assert source_of("manpages", "usr/share/man/man7/tty.7.gz", "roff") == "man_en"
    assert number("BAC") == 64 * 64 + 2
