"""How texts are extracted: the settings that every source of documents has."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from puna.core.config import Config
from puna.data.reasons import register_reasons

Directive = Literal[
    "noai", "noimageai", "noindex", "nofollow", "noarchive", "nosnippet", "tdm-reservation"
]


class ExtractConfig(Config):
    """How the text of a document is found in its bytes."""

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """What finds the main content of HTML pages. `trafilatura` needs the extra of that name."""
    repair: bool = False
    """Repair texts that were decoded wrongly before they came here (`schÃ¶n` for `schön`), with
    ftfy (the extra `repair`). Program code is left alone; repaired documents are counted and
    carry `repaired` in their metadata."""
    notebook_code: Literal["fenced", "percent"] = "fenced"
    """How code of a Jupyter notebook is written: in fenced blocks of a Markdown text, or as a
    script whose cells begin with `# %%` and whose prose is commented out."""
    notebook_output_chars: int = Field(default=0, ge=0)
    """Keep plain-text outputs of notebook cells, this many characters of each cell at most;
    0 keeps none. Images and HTML outputs are never kept."""
    reject_robots: tuple[Directive, ...] = ()
    """Reject documents whose owner says so: in `<meta name="robots">`, in the header
    `X-Robots-Tag` of a WARC record, or in a metadata field `robots` (reason `robots.noai`).
    `tdm-reservation` is the opt-out of the W3C group TDMRep. Directives for one named robot only
    are not followed; `none` stands for `noindex, nofollow`."""


DEFAULT_EXTRACT = ExtractConfig()
"""The settings where no one has given any."""

register_reasons(
    {
        f"robots.{name}": f"its owner says {name!r} (robots directive of the page, its HTTP "
        "header, or its metadata) and `reject_robots` names it"
        for name in get_args(Directive)
    }
)
