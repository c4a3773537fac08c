"""What a recipe says about safety: personal data, block lists, word lists, classifiers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field, field_validator

from puna.core.config import Config
from puna.data.engine import EngineConfig

Action = Literal["redact", "drop", "keep"]

NATIONAL_IDS = ("us_ssn", "de_tax_id", "fr_nir", "es_dni", "es_nie", "it_codice_fiscale")
"""Numbers that a state gives to a person; all but the first have check digits."""

KINDS: dict[str, str] = {
    "private_key": "a PEM block with a private key",
    "jwt": "a JSON web token",
    "url_password": "the password in a URL's login",
    "aws_key": "an access key id of AWS",
    "github_token": "a token of GitHub",
    "slack_token": "a token or webhook of Slack",
    "google_key": "an API key or client secret of Google",
    "openai_key": "a key that begins with `sk-` (OpenAI, Anthropic and others)",
    "service_token": "a token of GitLab, Hugging Face, npm, PyPI, SendGrid or Stripe",
    "password": "a value of high entropy assigned to a name such as password, secret or token",
    "email": "an e-mail address",
    "iban": "an international bank account number",
    "credit_card": "the number of a payment card",
    "us_ssn": "a social security number of the USA",
    "de_tax_id": "a German tax id",
    "fr_nir": "a French social security number",
    "es_dni": "a Spanish identity number",
    "es_nie": "a Spanish number of a foreign person",
    "it_codice_fiscale": "an Italian tax code",
    "ip": "a public IPv4 or IPv6 address",
    "phone": "a telephone number",
}
"""Kind of personal data or key -> what it is; where two claim the same bytes, the one that stands
first here wins."""

ANY_LANGUAGE = "*"


class PiiRules(Config):
    """What happens to personal data and keys."""

    action: Action = "redact"
    """For kinds that `actions` does not name. `redact`: replace it. `drop`: replace it, and drop
    the documents that hold more than `drop_above` of the kind. `keep`: count it only."""
    actions: dict[str, Action] = Field(default_factory=dict)
    """Kind -> action. Kinds: `email`, `phone`, `ip`, `credit_card`, `iban`, `us_ssn`, `de_tax_id`,
    `fr_nir`, `es_dni`, `es_nie`, `it_codice_fiscale`, `aws_key`, `github_token`, `slack_token`,
    `google_key`, `openai_key`, `service_token`, `jwt`, `private_key`, `password`,
    `url_password`."""
    drop_above: int = Field(default=5, ge=0)
    """Most findings of a kind with the action `drop` that a document may hold (5 in dolma)."""
    replacements: dict[str, str] = Field(default_factory=dict)
    """Kind -> what stands in its place; by default the kind itself, `<EMAIL>`."""
    national_ids: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {ANY_LANGUAGE: NATIONAL_IDS}
    )
    """Language (`de`, as `data.filter` names it) -> national ids that are looked for in its
    documents; `*` stands for all other languages and documents without one."""

    @field_validator("actions", "replacements")
    @classmethod
    def _known_kinds(cls, value: dict[str, str]) -> dict[str, str]:
        _require_known(value, KINDS)
        return value

    @field_validator("national_ids")
    @classmethod
    def _known_ids(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for kinds in value.values():
            _require_known(kinds, NATIONAL_IDS)
        return value

    def action_of(self, kind: str) -> Action:
        """Return what happens to a kind."""
        return self.actions.get(kind, self.action)

    def replacement_of(self, kind: str) -> str | None:
        """Return what stands in the place of a kind; None when it is kept."""
        if self.action_of(kind) == "keep":
            return None
        return self.replacements.get(kind, f"<{kind.upper()}>")

    def ids_of(self, language: str | None) -> frozenset[str]:
        """Return the national ids to look for in documents of a language."""
        default = self.national_ids.get(ANY_LANGUAGE, ())
        return frozenset(self.national_ids.get(language or ANY_LANGUAGE, default))


def _require_known(names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown kind {name!r}; {hint}known: {', '.join(known)}")


class TermRules(Config):
    """Weighted terms; a document is dropped when both limits are passed (the limits are ours)."""

    files: tuple[str, ...] = ()
    """Lists of terms: one per line, after a tab its weight (1 when there is none)."""
    context_files: tuple[str, ...] = ()
    """Lists of words that excuse terms with a weight below 1, up to 100 bytes away."""
    max_per_1000: float = Field(default=8.0, ge=0)
    """Largest sum of weights per 1,000 words."""
    min_distinct: int = Field(default=3, ge=1)
    """Documents with fewer distinct terms stay."""
    except_sources: tuple[str, ...] = ()
    """Sources whose documents stay."""


class NsfwRules(TermRules):
    """As :class:`TermRules`, with a list of our own."""

    builtin: bool = True
    """Use our modest list of explicit terms, and our words of medicine and education."""


class ModelUse(Config):
    """A classifier whose positive class is dropped."""

    path: str
    """What `train_hashed` wrote (`.safetensors`), a folder of `puna data classifier train`, or a
    fastText model (`.bin`)."""
    positive: str | None = None
    """For a fastText model: the label whose probability is the score."""
    max: float = Field(default=0.5, ge=0, le=1)
    """Drop documents with a higher score."""
    except_sources: tuple[str, ...] = ()
    """Sources whose documents stay."""


class SafetyConfig(EngineConfig):
    """What is redacted, and what drops a document."""

    pii: PiiRules = Field(default_factory=PiiRules)
    """Personal data and keys."""
    block_lists: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Category -> files with one domain (or domain and path) per line, as the UT1 and hosts lists;
    subdomains match. Applied to a document's `path` and to `url` of its metadata."""
    nsfw: NsfwRules = Field(default_factory=NsfwRules)
    """Explicit terms."""
    toxic: TermRules = Field(default_factory=TermRules)
    """Terms of the user's own lists of insults and hate; without `files` nothing is looked for."""
    models: dict[str, ModelUse] = Field(default_factory=dict)
    """Name (`nsfw`, `toxic`) -> classifier."""

    def files(self) -> Sequence[str]:
        """Return all files and folders that the rules name."""
        lists = [path for paths in self.block_lists.values() for path in paths]
        terms = [*self.nsfw.files, *self.nsfw.context_files, *self.toxic.files]
        models = [use.path for use in self.models.values()]
        return [*lists, *terms, *self.toxic.context_files, *models]
