"""Bits per byte of a checkpoint, by a process of its own while the training goes on.

Nothing is written into the run and the training knows nothing of it: it needs a machine that sees
the checkpoints. The products are in float32, as in ``eval.bpb``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from puna.core.errors import PunaError
from puna.eval.likelihood import measure
from puna.lm.load import MODEL_DIR
from puna.model.config import LlamaConfig
from puna.model.device import Device, pick_device
from puna.model.formats.hf_config import read_hf_config
from puna.model.llama import Llama
from puna.tokens.heldout import TextSet, held_out_sets
from puna.train.checkpoint.manifest import (
    DamagedCheckpointError,
    list_steps,
    step_dir,
    verify,
)
from puna.train.export import LAST_WEIGHTS
from puna.train.spec import CHECKPOINTS_DIR, JOB_FILE, STATE_DIR
from puna.train.stage import LOADER_FILE

_STAGE = "train.pretrain"


def measure_checkpoint(
    run_dir: Path,
    step: int | None = None,
    *,
    max_tokens: int = 100_000,
    overlap: float = 0.25,
    seed: int = 0,
    rows_per_batch: int = 8,
    device: Device = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure the held-out documents of a run with one of its checkpoints.

    Args:
        run_dir: Folder of the run, which may be in the middle of its training.
        step: Steps done; the newest checkpoint when None.
        max_tokens: Of a source, see :func:`puna.tokens.heldout.choose_documents`.
        overlap: Share of a window that repeats earlier tokens, unscored.
        seed: Chooses the documents.
        rows_per_batch: Rows of a forward pass.
        device: Where to run.
        on_batch: Called with the number of scored tokens of each batch.

    Returns:
        ``step``, ``bits_per_byte`` of all documents, ``seq_len``, and per source ``bits_per_byte,
        nats_per_token, n_tokens, n_bytes, n_docs``.

    Raises:
        PunaError: There is no such checkpoint, it is damaged, or no document is held out.
    """
    folder = _training_folder(run_dir)
    loader = json.loads((folder / LOADER_FILE).read_text(encoding="utf-8"))["kwargs"]
    sets = held_out_sets(
        loader["folder"], loader["seq_len"], overlap, max_tokens, seed, loader.get("cache")
    )
    if not sets:
        raise PunaError(
            f"{loader['folder']} holds no held-out document that can be measured",
            "raise the held-out share of [data.split], or --max-tokens",
        )
    config = _model_config(folder)
    done, model = _load(folder / CHECKPOINTS_DIR, step, config)
    model = model.to(pick_device(device)).eval()
    found = {
        one.name: measure(
            model, one.pieces, loader["seq_len"], rows_per_batch, on_batch=on_batch
        ).nll_nats
        for one in sets
    }
    return {
        "step": done,
        "seq_len": loader["seq_len"],
        "bits_per_byte": _bits_per_byte(sum(found.values()), sum(one.n_bytes for one in sets)),
        "sources": {one.name: _row(one, found[one.name]) for one in sets},
    }


def _bits_per_byte(nats: float, n_bytes: int) -> float:
    return nats / math.log(2) / n_bytes


def _row(one: TextSet, nats: float) -> dict[str, Any]:
    return {
        "bits_per_byte": _bits_per_byte(nats, one.n_bytes), "nats_per_token": nats / one.n_tokens,
        "n_tokens": one.n_tokens, "n_bytes": one.n_bytes, "n_docs": one.n_docs,
    }  # fmt: skip


def _training_folder(run_dir: Path) -> Path:
    """Return the folder of the training, running or finished."""
    for name in (f"{_STAGE}.partial", _STAGE):
        if (run_dir / name / LOADER_FILE).is_file():
            return run_dir / name
    raise PunaError(
        f"{run_dir} has no [{_STAGE}] that has begun", "give the folder of a run, runs/NAME"
    )


def _model_config(folder: Path) -> LlamaConfig:
    job = folder / STATE_DIR / JOB_FILE
    if job.is_file():
        values = json.loads(job.read_text(encoding="utf-8"))
        return LlamaConfig.model_validate(values["model"])
    return read_hf_config(folder / MODEL_DIR)


def _load(folder: Path, step: int | None, config: LlamaConfig) -> tuple[int, Llama]:
    """Load a checkpoint; the newest that is whole, when none is named.

    The training removes old ones: one that goes away meanwhile counts as damaged.
    """
    from puna.train.checkpoint.dcp import CheckpointException, read

    steps = list_steps(folder)
    if step is not None and step not in steps:
        raise PunaError(
            f"{folder} has no checkpoint of step {step}",
            f"use one of: {', '.join(map(str, steps)) or 'none yet, wait for the first'}",
        )
    why = "there is none yet"
    for number in steps if step is None else [step]:
        try:
            verify(step_dir(folder, number))
            model = Llama(config, device="meta", dtype=torch.float32).to_empty(device="cpu")
            tensors = {f"{LAST_WEIGHTS}{name}": p.data for name, p in model.named_parameters()}
            read(step_dir(folder, number), tensors, no_dist=True)
        except (DamagedCheckpointError, CheckpointException, OSError) as error:
            why = f"that of step {number} cannot be read: {error}"
            continue
        return number, model
    raise PunaError(f"{folder} has no checkpoint to measure: {why}",
                    "wait for the next one, or name an earlier one with --step")  # fmt: skip
