"""Build a corpus of more than 100,000 real documents from Debian's documentation packages.

    python benchmarks/debian_corpus.py --cache CACHE [--seed 0] [--planted 500] [--workers 1]

The packages come from the configured mirror, each once (`apt-get download`, about 280 MB), and are
unpacked below the cache (`dpkg -x`, about 2.2 GB); nothing is installed. HTML, manual pages, plain
text, fortunes and dictionary entries become documents by puna's own extraction. An attempt that was
stopped is continued: packages, and units of a few hundred files, that are done are not done again.
The same packages and seed give the same files.

`CACHE/corpus` holds then

- `documents/part-*.parquet`: a finished artifact, the columns of puna's documents and `url`,
  `licence`; ordered by id, which is a hash, so any shard is a sample of the whole;
- `jsonl/part-*.jsonl.gz`: id, url, source, text, licence;
- `planted.parquet`: which documents are edited copies of which others (see `planted.py`).

The licence is what `usr/share/doc/*/copyright` names, best effort. Texts are for measuring here;
they are not ours to pass on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from planted import plant

from puna.core.artifact import write_record
from puna.core.errors import PunaError
from puna.core.fsio import atomic_path, hash_json, remove_tree
from puna.core.pool import WorkerPool, resolve_workers
from puna.core.progress import progress
from puna.data.engine.shards import write_shard
from puna.data.extract import extract
from puna.data.readers.files import format_of, read_file
from puna.data.readers.records import RawRecord, UnusableError
from puna.data.schema import DOCUMENT_SCHEMA, document_id, dump_metadata, shard_name

PACKAGES = (
    "rust-doc", "cppreference-doc-en-html", "linux-doc-6.12|linux-doc-6.1", "qtbase5-doc-html",
    "python-pandas-doc", "python-scipy-doc", "python3.11-doc|python3.13-doc", "python-django-doc",
    "sqlite3-doc", "debian-handbook", "installation-guide-amd64", "libreoffice-help-en-us",
    "libreoffice-help-de", "libreoffice-help-fr", "libreoffice-help-ja", "manpages-de",
    "manpages-fr", "manpages-es", "manpages-pl", "manpages-ja", "manpages-zh", "manpages-ru",
    "fortunes", "fortunes-de", "fortunes-it", "fortunes-es", "fortunes-ru", "dict-foldoc",
    "dict-jargon", "cmake-doc", "debian-reference-de", "debian-reference-en",
    "debian-reference-fr", "debian-reference-ja", "developers-reference", "harden-doc",
    "libgtk-3-doc", "manpages", "manpages-dev", "maxima-doc", "nodejs-doc", "octave-doc",
    "perl-doc",
)  # fmt: skip
"""Packages to use; ``a|b``: the first that the release has."""

SCHEMA = pa.schema(
    [*DOCUMENT_SCHEMA, pa.field("url", pa.string()), pa.field("licence", pa.string())]
)
FORMATS = ("html", "roff", "text", "markdown", "rst")
MAX_FILE_BYTES = 2_000_000
UNIT_FILES = 400
N_SHARDS = 8


@dataclass(frozen=True)
class Unit:
    """Some files of an unpacked package, and where their documents go.

    Attributes:
        package: Name of the package.
        licence: What its copyright file names.
        root: Folder that it was unpacked into.
        paths: Files, relative to ``root``.
        out: Parquet file to write.
    """

    package: str
    licence: str
    root: Path
    paths: tuple[str, ...]
    out: Path


def command(*arguments: str, cwd: Path | None = None) -> str:
    """Run a program and return its output.

    Raises:
        PunaError: It is not installed, or fails.
    """
    try:
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise PunaError(f"{arguments[0]} is not installed", "run this on Debian") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise PunaError(
            f"`{' '.join(arguments)}` failed: {last}", "run `apt-get update`, check the mirror"
        ) from error
    return done.stdout


def choose(package: str) -> str | None:
    """Return the first of the alternatives that the release has, None when it has none."""
    for name in package.split("|"):
        policy = command("apt-cache", "policy", name)  # empty for a name that is not known
        if policy and "Candidate: (none)" not in policy:
            return name
    return None


def download(package: str, debs: Path) -> Path:
    """Download a package unless the cache holds it."""
    known = sorted(debs.glob(f"{package}_*.deb"))
    if known:
        return known[0]
    partial = debs / "partial"
    remove_tree(partial)
    partial.mkdir(parents=True)
    command("apt-get", "download", "-q", package, cwd=partial)
    (found,) = partial.glob("*.deb")
    return found.rename(debs / found.name)


def unpack(package: str, deb: Path, unpacked: Path) -> Path:
    """Unpack a package unless the cache holds its files."""
    folder = unpacked / package
    if not folder.is_dir():
        partial = unpacked / f"{package}.partial"
        remove_tree(partial)
        command("dpkg", "-x", str(deb), str(partial))
        partial.rename(folder)
    return folder


# A short name; longer ones are the licence itself.
_LICENCE = re.compile(r"^License:[ \t]*(\S[^\n]{0,60})$", re.MULTILINE | re.IGNORECASE)
_KNOWN_LICENCES = (
    ("GNU Free Documentation License", "GFDL"), ("Creative Commons", "CC"),
    ("GNU Lesser General Public", "LGPL"), ("GNU General Public", "GPL"), ("Apache", "Apache"),
    ("Python Software Foundation", "PSF"), ("MIT", "MIT"), ("BSD", "BSD"),
    ("Artistic", "Artistic"), ("public domain", "public-domain"),
)  # fmt: skip


def licence_of(package: str, root: Path) -> str:
    """Read the licences that a package's copyright file names, the most frequent first."""
    path = root / "usr/share/doc" / package / "copyright"
    if not path.is_file():
        return "unknown"
    text = path.read_text(encoding="utf-8", errors="replace")
    named = Counter(name.strip().rstrip(".") for name in _LICENCE.findall(text))
    if not named:
        named = Counter(short for long, short in _KNOWN_LICENCES if long.lower() in text.lower())
    return ", ".join(name for name, _ in named.most_common(3)) or "unknown"


def list_units(package: str, licence: str, root: Path, texts: Path) -> list[Unit]:
    """Divide the usable files of a package into units."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    inner = (path.relative_to(root).as_posix() for path in files)
    usable = sorted(path for path in inner if kind_of(path) is not None)
    return [
        Unit(package, licence, root, tuple(usable[at : at + UNIT_FILES]),
             texts / f"{package}-{at // UNIT_FILES:03d}.parquet")
        for at in range(0, len(usable), UNIT_FILES)
    ]  # fmt: skip


def kind_of(path: str) -> str | None:
    """Tell how a file is read: a format of puna's, ``fortunes``, ``dict``, or None: not at all."""
    name = path.rpartition("/")[2]
    if "/fortunes/" in path and "." not in name:
        return "fortunes"
    if name.endswith(".dict.dz"):
        return "dict"
    found = format_of(path)
    return found if found in FORMATS else None


def source_of(package: str, path: str, kind: str) -> str:
    """Name the source of a document: manual pages by language, text by package."""
    if kind == "roff":
        language = re.search(r"/man/(?:([a-zA-Z_.]+)/)?man\d", f"/{path}")
        return f"man_{((language and language[1]) or 'en').partition('.')[0]}"
    return f"{package}-txt" if kind in ("text", "markdown", "rst") else package


def build_unit(unit: Unit) -> Counter[str]:
    """Extract the files of a unit; return what was left out and why."""
    lost: Counter[str] = Counter()
    rows = []
    for path in unit.paths:
        kind = kind_of(path) or ""
        try:
            with warnings.catch_warnings(action="ignore"):
                parts = list(read_texts(unit.root / path, kind))
        except UnusableError as error:
            lost[error.reason] += 1
            continue
        source = source_of(unit.package, path, kind)
        for key, text in parts:
            if not text.strip():
                lost["empty"] += 1
                continue
            url = f"https://{unit.package.replace('_', '-')}.example.org/{quote(path + key)}"
            metadata = {"licence": unit.licence, "package": unit.package, "url": url}
            inner = f"{unit.package}/{path}{key}"
            rows.append((document_id(source, inner), source, inner, text, dump_metadata(metadata),
                         len(text.encode()), url, unit.licence))  # fmt: skip
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(values, f.type) for values, f in zip(columns, SCHEMA, strict=True)]
    counts = {b"lost": json.dumps(lost).encode()}
    with atomic_path(unit.out) as temporary:
        table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(counts))
        pq.write_table(table, temporary, compression="zstd")
    return lost


def read_texts(path: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Yield (what to append to the path, text) of each document of a file.

    Raises:
        UnusableError: The file is too large, damaged, or no text.
    """
    if kind == "dict":
        yield from read_dictionary(path)
        return
    with path.open("rb") as file:
        format = "text" if kind == "fortunes" else kind
        record = next(read_file(file, path.as_posix(), format, max_record_bytes=MAX_FILE_BYTES))
    if not isinstance(record, RawRecord):
        raise UnusableError(record.reason, record.error)
    text, _ = extract(record.content, record.media_type)
    if kind == "fortunes":
        for number, part in enumerate(re.split(r"(?m)^%%?[ \t]*$", text)):
            yield f"#{number}", part.strip("\n")
    else:
        yield "", text


def read_dictionary(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the entries of a dictd database (dictfmt(1): word, offset and length in base 64)."""
    data = gzip.decompress(path.read_bytes())
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index")
    seen = set()
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split("\t")
        place = (number(fields[1]), number(fields[2]))
        if place not in seen and not fields[0].startswith("00-"):
            seen.add(place)
            text, _ = extract(data[place[0] : sum(place)], "text/plain")
            yield f"#{place[0]}", text


_DIGITS = {char: value for value, char in enumerate(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}  # fmt: skip


def number(digits: str) -> int:
    """Read a number of a dictd index."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def build_texts(cache: Path, workers: int) -> tuple[list[Path], dict[str, object]]:
    """Download, unpack and extract all packages; return the units' files and what was found."""
    debs, unpacked, texts = cache / "debs", cache / "unpacked", cache / "texts"
    for folder in (debs, unpacked, texts):
        folder.mkdir(parents=True, exist_ok=True)
    versions, missing, units = {}, [], []
    for entry in PACKAGES:
        package = choose(entry)
        if package is None:
            print(f"not in this release: {entry}", file=sys.stderr)
            missing.append(entry)
            continue
        deb = download(package, debs)
        versions[package] = deb.name.split("_")[1].replace("%3a", ":")
        root = unpack(package, deb, unpacked)
        units += list_units(package, licence_of(package, root), root, texts)
    todo = [unit for unit in units if not unit.out.is_file()]
    with (
        WorkerPool(resolve_workers(workers)) as pool,
        progress("extract", total=len(todo), unit="units") as bar,
    ):
        for _ in pool.map(build_unit, todo):
            bar.advance(1)
    return [unit.out for unit in units], {"packages": versions, "missing": missing}


def write_corpus(table: pa.Table, planted: pa.Table, out: Path, facts: dict[str, object]) -> None:
    """Write shards, JSON Lines and ground truth; the record comes last."""
    remove_tree(out)
    for name in ("documents", "jsonl"):
        (out / name).mkdir(parents=True)
    size = -(-table.num_rows // N_SHARDS)
    for index in range(N_SHARDS):
        part = table.slice(index * size, size)
        write_shard(out / "documents" / shard_name(index), part)
        path = out / "jsonl" / f"part-{index:05d}.jsonl.gz"
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for row in part.select(["id", "url", "source", "text", "licence"]).to_pylist():
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    pq.write_table(planted, out / "planted.parquet", compression="zstd")
    write_record(
        out,
        {"stage": "data.ingest", "fingerprint": hash_json(facts), "config": {}, "inputs": {},
         "metrics": facts},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for all files (3 GB)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the planted duplicates")
    parser.add_argument("--planted", type=int, default=500, help="planted duplicates per kind")
    parser.add_argument("--workers", type=int, default=1, help="processes for the extraction")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    cache = arguments.cache.resolve()
    files, facts = build_texts(cache, arguments.workers)
    lost: Counter[str] = Counter()
    tables = []
    for path in files:
        table = pq.read_table(path)
        lost.update(json.loads(table.schema.metadata[b"lost"]))
        tables.append(table.replace_schema_metadata())
    real = pa.concat_tables(tables).sort_by("id")
    copies, planted = plant(real, arguments.planted, arguments.seed)
    table = pa.concat_tables([real, copies]).sort_by("id").combine_chunks()
    by_source = table.group_by("source").aggregate([("n_bytes", "sum"), ("n_bytes", "count")])
    sources = {
        row["source"]: {"docs": row["n_bytes_count"], "bytes": row["n_bytes_sum"]}
        for row in by_source.sort_by([("n_bytes_sum", "descending")]).to_pylist()
    }
    n_bytes = sum(part["bytes"] for part in sources.values())
    facts |= {"docs": table.num_rows, "planted": planted.num_rows, "seed": arguments.seed,
              "bytes": n_bytes,
              "left_out": dict(sorted(lost.items())), "sources": sources}  # fmt: skip
    write_corpus(table, planted, cache / "corpus", facts)
    for name, part in sources.items():
        print(f"{name:<34}{part['docs']:>8,} docs {part['bytes'] / 1e6:>8.1f} MB")
    print(f"{real.num_rows:,} documents and {planted.num_rows:,} planted, "
          f"{n_bytes / 1e6:.0f} MB, left out: {dict(lost)}, "
          f"{time.monotonic() - started_s:.0f} s")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except PunaError as error:
        sys.exit(f"{error.message}\n{error.fix}")
