"""A student of a classifier: its scores on texts without labels train one that is faster.

The student learns the teacher's probabilities, not its decisions (Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.progress import progress
from puna.data.kernels.buffers import texts_from
from puna.data.quality.classifier import RECORD_FILE, Classifier, load_classifier
from puna.data.quality.examples import Example, distinct
from puna.data.quality.measure import correlation, ranks, threshold_of
from puna.data.quality.settings import TrainConfig
from puna.data.quality.train import KEPT_SHARES, divide, evaluate_on, train_classifier

_BATCH = 512


def distil_classifier(
    cfg: TrainConfig,
    teacher: Classifier,
    items: Sequence[Example],
    out: Path,
    labelled: Sequence[Example] = (),
) -> dict[str, Any]:
    """Train a student of a teacher.

    Args:
        cfg: How the student is trained; its ``kind``.
        teacher: A classifier of any task but ``bits``.
        items: Texts; labels and scores of theirs are not looked at.
        out: New folder of the student.
        labelled: Labelled (or scored) texts on which both are measured; copies of them among
            ``items`` are left out.

    Returns:
        The record of the student, with ``teacher``: its digest, ``agreement`` on texts that the
        student has not seen, and, with ``labelled``, the ``reports`` of both.

    Raises:
        PunaError: The teacher gives bits per byte, the folder exists, or there are too few texts.
    """
    if teacher.task == "bits":
        raise PunaError("a model of bits per byte has nothing to teach",
                        "give a classifier with a probability, a label or a grade")  # fmt: skip
    if out.exists():
        raise PunaError(f"{out} exists already", "choose another folder, or remove it")
    known = {int(key) for key in distinct(labelled).keys}
    unlabelled = distinct([replace(item, label="", score=0.0, weight=1.0) for item in items])
    fresh = [item for item, key in zip(unlabelled.items, unlabelled.keys.tolist(), strict=True)
             if key not in known]  # fmt: skip
    taught = list(_taught(teacher, fresh))
    record = train_classifier(cfg, taught, out, teacher)
    student = load_classifier(out)
    examples = distinct(taught, last=cfg.unseen_sources)
    parts = divide(cfg, examples)
    rows = [examples.items[k] for k in np.concatenate([parts.test, parts.unseen])]
    report: dict[str, Any] = {
        "digest": teacher.digest,
        "texts": {"given": len(items), "taught": len(fresh)},
        "agreement": _agreement(teacher, student, rows),
    }
    if labelled:
        judges = {"teacher": teacher, "student": student}
        report["reports"] = {
            name: evaluate_on(judged, labelled, cfg) for name, judged in judges.items()
        }
    record = {**record, "teacher": report}
    write_json(out / RECORD_FILE, record)
    return record


def _taught(teacher: Classifier, items: Sequence[Example]) -> Iterator[Example]:
    """Give texts the teacher's shares of labels, or its scores."""
    with progress("classifier: the teacher", total=len(items), unit="texts") as bar:
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            raw = teacher.model.raw(texts_from([item.text for item in part]))
            if teacher.task == "labels":
                shares = teacher.probabilities(raw)
            else:
                values = teacher.values(raw)
                shares = np.stack([1 - values, values], 1)
            for item, row in zip(part, shares.tolist(), strict=True):
                if teacher.task == "score":
                    yield replace(item, score=row[1])
                else:
                    yield replace(item, shares=tuple(row))
            bar.advance(len(part))


def _agreement(teacher: Classifier, student: Classifier, rows: list[Example]) -> dict[str, Any]:
    """Compare the two on texts: the same label, or rank correlation and kept documents."""
    raw = student.model.raw(texts_from([item.text for item in rows]))
    report: dict[str, Any] = {"docs": len(rows)}
    if teacher.task == "labels":
        shares = np.array([item.shares for item in rows])
        same = shares.argmax(1) == student.probabilities(raw).argmax(1)
        return report | {"same_label": float(same.mean())}
    given = np.array([item.shares[1] if item.shares else item.score for item in rows])
    values = student.values(raw)
    report["pearson"] = correlation(given, values)
    report["spearman"] = correlation(ranks(given), ranks(values))
    report["mean_absolute_difference"] = float(np.abs(given - values).mean())
    report["kept_by_both"] = []
    for share in KEPT_SHARES:
        kept = [one >= threshold_of(one, share) for one in (given, values)]
        both = float((kept[0] & kept[1]).sum() / max(min(kept[0].sum(), kept[1].sum()), 1))
        report["kept_by_both"].append({"share": share, "overlap": both})
    return report
