"""What a desk is told when it is made: labels, overlap, gates, limits, reason codes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from puna.core.config import Config

ROLES = ("annotator", "reviewer", "adjudicator", "admin")
"""Each may do what those before it may; nobody may judge what they wrote."""
KINDS = ("write", "rank", "label")
"""Write or edit a response, say which of two is better, choose a label."""
SPLITS = ("train", "heldout")
"""What examples are for; the splits of :mod:`puna.post.pairs`."""
DEGREES = ("marginally better", "slightly better", "better", "significantly better")
"""Degrees of preference 1 to 4 (Llama 3, arXiv 2407.21783, section 4.2.1)."""

Role = Literal["annotator", "reviewer", "adjudicator", "admin"]


class CheckRules(Config):
    """What is looked for in a response before anyone else sees it."""

    min_chars: int = Field(default=1, ge=0)
    """Shortest text, in characters."""
    max_chars: int = Field(default=20_000, ge=1)
    """Longest text, in characters."""
    language: str | None = None
    """Language that a text of 40 characters or more must be in (`en`), None for any."""
    refusals: bool = True
    """Send back texts that refuse ("I cannot help with that")."""
    phrases: tuple[str, ...] = ("as an ai", "as a language model", "i hope this helps",
                                "delve into", "it's important to note")  # fmt: skip
    """Worn phrases that are told to the reviewer."""
    max_opening_share: float = Field(default=0.05, gt=0, le=1)
    """Largest share of responses that may begin with the same three words; from 200 on."""
    pii: bool = True
    """Send back texts with personal data or keys."""
    duplicates: bool = True
    """Send back texts that were given for another item, letter for letter."""
    contamination: tuple[str, ...] = ()
    """JSONL files of evaluation examples (`text`, `question` or `prompt`)."""
    ngram: int = Field(default=13, ge=3)
    """Words in a row that, shared with an evaluation example, make a text contaminated."""


class Rules(Config):
    """How work goes through a desk."""

    labels: tuple[str, ...] = ("safe", "unsafe")
    """Labels of items of kind `label`, and safety marks of written responses."""
    topics: tuple[str, ...] = ()
    """Topics that an annotator may mark."""
    guidelines: str = ""
    """Shown beside every item."""
    overlap: int = Field(default=1, ge=1)
    """Annotators per item."""
    max_overlap: int = Field(default=5, ge=1)
    """Most annotators that an item gets when they do not agree; then it is adjudicated."""
    agree: float = Field(default=0.9, gt=0.5, le=1)
    """Chance of the likeliest label from which on the votes on an item agree."""
    gold_rate: float = Field(default=0.05, ge=0, lt=1)
    """Share of handed-out items that are gold items, as long as there are any unseen."""
    review_share: float = Field(default=1.0, ge=0, le=1)
    """Share of items whose votes agree that a reviewer sees; written responses are all seen."""
    max_rounds: int = Field(default=4, ge=1)
    """Rounds after which an item is adjudicated instead of returned."""
    reasons: tuple[str, ...] = ("factual", "incomplete", "instructions", "style", "unsafe",
                                "format", "other")  # fmt: skip
    """Reason codes of returns and defects."""
    lease_s: float = Field(default=3600.0, gt=0)
    """After so many seconds an item that a reviewer took and did not judge is given to another."""
    claim_s: float = Field(default=86_400.0, gt=0)
    """After so many seconds without a draft an annotator's item is given to another."""
    min_votes: int = Field(default=20, ge=1)
    """Votes before an annotator is called doubtful or a spammer."""
    trust: float = Field(default=0.5, ge=0, le=1)
    """Annotators whose informedness may be lower (lower bound) are doubtful."""
    spam: float = Field(default=0.25, ge=0, le=1)
    """Annotators whose informedness is lower (upper bound) get no more items."""
    refresh_every: int = Field(default=200, ge=1)
    """Votes after which reliability is estimated anew."""
    defect_limit: float = Field(default=0.05, gt=0, lt=1)
    """A batch is accepted when the upper bound of its defect rate is below."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of that bound."""
    audit_defects: int = Field(default=1, ge=0)
    """Defects that a batch's sample may hold; more make it larger."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of items that are held out of training, where an import does not say."""
    checks: CheckRules = Field(default_factory=CheckRules)
    """Automatic checks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.overlap > self.max_overlap:
            raise ValueError(f"overlap {self.overlap} is above max_overlap {self.max_overlap}")
        if len(set(self.labels)) < 2:
            raise ValueError("labels must name two at least")
        return self
