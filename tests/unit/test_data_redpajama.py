"""RedPajama-V2's signals against a slow writing of their definitions."""

import math
import re
import string
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.filters.base import FILTERS
from puna.data.filters.batch import TextBatch
from puna.data.filters.redpajama import SIGNALS, RedPajama
from puna.data.filters.rules import Rules, SourceRules
from puna.data.words.columns import STOP_WORDS
from tests.unit.test_data_words import documents, rare_documents, strange_texts

BAD = {"spam", "hot dog", "the quick brown", "a-b"}
BULLETS = tuple("\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab\u2013")


def normalised(text):
    text = "".join(char for char in text if char not in string.punctuation).lower()
    return unicodedata.normalize("NFD", re.sub(r"\s+", " ", text.strip()))


def share(part, whole):
    return part / whole if whole else None


def signals(text):
    """The signals by their definitions; None where there is nothing to divide by."""
    content, raw = normalised(text), re.findall(r"\w+|[^\w\s]+", text)
    words = content.split()
    lines = [line for line in re.split(r"(?<=\n)", text) if line]
    counts, n = Counter(words), len(words)
    chars = sum(map(len, words))
    found = {
        "rps_doc_word_count": n,
        "rps_doc_mean_word_length": share(chars, n),
        "rps_doc_symbol_to_word_ratio": share(sum(map(text.count, ("#", "...", "…"))), len(raw)),
        "rps_doc_frac_lines_end_with_ellipsis": share(
            sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
        "rps_doc_frac_no_alph_words": share(
            sum(not re.search("[a-zA-Z]", word) for word in raw), len(raw)),
        "rps_doc_frac_unique_words": share(len(counts), n),
        "rps_doc_unigram_entropy": sum(-c / n * math.log(c / n) for c in counts.values())
        if n else None,
        "rps_doc_frac_all_caps_words": share(sum(map(str.isupper, raw)), len(raw)),
        "rps_doc_stop_word_fraction": sum(word in STOP_WORDS for word in raw) / len(raw)
        if n and raw else 0,
        "rps_doc_num_sentences": len(re.findall(r"\b[^.!?]+[.!?]*", text)),
        "rps_doc_curly_bracket": (text.count("{") + text.count("}")) / max(len(text), 1),
        "rps_doc_lorem_ipsum": content.count("lorem ipsum") / max(len(content), 1),
        "rps_doc_ldnoobw_words": sum(
            " ".join(words[i : i + k]) in BAD for k in (1, 2, 3) for i in range(n - k + 1)),
    }  # fmt: skip
    of_lines = {
        "rps_lines_start_with_bulletpoint": [s.lstrip().startswith(BULLETS) for s in lines],
        "rps_lines_ending_with_terminal_punctution_mark": [
            s.rstrip().endswith((".", "!", "?", "”")) for s in lines],
        "rps_lines_javascript_counts": [normalised(s).split().count("javascript") for s in lines],
        "rps_lines_num_words": [len(normalised(s).split()) for s in lines],
        "rps_lines_numerical_chars_fraction": [
            share(sum(map(str.isnumeric, normalised(s))), len(normalised(s))) or 0 for s in lines],
        "rps_lines_uppercase_letter_fraction": [sum(map(str.isupper, s)) / len(s) for s in lines],
    }  # fmt: skip
    found |= {name: share(sum(values), len(values)) for name, values in of_lines.items()}
    for k in range(2, 11):
        grams = [tuple(words[i : i + k]) for i in range(n - k + 1)]
        if k < 5:
            top, count = (Counter(grams).most_common(1) or [((), 0)])[0]
            part = len("".join(top)) * count if count > 1 else 0
            found[f"rps_doc_frac_chars_top_{k}gram"] = part / max(chars, 1)
        else:
            again = Counter(grams)
            inside = {i + j for i, gram in enumerate(grams) if again[gram] > 1 for j in range(k)}
            part = sum(len(words[i]) for i in inside)
            found[f"rps_doc_frac_chars_dupe_{k}grams"] = part / max(chars, 1)
    return found


@pytest.fixture(scope="module")
def measuring(tmp_path_factory):
    path = tmp_path_factory.mktemp("lists") / "bad.txt"
    path.write_text("\n".join(sorted(BAD)) + "\n\n", encoding="utf-8")
    return RedPajama(bad_words=path)


def check(texts, measuring):
    docs = TextBatch(pa.array(texts, pa.large_string()))
    found = {f.reason.removeprefix("redpajama."): f.value for f in measuring.judge(docs)}
    assert list(found) == list(SIGNALS)
    for index, text in enumerate(texts):
        for name, value in signals(text).items():
            mine = found[name][index]
            if value is None:
                assert np.isnan(mine), (name, text)
            else:
                assert mine == pytest.approx(value, abs=1.1e-8), (name, text)


def test_values_are_those_of_the_definitions(measuring):
    texts = [*documents(80, seed=2), *strange_texts(200, seed=3), *rare_documents(seed=8)]
    texts += [
        "",
        " ",
        "\n\n",
        "...",
        "{lorem, ipsum} Lorem  Ipsum",
        "Hot dog! hot-dog spam a-b",
        "JavaScript java-script\n12 ½ ٣\n‣ x\n   – y",
        "ΣΑΣ ß ŉ ǅ ẛ̣ K É e\u0301",
    ]
    check(texts, measuring)


WORDS = ["hot", " dog", " the", " quick brown", ".", "!", "...", "…", "\n", "\n\n", "  ", "A1",
         "ABC ", "é", "É", "\u0301", "12 ", "•", "{", "javascript ", "lorem ipsum ", "日本", "_",
         "x y z v w x y z v w "]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=40).map("".join))
@settings(max_examples=150, deadline=None)
def test_values_of_made_up_texts_are_those_of_the_definitions(measuring, text):
    if not any(0xD800 <= ord(char) < 0xE000 for char in text):
        check([text], measuring)


def test_the_limits_are_those_of_the_card_and_any_signal_can_have_one():
    # 60 different words; the rule of the card: 50 to 10,000 words
    words = " ".join(f"{a}{b}{c}" for a in "bcdf" for b in "aeiou" for c in "lmn")
    texts = [
        words,
        words[:100],
        f"{words} {'# ' * 9}",
        "\n".join(f"• {w * 3}" for w in words.split()),
        "ab cd " * 40,
        "a " * 60,
    ]
    verdicts = Rules((RedPajama(),), False).judge(pa.array(texts, pa.large_string()))
    assert [reason and reason.split("doc_")[-1] for reason in verdicts.reason] == [
        None, "word_count", "symbol_to_word_ratio", "redpajama.rps_lines_start_with_bulletpoint",
        "mean_word_length", "mean_word_length",
    ]  # fmt: skip
    strict = RedPajama(limits={"rps_doc_unigram_entropy": (5, None)})
    verdicts = Rules((strict,), False).judge(pa.array(texts[:1], pa.large_string()))
    assert verdicts.reason == ["redpajama.rps_doc_unigram_entropy"]
    assert verdicts.value == [pytest.approx(math.log(60))]
    assert set(RedPajama.reasons) == {f"redpajama.{name}" for name in SIGNALS}


def test_an_unknown_signal_is_named():
    use = {"filters": [{"name": "redpajama", "settings": {"limits": {"rps_doc_words": [1, 2]}}}]}
    with pytest.raises(ValueError, match="no such signal: rps_doc_words"):
        SourceRules.model_validate(use)
    assert "redpajama" in FILTERS
