"""Documents with planted personal data and hard negatives, to measure the detectors with.

Everything is made up from a seed: no value belongs to anybody (but any valid number may exist). The
contexts were written by the authors of the detectors, so the measured precision and recall say that
the detectors do what they are meant to do, not how they do on the web.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puna.data.kernels.buffers import texts_from
from puna.data.safety import checks
from puna.data.safety.config import KINDS, NATIONAL_IDS
from puna.data.safety.labelled_contexts import CONTEXTS, FILLER, NAMES, NEGATIVES, WORDS
from puna.data.safety.numbers import Span
from puna.data.safety.pii import find_pii

_ALNUM = string.ascii_letters + string.digits
_Make = Callable[[random.Random], str]


@dataclass(frozen=True)
class Labelled:
    """A text and what was planted in it: (start, end, kind) with byte offsets."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Score:
    """How a kind was found; a span counts as found when both its ends are right.

    Attributes:
        planted: Spans in the labelled set.
        found: Planted spans that were found.
        wrong: Spans that were reported where there is none, or with other ends.
    """

    planted: int
    found: int
    wrong: int

    @property
    def precision(self) -> float:
        """Share of the reported spans that are right; 1 when nothing was reported."""
        return self.found / max(self.found + self.wrong, 1) if self.found + self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Share of the planted spans that were found."""
        return self.found / max(self.planted, 1)


def make_labelled(n_docs: int, seed: int) -> list[Labelled]:
    """Make documents, each with a few planted spans and a few hard negatives among plain text.

    Args:
        n_docs: Number of documents; every kind occurs about ``n_docs / 4`` times.
        seed: Of the generator; equal seeds give equal documents.
    """
    rng = random.Random(seed)
    kinds = list(KINDS)
    return [_document(rng, kinds) for _ in range(n_docs)]


def measure(documents: Sequence[Labelled]) -> dict[str, Score]:
    """Run the detectors over labelled documents and compare: kind -> score."""
    ids = [frozenset(NATIONAL_IDS)] * len(documents)
    found = find_pii(texts_from([document.text for document in documents]), ids)
    planted = {(i, *span) for i, document in enumerate(documents) for span in document.spans}
    reported = {(i, *span) for i, spans in found.items() for span in spans}
    return {
        kind: Score(
            sum(item[3] == kind for item in planted),
            sum(item[3] == kind for item in planted & reported),
            sum(item[3] == kind for item in reported - planted),
        )
        for kind in KINDS
    }


def _document(rng: random.Random, kinds: list[str]) -> Labelled:
    parts: list[tuple[str, str, str]] = []  # text before, value, kind
    for kind in rng.sample(kinds, 5):
        context = rng.choice(CONTEXTS[kind])
        before, _, after = context.partition("@@")
        parts.append((before, VALUES[kind](rng), kind))
        parts.append((f"{after}\n", "", ""))
    parts += [(f"{_negative(rng)}\n", "", "") for _ in range(4)]
    parts += [(f"{rng.choice(FILLER)}\n", "", "") for _ in range(4)]
    blocks, i = [], 0
    while i < len(parts):  # a context stays together with what follows its value
        n = 2 if parts[i][2] else 1
        blocks.append(parts[i : i + n])
        i += n
    rng.shuffle(blocks)
    text, spans, at = "", [], 0
    for template, value, kind in (part for block in blocks for part in block):
        before = _fill(template, rng)
        start = at + len(before.encode())
        at = start + len(value.encode())
        text += before + value
        if kind:
            spans.append((start, at, kind))
    return Labelled(text, tuple(spans))


def _negative(rng: random.Random) -> str:
    return _fill(rng.choice(NEGATIVES), rng)


def _fill(template: str, rng: random.Random) -> str:
    """Replace ``{name}``, ``{word}``, ``{d4}`` (digits), ``{h8}`` (hex), ``{n}`` (small number)."""
    pieces = template.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        field, _, rest = piece.partition("}}")
        out.append(_field(field, rng) + rest)
    return "".join(out)


def _field(field: str, rng: random.Random) -> str:
    if field == "name":
        return rng.choice(NAMES).capitalize()
    if field == "word":
        return rng.choice(WORDS)
    if field == "n":
        return str(rng.randint(0, 30))
    alphabet = {"d": string.digits, "h": "0123456789abcdef", "a": _ALNUM}[field[0]]
    return _some(rng, alphabet, int(field[1:]))


def _some(rng: random.Random, alphabet: str, n: int) -> str:
    return "".join(rng.choices(alphabet, k=n))


def _email(rng: random.Random) -> str:
    first, last = rng.choice(NAMES), rng.choice(NAMES)
    word = rng.choice(WORDS)
    local = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{first}{rng.randint(1, 99)}",
                        f"{first}_{last}", f"{first}+{word}", f"{first}-{last}"))  # fmt: skip
    host = rng.choice(("gmail.com", "web.de", "orange.fr", "yahoo.co.uk", "cs.stanford.edu",
                       f"{word}.com", f"{word}-{last}.org", f"mail.{last}.io", "posteo.net",
                       "libero.it", "qq.com", "mail.ru"))  # fmt: skip
    return f"{local}@{host}"


def _phone(rng: random.Random) -> str:
    d = lambda n: _some(rng, string.digits, n)  # noqa: E731
    area = f"{rng.randint(2, 9)}{rng.randint(2, 9)}{rng.randint(2, 9)}"
    exchange = f"{rng.randint(2, 4)}{rng.randint(2, 9)}{rng.randint(2, 9)}"
    return rng.choice((
        f"({area}) {exchange}-{d(4)}", f"{area}-{exchange}-{d(4)}", f"+1 {area} {exchange} {d(4)}",
        f"+1-{area}-{exchange}-{d(4)}", f"1-{area}-{exchange}-{d(4)}", f"+1{area}{exchange}{d(4)}",
        f"+44 20 7{d(3)} {d(4)}", f"+447{d(9)}", f"+49 30 {rng.randint(2, 9)}{d(6)}",
        f"+49 (0)89 {rng.randint(2, 9)}{d(5)}", f"0049 40 {rng.randint(2, 9)}{d(6)}",
        f"+33 6 {d(2)} {d(2)} {d(2)} {d(2)}", f"06 {d(2)} {d(2)} {d(2)} {d(2)}",
        f"06.{d(2)}.{d(2)}.{d(2)}.{d(2)}", f"+34 6{d(2)} {d(3)} {d(3)}", f"+39 3{d(2)} {d(7)}",
        f"+91 9{d(4)} {d(5)}", f"+86 13{rng.randint(0, 9)} {d(4)} {d(4)}", f"+55 11 9{d(4)}-{d(4)}",
        f"+81 3-{rng.randint(3, 6)}{d(3)}-{d(4)}", f"+41 79 {d(3)} {d(2)} {d(2)}",
    ))  # fmt: skip


def _phone_in_context(rng: random.Random) -> str:
    """A national form that only a word before it makes a telephone number."""
    d = lambda n: _some(rng, string.digits, n)  # noqa: E731
    return rng.choice((
        f"030 {rng.randint(2, 9)}{d(6)}", f"0171 {rng.randint(2, 9)}{d(6)}", f"020 7{d(3)} {d(4)}",
        f"07{d(3)} {d(6)}", f"6{d(2)} {d(3)} {d(3)}", f"02 {d(8)}", f"3{d(2)} {d(7)}",
        f"089/{rng.randint(2, 9)}{d(6)}", f"13{d(9)}", f"9{d(4)} {d(5)}", _phone(rng),
    ))  # fmt: skip


def _ip(rng: random.Random) -> str:
    if rng.random() < 0.25:
        groups = [f"{rng.randint(1, 0xFFFF):x}" for _ in range(6)]
        whole = f"2a0{rng.randint(0, 9)}:{':'.join(groups)}:{rng.randint(1, 0xFFFF):x}"
        return rng.choice((whole, f"2a0{rng.randint(0, 9)}:{groups[0]}:{groups[1]}::{groups[2]}"))
    first = rng.choice((5, 23, 46, 62, 77, 81, 91, 93, 134, 141, 151, 178, 185, 194, 212, 217))
    return f"{first}.{rng.randint(1, 254)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}"


def _with_check(rng: random.Random, make: _Make, tails: str, accept: Callable[[str], bool]) -> str:
    """Make values until one of the tails fits; then it is valid."""
    while True:
        body = make(rng)
        for tail in rng.sample(tails, len(tails)):
            if accept(body + tail):
                return body + tail


def _card(rng: random.Random) -> str:
    prefix, n = rng.choice(
        (("4", 16), ("51", 16), ("55", 16), ("2250", 16), ("37", 15), ("6011", 16))
    )
    make = lambda rng: prefix + _some(rng, string.digits, n - 1 - len(prefix))  # noqa: E731
    digits = _with_check(rng, make, string.digits, checks.is_card)
    if rng.random() < 0.3:
        return digits
    cuts = (4, 10) if n == 15 else (4, 8, 12)
    return _cut(digits, cuts, rng.choice(" -"))


def _cut(text: str, cuts: Sequence[int], separator: str) -> str:
    edges = [0, *cuts, len(text)]
    return separator.join(text[a:b] for a, b in itertools.pairwise(edges))


def _iban(rng: random.Random) -> str:
    country = rng.choice(("DE", "FR", "GB", "NL", "ES", "IT", "AT", "CH", "BE", "PL"))
    letters = {"GB": 4, "NL": 4, "IT": 1}.get(country, 0)
    n = checks.IBAN_LENGTHS[country] - 4 - letters
    body = _some(rng, string.ascii_uppercase, letters) + _some(rng, string.digits, n)
    turned = "".join(str(int(char, 36)) for char in f"{body}{country}00")
    whole = f"{country}{98 - int(turned) % 97:02d}{body}"
    return whole if rng.random() < 0.5 else _cut(whole, range(4, len(whole), 4), " ")


def _ssn(rng: random.Random) -> str:
    return f"{rng.randint(1, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def _tax_id(rng: random.Random) -> str:
    def make(rng: random.Random) -> str:
        digits = rng.sample(string.digits, 9)
        digits.insert(rng.randint(0, 8), rng.choice(digits))
        return "".join(digits)

    whole = _with_check(rng, make, string.digits, checks.is_de_tax_id)
    return whole if rng.random() < 0.5 else _cut(whole, (2, 5, 8), " ")


def _nir(rng: random.Random) -> str:
    place = rng.choice((f"{rng.randint(1, 95):02d}", "2A", "2B"))
    body = (f"{rng.choice('12')}{rng.randint(0, 99):02d}{rng.randint(1, 12):02d}{place}"
            f"{rng.randint(1, 999):03d}{rng.randint(1, 999):03d}")  # fmt: skip
    number = int(body.replace("2A", "19").replace("2B", "18"))
    whole = f"{body}{97 - number % 97:02d}"
    return whole if rng.random() < 0.5 else _cut(whole, (1, 3, 5, 7, 10, 13), " ")


def _dni(rng: random.Random) -> str:
    whole = _with_check(rng, lambda rng: _some(rng, string.digits, 8), "TRWAGMYFPDXBNJZSQVHLCKE",
                        checks.is_es_dni)  # fmt: skip
    return rng.choice((whole, f"{whole[:-1]}-{whole[-1]}"))


def _nie(rng: random.Random) -> str:
    whole = _with_check(rng, lambda rng: rng.choice("XYZ") + _some(rng, string.digits, 7),
                        "TRWAGMYFPDXBNJZSQVHLCKE", checks.is_es_dni)  # fmt: skip
    return rng.choice((whole, f"{whole[0]}-{whole[1:-1]}-{whole[-1]}"))


def _codice(rng: random.Random) -> str:
    consonants = "BCDFGHLMNPRSTVZ"
    body = (f"{_some(rng, consonants, 6)}{rng.randint(30, 99)}{rng.choice('ABCDEHLMPRST')}"
            f"{rng.randint(1, 28) + rng.choice((0, 40)):02d}{rng.choice('ABCDEFGHIL')}"
            f"{rng.randint(100, 999)}")  # fmt: skip
    return body + chr(65 + checks.codice_fiscale_sum(body) % 26)


def _jwt(rng: random.Random) -> str:
    def part(value: object) -> str:
        raw = json.dumps(value, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    header = part({"alg": rng.choice(("HS256", "RS256")), "typ": "JWT"})
    claims = part({"sub": _some(rng, string.digits, 10), "iat": rng.randint(10**9, 2 * 10**9)})
    return f"{header}.{claims}.{_some(rng, _ALNUM + '-_', 42)}{rng.choice(_ALNUM)}"


def _pem(rng: random.Random) -> str:
    name = rng.choice(("RSA PRIVATE KEY", "PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY"))
    lines = "\n".join(_some(rng, _ALNUM + "+/", 64) for _ in range(rng.randint(4, 25)))
    return f"-----BEGIN {name}-----\n{lines}\n-----END {name}-----"


def _password(rng: random.Random) -> str:
    strong = _some(rng, _ALNUM + "!$%^&*-_+", rng.randint(12, 24))
    token = rng.choice((_some(rng, "0123456789abcdef", 40), _some(rng, _ALNUM, 32)))
    return rng.choice((f"{strong}aR7", token))


def _service(rng: random.Random) -> str:
    return rng.choice((
        f"sk_live_{_some(rng, _ALNUM, 24)}", f"glpat-{_some(rng, _ALNUM, 20)}",
        f"hf_{_some(rng, _ALNUM, 34)}", f"npm_{_some(rng, _ALNUM, 36)}",
        f"SG.{_some(rng, _ALNUM, 22)}.{_some(rng, _ALNUM, 43)}",
        f"pypi-AgEIcHlwaS5vcmc{_some(rng, _ALNUM, 80)}",
    ))  # fmt: skip


VALUES: dict[str, _Make] = {
    "private_key": _pem,
    "jwt": _jwt,
    "url_password": lambda rng: f"{_some(rng, _ALNUM, rng.randint(9, 16))}{rng.choice('!$7x')}9",
    "aws_key": lambda rng: rng.choice(("AKIA", "ASIA"))
    + _some(rng, string.ascii_uppercase + "234567", 15) + rng.choice("234567"),
    "github_token": lambda rng: rng.choice((
        f"gh{rng.choice('pousr')}_{_some(rng, _ALNUM, 36)}",
        f"github_pat_{_some(rng, _ALNUM, 22)}_{_some(rng, _ALNUM, 59)}")),
    "slack_token": lambda rng: rng.choice((
        f"xoxb-{_some(rng, string.digits, 12)}-{_some(rng, string.digits, 12)}-"
        f"{_some(rng, _ALNUM, 24)}",
        f"hooks.slack.com/services/T{_some(rng, string.digits, 8)}/B{_some(rng, string.digits, 8)}/"
        f"{_some(rng, _ALNUM, 24)}")),
    "google_key": lambda rng: f"AIza{_some(rng, _ALNUM + '-_', 34)}{rng.choice(_ALNUM)}",
    "openai_key": lambda rng: rng.choice((
        f"sk-{_some(rng, _ALNUM, 48)}", f"sk-proj-{_some(rng, _ALNUM, 48)}",
        f"sk-ant-api03-{_some(rng, _ALNUM + '-_', 92)}A")),
    "service_token": _service,
    "password": _password,
    "email": _email,
    "iban": _iban,
    "credit_card": _card,
    "us_ssn": _ssn,
    "de_tax_id": _tax_id,
    "fr_nir": _nir,
    "es_dni": _dni,
    "es_nie": _nie,
    "it_codice_fiscale": _codice,
    "ip": _ip,
    "phone": _phone_in_context,
}  # fmt: skip
"""Kind -> what makes a value of it."""
