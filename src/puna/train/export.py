"""The model that a training leaves behind."""

from __future__ import annotations

import torch

from puna.core.fsio import commit_dir, remove_tree
from puna.lm.load import MODEL_DIR
from puna.model.formats.hf import save_hf
from puna.model.names import parameter_shapes
from puna.train.checkpoint.store import CheckpointStore
from puna.train.parallel.world import World
from puna.train.spec import JobSpec


def export_model(spec: JobSpec, store: CheckpointStore, world: World) -> None:
    """Write the trained model as a Hugging Face folder, fp32, whole or not at all.

    It comes from the last checkpoint, which is the same for every layout.

    Args:
        spec: The job; the folder is ``model/`` in its output.
        store: Holds the checkpoint after the last step.
        world: All ranks must call it.
    """
    if world.rank == 0:
        shapes = parameter_shapes(spec.model)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        store.read_whole(
            spec.training.n_steps, {f"model.{name}": value for name, value in tensors.items()}
        )
        final, partial = spec.out / MODEL_DIR, spec.out / f".{MODEL_DIR}.partial"
        remove_tree(partial)
        remove_tree(final)  # of an attempt that was killed after this point
        partial.mkdir()
        save_hf(partial, spec.model, tensors, **spec.special_ids)
        commit_dir(partial, final)
    world.barrier()
