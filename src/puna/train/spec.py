"""What a worker process is told: one ``job.json``; imports no torch."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.config import identity
from puna.core.fsio import hash_json, write_json
from puna.model.config import LlamaConfig
from puna.train.config import TrainingConfig

if TYPE_CHECKING:
    pass

STATE_DIR = "state"
"""Folder, inside the output, of what only the running job needs; removed at its end."""
CHECKPOINTS_DIR = "checkpoints"
JOB_FILE = "job.json"
LAST_MODEL_DIR = "model-last"
"""The weights of the last step, where the final model is an average."""
SHARED_MEMORY = Path("/dev/shm")  # of Linux


@dataclass(frozen=True)
class SourceSpec:
    """Where the batches come from: a factory and its arguments.

    The trainer calls it by name, so that it needs no import of the layer that wrote it.

    Attributes:
        factory: ``module:callable`` that returns a :class:`puna.tokens.loader.BatchSource` (of
            :class:`HeldOutSpec`: text sets).
        kwargs: JSON values.
    """

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Any:
        """Import the factory and call it."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(**self.kwargs)


@dataclass(frozen=True)
class HeldOutSpec:
    """Held-out text that a training measures as it goes on.

    Attributes:
        source: Factory that returns a list of :class:`puna.tokens.heldout.TextSet`.
        every: Steps between two measurements.
    """

    source: SourceSpec
    every: int


@dataclass(frozen=True)
class ProfileSpec:
    """Steps that are profiled instead of a whole training.

    Attributes:
        folder: Receives the traces.
        n_warm_up: Steps before them.
        n_steps: Profiled steps; the training ends after them, without checkpoint and model.
    """

    folder: Path
    n_warm_up: int
    n_steps: int

    def trace(self, rank: int) -> Path:
        """Path of a rank's trace."""
        return self.folder / f"trace-rank{rank}.json.gz"


@dataclass(frozen=True)
class JobSpec:
    """A training job.

    Attributes:
        job: Id, on every event of the job.
        out: Folder for state, checkpoints and the final model.
        ledger: The run's ledger; None for a run that keeps none.
        common: Fields of every event (``stage``).
        source: Batches.
        model: Shape of the model.
        weights: Checkpoint to start from; None for random weights from the seed.
        special_ids: ``bos_id``, ``eos_ids`` and ``pad_id`` for the final model's configuration.
        training: Everything else.
        weights_digest: Identity of the checkpoint's content, where it came from outside the run.
        rope_factor: Of a Meta checkpoint that does not name its own.
        fill_rows: Rows of embedding and head that are initialised instead of loaded.
        profile: Profile some steps and end; None for a training.
        heldout: Text that is measured between steps; None for none.
    """

    job: str
    out: Path
    ledger: Path | None
    common: dict[str, Any]
    source: SourceSpec
    model: LlamaConfig
    weights: Path | None
    special_ids: dict[str, Any]
    training: TrainingConfig
    weights_digest: str = ""
    rope_factor: float | None = None
    fill_rows: tuple[int, ...] = ()
    profile: ProfileSpec | None = None
    heldout: HeldOutSpec | None = None

    @property
    def state_dir(self) -> Path:
        """Folder of what only the running job needs."""
        return self.out / STATE_DIR

    @property
    def memory_dir(self) -> Path | None:
        """Folder for snapshots in shared memory; None where there is no such file system."""
        if not SHARED_MEMORY.is_dir():
            return None
        return SHARED_MEMORY / f"puna-{os.getuid()}-{self.job}"

    def attempt_dir(self, attempt: int) -> Path:
        """Folder of an attempt's heartbeats and log."""
        return self.state_dir / f"attempt-{attempt}"

    def identity(self) -> str:
        """Digest of all that decides the numbers, except how ranks and passes divide the batch.

        A checkpoint carries it; another job does not continue from it.
        """
        training = identity(self.training)
        del training["nproc"], training["micro_batch"]
        training["steps"] = self.training.n_steps
        return hash_json(
            {
                "training": training,
                "model": self.model.model_dump(mode="json"),
                "factory": self.source.factory,
                "starts_from_weights": self.weights_digest or self.weights is not None,
                "fill_rows": self.fill_rows,
            }
        )

    def write(self, name: str = JOB_FILE) -> Path:
        """Write ``job.json`` and return its path."""
        path = self.state_dir / name
        write_json(
            path,
            {
                "job": self.job,
                "out": str(self.out),
                "ledger": str(self.ledger) if self.ledger else None,
                "common": self.common,
                "source": asdict(self.source),
                "model": self.model.model_dump(mode="json"),
                "weights": str(self.weights) if self.weights else None,
                "special_ids": self.special_ids,
                "training": self.training.model_dump(mode="json"),
                "weights_digest": self.weights_digest,
                "rope_factor": self.rope_factor,
                "fill_rows": self.fill_rows,
                "heldout": None if self.heldout is None else asdict(self.heldout),
                "profile": None if self.profile is None else {
                    **asdict(self.profile), "folder": str(self.profile.folder),
                },
            },
        )  # fmt: skip
        return path

    @classmethod
    def read(cls, path: Path) -> JobSpec:
        """Read ``job.json``."""
        values = json.loads(path.read_text(encoding="utf-8"))
        profile, heldout = values["profile"], values["heldout"]
        return cls(
            job=values["job"],
            out=Path(values["out"]),
            ledger=Path(values["ledger"]) if values["ledger"] else None,
            common=values["common"],
            source=SourceSpec(**values["source"]),
            model=LlamaConfig.model_validate(values["model"]),
            weights=Path(values["weights"]) if values["weights"] else None,
            special_ids=values["special_ids"],
            training=TrainingConfig.model_validate(values["training"]),
            weights_digest=values["weights_digest"],
            rope_factor=values["rope_factor"],
            fill_rows=tuple(values["fill_rows"]),
            heldout=None
            if heldout is None
            else HeldOutSpec(SourceSpec(**heldout["source"]), heldout["every"]),
            profile=None
            if profile is None
            else ProfileSpec(Path(profile["folder"]), profile["n_warm_up"], profile["n_steps"]),
        )


def plain_training(config: TrainingConfig) -> TrainingConfig:
    """Reduce a subclass (pretraining, fine-tuning) to the fields that every training has."""
    return TrainingConfig.model_validate(
        {name: getattr(config, name) for name in TrainingConfig.model_fields}
    )
