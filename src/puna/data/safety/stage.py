"""Stage ``data.safety``: redact personal data and keys; drop explicit, toxic, blocked texts."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import hash_file
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.data.chain import before
from puna.data.engine import open_engine
from puna.data.reasons import register_reasons
from puna.data.safety.config import KINDS, PiiRules, SafetyConfig, TermRules
from puna.data.schema import DOCUMENTS_DIR, REJECTED_DIR
from puna.data.stagework import SCRATCH_DIR, documents_of, require_documents, step_metrics

if TYPE_CHECKING:
    from puna.data.safety.kernel import ModelCheck, SafetyKernel, TermCheck

register_reasons(
    {
        "safety.url": "the address is on a block list; the detail is the category and the entry",
        "safety.nsfw": "the weights of explicit terms add up to more than `max_per_1000` per 1,000 "
        "words, with at least `min_distinct` distinct terms; the detail names the strongest",
        "safety.toxic": "as safety.nsfw, by the user's lists of insults and hate",
        "safety.model": "a classifier's score is above `max`; the detail is its name",
        **{
            f"pii.{kind}": f"more than `drop_above` findings of {what}"
            for kind, what in KINDS.items()
        },
    }
)


def _files_digests(cfg: SafetyConfig) -> dict[str, str | None]:
    """Return the digests of lists and models now; null for one that is gone."""
    return {path: _digest(Path(path)) for path in sorted(set(cfg.files()))}


def _digest(path: Path) -> str | None:
    if path.is_file():
        return hash_file(path)
    from puna.data.quality.classifier import digest_of

    try:
        return digest_of(path)
    except PunaError:
        return None


@stage(
    "data.safety",
    needs={"documents": before("data.safety")},
    resumable=True,
    external_state=_files_digests,
)
def make_safe(cfg: SafetyConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Redact personal data and keys; drop explicit, toxic and blocked documents, with reasons.

    Writes ``documents/`` (with the redacted text and a column ``pii``: JSON, kind -> count) and
    ``rejected/``.
    """
    started_s = time.monotonic()
    kernel = make_kernel(cfg)
    with open_engine(cfg, out / SCRATCH_DIR) as engine:
        manifest = engine.judge("data.safety", documents_of(inputs["documents"]), out, kernel)
    require_documents(manifest.rows_in, "data.safety", "the stage before it")
    return {**step_metrics(manifest, started_s, events), "pii": count_pii(out, cfg.pii)}


def make_kernel(cfg: SafetyConfig) -> SafetyKernel:
    """Read and check the lists and models that a configuration names.

    Raises:
        PunaError: One of them is missing or damaged.
    """
    from puna.data.safety.domains import BlockList
    from puna.data.safety.kernel import SafetyKernel

    lists = tuple(BlockList.of(name, paths) for name, paths in sorted(cfg.block_lists.items()))
    checks = [
        _term_check("safety.nsfw", cfg.nsfw, builtin=cfg.nsfw.builtin),
        _term_check("safety.toxic", cfg.toxic, builtin=False),
    ]
    terms = tuple(check for check in checks if check.terms.weights)
    return SafetyKernel(cfg.pii, lists, terms, _model_checks(cfg))


def _term_check(reason: str, rules: TermRules, *, builtin: bool) -> TermCheck:
    from puna.data.safety.explicit_terms import CONTEXT_WORDS, EXPLICIT_TERMS
    from puna.data.safety.kernel import TermCheck
    from puna.data.safety.terms import TermList, read_terms

    weights = dict(EXPLICIT_TERMS) if builtin else {}
    context: set[str] = set(CONTEXT_WORDS)
    for path in rules.files:
        weights.update(read_terms(Path(path)))
    for path in rules.context_files:
        context.update(read_terms(Path(path)))
    return TermCheck(reason, TermList.of(weights, context), rules.max_per_1000, rules.min_distinct,
                     rules.except_sources)  # fmt: skip


def _model_checks(cfg: SafetyConfig) -> tuple[ModelCheck, ...]:
    from puna.data.safety.kernel import ModelCheck

    checks = []
    for name, use in sorted(cfg.models.items()):
        digest = _digest(Path(use.path))
        if digest is None:
            raise PunaError(
                f"data.safety.models.{name}: {use.path} is no classifier",
                "make one with `puna.data.safety.hashed_model.train_hashed`, or with "
                "`puna data classifier train`",
            )
        checks.append(ModelCheck(name, use, digest))
    return tuple(checks)


def count_pii(out: Path, rules: PiiRules) -> dict[str, Any]:
    """Count findings per source and kind, from the written files.

    Returns:
        Source -> kind -> ``found`` (in all documents), ``redacted`` (in kept documents), ``docs``
        (all documents with any).
    """
    from puna.data.engine.shards import list_shards, read_columns

    counts: dict[str, dict[str, Counter[str]]] = {}
    for folder in (DOCUMENTS_DIR, REJECTED_DIR):
        for shard in list_shards(out / folder):
            table = read_columns(shard.path, ["source", "pii"])
            grouped = table.group_by(["source", "pii"], use_threads=False).aggregate(
                [([], "count_all")]
            )
            for row in grouped.to_pylist():
                for kind, n in json.loads(row["pii"] or "{}").items():
                    of_kind = counts.setdefault(row["source"], {}).setdefault(kind, Counter())
                    of_kind["docs"] += row["count_all"]
                    of_kind["found"] += n * row["count_all"]
                    kept = folder == DOCUMENTS_DIR and rules.replacement_of(kind) is not None
                    of_kind["redacted"] += n * row["count_all"] * kept
    return {
        source: {kind: dict(sorted(of_kind.items())) for kind, of_kind in sorted(kinds.items())}
        for source, kinds in sorted(counts.items())
    }
