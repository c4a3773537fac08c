"""The model that a training leaves behind."""

from __future__ import annotations

import torch

from puna.core.fsio import commit_dir, remove_tree
from puna.lm.load import MODEL_DIR
from puna.model.formats.hf import save_hf
from puna.model.names import parameter_shapes
from puna.train.average import AVERAGE
from puna.train.checkpoint.store import CheckpointStore
from puna.train.parallel.world import World
from puna.train.spec import LAST_MODEL_DIR, JobSpec

LAST_WEIGHTS = "model."
"""Begins the names of the parameters in a checkpoint."""


def export_model(spec: JobSpec, store: CheckpointStore, world: World) -> None:
    """Write the trained model as a Hugging Face folder, fp32, whole or not at all.

    It comes from the last checkpoint, which is the same for every layout. Where the weights were
    averaged, the average is the model, and the last weights are in a folder beside it.

    Args:
        spec: The job; the folder is ``model/`` in its output.
        store: Holds the checkpoint after the last step.
        world: All ranks must call it.
    """
    if world.rank == 0:
        if spec.training.average is not None:
            _write(spec, store, LAST_WEIGHTS, LAST_MODEL_DIR)
        _write(spec, store, AVERAGE if spec.training.average else LAST_WEIGHTS, MODEL_DIR)
    world.barrier()


def _write(spec: JobSpec, store: CheckpointStore, prefix: str, folder: str) -> None:
    shapes = parameter_shapes(spec.model)
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    store.read_whole(
        spec.training.n_steps, {f"{prefix}{name}": value for name, value in tensors.items()}
    )
    final, partial = spec.out / folder, spec.out / f".{folder}.partial"
    remove_tree(partial)
    remove_tree(final)  # of an attempt that was killed after this point
    partial.mkdir()
    save_hf(partial, spec.model, tensors, **spec.special_ids)
    commit_dir(partial, final)
