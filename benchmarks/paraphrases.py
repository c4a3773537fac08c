"""Labelled pairs of texts for measuring semantic deduplication, made offline from real texts.

Positives, all with different words:

- `independent`: texts on one thing by different authors: a C function in cppreference and in the
  Linux manual pages; a term in FOLDOC and in the Jargon File (entries that share a word 5-gram are
  left out: many of FOLDOC's are copies);
- `light`, `medium`, `heavy`: paragraphs that are rewritten by rule: a share of the content words is
  replaced by WordNet synonyms (30, 60, 90 %), set phrases by others, and, from `medium` on, the
  sentences come in another order; `heavy` leaves out asides and one sentence of four or more.

Negatives, of the same texts: `random` (two paragraphs of any documents), `same document` (another
paragraph of the document) and `neighbour` (the paragraph of another document that has most in
common with it, by TF-IDF of words). The last two are hard: one topic, other content. Some
neighbours do say the same; that is noise which all methods meet alike.
"""

from __future__ import annotations

import math
import random
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
from planted import jaccard, shingles

PROSE = (
    "rust-doc", "cppreference-doc-en-html", "python3.11-doc", "python-django-doc", "sqlite3-doc",
    "libreoffice-help-en-us", "man_en", "dict-foldoc", "dict-jargon", "fortunes", "cmake-doc",
    "linux-doc-6.12", "qtbase5-doc-html", "python-pandas-doc", "python-scipy-doc", "nodejs-doc",
)  # fmt: skip
PER_SOURCE = 100
LEVELS = {"light": 0.3, "medium": 0.6, "heavy": 0.9}
NEGATIVES = ("random", "same document", "neighbour")
MIN_CHARS, MAX_CHARS = 200, 1000
COPY = 0.2
"""Share of its word 5-grams that a text may have in common with the others; more is a copy."""

_STOP_WORDS = """
a about after all also an and any are as at be because been before being but by can could did do
does each for from had has have how i if in into is it its just like may might more most must no
not now of off on one only or other our out over own same should so some such than that the
their them then there these they this those through to two under until up upon use used using
very was we well were what when where which while who will with would you your null true false
return returns type function value file class string list set get
"""
_PHRASES = tuple(
    (re.compile(rf"\b{old}\b"), new)
    for old, new in (
        ("in order to", "to"), ("is able to", "can"), ("must not", "may never"),
        ("must", "has to"), ("can be used to", "serves to"), ("is used to", "serves to"),
        ("for example", "for instance"), ("however", "yet"), ("because", "since"),
        ("such as", "like"), ("a number of", "several"), ("if", "in case"), ("do not", "don't"),
        ("does not", "doesn't"), ("is not", "isn't"), ("cannot", "can't"), ("only", "solely"),
        ("the following", "these"), ("as well as", "and also"), ("there is", "one finds"),
        ("note that", "mind that"), ("allows you to", "lets you"), ("specifies", "tells"),
    )
)  # fmt: skip
_STOP = frozenset(_STOP_WORDS.split())
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_ASIDE = re.compile(r"\s*\([^()]{3,80}\)")
_LEAD = re.compile(r"^(However|Therefore|Thus|Also|Finally|In addition|For example|Note that),? ?")
_ROMAN = re.compile("[ivxlcdmIVXLCDM]+")
_FORMS = (("ies", "y"), ("es", "e"), ("es", ""), ("s", ""), ("ied", "y"), ("ed", "e"), ("ed", ""),
          ("ing", "e"), ("ing", ""))  # fmt: skip


def unpack_wordnet(cache: Path) -> Path:
    """Fetch Debian's `wordnet-base` into a cache, without installing it; return its folder."""
    folder = cache / "wordnet" / "usr/share/wordnet"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=cache, check=True)
        package = next(cache.glob("wordnet-base_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(cache / "wordnet")], check=True)
    return folder


class WordNet:
    """Synonyms of a word in its most frequent sense."""

    def __init__(self, folder: Path) -> None:
        self.senses: dict[str, tuple[int, list[str]]] = {}
        for kind in ("noun", "verb", "adj", "adv"):
            data = (folder / f"data.{kind}").read_bytes()
            for line in (folder / f"index.{kind}").read_text().splitlines():
                if not line.startswith(" "):
                    self._add(data, line.split())

    def _add(self, data: bytes, entry: list[str]) -> None:
        word, n_pointers = entry[0], int(entry[3])
        n_tagged, offset = int(entry[5 + n_pointers]), int(entry[6 + n_pointers])
        if "_" in word or n_tagged < self.senses.get(word, (0, []))[0]:
            return
        fields = data[offset : data.index(b"\n", offset)].split(b" ")
        lemmas = [fields[4 + 2 * k].decode() for k in range(int(fields[3], 16))]
        others = [lemma.partition("(")[0] for lemma in lemmas if lemma.lower() != word]
        plain = [lemma for lemma in others if lemma.isalpha() and not _ROMAN.fullmatch(lemma)]
        if plain:
            self.senses[word] = (n_tagged, plain)

    def replace(self, word: str, rng: random.Random) -> str:
        """Return a synonym in the same form, or the word itself."""
        lower = word.lower()
        if lower in _STOP or len(lower) < 4:
            return word
        if lower in self.senses:
            return _as(word, rng.choice(self.senses[lower][1]))
        for ending, base in _FORMS:
            stem = lower.removesuffix(ending) + base
            if lower.endswith(ending) and stem in self.senses:
                return _as(word, _inflect(rng.choice(self.senses[stem][1]), ending))
        return word


def _as(word: str, other: str) -> str:
    return other.capitalize() if word[0].isupper() else other


def _inflect(word: str, ending: str) -> str:
    if ending in ("s", "es", "ies"):
        if word.endswith(("s", "x", "ch", "sh")):
            return f"{word}es"
        return f"{word[:-1]}ies" if re.search("[^aeiou]y$", word) else f"{word}s"
    stem = word.removesuffix("e")
    if ending == "ing":
        return f"{stem}ing"
    return f"{word[:-1]}ied" if re.search("[^aeiou]y$", word) else f"{stem}ed"


def rewrite(text: str, level: str, words: WordNet, rng: random.Random) -> str:
    """Say a paragraph in other words."""
    sentences = _SENTENCE.split(text)
    if level == "heavy":
        sentences = [_LEAD.sub("", _ASIDE.sub("", sentence)) for sentence in sentences]
        if len(sentences) >= 4:
            sentences.pop(rng.randrange(1, len(sentences)))
    if level != "light":
        rng.shuffle(sentences)
    rewritten = " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)
    for pattern, new in _PHRASES:
        rewritten = pattern.sub(new, rewritten)
    share = LEVELS[level]
    return _WORD.sub(
        lambda m: words.replace(m[0], rng) if rng.random() < share else m[0], rewritten
    )


@dataclass(frozen=True)
class Pairs:
    """Texts and pairs of them.

    Attributes:
        texts: The texts.
        documents: The documents (paths) that they are from.
        positive: Kind -> pairs of numbers of texts, int64 [n, 2].
        negative: The same.
    """

    texts: list[str]
    documents: frozenset[str]
    positive: dict[str, np.ndarray]
    negative: dict[str, np.ndarray]

    @cached_property
    def jaccards(self) -> dict[str, np.ndarray]:
        """Exact Jaccard similarity of word 5-grams of all pairs, for comparison."""
        return {
            kind: np.array([jaccard(self.texts[a], self.texts[b]) for a, b in pairs])
            for kind, pairs in {**self.positive, **self.negative}.items()
        }


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs of running prose."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(block.replace("{", "").replace("}", "").split())
        letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in joined)
        if (
            MIN_CHARS <= len(joined) <= MAX_CHARS
            and letters > 0.9 * len(joined)
            and len(_SENTENCE.split(joined)) >= 2
            and joined[-1] in ".!?"
        ):
            found.append(joined)
    return found


def _independent(rows: list[dict[str, str]]) -> list[tuple[str, str, str, str]]:
    """Return (text, text, path, path) of texts on one thing by different authors."""
    kinds: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for row in rows:
        source, path, text = row["source"], row["path"], row["text"]
        if "/en/c/" in path and source == "cppreference-doc-en-html":
            body = text.partition("From cppreference.com")[2]
            prose = " ".join(
                line.strip() for line in body.splitlines()
                if line.strip()[-1:] in (".", ")") and len(line) > 60 and ";" not in line
            )  # fmt: skip
            kinds["reference"][Path(path).stem] = (prose, path)
        elif "/man3/" in path and source == "man_en":
            body = text.partition("\nDESCRIPTION\n")[2]
            prose = " ".join(re.split(r"\n[A-Z][A-Z ]+\n", body)[0].split())
            kinds["manual"][Path(path).name.partition(".")[0]] = (prose, path)
        elif source in ("dict-foldoc", "dict-jargon") and "Jargon File" not in text:
            head, _, body = text.partition("\n")
            body = re.sub(r"^\s*(n|v|vt|vi|adj)\.\s|\(\d{4}-\d\d-\d\d\)|[{}]|<[^>]*>", "", body)
            kinds[source][head.strip().lower()] = (" ".join(body.split()), path)
    pairs = []
    for left, right in (("reference", "manual"), ("dict-foldoc", "dict-jargon")):
        for key in sorted(kinds[left].keys() & kinds[right].keys()):
            (a, path_a), (b, path_b) = kinds[left][key], kinds[right][key]
            a, b = a[:MAX_CHARS], b[:MAX_CHARS]
            if min(len(a), len(b)) >= 120 and not shingles(a) & shingles(b):
                pairs.append((a, b, path_a, path_b))
    return pairs


def neighbours(
    texts: list[str], documents: list[str], only: Container[int] | None = None
) -> list[int]:
    """Return for each text the text of another document with the highest TF-IDF cosine.

    Args:
        texts: The texts.
        documents: Of each text.
        only: Numbers of the texts that may be chosen; None for all.
    """
    counts = [Counter(_WORD.findall(text.lower())) for text in texts]
    n_with = Counter(word for count in counts for word in count)
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    vectors = []
    for index, count in enumerate(counts):
        vector = {word: (1 + math.log(n)) * math.log(len(texts) / n_with[word])
                  for word, n in count.items() if n_with[word] < 0.1 * len(texts)}  # fmt: skip
        norm = math.sqrt(sum(x * x for x in vector.values())) or 1.0
        vectors.append({word: x / norm for word, x in vector.items()})
        for word, x in vectors[-1].items():
            postings[word].append((index, x))
    nearest = []
    for index, vector in enumerate(vectors):
        scores: dict[int, float] = defaultdict(float)
        for word, x in vector.items():
            for other, y in postings[word]:
                scores[other] += x * y
        allowed = {k: v for k, v in scores.items()
                   if documents[k] != documents[index] and (only is None or k in only)}  # fmt: skip
        nearest.append(max(allowed, key=lambda k: (allowed[k], -k), default=-1))
    return nearest


def make_pairs(corpus: Path, wordnet: Path, seed: int = 0, per_source: int = PER_SOURCE) -> Pairs:
    """Make the pairs from `documents/` of a corpus (`debian_corpus.py`).

    Args:
        corpus: The corpus.
        wordnet: Folder of WordNet's database.
        seed: Of all choices.
        per_source: Paragraphs to take from each source.
    """
    rng, words = random.Random(seed), WordNet(wordnet)
    dataset = pads.dataset(corpus / "documents")
    wanted = pads.field("source").isin(list(PROSE))
    table = dataset.to_table(columns=["id", "source", "path", "text"], filter=wanted).sort_by("id")
    rows = table.to_pylist()
    seen: set[tuple[str, ...]] = set()
    taken: Counter[str] = Counter()
    firsts, seconds, paths = [], [], []
    for row in rows:
        found = _paragraphs(row["text"]) if taken[row["source"]] < per_source else []
        two = rng.sample(found, min(2, len(found)))
        grams = [shingles(text) for text in two]
        shared = [len(gram & seen) / len(gram) for gram in grams]
        if len(two) > 1:
            shared.append(len(grams[0] & grams[1]) / len(grams[1]))
        if not two or max(shared) > COPY:
            continue
        taken[row["source"]] += 1
        seen.update(*grams)
        firsts.append(two[0])
        seconds.append(two[1] if len(two) > 1 else None)
        paths.append(row["path"])
    texts = list(firsts)
    positive: dict[str, list[tuple[int, int]]] = {"independent": []}
    for a, b, path_a, path_b in _independent(rows):
        positive["independent"].append((len(texts), len(texts) + 1))
        texts += [a, b]
        paths += [path_a, path_b]
    n = len(firsts)
    for level in LEVELS:
        positive[level] = [(k, len(texts) + k) for k in range(n)]
        texts += [rewrite(text, level, words, rng) for text in firsts]
    negative: dict[str, list[tuple[int, int]]] = {"same document": []}
    for k, second in enumerate(seconds):
        if second is not None:
            negative["same document"].append((k, len(texts)))
            texts.append(second)
    neighbour = neighbours(firsts, paths)
    negative["neighbour"] = [(k, other) for k, other in enumerate(neighbour) if other >= 0]
    shifted = [(k, (k + rng.randrange(1, n)) % n) for k in range(n) for _ in range(5)]
    negative["random"] = shifted
    return Pairs(
        texts, frozenset(paths),
        {kind: np.array(pairs) for kind, pairs in positive.items()},
        {kind: np.array(negative[kind]) for kind in NEGATIVES},
    )  # fmt: skip
