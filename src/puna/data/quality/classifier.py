"""A trained classifier: ``classifier.json`` and one model file, loaded without pickle.

What a classifier gives depends on its task: ``binary`` a probability, ``labels`` a label and its
probability, ``score`` a grade, ``bits`` the bits per byte of a language model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json
from puna.core.registry import Registry
from puna.data.kernels.buffers import Texts
from puna.data.quality.calibrate import calibrated, softmax
from puna.data.quality.embedded import load_head_model
from puna.data.quality.fasttext_model import MODEL_FILE, load_fasttext
from puna.data.quality.heads import HEAD_FILE
from puna.data.quality.ngram import NGRAM_FILE, load_ngram

if TYPE_CHECKING:
    import pyarrow as pa

RECORD_FILE = "classifier.json"
SCHEMA_VERSION = 1
DEFAULT_MAX_BYTES = 65536
"""Bytes of a text that a classifier looks at (ours): the head of a document tells its kind."""

_IDENTITY = ("kind", "task", "labels", "parameters", "calibration", "model_hash")

Task = Literal["binary", "labels", "score", "bits"]


class Scorer(Protocol):
    """What a model must give; a plugin's model implements it and registers how it is loaded."""

    def raw(self, texts: Texts) -> np.ndarray:
        """Return one row of raw numbers per text, float64 [n_texts, n_outputs]."""
        ...


Loader = Callable[[Path, Mapping[str, Any]], Scorer]

MODEL_KINDS: Registry[tuple[str, Loader]] = Registry("kind of classifier")
"""Kind -> name of the model file, and a function that loads it: path and the record's
``parameters`` to a :class:`Scorer`."""

MODEL_KINDS.register(
    "fasttext",
    (MODEL_FILE, lambda path, p: load_fasttext(path, p["preparation"], p["max_bytes"])),
)
MODEL_KINDS.register("ngram", (NGRAM_FILE, lambda path, p: load_ngram(path, p["max_bytes"])))
for _kind in ("embedding", "transformer", "lexical"):
    MODEL_KINDS.register(_kind, (HEAD_FILE, load_head_model))


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier.

    Attributes:
        model: Gives raw numbers.
        task: What they mean.
        labels: Label names, in the order of the raw numbers (``labels``); the negative and the
            positive label (``binary``); the grades (``score``).
        calibration: How raw numbers become scores.
        digest: Changes with the model and with what the raw numbers are turned into.
        record: What ``classifier.json`` holds.
    """

    model: Scorer
    task: Task
    labels: tuple[str, ...]
    calibration: Mapping[str, Any]
    digest: str
    record: Mapping[str, Any]

    def columns(self, name: str) -> list[pa.Field]:
        """Return the columns that it adds to documents, under a name."""
        import pyarrow as pa

        if self.task == "labels":
            return [pa.field(name, pa.string()), pa.field(f"{name}_score", pa.float64())]
        return [pa.field(name, pa.float64())]

    def score(self, texts: Texts) -> list[Any]:
        """Return the values of :meth:`columns` for texts."""
        raw = self.model.raw(texts)
        if self.task == "labels":
            p = self.probabilities(raw)
            best = p.argmax(1)
            return [[self.labels[k] for k in best], p.max(1, initial=0.0)]
        return [self.values(raw)]

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Return the probability of each label (task ``labels``), float64 [n, n_labels]."""
        return softmax(raw / self.calibration["temperature"])

    def values(self, raw: np.ndarray) -> np.ndarray:
        """Return probability, grade or bits per byte (the other tasks), float64 [n]."""
        if self.task == "bits":
            return raw[:, 0]
        return calibrated(scalar(raw, self.task, self.labels), self.calibration)


def scalar(raw: np.ndarray, task: Task, labels: tuple[str, ...]) -> np.ndarray:
    """Reduce raw numbers to the one that is calibrated.

    Args:
        raw: Logits per label, or bits per byte, or (``score``) the grade in a single column.
        task: ``binary``: the margin of the positive over the negative label, or minus the bits per
            byte. ``score``: the expected grade.
        labels: Names of the labels in the order of ``raw``; grades are numbers.
    """
    if raw.shape[1] == 1:
        return raw[:, 0] if task == "score" else -raw[:, 0]
    if task == "score":
        return softmax(raw) @ np.array([float(label) for label in labels])
    return raw[:, 1] - raw[:, 0]


class _Reordered:
    """A model of others whose labels come in another order."""

    def __init__(self, model: Scorer, order: list[int]) -> None:
        self._model, self._order = model, order

    def raw(self, texts: Texts) -> np.ndarray:
        """See :class:`Scorer`."""
        return self._model.raw(texts)[:, self._order]


def digest_of(path: Path) -> str:
    """Return the digest of a classifier's folder or model file, without loading the model.

    Raises:
        PunaError: It is missing or damaged.
    """
    if path.is_file():
        return hash_file(path)
    record = read_record(path)
    return hash_json({key: record[key] for key in _IDENTITY})


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``classifier.json``.

    Raises:
        PunaError: The folder holds no classifier, or it is damaged or newer than this puna.
    """
    path = folder / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
        if version == SCHEMA_VERSION:
            _ = [record[key] for key in _IDENTITY]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PunaError(
            f"{folder} holds no classifier ({RECORD_FILE} is missing)",
            "make one with `puna data classifier train`, or give a fastText `model.bin`",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PunaError(f"{path} is damaged: {error!r}", "train the classifier anew") from error
    if version != SCHEMA_VERSION:
        raise PunaError(f"{path} has schema version {version}; this puna reads {SCHEMA_VERSION}",
                        "train the classifier anew")  # fmt: skip
    return record


def load_classifier(path: Path, positive: str | None = None) -> Classifier:
    """Load a classifier's folder, or a fastText model of others (a ``.bin`` file).

    A model of others gets its texts as DCLM's recipe does: line ends become spaces. Its scores are
    its own probabilities, not calibrated.

    Args:
        path: Folder or file.
        positive: For a file with two labels: the label whose probability is the score.

    Raises:
        PunaError: Missing, damaged, or changed since it was trained.
    """
    return _load(str(path), positive, digest_of(path))


@lru_cache(maxsize=4)
def _load(path: str, positive: str | None, digest: str) -> Classifier:
    if Path(path).is_file():
        return _load_foreign(Path(path), positive, digest)
    record = read_record(Path(path))
    file_name, loader = MODEL_KINDS.get(record["kind"])
    model_file = Path(path) / file_name
    if not model_file.is_file() or hash_file(model_file) != record["model_hash"]:
        raise PunaError(f"{model_file} is missing or not the file that {RECORD_FILE} describes",
                        "train the classifier anew, or copy the whole folder")  # fmt: skip
    model = loader(model_file, record["parameters"])
    return Classifier(
        model, record["task"], tuple(record["labels"]), record["calibration"], digest, record
    )


def _load_foreign(path: Path, positive: str | None, digest: str) -> Classifier:
    model = load_fasttext(path, "plain", DEFAULT_MAX_BYTES)
    names = model.labels
    if positive is not None and (positive not in names or len(names) != 2):
        raise PunaError(
            f"{path}: `positive` is {positive!r}, but the labels are {', '.join(names)}",
            "name one of two labels; leave `positive` out for a model of several labels",
        )
    if positive is None:
        if len(names) == 2:
            raise PunaError(f"{path} has the labels {names[0]} and {names[1]}",
                            "say with `positive` which of them is the good one")  # fmt: skip
        calibration: dict[str, Any] = {"method": "temperature", "temperature": 1.0}
        return Classifier(model, "labels", names, calibration, digest, {})
    order = [1 - names.index(positive), names.index(positive)]
    calibration = {"method": "platt", "slope": 1.0, "offset": 0.0}
    chosen = tuple(names[k] for k in order)
    return Classifier(_Reordered(model, order), "binary", chosen, calibration, digest, {})
