"""What the data card tells, collected from the artifacts of a run; nothing is made up."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.recipe import toml_values
from puna.data.chain import DATA_STAGES
from puna.data.compose.kernels import NO_VALUE
from puna.data.export.corpus import LICENCE, TOKEN_STAGE, Corpus
from puna.data.export.counts import Counts, Sum, count
from puna.data.flow import flow_rows
from puna.data.quality.classifier import RECORD_FILE
from puna.data.reasons import meaning_of

CARD_SCHEMA_VERSION = 1
_EXECUTION = ("engine", "spark", "workers", "memory_mib")
_SECRET = ("storage_options",)
_USER = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(?P<url>\b[a-z][a-z0-9+.-]*://[^\s?#]*)\?\S*")


def collect_card(corpus: Corpus, name: str) -> dict[str, Any]:
    """Read everything that the card tells from the artifacts and the final documents.

    Args:
        corpus: The final corpus.
        name: Name of the data set.
    """
    labels = [column for column in _label_columns(corpus) if column in corpus.schema.names]
    language = ["language"] if "language" in corpus.schema.names else []
    by = list(dict.fromkeys(["split", "source", *language, *labels, LICENCE]))
    counts = count(corpus, by)
    return {
        "card_schema_version": CARD_SCHEMA_VERSION,
        "name": name,
        "run": corpus.run_dir.resolve().name,
        "counts": _counts(counts, ["split", "source", *language, *labels]),
        "sources": _sources(corpus, counts),
        "licences": _licences(counts),
        "stages": [_stage(stage, artifact) for stage, artifact in corpus.stages.items()],
        "dropped": _dropped(corpus),
        "filters": _filters(corpus),
        "deduplication": _part(corpus, "data.dedup", ("dropped_between", "dropped_for_index")),
        "safety": _part(corpus, "data.safety", ("pii",)),
        "quality": _quality(corpus),
        "decontamination": _part(corpus, "data.decontaminate", ("sets",)),
        "composition": _composition(corpus),
        "gaps": _gaps(corpus, counts, language, labels),
        "rebuild": _rebuild(corpus),
    }


def _label_columns(corpus: Corpus) -> list[str]:
    """Return the columns that hold labels (domains) and those that the composition used."""
    quality, composed = corpus.stages.get("data.quality"), corpus.stages.get("data.compose")
    found = []
    if quality is not None:
        scorers = quality.metrics.get("scorers", {})
        found += [name for name, one in scorers.items() if one.get("task") == "labels"]
    if composed is not None:
        found += composed.metrics.get("by", [])
    return [name for name in found if name not in ("source", "language", "split", LICENCE)]


def _counts(counts: Counts, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "token_counts": "tokenizer" if counts.is_counted else "estimate",
        "bytes_per_token": counts.bytes_per_token,
        "total": asdict(counts.total),
        **{
            f"by_{column}": {key[0]: asdict(one) for key, one in counts.over(column).items()}
            for column in columns
        },
        "by_split_source": [
            {"split": split, "source": source, **asdict(one)}
            for (split, source), one in counts.over("split", "source").items()
        ],
    }


def _licences(counts: Counts) -> dict[str, Any]:
    found = {key[0]: asdict(one) for key, one in counts.over(LICENCE).items()}
    unknown = found.pop(NO_VALUE, asdict(Sum()))
    n_docs = counts.total.docs
    ordered = dict(sorted(found.items(), key=lambda item: (-item[1]["docs"], item[0])))
    return {
        "known": ordered,
        "unknown": unknown,
        "unknown_docs": unknown["docs"],
        "unknown_share": unknown["docs"] / n_docs if n_docs else 0.0,
    }


def _sources(corpus: Corpus, counts: Counts) -> list[dict[str, Any]]:
    """Tell per source where it comes from, what came in, and under which licences."""
    ingest = corpus.stages.get("data.ingest")
    configured = {one.get("name"): one for one in (ingest.config.get("sources", []) if ingest else
                                                   [])}  # fmt: skip
    read = {row.source: row for row in flow_rows("data.ingest", ingest.metrics)} if ingest else {}
    kept = counts.over("source")
    per_licence = counts.over("source", LICENCE)
    rows = []
    for name in sorted({*read, *(key[0] for key in kept)}):
        licences = {key[1]: one.docs for key, one in per_licence.items() if key[0] == name}
        unknown = licences.pop(NO_VALUE, 0)
        flow = read.get(name)
        got = kept.get((name,))
        rows.append({
            "name": name,
            "origin": _said(clean(configured.get(name) or {})),
            "read_docs": flow.in_docs if flow else None,
            "read_bytes": flow.in_bytes if flow else None,
            "docs": got.docs if got else 0,
            "licences": dict(sorted(licences.items(), key=lambda item: (-item[1], item[0]))),
            "unknown_licence_docs": unknown,
        })  # fmt: skip
    return rows


def clean(value: Any, key: str = "") -> Any:
    """Leave out of a configuration what must not be published.

    Credentials of object stores, user names and query strings (signatures) of URLs go.
    """
    if key in _SECRET:
        return {}
    if isinstance(value, Mapping):
        return {name: clean(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    if isinstance(value, str):
        return _QUERY.sub(r"\g<url>", _USER.sub("", value))
    return value


def _said(value: Any) -> Any:
    """Leave out the settings that are empty, after :func:`clean`."""
    if isinstance(value, Mapping):
        found = {name: _said(one) for name, one in value.items()}
        return {name: one for name, one in found.items() if one not in (None, [], {}, "")}
    return [_said(one) for one in value] if isinstance(value, list) else value


def _config(artifact: Artifact) -> dict[str, Any]:
    return {k: v for k, v in _said(clean(artifact.config)).items() if k not in _EXECUTION}


def _stage(name: str, artifact: Artifact) -> dict[str, Any]:
    rows = flow_rows(name, artifact.metrics)
    record = artifact.record
    return {
        "stage": name,
        "in_docs": sum(row.in_docs for row in rows),
        "kept_docs": sum(row.kept_docs for row in rows),
        "kept_bytes": sum(row.kept_bytes for row in rows),
        "dropped_docs": sum(row.rejected_docs for row in rows),
        "seconds": record.get("seconds"),
        "config": _config(artifact),
        "fingerprint": artifact.fingerprint,
        "content_hash": artifact.content_hash,
        "code": record.get("code"),
    }


def _dropped(corpus: Corpus) -> list[dict[str, Any]]:
    """Add up the dropped documents by stage and reason, the most frequent of a stage first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for stage, artifact in corpus.stages.items():
        for row in flow_rows(stage, artifact.metrics):
            for reason, one in row.rejected.items():
                total = sums.setdefault((stage, reason), [0, 0])
                total[0] += one.docs
                total[1] += one.n_bytes
    order = list(corpus.stages)
    return [
        {"stage": stage, "reason": reason, "meaning": meaning_of(reason), "docs": docs,
         "bytes": n_bytes}
        for (stage, reason), (docs, n_bytes) in sorted(
            sums.items(), key=lambda item: (order.index(item[0][0]), -item[1][0], item[0][1])
        )
    ]  # fmt: skip


def _filters(corpus: Corpus) -> list[dict[str, Any]]:
    """Tell the filters of each source, in their order, with every threshold."""
    artifact = corpus.stages.get("data.filter")
    if artifact is None:
        return []
    config = artifact.config
    rules = {"(all other sources)": config.get("default", {}), **config.get("sources", {})}
    return [
        {
            "source": source,
            "profile": rule.get("profile"),
            "filters": [
                {"name": use.get("name"), "settings": _said(clean(use.get("settings", {})))}
                for use in rule.get("filters", [])
            ],
        }
        for source, rule in rules.items()
    ]


def _part(corpus: Corpus, stage: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    artifact = corpus.stages.get(stage)
    if artifact is None:
        return None
    found = {name: artifact.metrics[name] for name in metrics if name in artifact.metrics}
    return {"config": _config(artifact), **found}


def _quality(corpus: Corpus) -> dict[str, Any] | None:
    """Tell the scorers, with what was measured of them where their folder is still the same."""
    artifact = corpus.stages.get("data.quality")
    found = _part(corpus, "data.quality", ("scorers",))
    if artifact is None or found is None:
        return None
    for name, use in artifact.config.get("scorers", {}).items():
        record = _classifier_record(Path(use["classifier"]), found["scorers"].get(name, {}))
        if record is not None and name in found["scorers"]:
            found["scorers"][name] = {**found["scorers"][name], "measured": record}
    return found


def _classifier_record(folder: Path, scorer: Mapping[str, Any]) -> Any:
    from puna.core.errors import PunaError
    from puna.data.quality.classifier import digest_of

    try:
        if digest_of(folder) != scorer.get("digest"):
            return None
        return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")).get("metrics")
    except (OSError, ValueError, PunaError):
        return None  # a model file, or gone since: the card says that nothing is known


def _composition(corpus: Corpus) -> dict[str, Any] | None:
    names = ("by", "budget_tokens", "train_tokens", "token_counts", "parts", "groups", "unreached")
    return _part(corpus, "data.compose", names)


def _gaps(
    corpus: Corpus, counts: Counts, language: Sequence[str], labels: Sequence[str]
) -> list[str]:
    """Name what this corpus has not been through, and what is not known about it."""
    found = [
        f"The stage {stage} was not run." for stage in DATA_STAGES if stage not in corpus.stages
    ]
    unknown = _licences(counts)
    if unknown["unknown_docs"]:
        found.append(
            f"{unknown['unknown_share']:.1%} of the documents ({unknown['unknown_docs']:,}) have "
            "no known licence."
        )
    if unknown["known"]:
        found.append("Licences are what the sources or pages state; nobody has verified them.")
    if not counts.is_counted:
        found.append(f"Tokens are estimated at {counts.bytes_per_token:g} bytes per token, not "
                     "counted (stage tokens.count).")  # fmt: skip
    if not language:
        found.append("The language of the documents was not detected.")
    elif (NO_VALUE,) in counts.over("language"):
        n = counts.over("language")[(NO_VALUE,)].docs
        found.append(f"{n:,} documents have no detected language.")
    if not labels:
        found.append("The documents have no domain: no classifier of labels was run.")
    found += [f"{rule['source']}: no heuristic filter." for rule in _filters(corpus)
              if not rule["filters"]]  # fmt: skip
    if "data.safety" in corpus.stages:
        found.append("Precision and recall of the detectors of personal data, keys and explicit "
                     "text were not measured on this corpus.")  # fmt: skip
    scorers = (_quality(corpus) or {}).get("scorers", {})
    found += [
        f"Nothing is recorded about the accuracy of the scorer {name}."
        for name, one in scorers.items()
        if "measured" not in one
    ]
    composed = corpus.stages.get("data.compose")
    found += [f"Not reached: {line}." for line in composed.metrics["unreached"]] if composed else []
    if any((artifact.record.get("code") or {}).get("dirty") for artifact in
           corpus.stages.values()):  # fmt: skip
        found.append("Some stages ran code with local changes: the commit alone does not give it.")
    return found


def _rebuild(corpus: Corpus) -> dict[str, Any]:
    recipe: dict[str, Any] = {"name": corpus.run_dir.resolve().name}
    stages = dict(corpus.stages)
    tokenizer = corpus.run_dir / "tokens.train"
    if TOKEN_STAGE in stages and (tokenizer / ARTIFACT_FILE).is_file():
        stages = {"tokens.train": Artifact(tokenizer), **stages}
    for stage, artifact in stages.items():
        layer, _, step = stage.partition(".")
        config = {k: v for k, v in clean(artifact.config).items() if k not in _EXECUTION}
        recipe.setdefault(layer, {})[step] = toml_values(config)
    last = corpus.artifact.record
    return {
        "recipe": recipe,
        "code": last.get("code"),
        "packages": last.get("packages"),
        "started_at": next(iter(corpus.stages.values())).record.get("started_at"),
        "ended_at": last.get("ended_at"),
        "fingerprints": {name: one.fingerprint for name, one in stages.items()},
        "content_hash": corpus.artifact.content_hash,
    }
