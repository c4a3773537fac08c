"""How well and how fast personal data, keys and explicit terms are found.

    python benchmarks/bench_safety.py [--docs 4000] [--seed 100] [--mb 16]

The first table is precision and recall per kind on the labelled set (made-up values in contexts
of our own, see `puna.data.safety.labelled`); a span counts when both of its ends are right. The
second is the recall of values that Faker makes, which knows nothing of our patterns: behind a
word that says what they are, and alone (a number without any context is often left alone, on
purpose). The third is speed per second of CPU time of one core: on Python code and package
descriptions as they are, on those of them in which nothing is found, and on the labelled set,
which is full of it. The end counts what is found in the real texts, with examples to look at;
nobody has labelled those.
"""

from __future__ import annotations

import argparse
from collections import Counter

from bench_data import MB, cpu_per_mb, n_bytes, read_texts
from rich.console import Console
from rich.table import Table

from puna.data.kernels.buffers import texts_from
from puna.data.safety.config import NATIONAL_IDS
from puna.data.safety.explicit_terms import CONTEXT_WORDS, EXPLICIT_TERMS
from puna.data.safety.labelled import make_labelled, measure
from puna.data.safety.pii import find_pii
from puna.data.safety.scan import find_candidates
from puna.data.safety.terms import TermList

_IDS = frozenset(NATIONAL_IDS)
_LOCALES = "en_US en_GB de_DE fr_FR es_ES it_IT nl_NL pt_BR pl_PL zh_CN ja_JP en_IN"
FAKER_VALUES = (
    ("email", "ascii_free_email", "mail ", "en_US de_DE"),
    ("phone", "phone_number", "Tel: ", _LOCALES),
    ("ip", "ipv4_public", "from ", "en_US"),
    ("credit_card", "credit_card_number", "card ", "en_US"),
    ("iban", "iban", "IBAN ", "en_GB de_DE fr_FR es_ES it_IT nl_NL pl_PL"),
    ("us_ssn", "ssn", "SSN ", "en_US"),
    ("fr_nir", "ssn", "NIR ", "fr_FR"),
    ("es_dni", "nif", "NIF ", "es_ES"),
    ("es_nie", "nie", "NIE ", "es_ES"),
    ("it_codice_fiscale", "ssn", "CF ", "it_IT"),
)
"""Kind, method of Faker, word before the value, locales."""


def quality_table(n_docs: int, seed: int) -> Table:
    table = Table(title=f"{n_docs} labelled documents, seed {seed}")
    for name in ("kind", "planted", "found", "wrong", "precision", "recall"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, score in measure(make_labelled(n_docs, seed)).items():
        table.add_row(kind, str(score.planted), str(score.found), str(score.wrong),
                      f"{score.precision:.4f}", f"{score.recall:.4f}")  # fmt: skip
    return table


def faker_table(n_values: int, seed: int) -> Table:
    """Measure recall on values of another generator."""
    from faker import Faker

    table = Table(title=f"recall of {n_values} values of Faker each, seed {seed}")
    for name in ("kind", "locale", "with a word before it", "alone"):
        table.add_column(name)
    for kind, method, word, locales in FAKER_VALUES:
        for locale in locales.split():
            fake = Faker(locale)
            fake.seed_instance(seed)
            values = [getattr(fake, method)() for _ in range(n_values)]
            shares = [recall(kind, [f"{before}{v}" for v in values], values)
                      for before in (word, "")]  # fmt: skip
            table.add_row(kind, locale, *(f"{share:.3f}" for share in shares))
    return table


def recall(kind: str, texts: list[str], values: list[str]) -> float:
    found = find_pii(texts_from(texts), [_IDS] * len(texts))
    n_right = 0
    for index, (text, value) in enumerate(zip(texts, values, strict=True)):
        data = text.encode()
        right = [data[a:b] == value.encode() and one == kind for a, b, one in found.get(index, [])]
        n_right += any(right)
    return n_right / len(values)


def speed_row(name: str, texts: list[str]) -> list[str]:
    batch, size = texts_from(texts), n_bytes(texts)
    ids = [_IDS] * len(texts)
    terms = TermList.of(EXPLICIT_TERMS, CONTEXT_WORDS)
    seconds = [
        cpu_per_mb(lambda: find_candidates(batch), size),
        cpu_per_mb(lambda: find_pii(batch, ids), size),
        cpu_per_mb(lambda: terms.measure(batch), size),
    ]
    n_candidates = len(find_candidates(batch).doc)
    found = find_pii(batch, ids)
    return [name, f"{size / MB:.1f}", f"{n_candidates / size * MB:.0f}",
            f"{sum(map(len, found.values())) / size * MB:.0f}",
            *(f"{1 / one:.0f}" for one in seconds)]  # fmt: skip


def without_findings(texts: list[str]) -> list[str]:
    found = find_pii(texts_from(texts), [_IDS] * len(texts))
    return [text for index, text in enumerate(texts) if index not in found]


def speed_table(real: dict[str, list[str]], n_docs: int, seed: int) -> Table:
    table = Table(title="MB/s per core (CPU time)")
    columns = ("texts", "MB", "candidates/MB", "findings/MB", "scan", "scan + detect", "terms")
    for name in columns:
        table.add_column(name, justify="left" if name == "texts" else "right")
    for name, texts in real.items():
        table.add_row(*speed_row(name, texts))
        table.add_row(*speed_row(f"{name}, nothing found", without_findings(texts)))
    labelled = [document.text for document in make_labelled(n_docs, seed)]
    table.add_row(*speed_row("labelled set", labelled))
    return table


def print_findings(console: Console, real: dict[str, list[str]]) -> None:
    for name, texts in real.items():
        distinct = sorted(set(texts))
        found = find_pii(texts_from(distinct), [_IDS] * len(distinct))
        counts: Counter[str] = Counter()
        examples: dict[str, set[str]] = {}
        for index, spans in found.items():
            data = distinct[index].encode()
            for start, end, kind in spans:
                counts[kind] += 1
                examples.setdefault(kind, set()).add(data[start:end].decode()[:48])
        size = n_bytes(distinct) / MB
        console.print(f"{name}: {len(distinct)} distinct texts, {size:.1f} MB", markup=False)
        for kind, n in counts.most_common():
            shown = ", ".join(sorted(examples[kind])[:4])
            console.print(f"  {kind}: {n}, as {shown}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--mb", type=float, default=16)
    options = parser.parse_args()
    console = Console()
    console.print(quality_table(options.docs, options.seed))
    console.print(faker_table(400, options.seed))
    real = read_texts(options.mb)
    console.print(speed_table(real, options.docs, options.seed))
    print_findings(console, real)


if __name__ == "__main__":
    main()
