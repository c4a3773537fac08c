"""The data card as Markdown, with the YAML header that Hugging Face's ``datasets`` reads."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from puna.core.units import format_bytes, format_count
from puna.data.export.plan import DATA_DIR, ExportFile

MAX_ROWS = 40
_MAX_CHARS = 400
_MARKS = re.compile(r"([\\`*_{}\[\]#!|~$@]|:(?=//)|(?<=www)\.)")
_HTML = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"})
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
          (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_HUB_LICENCES = {
    name.lower(): name.lower()
    for name in ("Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-SA-3.0",
                 "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "MPL-2.0", "BSD-2-Clause",
                 "BSD-3-Clause", "ISC", "Unlicense", "WTFPL", "Zlib")
}  # fmt: skip


def plain(text: object) -> str:
    """Return a text on one line without control characters, cut to a sensible length."""
    line = " ".join(str(text).split())
    line = "".join(char for char in line if unicodedata.category(char)[0] != "C")
    return line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 1]}…"


def cell(text: object) -> str:
    """Return a text from outside as harmless Markdown: no markup, links, HTML or new cells."""
    return _MARKS.sub(r"\\\1", plain(text)).translate(_HTML)


def render(card: Mapping[str, Any], files: Sequence[ExportFile], picture: str) -> str:
    """Write the card.

    Args:
        card: What :func:`puna.data.export.card.collect_card` returns, with ``export``.
        files: The data files.
        picture: File name of the picture.
    """
    sections = [
        _header(card, files), f"# {cell(card['name'])}", _summary(card),
        f"![Tokens by source, language and licence]({picture})", _composition(card), _counts(card),
        _sources(card), _licences(card), _stages(card), _dropped(card), _filters(card),
        _steps(card), _gaps(card), _files(card, files), _rebuild(card),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(card: Mapping[str, Any], files: Sequence[ExportFile]) -> str:
    n_docs = card["export"]["rows"]
    known, unknown = card["licences"]["known"], card["licences"]["unknown_docs"]
    header: dict[str, Any] = {"pretty_name": plain(card["name"])}
    if len(known) == 1 and not unknown:
        name = next(iter(known))
        header["license"] = _HUB_LICENCES.get(name.lower(), "other")
        if header["license"] == "other":
            header["license_name"] = plain(name)
    else:
        header["license"] = "other" if known else "unknown"
        if known:
            header["license_name"] = "several, see the column licence"
    languages = [one for one in card["counts"].get("by_language", {}) if _LANGUAGE.fullmatch(one)]
    if languages:
        header["language"] = languages
    header["size_categories"] = [next((name for top, name in _SIZES if n_docs < top), "n>1B")]
    header["task_categories"] = ["text-generation"]
    header["tags"] = ["puna"]
    splits = list(dict.fromkeys(file.split for file in files))
    header["configs"] = [{
        "config_name": "default",
        "data_files": [{"split": one, "path": f"{DATA_DIR}/{one}-*"} for one in splits],
    }]  # fmt: skip
    header["dataset_info"] = {
        "splits": [
            {"name": one, "num_bytes": sums["text_bytes"], "num_examples": sums["rows"]}
            for one, sums in card["export"]["splits"].items()
        ],
        "download_size": card["export"]["bytes"],
        "dataset_size": sum(one["text_bytes"] for one in card["export"]["splits"].values()),
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], n_text: int = 1) -> str:
    """Write a table; the first ``n_text`` columns are texts from outside, the others numbers."""
    lines = [f"| {' | '.join(head)} |"]
    lines.append(f"|{'|'.join(':--' if at < n_text else '--:' for at in range(len(head)))}|")
    shown = list(rows)
    lines += [f"| {' | '.join(cell(one) for one in row)} |" for row in shown[:MAX_ROWS]]
    text = "\n".join(lines)
    if len(shown) > MAX_ROWS:
        text += f"\n\n{len(shown) - MAX_ROWS} more rows are in `card.json`."
    return text


def _sum_row(name: str, one: Mapping[str, int], total: int) -> tuple[str, ...]:
    share = one["tokens_read"] / total if total else 0.0
    return (name, f"{one['docs']:,}", format_bytes(one["n_bytes"]), f"{one['n_tokens']:,}",
            f"{one['tokens_read']:,}", f"{share:.1%}")  # fmt: skip


_SUM_HEAD = ("documents", "text", "tokens", "tokens read in one pass", "share")


def _kind(card: Mapping[str, Any]) -> str:
    counts = card["counts"]
    if counts["token_counts"] == "tokenizer":
        return "counted with the run's tokenizer"
    return f"estimated at {counts['bytes_per_token']:g} bytes per token"


def _summary(card: Mapping[str, Any]) -> str:
    total = card["counts"]["total"]
    first = card["stages"][0]
    return (
        f"Text for training language models: {total['docs']:,} documents, "
        f"{format_bytes(total['n_bytes'])}, {format_count(total['n_tokens'])} tokens "
        f"({_kind(card)}), from {len(card['sources'])} sources. It is what the run "
        f"{cell(card['run'])} kept of {first['in_docs']:,} raw documents or records, filtered, "
        "deduplicated and divided as told below. Every number on this page is read from the run's "
        "artifacts; `card.json` has all of them."
    )


def _counts(card: Mapping[str, Any]) -> str:
    counts = card["counts"]
    total = counts["total"]["tokens_read"]
    texts = [f"## Counts\n\nTokens are {_kind(card)}."]
    for key, groups in counts.items():
        if key.startswith("by_") and isinstance(groups, Mapping):
            rows = [_sum_row(name, one, total) for name, one in groups.items()]
            texts.append(_table((key.removeprefix("by_"), *_SUM_HEAD), rows))
    rows = [
        (row["split"], *_sum_row(row["source"], row, total)) for row in counts["by_split_source"]
    ]
    texts.append(_table(("split", "source", *_SUM_HEAD), rows, 2))
    return "\n\n".join(texts)


def _composition(card: Mapping[str, Any]) -> str:
    found = card["composition"]
    if found is None:
        return ""
    rows = [
        (
            part["name"],
            "-" if part["asked_share"] is None else f"{part['asked_share']:.1%}",
            "-" if part["asked_factor"] is None else f"{part['asked_factor']:g}",
            f"{part['reached_share']:.1%}", f"{part['epochs']:.3g}", f"{part['max_epochs']:g}",
            f"{part['in_docs']:,}", f"{part['docs']:,}", f"{part['tokens']:,}",
        )
        for part in found["parts"]
    ]  # fmt: skip
    head = ("part", "asked share", "asked rate or repetition", "reached share", "times read",
            "limit", "documents there", "documents used", "tokens read")  # fmt: skip
    budget = found["budget_tokens"]
    text = (
        f"## Composition\n\nOne pass over the training side reads {found['train_tokens']:,} tokens"
        + (f" (budget {budget:,})" if budget else "")
        + ", repeated documents counted each time. The column `repeat` tells how often a document "
        "is read. Held-out documents are neither sampled nor repeated.\n\n"
    )
    text += _table(head, rows)
    if found["unreached"]:
        text += "\n\nNot reached:\n\n" + _list(found["unreached"])
    return text


def _list(lines: Iterable[object]) -> str:
    return "\n".join(f"- {cell(line)}" for line in lines)


def _sources(card: Mapping[str, Any]) -> str:
    rows = []
    for source in card["sources"]:
        origin = {k: v for k, v in source["origin"].items() if k != "name"}
        where = origin.pop("paths", None) or origin.pop("path", None) or "-"
        where = ", ".join(map(str, where)) if isinstance(where, list) else where
        licences = [f"{name}: {n:,}" for name, n in list(source["licences"].items())[:5]]
        if len(source["licences"]) > 5:
            licences.append(f"{len(source['licences']) - 5} more")
        rows.append((source["name"], origin.get("kind", "-"), where, "; ".join(licences) or "-",
                     f"{source['unknown_licence_docs']:,}",
                     "-" if source["read_docs"] is None else f"{source['read_docs']:,}",
                     f"{source['docs']:,}"))  # fmt: skip
    head = ("source", "kind", "from", "licences (documents)", "licence unknown", "read", "kept")
    return "## Provenance\n\n" + _table(head, rows, 4)


def _licences(card: Mapping[str, Any]) -> str:
    found = card["licences"]
    rows = [(name, f"{one['docs']:,}", format_bytes(one["n_bytes"]), f"{one['n_tokens']:,}")
            for name, one in found["known"].items()]  # fmt: skip
    one = found["unknown"]
    rows.append(("(unknown)", f"{one['docs']:,}", format_bytes(one["n_bytes"]),
                 f"{one['n_tokens']:,}"))  # fmt: skip
    return (
        f"## Licences\n\nThe licence of {found['unknown_share']:.1%} of the documents is unknown. "
        "The column `licence` has the licence of each.\n\n"
        + _table(("licence", "documents", "text", "tokens"), rows)
    )


def _stages(card: Mapping[str, Any]) -> str:
    rows = [
        (one["stage"], f"{one['in_docs']:,}", f"{one['kept_docs']:,}", f"{one['dropped_docs']:,}",
         format_bytes(one["kept_bytes"]))
        for one in card["stages"]
    ]  # fmt: skip
    return "## Stages\n\n" + _table(("stage", "in", "kept", "dropped", "text kept"), rows)


def _dropped(card: Mapping[str, Any]) -> str:
    rows = [(one["stage"], one["reason"], one["meaning"], f"{one['docs']:,}",
             format_bytes(one["bytes"])) for one in card["dropped"]]  # fmt: skip
    if not rows:
        return ""
    head = ("stage", "reason", "meaning", "documents", "text")
    return "## What was dropped, and why\n\n" + _table(head, rows, 3)


def _filters(card: Mapping[str, Any]) -> str:
    if not card["filters"]:
        return ""
    texts = ["## Filters and thresholds"]
    for rule in card["filters"]:
        rows = [(one["name"], _settings(one["settings"])) for one in rule["filters"]]
        texts.append(f"### {cell(rule['source'])}\n\nProfile: {cell(rule['profile'])}.")
        texts.append(_table(("filter", "thresholds"), rows, 2) if rows else "No filter.")
    return "\n\n".join(texts)


def _settings(settings: Mapping[str, Any]) -> str:
    """Write settings on one line; of lists of texts only how many there are."""
    parts = []
    for name, value in settings.items():
        if isinstance(value, list) and len(value) > 3 and isinstance(value[0], str):
            text = f"({len(value)} texts)"
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{name} = {text}")
    return "; ".join(parts) or "-"


def _steps(card: Mapping[str, Any]) -> str:
    """Write the parameters of the other stages, and what they found."""
    texts = []
    found = card["deduplication"]
    if found is not None:
        rows = [(one["kept"], one["dropped"], f"{one['docs']:,}")
                for one in found.get("dropped_between", [])]  # fmt: skip
        texts.append(f"## Deduplication\n\n{cell(_settings(found['config']))}")
        if rows:
            texts.append(_table(("kept in", "dropped from", "documents"), rows, 2))
    found = card["safety"]
    if found is not None:
        rows = [
            (source, kind, f"{one['found']:,}", f"{one.get('redacted', 0):,}", f"{one['docs']:,}")
            for source, kinds in found.get("pii", {}).items() for kind, one in kinds.items()
        ]  # fmt: skip
        texts.append("## Personal data and safety")
        head = ("source", "kind", "found", "redacted in kept documents", "documents")
        texts.append(_table(head, rows, 2) if rows else "No personal data and no key was found.")
    found = card["quality"]
    if found is not None:
        rows = [(name, one.get("task", "-"), _settings(one.get("measured", {}).get("test", {})))
                for name, one in found.get("scorers", {}).items()]  # fmt: skip
        texts.append(
            "## Scorers\n\n" + _table(("scorer", "task", "measured on its test set"), rows, 3)
        )
    found = card["decontamination"]
    if found is not None:
        rows = [(name, *(f"{one.get(key, 0):,}" for key in ("examples", "indexed", "contaminated",
                                                            "docs")))
                for name, one in found.get("sets", {}).items()]  # fmt: skip
        head = ("evaluation set", "examples", "looked for", "found", "documents concerned")
        texts.append("## Decontamination\n\n" + _table(head, rows))
    return "\n\n".join(texts)


def _gaps(card: Mapping[str, Any]) -> str:
    return "## Known gaps\n\n" + (_list(card["gaps"]) or "- None is known.")


def _files(card: Mapping[str, Any], files: Sequence[ExportFile]) -> str:
    export = card["export"]
    columns = ", ".join(cell(name) for name in export["columns"])
    return (
        f"## Files\n\n{len(files)} files of {format_bytes(export['bytes'])} in `{DATA_DIR}/`, "
        f"format {cell(export['format'])}; columns: {columns}. `manifest.json` has the rows, size "
        "and SHA-256 of each; check them with `sha256sum -c SHA256SUMS`."
    )


def _rebuild(card: Mapping[str, Any]) -> str:
    found = card["rebuild"]
    code, packages = found["code"] or {}, found["packages"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    rows = list(found["fingerprints"].items())
    return (
        "## How to rebuild\n\nThe resolved recipe is in `recipe.toml`, without credentials and "
        "query strings of URLs: `puna run recipe.toml`, then `puna data export`. Equal input and "
        "versions give equal fingerprints.\n\n"
        f"puna {cell(code.get('puna'))}, commit {cell(code.get('commit'))}; {cell(versions)}.\n\n"
        + _table(("stage", "fingerprint"), rows, 2)
    )
