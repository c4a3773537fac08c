"""Profiling a training: its ranks run some steps, and their traces are broken down.

Imports no torch: the work is done by the processes that it starts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import LEDGER_FILE, Ledger, read_events
from puna.model.config import LlamaConfig
from puna.resilience.history import read_history
from puna.resilience.supervisor import RestartPolicy, supervise
from puna.train.config import CheckpointConfig, TrainingConfig
from puna.train.launch import TrainJob
from puna.train.log_config import LogConfig
from puna.train.parallel.layout import check_layout
from puna.train.spec import JobSpec, ProfileSpec, SourceSpec, plain_training
from puna.train.watch.trace import PARTS, break_down, read_trace

SUMMARY_FILE = "profile.json"
N_WARM_UP = 2
"""Steps before the profiled ones: the first ones compile and allocate."""
_MOST_KERNELS = 25


def random_source(cfg: TrainingConfig, model: LlamaConfig, document_tokens: int) -> SourceSpec:
    """Return random tokens in documents of a mean length, in the shape of a training's batches."""
    return SourceSpec(
        "puna.train.watch.random_rows:random_rows",
        {
            "vocab_size": model.vocab_size, "seq_len": cfg.seq_len,
            "global_batch": cfg.global_batch, "document_tokens": document_tokens,
        },
    )  # fmt: skip


def profile_training(
    cfg: TrainingConfig, model: LlamaConfig, source: SourceSpec, folder: Path, n_steps: int
) -> dict[str, Any]:
    """Profile some steps of a training from random weights.

    Writes one ``trace-rank<n>.json.gz`` per rank (opens in Perfetto) and ``profile.json``. The
    training itself runs in a temporary folder; nothing of it is kept.

    Args:
        cfg: The training; checkpoints, faults, a batch ramp and its length are left out.
        model: Shape of the model.
        source: Batches.
        folder: Receives the files.
        n_steps: Steps in the traces.

    Returns:
        What ``profile.json`` holds: see :func:`summary`.

    Raises:
        PunaError: Bad input, or the training fails.
    """
    check_layout(cfg, model)
    folder.mkdir(parents=True, exist_ok=True)
    total = N_WARM_UP + n_steps
    plain = plain_training(cfg).model_copy(
        update={
            "steps": total, "tokens": None, "fault": None, "batch_ramp": [], "log_every": 1,
            "log": LogConfig(), "average": None,
            "checkpoint": CheckpointConfig(every=total + 1, memory_every=0, in_background=False),
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="puna-profile-") as scratch:
        out = Path(scratch)
        ledger = Ledger(out / LEDGER_FILE, job="profile")
        spec = JobSpec(
            job="profile", out=out, ledger=out / LEDGER_FILE, common={}, source=source,
            model=model, weights=None, special_ids={}, training=plain,
            profile=ProfileSpec(folder.resolve(), N_WARM_UP, n_steps),
        )  # fmt: skip
        spec.state_dir.mkdir()
        try:
            supervise(
                TrainJob(spec), ledger, RestartPolicy(max_restarts=0),
                history=read_history(ledger.path, "profile"),
            )  # fmt: skip
        except PunaError:
            for log in spec.attempt_dir(0).glob("*.txt"):  # what the message names goes away
                shutil.copyfile(log, folder / log.name)
            raise
        events = list(read_events(out / LEDGER_FILE, "train.start", "train.step"))
    if spec.profile is None or not spec.profile.trace(0).exists():
        raise PunaError("the profiled training left no trace", "run it again")
    found = summary(spec.profile, plain, events)
    write_json(folder / SUMMARY_FILE, found)
    return found


def summary(
    profile: ProfileSpec, cfg: TrainingConfig, events: list[dict[str, Any]]
) -> dict[str, Any]:
    """Break down the traces of all ranks.

    Returns:
        JSON values: ``step_s`` (median, profiled), ``parts`` and ``gap`` (rank 0, seconds per
        step), ``kernels`` (rank 0), ``ranks`` (step and parts of each), ``peak_flops`` of a rank,
        ``flops`` per step of rank 0, and what the ledger tells of the last step.
    """
    path = profile.folder / "peak.json"
    peak = json.loads(path.read_text(encoding="utf-8"))["flops_per_s_of_a_rank"]
    ranks = [break_down(read_trace(profile.trace(rank))) for rank in range(cfg.nproc)]
    first = ranks[0]
    start = next((event for event in events if event["kind"] == "train.start"), {})
    steps = [event for event in events if event["kind"] == "train.step"]
    profiled = [event["step_s"] for event in steps if event["step"] >= profile.n_warm_up]
    unprofiled = [event["step_s"] for event in steps if 0 < event["step"] < profile.n_warm_up]
    return {
        "n_steps": first.n_steps,
        "step_s": median(profiled) if profiled else first.seconds / first.n_steps,
        "unprofiled_step_s": unprofiled[-1] if unprofiled else None,
        "is_gpu": first.is_gpu,
        "peak_flops": peak,
        "flops": first.flops / first.n_steps,
        "parts": {
            PARTS[name]: seconds / first.n_steps for name, seconds in first.parts.items()
        },
        "gap": [[name, seconds] for name, seconds in first.gap(peak)],
        "kernels": [
            {
                **asdict(kernel),
                "n_calls": kernel.n_calls / first.n_steps,
                "seconds": kernel.seconds / first.n_steps,
                "flops": kernel.flops / first.n_steps,
            }
            for kernel in first.kernels[:_MOST_KERNELS]
        ],
        "ranks": [
            {
                "step_s": one.seconds / one.n_steps,
                "parts": {
                    PARTS[name]: seconds / one.n_steps for name, seconds in one.parts.items()
                },
            }
            for one in ranks
        ],
        "training": {
            key: start.get(key)
            for key in ("n_params", "world", "n_threads", "device", "dtype", "tokens_per_step")
        },
        "last_step": {
            key: steps[-1].get(key) for key in ("mfu", "hfu", "tokens_per_s", "peak_memory_bytes")
        } if steps else {},
        "traces": [profile.trace(rank).name for rank in range(cfg.nproc)],
    }  # fmt: skip
