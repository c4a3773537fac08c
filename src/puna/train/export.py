"""The model that a training leaves behind."""

from __future__ import annotations

from puna.core.fsio import commit_dir, remove_tree
from puna.lm.load import MODEL_DIR
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.train.parallel.fsdp import full_tensors
from puna.train.parallel.world import World
from puna.train.spec import JobSpec


def export_model(spec: JobSpec, model: Llama, world: World) -> None:
    """Write the trained model as a Hugging Face folder, fp32, whole or not at all.

    Args:
        spec: The job; the folder is ``model/`` in its output.
        model: Maybe sharded.
        world: All ranks must call it.
    """
    tensors = full_tensors(model, world)
    if tensors is not None:
        final, partial = spec.out / MODEL_DIR, spec.out / f".{MODEL_DIR}.partial"
        remove_tree(partial)
        remove_tree(final)  # of an attempt that was killed after this point
        partial.mkdir()
        save_hf(partial, spec.model, tensors, **spec.special_ids)
        commit_dir(partial, final)
    world.barrier()
