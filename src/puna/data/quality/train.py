"""Training a classifier with an honest evaluation.

The texts are divided by the hash of what they say (white space and case ignored), so copies never
stand on two sides: one part trains, one calibrates and sets thresholds, one is only measured on.
Sources listed in ``unseen_sources`` are measured on only, and reported apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from puna.core.artifact import package_versions
from puna.core.errors import PunaError
from puna.core.fsio import commit_dir, hash_file, remove_tree, write_json
from puna.core.version import VERSION
from puna.data.kernels.buffers import texts_from
from puna.data.quality import calibrate, measure
from puna.data.quality.classifier import (
    MODEL_KINDS,
    RECORD_FILE,
    SCHEMA_VERSION,
    Classifier,
    Task,
    load_classifier,
    scalar,
)
from puna.data.quality.examples import NEGATIVE, POSITIVE, Example, Examples, distinct
from puna.data.quality.fit import Lesson, fit_model, grade_shares
from puna.data.quality.settings import TrainConfig

MIN_TRAIN_DOCS, MIN_HELDOUT_DOCS = 20, 5
"""Fewer texts of a label are refused (ours)."""
KEPT_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Parts:
    """Row numbers of the examples by use, int64 [n] each."""

    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray
    unseen: np.ndarray


def divide(cfg: TrainConfig, examples: Examples) -> Parts:
    """Divide examples by the hash of their texts; unseen sources go apart.

    Raises:
        PunaError: An unseen source has no text.
    """
    sources = [item.source for item in examples.items]
    missing = sorted(set(cfg.unseen_sources) - set(sources))
    if missing:
        raise PunaError(f"unseen_sources names {missing[0]!r}, of which there is no text",
                        f"sources: {', '.join(sorted(set(sources)))}")  # fmt: skip
    late = set(cfg.unseen_sources)
    unseen = np.array([source in late for source in sources], bool)
    places = np.array([
        xxhash.xxh3_64_intdigest(f"{cfg.seed}:{key}".encode()) / 2**64
        for key in examples.keys.tolist()
    ])  # fmt: skip
    border = cfg.test_share + cfg.calibration_share
    masks = (places >= border, (places >= cfg.test_share) & (places < border),
             places < cfg.test_share)  # fmt: skip
    train, calibration, test = (np.flatnonzero(mask & ~unseen) for mask in masks)
    return Parts(train, calibration, test, np.flatnonzero(unseen))


def train_classifier(
    cfg: TrainConfig, items: Sequence[Example], out: Path, teacher: Classifier | None = None
) -> dict[str, Any]:
    """Train, calibrate and measure a classifier, and write its folder.

    Examples with scores make a student of graded scores; with the labels ``positive`` and
    ``negative`` (or, for ``ngram``, ``positive`` alone) a binary classifier; with other labels, a
    classifier of several labels.

    Args:
        cfg: The configuration.
        items: Labelled or scored texts.
        out: New folder.
        teacher: Gives task and labels; the texts have its shares or scores
            (:mod:`puna.data.quality.distil`).

    Returns:
        The record that ``classifier.json`` holds.

    Raises:
        PunaError: The folder exists, or there are too few texts.
    """
    if out.exists():
        raise PunaError(f"{out} exists already", "choose another folder, or remove it")
    examples = distinct(items, last=cfg.unseen_sources, several_raters=cfg.raters == "several")
    parts = divide(cfg, examples)
    task, labels, targets = _targets(cfg, examples, teacher)
    _require_enough(task, labels, targets, parts)
    partial = out.with_name(f".{out.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    fitted = fit_model(cfg, _lesson(examples, parts.train, task, labels, targets), partial)
    model_file = partial / MODEL_KINDS.get(cfg.kind)[0]
    model_file.write_bytes(fitted.content)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "kind": cfg.kind, "task": task, "labels": list(labels),
        "parameters": fitted.parameters, "calibration": {"method": "none"},
        "model_hash": hash_file(model_file), "config": cfg.model_dump(mode="json"),
        "losses": [], **fitted.record, "data": _data_record(examples, parts),
        "code": {"puna": VERSION, "packages": package_versions()},
    }  # fmt: skip
    write_json(partial / RECORD_FILE, record)
    loaded = load_classifier(partial)
    raw = loaded.model.raw(texts_from([item.text for item in examples.items]))
    record["calibration"] = _calibrate(cfg, task, labels, raw, targets, examples, parts)
    judged = Classifier(loaded.model, task, labels, record["calibration"], "", record)
    record |= _thresholds(task, judged, raw, targets, parts)
    record["metrics"] = {
        name: evaluate(judged, raw[rows], targets[rows], [examples.items[k] for k in rows], cfg)
        for name, rows in (("test", parts.test), ("unseen", parts.unseen))
        if len(rows)
    }
    write_json(partial / RECORD_FILE, record)
    commit_dir(partial, out)
    return record


def _lesson(
    examples: Examples, rows: np.ndarray, task: Task, labels: tuple[str, ...], targets: np.ndarray
) -> Lesson:
    """Gather what the model learns from the rows of the training part."""
    items = [examples.items[k] for k in rows]
    wanted = targets[rows].astype(np.float64)
    if task == "score":
        shares = grade_shares(wanted, labels)
    elif items[0].shares:
        shares = np.array([item.shares for item in items])
    else:
        shares = np.eye(len(labels))[targets[rows]]
    weights = np.array([item.weight for item in items])
    return Lesson([item.text for item in items], task, labels, shares, wanted, weights)


def _targets(
    cfg: TrainConfig, examples: Examples, teacher: Classifier | None
) -> tuple[Task, tuple[str, ...], np.ndarray]:
    """Return the task, its labels, and the number of each example's label (or its score)."""
    items = examples.items
    if cfg.kind == "ngram" and not {item.label for item in items} <= {POSITIVE, NEGATIVE}:
        raise PunaError("kind=ngram learns from positives, not from scores or other labels",
                        "choose another kind")  # fmt: skip
    if teacher is not None and teacher.task != "score":
        chosen = np.array([int(np.argmax(item.shares)) for item in items], np.int64)
        return teacher.task, teacher.labels, chosen
    names = sorted({item.label for item in items})
    if names == [""]:
        scores = np.array([item.score for item in items])
        grades = sorted({int(grade) for grade in np.rint(scores)})
        return "score", tuple(str(grade) for grade in grades), scores
    if set(names) <= {POSITIVE, NEGATIVE}:
        task: Task = "binary" if len(names) == 2 else "bits"
        if task == "bits" and cfg.kind != "ngram":
            raise PunaError(f"all texts are {names[0]}", "give positives and negatives")
        labels: tuple[str, ...] = (NEGATIVE, POSITIVE)
    else:
        task, labels = "labels", tuple(names)
    if task == "labels" and len(labels) < 2:
        raise PunaError(f"all texts have the label {labels[0]}", "give several labels")
    return task, labels, np.array([labels.index(item.label) for item in items])


def _require_enough(task: Task, labels: tuple[str, ...], targets: np.ndarray, parts: Parts) -> None:
    groups = [("scored", targets == targets)] if task == "score" else [
        (label, targets == k) for k, label in enumerate(labels) if task != "bits" or k == 1
    ]  # fmt: skip
    for name, members in groups:
        for part, rows, least in (
            ("training", parts.train, MIN_TRAIN_DOCS),
            ("calibration", parts.calibration, MIN_HELDOUT_DOCS),
            ("test", parts.test, MIN_HELDOUT_DOCS),
        ):
            n = int(members[rows].sum())
            if n < least:
                raise PunaError(
                    f"only {n} distinct {name} texts fall into the {part} part; {least} are needed",
                    "give more texts, or change `test_share` and `calibration_share`",
                )


def _calibrate(
    cfg: TrainConfig,
    task: Task,
    labels: tuple[str, ...],
    raw: np.ndarray,
    targets: np.ndarray,
    examples: Examples,
    parts: Parts,
) -> dict[str, Any]:
    rows = parts.calibration
    if task == "bits":
        return {"method": "none"}
    if task == "labels":
        return calibrate.fit_temperature(raw[rows], targets[rows])
    values = scalar(raw[rows], task, labels)
    if task == "score":
        return calibrate.fit_line(values, targets[rows])
    if examples.items[0].shares:  # a teacher's probabilities
        return calibrate.fit_platt(values, np.array([examples.items[k].shares[1] for k in rows]))
    fit = calibrate.fit_platt if cfg.calibration == "platt" else calibrate.fit_isotonic
    return fit(values, targets[rows] == 1)


def _thresholds(
    task: Task, judged: Classifier, raw: np.ndarray, targets: np.ndarray, parts: Parts
) -> dict[str, Any]:
    """Return the threshold of the highest accuracy, and those of kept shares."""
    if task != "binary":
        return {}
    rows = parts.calibration
    values, is_positive = judged.values(raw[rows]), targets[rows] == 1
    return {
        "threshold": measure.best_threshold(values, is_positive),
        "kept_share_thresholds": measure.share_thresholds(values, is_positive, KEPT_SHARES),
    }


def _data_record(examples: Examples, parts: Parts) -> dict[str, Any]:
    items = examples.items
    table = Counter((item.source, item.label) for item in items)
    return {
        "digest": examples.digest(),
        "texts": examples.counts,
        "raters": examples.agreement,
        "parts": {name: len(rows) for name, rows in vars(parts).items()},
        "sources": [
            {"source": source, "label": label, "docs": n}
            for (source, label), n in sorted(table.items())
        ],
    }  # fmt: skip


def evaluate_on(judged: Classifier, items: Sequence[Example], cfg: TrainConfig) -> dict[str, Any]:
    """Measure a finished classifier on other examples, copies among them left out.

    Args:
        judged: The classifier.
        items: Labelled or scored texts.
        cfg: Bootstrap, seed and ``keep_from``.

    Raises:
        PunaError: The examples do not suit the classifier's task.
    """
    examples = distinct(items)
    names = sorted({item.label for item in examples.items})
    scored = names == [""]
    if not names or scored != (judged.task == "score"):
        raise PunaError(
            f"a classifier of the task {judged.task} cannot be measured on these examples",
            "give scores to a student of scores, labels to the others",
        )
    if judged.task in ("binary", "bits"):  # labels of a model of others may have any names
        known: tuple[str, ...] = (NEGATIVE, POSITIVE)
    else:
        known = judged.labels
    strange = sorted(set(names) - set(known))
    if not scored and strange:
        raise PunaError(f"the classifier knows no label {strange[0]!r}",
                        f"its labels: {', '.join(known)}")  # fmt: skip
    targets = np.array([
        item.score if scored else known.index(item.label) for item in examples.items
    ])  # fmt: skip
    raw = judged.model.raw(texts_from([item.text for item in examples.items]))
    report = evaluate(judged, raw, targets, examples.items, cfg)
    return {"data": {"digest": examples.digest(), "texts": examples.counts}, **report}


def evaluate(
    judged: Classifier,
    raw: np.ndarray,
    targets: np.ndarray,
    items: Sequence[Example],
    cfg: TrainConfig,
) -> dict[str, Any]:
    """Measure a classifier on labelled texts.

    Args:
        judged: The classifier, calibrated.
        raw: Its raw numbers for the texts.
        targets: Numbers of the labels, or scores.
        items: The texts.
        cfg: Bootstrap, seed and ``keep_from``.
    """
    sources = [item.source for item in items]
    if judged.task == "labels":
        return measure.label_report(judged.probabilities(raw), targets, judged.labels, sources)
    values = judged.values(raw)
    if judged.task == "score":
        return measure.score_report(values, targets, sources, keep_from=cfg.keep_from)
    if judged.task == "bits":
        low, middle, high = np.percentile(values, [5, 50, 95])
        return {"docs": len(values), "bits_per_byte": {
            "mean": float(values.mean()), "p5": float(low), "median": float(middle),
            "p95": float(high)}}  # fmt: skip
    return measure.binary_report(
        values, targets == 1, sources, judged.record.get("threshold", 0.5),
        n_resamples=cfg.n_resamples, seed=cfg.seed,
    )  # fmt: skip
