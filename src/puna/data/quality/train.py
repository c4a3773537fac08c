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
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import Field, model_validator

from puna.core.artifact import package_versions
from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import commit_dir, hash_file, remove_tree, write_json
from puna.core.version import VERSION
from puna.data.kernels.buffers import texts_from
from puna.data.quality import calibrate, measure
from puna.data.quality.classifier import (
    DEFAULT_MAX_BYTES,
    MODEL_KINDS,
    RECORD_FILE,
    SCHEMA_VERSION,
    Classifier,
    Task,
    load_classifier,
    scalar,
)
from puna.data.quality.examples import NEGATIVE, POSITIVE, Example, Examples, distinct
from puna.data.quality.fasttext_train import train_fasttext
from puna.data.quality.ngram import MAX_ORDER, save_ngram, train_ngram
from puna.data.quality.prepare import Preparation, prepare

MIN_TRAIN_DOCS, MIN_HELDOUT_DOCS = 20, 5
"""Fewer texts of a label are refused (ours)."""
KEPT_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class TrainConfig(Config):
    """How a classifier is trained and evaluated."""

    kind: Literal["fasttext", "ngram"] = "fasttext"
    """`fasttext`: words and word n-grams; `ngram`: a byte n-gram model of the positives."""
    dim: int = Field(default=32, ge=2, le=1024)
    """fastText: dimension of the vectors."""
    epochs: int = Field(default=10, ge=1)
    """fastText: passes over the training texts."""
    lr: float = Field(default=0.5, gt=0)
    """fastText: learning rate at the start; it falls to 0."""
    word_ngrams: int = Field(default=2, ge=1, le=5)
    """fastText: longest word n-gram."""
    min_count: int = Field(default=3, ge=1)
    """fastText: words that occur less often have no vector of their own."""
    n_buckets: int = Field(default=2**18, ge=1)
    """fastText: hash buckets of the word n-grams."""
    order: int = Field(default=6, ge=2, le=MAX_ORDER)
    """ngram: longest n-gram, bytes."""
    preparation: Preparation = "words"
    """fastText: what a text is turned into, `words` or (line ends become spaces only) `plain`."""
    max_bytes: int = Field(default=DEFAULT_MAX_BYTES, ge=64)
    """Bytes of each text that are looked at."""
    calibration: calibrate.Method = "platt"
    """Two classes: `platt` (keeps all differences) or `isotonic` (any shape, makes ties)."""
    calibration_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of the texts that calibrates and sets thresholds."""
    test_share: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the texts that is only measured on."""
    unseen_sources: tuple[str, ...] = ()
    """Sources that are only measured on, and reported apart."""
    keep_from: float = 3.0
    """Scores: grade from which a text counts as good (3 in FineWeb-Edu)."""
    n_resamples: int = Field(default=500, ge=0)
    """Resamples of the bootstrap; 0 leaves the intervals out."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the division, the initial vectors, the order and the bootstrap."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.calibration_share + self.test_share > 0.6:
            raise ValueError("calibration_share and test_share leave less than 40 % for training")
        return self


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


def train_classifier(cfg: TrainConfig, items: Sequence[Example], out: Path) -> dict[str, Any]:
    """Train, calibrate and measure a classifier, and write its folder.

    Examples with scores make a student of graded scores; with the labels ``positive`` and
    ``negative`` (or, for ``ngram``, ``positive`` alone) a binary classifier; with other labels, a
    classifier of several labels.

    Args:
        cfg: The configuration.
        items: Labelled or scored texts.
        out: New folder.

    Returns:
        The record that ``classifier.json`` holds.

    Raises:
        PunaError: The folder exists, or there are too few texts.
    """
    if out.exists():
        raise PunaError(f"{out} exists already", "choose another folder, or remove it")
    examples = distinct(items, last=cfg.unseen_sources)
    parts = divide(cfg, examples)
    task, labels, targets = _targets(cfg, examples)
    _require_enough(task, labels, targets, parts)
    partial = out.with_name(f".{out.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    model, parameters, losses = _fit(cfg, examples, parts, labels, targets)
    model_file = partial / MODEL_KINDS.get(cfg.kind)[0]
    model_file.write_bytes(model)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "kind": cfg.kind, "task": task, "labels": list(labels),
        "parameters": parameters, "calibration": {"method": "none"},
        "model_hash": hash_file(model_file), "config": cfg.model_dump(mode="json"),
        "losses": losses, "data": _data_record(examples, parts),
        "code": {"puna": VERSION, "packages": package_versions()},
    }  # fmt: skip
    write_json(partial / RECORD_FILE, record)
    loaded = load_classifier(partial)
    raw = loaded.model.raw(texts_from([item.text for item in examples.items]))
    record["calibration"] = _calibrate(cfg, task, labels, raw, targets, parts.calibration)
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


def _targets(cfg: TrainConfig, examples: Examples) -> tuple[Task, tuple[str, ...], np.ndarray]:
    """Return the task, its labels, and the number of each example's label (or its score)."""
    items = examples.items
    names = sorted({item.label for item in items})
    if names == [""]:
        scores = np.array([item.score for item in items])
        grades = sorted({int(grade) for grade in np.rint(scores)})
        return "score", tuple(str(grade) for grade in grades), scores
    if set(names) <= {POSITIVE, NEGATIVE}:
        task: Task = "binary" if len(names) == 2 else "bits"
        if task == "bits" and cfg.kind == "fasttext":
            raise PunaError(f"all texts are {names[0]}", "give positives and negatives")
        labels: tuple[str, ...] = (NEGATIVE, POSITIVE)
    else:
        task, labels = "labels", tuple(names)
    if task == "labels" and (cfg.kind == "ngram" or len(labels) < 2):
        raise PunaError(f"{cfg.kind} cannot learn the labels {', '.join(labels)}",
                        "give several labels with kind=fasttext")  # fmt: skip
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


def _fit(
    cfg: TrainConfig, examples: Examples, parts: Parts, labels: tuple[str, ...], targets: np.ndarray
) -> tuple[bytes, dict[str, Any], list[float]]:
    """Return the model file, the parameters that its use needs, and the losses."""
    if cfg.kind == "ngram":
        rows = [k for k in parts.train if examples.items[k].label == POSITIVE]
        texts = texts_from([examples.items[k].text for k in rows])
        model = train_ngram(texts, order=cfg.order, max_bytes=cfg.max_bytes)
        return save_ngram(model), {"max_bytes": cfg.max_bytes, "order": cfg.order}, []
    texts = texts_from([examples.items[k].text for k in parts.train])
    lines = prepare(texts, cfg.preparation, cfg.max_bytes)
    wanted = targets[parts.train]
    if wanted.dtype == np.float64:  # scores: the nearest grade
        grades = np.array([float(label) for label in labels])
        wanted = np.abs(wanted[:, None] - grades).argmin(1)
    content, losses = train_fasttext(
        lines, wanted.astype(np.int64), labels, dim=cfg.dim, epochs=cfg.epochs, lr=cfg.lr,
        word_ngrams=cfg.word_ngrams, min_count=cfg.min_count, n_buckets=cfg.n_buckets,
        seed=cfg.seed,
    )  # fmt: skip
    return content, {"preparation": cfg.preparation, "max_bytes": cfg.max_bytes}, losses


def _calibrate(
    cfg: TrainConfig,
    task: Task,
    labels: tuple[str, ...],
    raw: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray,
) -> dict[str, Any]:
    if task == "bits":
        return {"method": "none"}
    if task == "labels":
        return calibrate.fit_temperature(raw[rows], targets[rows])
    values = scalar(raw[rows], task, labels)
    if task == "score":
        return calibrate.fit_line(values, targets[rows])
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
