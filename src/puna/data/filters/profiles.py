"""Profiles: the ordered lists of filters for kinds of text.

``prose``: Gopher's quality and repetition rules (Rae et al. 2021) on whitespace-separated words,
with checks of ours for broken encodings, data and licence texts.
``code``: the line-length and alphanumeric rules of Codex (Chen et al. 2021) and The Stack
(Kocetkov et al. 2022), encoded data after StarCoder2 (Lozhkov et al. 2024), generated files.
``gopher``, ``c4``, ``fineweb``: the filters of datatrove, decision for decision, on the words of
spaCy's English tokenizer; ``fineweb-pipeline``: all of them in FineWeb's order, in which lines need
no full stop (Penedo et al. 2024). ``dolma``: Gopher's rules as dolma applies them.
``refinedweb``: RefinedWeb's rules and line cutting as dclm has them. ``redpajama``: RedPajama-V2's
signals with the limits of its card. ``starcoder``: StarCoder's rules for files, ``starcoder2``:
those of The Stack v2. ``source-code``: licence headers cut, then ``code`` and whether files parse
(ours). ``notebook``, ``questions``: cleaning of these kinds of text (ours). ``dirty-words``: Llama
3's count.
Cheap checks come first; the order decides which reason a document with several faults gets.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.core.registry import Registry
from puna.data.filters import heuristics as h
from puna.data.filters.base import FILTERS, FilterConfig
from puna.data.filters.c4 import C4Quality
from puna.data.filters.code_syntax import CodeSyntax
from puna.data.filters.datatrove import FineWebQuality, GopherQuality, GopherRepetition
from puna.data.filters.dirty_words import DirtyWords
from puna.data.filters.dolma import DolmaGopher
from puna.data.filters.licence_header import LicenceHeader
from puna.data.filters.notebooks import Notebook
from puna.data.filters.questions import Questions
from puna.data.filters.redpajama import RedPajama
from puna.data.filters.refinedweb import RefinedWeb
from puna.data.filters.starcoder import StarCoder2
from puna.data.filters.starcoder1 import StarCoder


@dataclass(frozen=True)
class Profile:
    """A named list of filters.

    Attributes:
        filters: In the order in which they are applied.
        detect_language: Name the language of kept documents (column ``language``).
    """

    filters: tuple[FilterConfig, ...]
    detect_language: bool


PROFILES: Registry[Profile] = Registry("filter profile")

PROFILES.register(
    "prose",
    Profile(
        (
            h.NonText(), h.Length(), h.Words(), h.WordLength(), h.Symbols(), h.BulletLines(),
            h.EllipsisLines(), h.AlphaWords(), h.DataLike(), h.Licence(), h.Repetition(),
            h.Language(), h.StopWords(),
        ),
        detect_language=True,
    ),
)  # fmt: skip

PROFILES.register(
    "code",
    Profile(
        (
            h.NonText(), h.Length(min=20), h.Lines(), h.Alnum(), h.DataLike(), h.Generated(),
            h.Licence(max=0.8),
        ),
        detect_language=False,
    ),
)  # fmt: skip

for _name, _filters in (
    ("gopher", (GopherRepetition(), GopherQuality())),
    ("c4", (C4Quality(),)),
    ("fineweb", (FineWebQuality(),)),
    ("dolma", (DolmaGopher(),)),
    ("refinedweb", (RefinedWeb(),)),
    ("redpajama", (RedPajama(),)),
    ("starcoder", (StarCoder(),)),
    ("starcoder2", (StarCoder2(),)),
    ("source-code", (LicenceHeader(), *PROFILES.get("code").filters, CodeSyntax())),
    ("notebook", (Notebook(),)),
    ("questions", (Questions(),)),
    ("dirty-words", (DirtyWords(),)),
    (
        "fineweb-pipeline",
        (GopherRepetition(), GopherQuality(), C4Quality(terminal_punctuation=False),
         FineWebQuality()),
    ),
):  # fmt: skip
    PROFILES.register(_name, Profile(_filters, detect_language=False))

PROFILES.register("none", Profile((), detect_language=False))


def name_of(document_filter: FilterConfig) -> str:
    """Return the registered name of a filter."""
    return next(name for name in FILTERS if FILTERS.get(name) is type(document_filter))
