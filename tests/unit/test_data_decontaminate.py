"""Evaluation examples in the corpus: found as plain Python finds them, dropped or cut, reported."""

import gzip
import json
import random
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import resolve
from puna.data.decontaminate import DecontaminateConfig, decontaminate
from puna.data.decontaminate.both import union
from puna.data.decontaminate.examples import EvalSetConfig, Example, read_examples, sets_state
from puna.data.decontaminate.grouping import group_hits, merge_spans
from puna.data.decontaminate.index import NgramRule, build_index, hash_index, load_index
from puna.data.decontaminate.kernels import find_examples
from puna.data.decontaminate.matching import MATCHERS
from puna.data.decontaminate.windows import cut_windows, sentences
from puna.data.kernels.buffers import fixed, texts_from
from puna.data.testing import folder_bytes, kept_rows, make_documents, rejected_rows

LONG = (
    "How many apples does Anna have left after she gave three of her seventeen apples to Bob "
    "and ate two more of them?"
)
SHORT = "Which planet of the solar system is the largest one?"


def filler(seed, n=120):
    rng = random.Random(seed)
    return " ".join(f"f{rng.randrange(10**9)}" for _ in range(n))


def write_set(tmp_path, rows, name="set.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name.partition(".")[0], "paths": str(path)}


def run(tmp_path, texts, sets, name="out", n_shards=2, **cfg):
    rows = [("web", path, text) for path, text in texts.items()]
    documents = make_documents(tmp_path / f"{name}.in", rows, n_shards=n_shards)
    out = tmp_path / name
    out.mkdir()
    config = DecontaminateConfig(**{"workers": 1, "sets": sets, **cfg})
    return out, decontaminate(config, {"documents": documents}, out, Ledger(None))


def hits_of(out):
    return pq.read_table(out / "hits.parquet").to_pylist()


def test_documents_with_an_example_are_dropped_and_reported(tmp_path):
    loud = LONG.upper().replace(" ", "\n--  ")
    texts = {
        "long": f"{filler(1)} {loud} {filler(2)}",
        "short": f"So: “which PLANET of the   solar-system is\tthe largest, one” {filler(3)}",
        "nearly": f"Which planet of the solar system is the largest two {filler(4)}",
        "clean": filler(5),
    }
    rows = [{"text": LONG}, {"text": "too short to be looked for"}, {"text": SHORT}]
    rows.append({"text": SHORT.upper()})
    out, metrics = run(tmp_path, texts, [write_set(tmp_path, rows)])
    assert {row["path"] for row in kept_rows(out)} == {"nearly", "clean"}
    dropped = {row["path"]: row for row in rejected_rows(out)}
    assert dropped["long"]["reason"] == "decontaminate.match"
    assert (dropped["long"]["value"], dropped["long"]["detail"]) == (1.0, "set#0")
    assert dropped["short"]["detail"] == "set#2"
    first, second = hits_of(out)
    assert (first["path"], first["set"], first["example"], first["coverage"]) == (
        "long", "set", 0, 1.0,
    )  # fmt: skip
    assert first["text"] == loud.rstrip("?")
    assert texts["long"].encode()[first["start"] : first["end"]].decode() == first["text"]
    assert second["text"] == "which PLANET of the   solar-system is\tthe largest, one"
    assert metrics["sets"]["set"] == {
        "examples": 4, "same": 1, "too_short": 1, "unspecific": 0, "indexed": 2,
        "contaminated": 2, "partly": 0, "docs": 2,
    }  # fmt: skip
    assert metrics["in_docs"] - metrics["kept_docs"] == 2


def test_a_part_of_an_example_counts_from_the_coverage_that_is_asked_for(tmp_path):
    words = LONG.split()
    texts = {"half": f"{filler(1)} {' '.join(words[:14])} {filler(2)}"}
    sets = [write_set(tmp_path, [{"text": LONG}])]
    coverage = 14 / len(words)
    out, _ = run(tmp_path, texts, sets, "any")
    (row,) = rejected_rows(out)
    assert (row["value"], row["threshold"]) == (pytest.approx(coverage), 0)
    out, metrics = run(tmp_path, texts, sets, "most", min_coverage=coverage + 0.01)
    assert len(kept_rows(out)) == 1
    assert [hit["counts"] for hit in hits_of(out)] == [False]
    counts = metrics["sets"]["set"]
    assert (counts["contaminated"], counts["partly"], counts["docs"]) == (0, 1, 0)
    texts = {"less": f"{filler(1)} {' '.join(words[:12])} {filler(2)}"}
    out, _ = run(tmp_path, texts, sets, "less")
    assert hits_of(out) == []


def test_cutting_takes_the_window_and_short_pieces_too(tmp_path):
    head, tail = "ä" * 500 + " " + filler(1), filler(2)
    texts = {
        "middle": f"{head} {LONG} {tail}",
        "start": f"{LONG} {filler(3)}",
        "all": f"before {LONG} behind",
        "many": f" {LONG} ".join(filler(i, 60) for i in range(5)),
    }
    out, _ = run(
        tmp_path, texts, [write_set(tmp_path, [{"text": LONG}])], action="cut", window_chars=100,
        min_piece_chars=50, max_pieces=4, min_left_bytes=10,
    )  # fmt: skip
    kept = {row["path"]: row for row in kept_rows(out)}
    stop = LONG.rstrip("?")
    assert kept["middle"]["text"] == f"{head} "[:-100] + "\n" + f"? {tail}"[100:]
    assert kept["middle"]["eval_spans_cut"] == 1
    assert kept["middle"]["n_bytes"] == len(kept["middle"]["text"].encode())
    assert kept["start"]["text"] == texts["start"][len(stop) + 100 :]
    dropped = {row["path"]: row for row in rejected_rows(out)}
    assert dropped["all"]["reason"] == "decontaminate.emptied"
    assert (dropped["all"]["value"], dropped["all"]["threshold"]) == (0, 10)
    assert dropped["all"]["text"] == texts["all"]
    assert (dropped["many"]["reason"], dropped["many"]["value"]) == ("decontaminate.pieces", 5)


def test_what_many_examples_share_is_no_evidence(tmp_path):
    instruction = "Read the following question carefully and choose the best of the four answers:"
    own = [filler(i, 20) for i in range(4)]
    rows = [{"text": f"{instruction} {text}"} for text in own]
    texts = {"template": f"{filler(9)} {instruction} {filler(8)}", "real": f"x {own[2]} y"}
    sets = [write_set(tmp_path, rows)]
    out, _ = run(tmp_path, texts, sets, max_shared=3)
    assert [row["path"] for row in rejected_rows(out)] == ["real"]
    out, _ = run(tmp_path, texts, sets, "all", max_shared=4)
    assert len(rejected_rows(out)) == 2


def test_few_different_words_are_no_evidence(tmp_path):
    zeros = "the table has the values " + "00 00 " * 12
    sets = [write_set(tmp_path, [{"text": zeros}, {"text": "ha ha ha " * 9}])]
    texts = {"other": f"{filler(1)} {'00 ' * 30}", "same": f"{filler(2)} {zeros}"}
    out, metrics = run(tmp_path, texts, sets)
    assert [row["path"] for row in rejected_rows(out)] == ["same"]
    assert metrics["sets"]["set"]["unspecific"] == 1
    out, _ = run(tmp_path, texts, sets, "all", min_different=1)
    assert len(rejected_rows(out)) == 2


def test_phrases_of_many_documents_are_no_hit_when_a_limit_is_set(tmp_path):
    words = LONG.split()
    sets = [write_set(tmp_path, [{"text": LONG}])]
    texts = {f"{i}": f"{filler(i)} {' '.join(words[:13])} {filler(i + 50)}" for i in range(4)}
    texts["all"] = f"{filler(98)} {LONG} {filler(99)}"
    out, _ = run(tmp_path, texts, sets, max_docs=4)
    assert [row["path"] for row in rejected_rows(out)] == ["all"]
    assert rejected_rows(out)[0]["value"] == pytest.approx((len(words) - 1) / len(words))
    out, _ = run(tmp_path, texts, sets, "more", max_docs=5)
    assert len(rejected_rows(out)) == 5


def test_short_examples_that_begin_alike_are_told_apart(tmp_path):
    rows = [{"text": f"what is the capital city of the country {i}"} for i in range(30)]
    out, metrics = run(
        tmp_path, {"a": f"{filler(1)} What is the capital city of the country 17?", "b": filler(2)},
        [write_set(tmp_path, rows)], max_shared=2,
    )  # fmt: skip
    assert [hit["example"] for hit in hits_of(out)] == [17]
    assert metrics["sets"]["set"]["indexed"] == 30


def test_fields_are_looked_for_together_and_alone(tmp_path):
    question = "which of these four rivers flows through the town of Ulm"
    row = {"question": question, "choices": ["the Rhine", "the Danube"], "answer": 1, "none": None}
    one = write_set(tmp_path, [row])
    sets = [{**one, "fields": ["question", "choices", "answer", "none", "missing"]}]
    texts = {"alone": f"{filler(1)} {question}? (a) Danube {filler(2)}"}
    out, _ = run(tmp_path, texts, sets)
    (hit,) = hits_of(out)
    assert hit["coverage"] == pytest.approx(11 / 16)


def test_gzip_parquet_and_several_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": "one two"}).encode()))
    pq.write_table(pa.table({"q": ["three", "four"], "c": [["x"], ["y", "z"]]}), tmp_path / "b.pq")
    cfg = EvalSetConfig(name="s", paths=(str(tmp_path / "*"),), fields=("q", "c"))
    found = list(read_examples(cfg))
    assert [example.parts for example in found] == [
        ("one two",),
        ("three", "x"),
        ("four", "y", "z"),
    ]
    assert [example.index for example in found] == [0, 1, 2]
    before = sets_state((cfg,))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": "other"}).encode()))
    assert sets_state((cfg,)) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r"evaluation set 's', .*, record 2: field 'text'.* 3"),
        ('{"text": "a"}\n{"text"\n', r"record 2: "),
        ('{"question": "a"}\n', r"record 1: field 'text' .*missing; fields here: question"),
        ("", r"the files hold no record"),
        ('{"text": "a b"}\n', r"none of its 1 examples can be looked for"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(tmp_path, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(PunaError, match=message):
        run(tmp_path, {"a": "b"}, [{"name": "s", "paths": str(tmp_path / "s.jsonl")}])


def test_settings_that_cannot_be_are_refused(tmp_path):
    one = {"name": "s", "paths": "nowhere/*.jsonl"}
    with pytest.raises(PunaError, match="there is no file nowhere"):
        run(tmp_path, {"a": "b"}, [one])
    with pytest.raises(PunaError, match="2 sets are called 's'"):
        resolve({"name": "x", "data": {"decontaminate": {"sets": [one, one]}}})
    with pytest.raises(PunaError, match=r"short_words \(9\) is above ngram \(5\)"):
        resolve({"name": "x", "data": {"decontaminate": {"sets": [one], "ngram": 5,
                                                         "short_words": 9}}})  # fmt: skip
    with pytest.raises(PunaError, match="unknown matcher 'embed'"):
        run(tmp_path, {"a": "b"}, [write_set(tmp_path, [{"text": LONG}])], "m", method="embed")
    assert set(MATCHERS) == {"ngrams", "embedding", "ngrams+embedding"}


def plain_hits(texts, examples, ngram, short):
    """Pairs of text and example with a common n-gram, and the words of the example covered."""
    split = [re.findall(r"[a-z]+", text) for text in examples]
    found = {}
    for t, text in enumerate(texts):
        words = re.findall(r"[a-z]+", text)
        for e, example in enumerate(split):
            n = min(ngram, len(example))
            if n < short or example in split[:e]:
                continue
            grams = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
            covered = {
                i + k for i in range(len(example) - n + 1) for k in range(n)
                if tuple(example[i : i + n]) in grams
            }  # fmt: skip
            if covered:
                found[t, e] = len(covered) / len(example)
    return found


TEXT = st.lists(st.sampled_from(["a", "b", "ab", "c", ". ", "\n"]), max_size=30).map(" ".join)


@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=1, max_size=5),
       st.integers(2, 5), st.data())  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_hits_are_those_of_plain_python(tmp_path_factory, texts, examples, ngram, data):
    short = data.draw(st.integers(2, ngram))
    folder = tmp_path_factory.mktemp("index")
    parts = [(text,) if text else () for text in examples]
    build_index([Example("s", i, "", one) for i, one in enumerate(parts)],
                NgramRule(ngram, short, 1000, 1), folder)  # fmt: skip
    index = load_index(folder, hash_index(folder)).index
    rows = find_examples(texts_from(texts), index)
    pairs = group_hits(rows, index)
    found = dict(zip(zip(pairs.document.tolist(), pairs.example.tolist(), strict=True),
                     pairs.coverage.tolist(), strict=True))  # fmt: skip
    assert found == pytest.approx(plain_hits(texts, examples, ngram, short))
    for document, start, end, _ in rows[:, [0, 2, 3, 1]].tolist():
        piece = texts[document].encode()[start:end].decode()
        assert len(re.findall("[a-z]+", piece)) >= short


def test_a_hit_rests_on_the_words_not_on_their_hash(tmp_path):
    build_index([Example("s", 0, "", (LONG,))], NgramRule(13, 8, 10, 4), tmp_path)
    index = load_index(tmp_path, hash_index(tmp_path)).index
    assert len(find_examples(texts_from([LONG]), index)) == 11
    forged = index._replace(words=np.where(index.words == ord("a"), ord("b"), index.words))
    assert len(find_examples(texts_from([LONG]), forged._replace(words=fixed(forged.words)))) == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 9)), max_size=12))
@settings(deadline=None)
def test_merged_spans_cover_the_same_bytes_once(spans):
    rows = np.array([(d, 0, a, a + n) for d, a, n in spans], np.int64).reshape(-1, 4)
    joined = merge_spans(rows)
    covered = {(d, at) for d, a, n in spans for at in range(a, a + n)}
    places = [(d, at) for d, a, b in joined.tolist() for at in range(a, b)]
    assert sorted(covered) == places
    assert all(x[0] != y[0] or x[2] < y[1] for x, y in pairwise(joined))


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_the_result_does_not_depend_on_workers(tmp_path, monkeypatch, action):
    texts = {f"{i:02}": f"{filler(i)} {LONG if i % 3 == 0 else ''} {filler(i + 99)}"
             for i in range(30)}  # fmt: skip
    sets = [write_set(tmp_path, [{"text": LONG}])]
    out, _ = run(tmp_path, texts, sets, "one", n_shards=3, action=action)
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    other, _ = run(tmp_path, texts, sets, "two", n_shards=3, action=action, workers=2)
    assert folder_bytes(out) == folder_bytes(other)
    assert len(hits_of(out)) == 10


# ---- by meaning

SYNONYMS = [(f"a{k}", f"b{k}") for k in range(60)]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """Every word has a synonym with almost the same vector."""
    folder = tmp_path_factory.mktemp("embedder")
    rng = np.random.default_rng(0)
    meanings = rng.normal(size=(len(SYNONYMS), 32)).repeat(2, 0)
    table = np.concatenate([np.zeros((1, 32)), meanings + 0.05 * rng.normal(size=meanings.shape)])
    words = [word for pair in SYNONYMS for word in pair]
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"embeddings": table.astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    return folder


def spoken(seed, form=0, n=14):
    numbers = np.random.default_rng(seed).integers(0, len(SYNONYMS), n)
    return " ".join(SYNONYMS[k][form] for k in numbers).capitalize().lower() + "."


def talk(seed, n=6):
    return " ".join(spoken(1000 * seed + k) for k in range(n))


def test_paraphrases_are_found_where_ngrams_find_none(tmp_path, embedder):
    examples = [{"text": spoken(k)} for k in range(5)]
    texts = {f"clean{k}": talk(k + 1) for k in range(20)}
    texts["ö"] = f"ööö {talk(50)} {spoken(2, form=1)} {talk(51)}"
    one = write_set(tmp_path, examples)
    out, _ = run(tmp_path, texts, [one], "words")
    assert not rejected_rows(out)
    out, metrics = run(
        tmp_path, texts, [one], "out", method="embedding", embedder=str(embedder), threshold=0.95
    )  # fmt: skip
    (row,) = rejected_rows(out)
    assert (row["path"], row["reason"], row["detail"]) == ("ö", "decontaminate.meaning", "set#2")
    assert row["threshold"] == 0.95 <= row["value"] <= 1
    (hit,) = hits_of(out)
    assert hit["text"] == spoken(2, form=1)
    assert hit["example_text"] == examples[2]["text"]
    assert texts["ö"].encode()[hit["start"] : hit["end"]].decode() == hit["text"]
    assert metrics["sets"]["set"]["contaminated"] == 1
    assert metrics["threshold"] == 0.95
    out, _ = run(
        tmp_path, texts, [one], "cut", method="embedding", embedder=str(embedder), threshold=0.95,
        action="cut", window_chars=0, min_piece_chars=5,
    )  # fmt: skip
    cut = {row["path"]: row["text"] for row in kept_rows(out)}["ö"]
    assert spoken(2, form=1) not in cut
    assert cut.startswith("ööö ")


def test_both_methods_together_find_what_either_finds(tmp_path, embedder):
    examples = [{"text": spoken(1)}, {"text": LONG}]
    texts = {
        "clean": talk(9),
        "told": f"{talk(1)} {spoken(1, form=1)}",
        "copy": f"{LONG} {talk(2)}",
    }
    common = {"embedder": str(embedder), "threshold": 0.95, "method": "ngrams+embedding"}
    one = write_set(tmp_path, examples)
    out, metrics = run(tmp_path, texts, [one], min_coverage=0.5, **common)
    verdicts = {r["path"]: (r["reason"], r["threshold"], r["detail"]) for r in rejected_rows(out)}
    assert verdicts == {
        "told": ("decontaminate.meaning", 0.95, "set#0"),
        "copy": ("decontaminate.match", 0.5, "set#1"),
    }
    assert {hit["method"] for hit in hits_of(out)} == {"ngrams", "embedding"}
    assert metrics["sets"]["set"]["contaminated"] == 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12), st.data())
def test_the_union_of_spans_covers_the_bytes_of_both(pairs, data):
    part = data.draw(st.integers(0, len(pairs)))
    sides = [union([], [n for a, size in sorted(some) for n in (a, a + size)])
             for some in (pairs[:part], pairs[part:])]  # fmt: skip
    joined = union(*sides)
    covered = {b for a, size in pairs for b in range(a, a + size)}
    assert joined == sorted(set(joined))
    assert {
        b for a, z in zip(joined[::2], joined[1::2], strict=True) for b in range(a, z)
    } == covered


def test_a_field_of_an_example_is_found_alone(tmp_path, embedder):
    rows = [{"question": spoken(1), "choices": [spoken(2), "a1"]}]
    one = write_set(tmp_path, rows) | {"fields": ["question", "choices"]}
    out, metrics = run(
        tmp_path, {"q": f"{talk(3)} {spoken(1, form=1)}", "c": talk(4)}, [one],
        method="embedding", embedder=str(embedder), threshold=0.95,
    )  # fmt: skip
    assert [row["path"] for row in rejected_rows(out)] == ["q"]
    assert metrics["sets"]["set"]["indexed"] == 1


def test_negatives_set_the_threshold(tmp_path, embedder):
    one = write_set(tmp_path, [{"text": spoken(k)} for k in range(5)])
    clean = [{"text": talk(k + 100)} for k in range(50)]
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean))
    texts = {str(k): row["text"] for k, row in enumerate(clean)}
    texts["told"] = f"{talk(7)} {spoken(3, form=1)}"
    common = {"method": "embedding", "embedder": str(embedder),
              "negatives": (str(tmp_path / "clean.jsonl"),)}  # fmt: skip
    out, metrics = run(tmp_path, texts, [one], "out", false_positives=0.1, **common)
    dropped = {row["path"] for row in rejected_rows(out)}
    assert "told" in dropped
    # a tenth of every second text, which set the threshold; the others told what is usual
    assert len({name for name in dropped - {"told"} if int(name) % 2}) == 2
    assert 0 < metrics["threshold"] < 1
    rows = {row["path"]: row for row in rejected_rows(out)}
    assert rows["told"]["value"] > rows["told"]["threshold"] > metrics["threshold"]
    with pytest.raises(PunaError, match=r"too few for a share of false positives of 0\.001"):
        run(tmp_path, texts, [one], "few", false_positives=0.001, **common)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "embedding"}, "go together"),
        ({"embedder": "x"}, "go together"),
        ({"method": "embedding", "embedder": "x"}, "give a `threshold`"),
    ],
)
def test_settings_of_the_embedding_must_be_complete(values, message):
    one = {"name": "a", "paths": "x"}
    with pytest.raises(ValueError, match=message):
        DecontaminateConfig(sets=[one], **values)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from([16, 64]))
@settings(max_examples=60, deadline=None)
def test_windows_begin_at_every_sentence_and_are_as_long_as_can_be(lengths, size):
    ids = [[7] * n for n in lengths]
    spans = np.stack([np.arange(len(ids)), np.arange(len(ids)) + 1], 1)
    cut = cut_windows(ids, spans, [size])
    assert set(cut.of_size[size].tolist()) == set(range(len(cut.windows)))
    for k, (first, last) in enumerate(cut.windows.tolist()):
        n = len(cut.tokens(k))
        every = [sum(lengths[first:j]) for j in range(first + 1, len(lengths) + 1)]
        long = [m for m in every if 2 * m >= size] or [max(every)]
        assert abs(n - size) == min(abs(m - size) for m in long)
        assert n == sum(lengths[first:last])
        assert first == 0 or 2 * n >= size
    reaching = [i for i in range(len(lengths)) if 2 * sum(lengths[i:]) >= size]
    assert set(reaching) <= set(cut.windows[:, 0].tolist())


@given(st.text(alphabet="ab.!? \n。é", max_size=60))
def test_sentences_hold_all_that_is_no_space(text):
    spans = sentences(text)
    left = list(text)
    for start, end in spans.tolist():
        assert end > start
        assert not text[start].isspace()
        left[start:end] = " " * (end - start)
    assert not "".join(left).strip(" \n\"')]")
