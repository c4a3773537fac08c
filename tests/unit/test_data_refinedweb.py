"""RefinedWeb's rules as dclm has them, against a slow writing of their definitions."""

import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.filters.refinedweb import RefinedWeb
from puna.data.filters.rules import Rules
from puna.data.kernels.buffers import texts_from
from puna.data.trial import try_filters
from puna.data.words.breaks import break_words, kinds
from puna.data.words.split import decode, work_for
from tests.unit.test_data_words import PROSE, documents, rare_documents, repeating, strange_texts
from tests.unit.word_breaks import FILE, facts

uniseg = pytest.importorskip("uniseg.wordbreak")

UNIQUE = [f"{a}{b}{c}{d}" for a in "bcdfg" for b in "aeiou" for c in "lmnpr" for d in "ae"]
PLAIN = "The tale of " + " ".join(UNIQUE[:120]) + " and that, with 3.5 more, is a_b it's end."
STOP = {"the", "be", "to", "of", "and", "that", "have", "with"}
COUNTED = ("likes", "shares", "comments", "retweets", "reposts", "quotes", "bookmarks", "upvotes",
           "downvotes", "downloads", "views", "followers")  # fmt: skip
TLDS = "com\norg\nwe\nco\nxn--p1ai\n"


def parts_of(text, end):
    return [part.strip() for part in text.split(end) if part.strip()]


def tokens_of(text):
    """FastText's words: between these white spaces; those that begin with a sign do not count."""
    return [word for word in re.split(r"[ \n\r\t\v\f\0]+", text) if word and word[0].isalnum()]


def too_repetitive(text):
    for end, name, limits in (("\n", "line", (0.3, 0.2)), ("\n\n", "paragraph", (0.3, 0.2))):
        parts = parts_of(text, end)
        again = [part for part in parts if parts.count(part) > 1]
        yield name + "_share", len(again) / max(len(parts), 1), limits[0], len(parts)
        chars = sum(map(len, parts))
        yield name + "_char_share", sum(map(len, again)) / max(chars, 1), limits[1], len(parts)
    words = [word for word in uniseg.words(text) if word[0].isalnum()]
    chars = sum(map(len, words))
    for n, limit in zip(range(2, 11), (0.2, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
                        strict=True):  # fmt: skip
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        most = max(counts.values(), default=0)
        if n < 5:
            longest = max((len("".join(g)) for g, k in counts.items() if k == most), default=0)
            found = most * longest if most > 1 else 0
            yield f"top_{n}_gram", found / max(chars, 1), limit, 2
        else:
            inside = {i + k for i, gram in enumerate(grams) if counts[gram] > 1 for k in range(n)}
            found = sum(len(words[i]) for i in inside)
            yield f"duplicated_{n}_grams", found / max(chars, 1), limit, 2


ORDER = (
    "line_share",
    "paragraph_share",
    "line_char_share",
    "paragraph_char_share",
    *(f"top_{n}_gram" for n in range(2, 5)),
    *(f"duplicated_{n}_grams" for n in range(5, 11)),
)


def quality(text):
    """Gopher's rules: the name of the first that fails."""
    words, lines = text.split(), parts_of(text, "\n")
    if not 50 <= len(tokens_of(text)) <= 100_000:
        return "page_length"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "word_length"
    if sum(map(text.count, ("#", "...", ". . .", "…"))) / len(words) > 0.1:
        return "symbol_ratio"
    if sum(line[0] in "●•*-" for line in lines) > 0.9 * len(lines):
        return "bullet_count"
    if sum(line.endswith(("...", ". . .", "…")) for line in lines) > 0.3 * len(lines):
        return "ellipsis_count"
    if sum(not any(map(str.isalpha, word)) for word in words) / len(words) > 0.2:
        return "alphabetic_word_ratio"
    if sum(word.lower() in STOP for word in words) < 2:
        return "stop_word"
    measured = {name: (value, limit, n) for name, value, limit, n in too_repetitive(text)}
    for name in ORDER:
        value, limit, n_parts = measured[name]
        if value > limit and n_parts > 1:
            return name
    return None


def without_addresses(text, tlds):
    named = [tld for tld in tlds.split() if tld.isalnum()]
    if any(text.lower().startswith(tld) for tld in named):
        tail = r"[-a-zA-Z0-9()@:%_+.~#?&/=]*"
        begin = r"\s{0,10}(?:(?:https?|ftp)://)?[-a-zA-Z0-9@:%._+~#=]{1,256}\.(?:"
        any_of = "|".join(sorted(named, reverse=True))
        text = re.sub(begin + any_of + r")\b" + tail, "", text)
    byte = r"[0-2]?[0-9]{1,2}"
    return re.sub(rf"\s{{0,10}}\b((https?|ftp)://)?(?:{byte}\.){{3}}{byte}"
                  r"[-a-zA-Z0-9()@:%_+.~#?&/=]*", "", text)  # fmt: skip


def is_counter(line):
    middle = re.sub(r"^\W*", "", re.sub(r"\W*$", "", line.lower()))
    match = re.fullmatch(r"\d[\d,.]*[kmb]?\s+(\w+)", middle)
    return match is not None and match[1] in COUNTED


def cut_lines(text):
    def keep(text, good):
        return "\n".join(line for line in text.split("\n") if not line or good(line))

    text = keep(text, lambda s: sum(c.isupper() for c in s) / len(s) <= 0.5).strip()
    text = keep(text, lambda s: sum(c.isdigit() for c in s) / len(s) <= 0.999999).strip()
    text = keep(text, lambda s: not is_counter(s)).strip()
    text = keep(text, lambda s: len(s.split()) >= 2)
    for phrase in (r"\s?items in cart", r"\s?read more...$", r"^sign-in\s?"):
        lines = []
        for line in text.split("\n"):
            short = len(line.split()) <= 10
            left = re.sub(phrase, "", line, flags=re.IGNORECASE) if short else line
            if not (short and line and not left.strip()):
                lines.append(left)
        text = "\n".join(lines).strip()
    return text


def reference(text, tlds=""):
    """The reason, or the text of what is kept."""
    text = without_addresses(text, tlds)
    if not text:
        return "emptied", None
    text = "".join("\n" * min(len(list(group)), 2) if char == "\n" else "".join(group)
                   for char, group in groupby(text, lambda c: c if c == "\n" else ""))  # fmt: skip
    reason = quality(text)
    if reason:
        return reason, None
    before, text = len(tokens_of(text)), cut_lines(text)
    if not text:
        return "emptied", None
    if (before - len(tokens_of(text))) / before > 0.05:
        return "word_removal_ratio", None
    return None, text


def check(texts, tlds=None):
    texts = list(texts)
    given = "" if tlds is None else Path(tlds).read_text(encoding="utf-8")
    rules = Rules((RefinedWeb(tlds=tlds),), detect_language=False)
    verdicts = rules.judge(pa.array(texts, pa.large_string()))
    for text, reason, new in zip(texts, verdicts.reason, verdicts.text, strict=True):
        expected, left = reference(text, given)
        assert (reason and reason.removeprefix("refinedweb.")) == expected, text
        if expected is None:
            assert new == left, text
    return {code for code in verdicts.reason if code}


def web_pages():
    """Prose with the lines that are cut out, and pages that fail for each reason."""
    lines = [
        "MENU HOME ABOUT",
        "  12 34",
        "1234",
        "3 likes",
        "» 1,2K views «",
        "1.5m followers!",
        "3 items in cart",
        "Read the story read more...",
        "Sign-in to comment",
        "Word",
        "",
        "   ",
        "READ MORE...",
        "Sign-in",
        "\tTitle\xa0",
        "See http://a.com/x?y=1 or 10.0.0.1",
    ]
    yield from (f"{line}\n{PLAIN}\n{line} x" for line in lines)
    yield from (f"{PLAIN}\n{line}" for line in lines)
    yield "\n".join(f"{line}\n{PROSE}" for line in lines)
    yield f"we {PLAIN} see https://a-b.com/x, c.org, d.company e.co.uk f@x.org."
    yield PLAIN.replace(" ", "\n\n\n\n", 3)
    yield PLAIN + "\n" + "\n".join(UNIQUE[120:135])
    texts = [f"{a} {b}" for a, b in zip(UNIQUE[::2], UNIQUE[1::2], strict=True)]
    yield "\n\n".join(["the of"] * 3 + ["\n".join(texts[i : i + 9]) for i in (0, 10, 20, 30)])
    yield "\n".join([" ".join(UNIQUE[:25])] * 2 + texts[15:40]) + " the of"
    gap = "\n" + " " * 400
    yield "\n\n".join([f"a b{gap}c d"] * 2 + ["\n".join(texts[i : i + 6]) for i in range(0, 70, 10)]
                      ) + " the of"  # fmt: skip
    unique = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnpr"]
    yield "the of " + " ".join(word.upper() + " A" for word in unique[:60])
    yield "\n".join(f"THE OF AND {word.upper()} ABLE WITH" for word in unique[:40])
    yield from ("10.0.0.1", "http://192.168.1.1/x?y", "", "\n\n\n")
    yield "\n".join(f"● the {word} of that {word[::-1]}" for word in unique)
    yield " ".join(f"{word}...\n" for word in unique)
    yield "\n".join(f"the {word} and so on . . ." for word in unique)
    yield "the of " + " ".join(f"{word} 1 -" for word in unique)
    yield "x " * 60 + "the of "
    yield "the of " + " ".join(word * 5 for word in unique)
    yield "\n\n".join([*(f"{word}\n{word[::-1]} the end" for word in unique[:30]), *["a\nb"] * 40])
    yield "\n".join(["short the of"] * 5 + [f"{w} {w[::-1]} and long" for w in unique[:40]])
    yield "10.0.0.1 \n" + PROSE * 2 + "don't 3.14 1,000 a_b カタカナ שלום צה\"ל e\u0301te\u0301"


def test_the_classes_are_those_of_the_library():
    import json

    assert json.loads(FILE.read_text(encoding="utf-8")) == facts()


ALPHABET = "ab1 .,:;'\"_-\u05d0\u30ab\u0301\u200d\u00ad\n\r\u00e9\u4e00\U0001f600\u2019\u0e01²"


@given(st.text(ALPHABET, max_size=30) | st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_words_that_begin_with_a_letter_or_digit_are_unisegs(text):
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        return
    texts = texts_from([text])
    work = work_for(texts)
    n = break_words(kinds(), work, decode(texts.data, 0, len(text.encode()), work))
    found = [text[first:last] for first, last in work.words[:n, :2].tolist()]
    assert found == [word for word in uniseg.words(text) if word[0].isalnum()]


def test_decisions_reasons_and_texts_are_those_of_the_definitions(tmp_path):
    tlds = tmp_path / "tlds.txt"
    tlds.write_text(TLDS, encoding="utf-8")
    texts = [*web_pages(), *documents(150, seed=2), *strange_texts(60, seed=3)]
    texts += rare_documents(seed=8)
    seen = check(texts) | check(texts, tlds) | check(repetitive())
    # 100,000 words take the library long
    assert seen >= set(RefinedWeb.reasons)


def repetitive():
    """Pages on both sides of each limit on repeated n-grams."""
    import random

    rng = random.Random(4)
    for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        for part in (limit + 0.004, limit - 0.004):
            yield repeating(rng, n, 2, int(8 * n / part), n_phrases=4)
            yield repeating(rng, 40, 2, int(80 / part))
    for n, times, n_words in ((2, 12, 100), (3, 7, 110), (4, 5, 110)):
        yield repeating(rng, n, times, n_words)


PARTS = [PLAIN,
         "the", "of", "The", "3 likes", "\n", "\n\n", "\n\n\n", " ", "word", "two words", "ABC DEF",
         "12", "...", "•", "read more...", "Sign-in", "10.0.0.1", "com", "a.com", PROSE, "\u00a0",
         "İ", "ſign-in", "5K vıews", "日本語の", PROSE[:60]]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=60).map("".join))
@settings(max_examples=80, deadline=None)
def test_made_up_texts_are_judged_as_by_the_definitions(text):
    check([text, f"{text}\n{PLAIN}"])


def test_a_document_is_judged_by_itself():
    texts = [*web_pages(), *documents(30, seed=5)]
    together = Rules((RefinedWeb(),), detect_language=False).judge(pa.array(texts))
    for index, text in enumerate(texts):
        alone = Rules((RefinedWeb(),), detect_language=False).judge(pa.array([text]))
        assert (alone.reason[0], alone.value[0]) == (together.reason[index], together.value[index])


def test_try_shows_what_was_measured_and_the_text_that_is_left():
    trial = try_filters("refinedweb", f"3 likes\n{PLAIN}")
    assert trial.verdict is None
    assert trial.text == PLAIN
    removed = next(c for c in trial.checks if c.reason == "refinedweb.word_removal_ratio")
    assert removed.value == pytest.approx(2 / (len(tokens_of(PLAIN)) + 2))
    assert np.isfinite([check.value for check in trial.checks]).all()


def test_a_missing_list_of_domains_is_named(tmp_path):
    rules = Rules((RefinedWeb(tlds=tmp_path / "tlds.txt"),), detect_language=False)
    with pytest.raises(PunaError, match=r"list of top-level domains .* does not exist"):
        rules.judge(pa.array(["a.com"]))
