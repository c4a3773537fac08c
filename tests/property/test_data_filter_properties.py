"""The compiled measures equal plain Python; every rejection has a declared reason."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.engine.base import Shard
from puna.data.filters import FILTERS, TextBatch
from puna.data.filters.rules import FilterKernel, SourceRules
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.phrases import scan_phrases
from puna.data.reasons import REASONS, meaning_of

PLAIN = Path(__file__).parents[2] / "benchmarks" / "plain_filters.py"


def _load_plain():
    spec = importlib.util.spec_from_file_location("plain_filters", PLAIN)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_filters"] = module
    spec.loader.exec_module(module)
    return module


plain = _load_plain()

WORDS = ["a", "bb", "the", "To", "#", "...", "wait...", "0x1f,", "12", "-", "*", "•", "é", "naïve…",
         "Zm9v" * 17, "—", "日本語"]  # fmt: skip
SPACES = [" ", "  ", "\n", "\n\n", "\t", " \n \n"]
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), max_size=60).map(
    lambda parts: "".join(word + space for word, space in parts)
)


@given(st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_measures_equal_plain_python(batch):
    docs = TextBatch(pa.array(batch, pa.large_string()))
    for index, text in enumerate(batch):
        for measure in (plain.char_measures, plain.word_measures, plain.line_measures):
            for name, value in measure(text).items():
                assert docs[name][index] == value, (name, text)
        for name, value in plain.repetition_measures(text).items():
            assert docs[name][index] == pytest.approx(value, abs=1e-12), (name, text)


PHRASES = ("licensed under", "rights", "all rights reserved", "under the", "s")


@given(st.lists(st.sampled_from(["Licensed", "under", "the ", "all", " rights", " reserved", "\n",
                                 "\n#\n", "xyz", " "]), max_size=40).map("".join),
       st.sets(st.sampled_from(PHRASES), min_size=1))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_phrase_blocks_equal_plain_python(text, phrases):
    chosen = tuple(sorted(phrases))
    row = scan_phrases(texts_from(["", text]), np.ones(2, bool), chosen)[1]
    assert tuple(row[:2]) == plain.phrase_measures(text, chosen)
    ends = [text.lower().find(p) + len(p) for p in chosen if p in text.lower()]
    assert row[2] == min(ends, default=-1)


DOCUMENTS = st.one_of(texts, st.text(max_size=300), st.just("The cat and the dog " * 30))


@given(st.lists(st.tuples(st.sampled_from(["prose", "code", "plain"]), DOCUMENTS), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_rejected_row_has_a_declared_reason_and_a_value_beyond_the_threshold(rows):
    rows = [(source, text.encode("utf-8", "replace").decode()) for source, text in rows]
    kernel = FilterKernel(
        SourceRules().make(),
        {"code": SourceRules(profile="code").make(), "plain": SourceRules(profile="none").make()},
    )
    batch = pa.record_batch(
        {"source": pa.array([row[0] for row in rows], pa.string()),
         "text": pa.array([row[1] for row in rows], pa.large_string())}
    )  # fmt: skip
    result = kernel(batch, Shard(0, Path("part-00000.parquet"), len(rows), 0), 0).to_pylist()
    assert len(result) == len(rows)
    declared = {code: name for name in FILTERS for code in FILTERS.get(name).reasons}
    for (source, _), row in zip(rows, result, strict=True):
        if row["reason"] is None:
            assert row["value"] is row["threshold"] is row["detail"] is None
            assert (row["language"] is not None) == (source == "prose")
        else:
            assert source != "plain"
            assert row["reason"] in declared
            assert meaning_of(row["reason"])
            assert row["value"] is not None
            assert row["threshold"] is not None


def test_every_reason_has_a_meaning_and_names_its_filter():
    assert all(REASONS.get(code) for code in REASONS)
    for name in FILTERS:
        for code in FILTERS.get(name).reasons:
            assert code.split(".")[0] == name


@given(st.lists(texts, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_verdict_depends_on_the_document_alone(batch):
    rules = SourceRules(override={"length": {"min": 5}, "words": {"min": 2}}).make()
    together = rules.judge(pa.array(batch, pa.large_string()))
    for index, text in enumerate(batch):
        alone = rules.judge(pa.array([text], pa.large_string()))
        for column in ("reason", "value", "threshold", "detail", "language"):
            assert getattr(alone, column)[0] == getattr(together, column)[index]
