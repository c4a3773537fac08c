"""Texts on one thing by two authors, for measuring semantic deduplication on hard paraphrases.

No rule of ours made them. Each pair is the description of one C function or system call in

- the Linux manual pages (package `manpages-dev`, from the corpus), and
- the manual of newlib (`libnewlib-doc`) or the FreeBSD manual pages (`freebsd-manpages`).

Positive: the page of the same name, unless more than 2 % of the word 5-grams of the shorter text
are in the other, which has then a part that was copied. Both texts name the function, which helps
every method; `masked` replaces the name by the word *name*. Negative: the other author's text on
another function, five by chance (`random`) and the one with most in common by TF-IDF of words
(`nearest`), which often describes a sibling of the function. Descriptions are cut at 1,000
characters.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
from paraphrases import MAX_CHARS, Pairs, neighbours
from planted import shingles

from puna.data.extract import extract

PACKAGES = ("libnewlib-doc", "freebsd-manpages")
MIN_CHARS = 120
COPY = 0.02
N_RANDOM = 5
_HEADING = re.compile(r"\n(?:[A-Z][A-Z ]+|Returns|Portability|Synopsis)\n")
_TAG = re.compile(r"<(style|script|head)\b.*?</\1>|<[^>]*>", re.DOTALL)


def unpack(cache: Path, package: str) -> Path:
    """Fetch a Debian package into a cache, without installing it; return its folder."""
    folder = cache / "two-authors" / package
    if not folder.is_dir():
        debs = cache / "two-authors" / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True)
        subprocess.run(["dpkg", "-x", str(next(debs.glob(f"{package}_*.deb"))), str(folder)],
                       check=True)  # fmt: skip
    return folder


def _prose(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next, as one paragraph."""
    body = text.partition(f"\n{heading}\n")[2]
    return " ".join(_HEADING.split(body)[0].split())[:MAX_CHARS]


def _linux(corpus: Path) -> dict[str, tuple[str, str]]:
    """Return function -> description and path, of the corpus."""
    wanted = pads.field("source") == "man_en"
    table = pads.dataset(corpus / "documents").to_table(columns=["path", "text"], filter=wanted)
    found = {}
    for row in table.sort_by("path").to_pylist():
        if "/man2/" in row["path"] or "/man3/" in row["path"]:
            prose = _prose(row["text"], "DESCRIPTION")
            found[Path(row["path"]).name.partition(".")[0]] = (prose, row["path"])
    return found


def _newlib(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("usr/share/doc/libnewlib-doc/lib[cm].html/[a-z]*.html")):
        yield path.stem, _prose(html.unescape(_TAG.sub("", path.read_text("utf-8"))), "Description")


def _freebsd(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("usr/share/man/man[23]/*.gz")):
        if not path.is_symlink():
            text, _ = extract(gzip.decompress(path.read_bytes()), "text/troff")
            yield path.name.partition(".")[0], _prose(text, "DESCRIPTION")


def _mask(text: str, names: set[str]) -> str:
    return re.sub(rf"\b(?:{'|'.join(map(re.escape, sorted(names)))})\b", "name", text)


def make_hard_pairs(corpus: Path, cache: Path, seed: int = 0, *, masked: bool = False) -> Pairs:
    """Make the pairs.

    Args:
        corpus: The corpus (`debian_corpus.py`).
        cache: Where packages are unpacked.
        seed: Of the random negatives.
        masked: Whether to hide the names of the functions.
    """
    linux, rng = _linux(corpus), random.Random(seed)
    lefts, rights, paths = [], [], []
    for package, read in zip(PACKAGES, (_newlib, _freebsd), strict=True):
        seen: set[str] = set()
        for name, right in read(unpack(cache, package)):
            left, path = linux.get(name, ("", ""))
            grams = shingles(left), shingles(right)
            common = len(grams[0] & grams[1]) > COPY * min(map(len, grams))
            short = min(len(left), len(right)) < MIN_CHARS
            if short or common or left in seen or right in seen:
                continue
            seen |= {left, right}
            lefts.append(_mask(left, {name}) if masked else left)
            rights.append(_mask(right, {name}) if masked else right)
            paths.append(path)
    n = len(lefts)
    # a text of the other side on another function; the nearest of all texts may be of either side
    nearest = neighbours([*lefts, *rights], [*paths, *paths], only=range(n, 2 * n))[:n]
    chance = [(k, n + rng.choice([j for j in range(n) if paths[j] != paths[k]]))
              for k in range(n) for _ in range(N_RANDOM)]  # fmt: skip
    own = np.array([(k, n + k) for k in range(n)])
    return Pairs(
        [*lefts, *rights], frozenset(paths), {"two authors": own},
        {"random": np.array(chance), "nearest": np.array(list(enumerate(nearest)))},
    )  # fmt: skip
