"""Stage ``train.pretrain``, and :func:`train_job`, which every kind of training goes through.

Imports no torch: the work is done by the processes that it starts and watches.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.fsio import remove_tree, write_json
from puna.core.ledger import Ledger, read_events
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import format_count, format_rate
from puna.lm.load import MODEL_DIR
from puna.model.accounting import account
from puna.model.config import LlamaConfig
from puna.resilience.goodput import job_goodput
from puna.resilience.health import HealthWatch, HostHealth
from puna.resilience.history import read_history
from puna.resilience.supervisor import RestartPolicy, supervise
from puna.tokens.shards import is_remote
from puna.train.config import PretrainConfig, TrainingConfig
from puna.train.elastic import check_elastic
from puna.train.launch import TrainJob
from puna.train.log_config import check_log
from puna.train.mixture import consumed, with_schedule
from puna.train.parallel.layout import check_layout
from puna.train.progress import TrainProgress
from puna.train.spec import (
    JOB_FILE,
    LAST_MODEL_DIR,
    STATE_DIR,
    HeldOutSpec,
    JobSpec,
    SourceSpec,
    plain_training,
)

if TYPE_CHECKING:
    from puna.tokens.loader import PackedLoader
    from puna.train.continued import Start

_PRETRAIN = "train.pretrain"
LOADER_FILE = "loader.json"
"""How the batches were made, for `puna lineage`: factory, its arguments, number of steps."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _state_of_checkpoint(cfg: PretrainConfig) -> Any:
    """Sizes and times of the checkpoint's files and the schedule: a change is told on a rerun."""
    if cfg.init is None and not cfg.mix:
        return None
    files = [Path(cfg.mix).expanduser()] if cfg.mix else []
    if cfg.init is not None:
        path = Path(cfg.init.path).expanduser()
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.is_file()
    }


@stage(
    _PRETRAIN,
    needs={
        "tokens?": "tokens.encode|tokens.import",
        "tokenizer?": "tokens.train|tokens.use|tokens.import",
    },
    resumable=True,
    external_state=_state_of_checkpoint,
)
def pretrain(cfg: PretrainConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Train a Llama on packed token shards, from random weights or from a checkpoint."""
    from puna.tokens.loader import PackedLoader

    shards = cfg.shards or ("tokens" in inputs and str(inputs["tokens"].path))
    if not shards:
        raise PunaError("train.pretrain has no token shards",
                        "add [tokens.encode] or [tokens.import], or set `shards` to a URL",
                        )  # fmt: skip
    cache = cfg.cache.open() if is_remote(shards) else None
    if cfg.mix:
        from puna.tokens.shards import TokenShards

        cfg = with_schedule(cfg, TokenShards(shards, cache).counts("train"))
    loader = PackedLoader(
        shards, "train", dict(cfg.weights) or None, cfg.seq_len, cfg.global_batch, cfg.seed,
        cfg.curriculum, on_damage=cfg.on_damage, stairs=cfg.ramp.stairs,
        cache=cache,
    )  # fmt: skip
    tokenizer = _tokenizer_folder(cfg, inputs, out)
    source, heldout = SourceSpec(**loader.spec()), _heldout(cfg, loader)
    if cfg.init is None:
        model = cfg.model.resolve(loader.vocab_size)
        found = train_job(
            cfg, model, source, out, events, tokenizer=tokenizer, name=_PRETRAIN, heldout=heldout
        )
        return found | _tell_sources(cfg, loader, found, events)
    from puna.tokens.tokenizer import load_tokenizer
    from puna.train.continued import plan_start

    made_by = str(loader.shards.index.get("tokenizer_digest", ""))
    start = plan_start(cfg.init, cfg.context, load_tokenizer(tokenizer), made_by)
    events.emit(
        "train.init", path=str(start.path), content=start.digest, stored_rows=start.stored_rows,
        rows=start.model.vocab_size, new_filled=list(start.new),
        untrained_filled=list(start.untrained),
        max_seq_len=start.model.max_seq_len, rope_theta=start.model.rope_theta,
    )  # fmt: skip
    found = train_job(
        cfg, start.model, source, out, events, tokenizer=tokenizer, start=start, name=_PRETRAIN,
        heldout=heldout,
    )  # fmt: skip
    return found | _tell_sources(cfg, loader, found, events)


def _tell_sources(
    cfg: PretrainConfig, loader: PackedLoader, trained: Metrics, events: Ledger
) -> Metrics:
    """Write ``train.sources``: tokens of each source against its shares, phase by phase."""
    firsts = [phase.first_step for phase in cfg.curriculum.phases]
    found = consumed(loader, [0, *firsts, cfg.n_steps])
    events.emit(
        "train.sources", schedule=cfg.mix, labelled=trained.get("labelled_tokens", {}), **found
    )
    totals = {
        name: sum(phase["sources"][name]["tokens"] for phase in found["phases"])
        for name in loader.rows_per_source(0)
    }
    return {"source_tokens": totals, "source_tokens_most_off": found["most_off_tokens"]}


def _heldout(cfg: PretrainConfig, loader: PackedLoader) -> HeldOutSpec | None:
    """Return what is measured in the middle of the training."""
    if cfg.eval is None:
        return None
    kwargs = {
        "folder": loader.shards.absolute, "seq_len": cfg.seq_len, "overlap": cfg.eval.overlap,
        "max_tokens": cfg.eval.max_tokens_per_source, "seed": cfg.eval.seed,
        "cache": None if loader.cache is None else loader.cache.to_json(),
    }  # fmt: skip
    spec = HeldOutSpec(SourceSpec("puna.tokens.heldout:held_out_sets", kwargs), cfg.eval.every)
    if not spec.source.open():
        raise PunaError(
            f"{loader.shards.absolute} holds no held-out document that can be measured",
            "raise the held-out share of [data.split] or eval.max_tokens_per_source, or remove "
            "[train.pretrain.eval]",
        )
    return spec


def _tokenizer_folder(cfg: PretrainConfig, inputs: Artifacts, out: Path) -> Path:
    """Return a folder with the tokenizer's files: of a stage, else the checkpoint's own."""
    if "tokenizer" in inputs:
        return inputs["tokenizer"].path
    if cfg.init is not None:
        from puna.lm.convert import find_tokenizer

        found = find_tokenizer(Path(cfg.init.path).expanduser())
        if found is not None:
            folder = out / STATE_DIR / "tokenizer"
            folder.mkdir(parents=True, exist_ok=True)
            found.save(folder)
            return folder
    raise PunaError("train.pretrain has no tokenizer",
                    "add [tokens.train] or [tokens.use], or put it beside the checkpoint",
                    )  # fmt: skip


def train_job(
    cfg: TrainingConfig,
    model: LlamaConfig,
    source: SourceSpec,
    out: Path,
    events: Ledger,
    *,
    tokenizer: Path | None = None,
    weights: Path | None = None,
    start: Start | None = None,
    name: str = "train",
    heldout: HeldOutSpec | None = None,
) -> Metrics:
    """Train to the end, through every fault; called again after a kill it continues.

    Leaves in ``out``: ``model/`` (Hugging Face folder, fp32, with the tokenizer), ``checkpoints/``
    and ``loader.json``.

    Args:
        cfg: How to train.
        model: Shape of the model.
        source: Where the batches come from; opened by every rank, and once here to find bad input
            before any process is started.
        out: Folder; may hold what a killed call left.
        events: Ledger; the workers' events carry its ``stage``, too.
        tokenizer: Folder with the tokenizer's files, copied beside the weights; None for none.
        weights: Hugging Face folder to start from; None for random weights from the seed.
        start: Checkpoint to start from with what changes in it, instead of ``weights``.
        name: Shown with the progress.
        heldout: Text that is measured between steps; None for none.

    Returns:
        Metrics: ``seconds, steps, tokens, tokens_per_s, final_loss, n_params, mfu, dtype,
        goodput`` (see :meth:`puna.resilience.goodput.Goodput.to_json`) and more.

    Raises:
        PunaError: Bad input, a full disk, or a failure that a restart does not cure.
    """
    start_s = time.monotonic()
    _check(cfg, model, source)
    job = _job_id(out)
    bound = events.bind(job=job)
    history = read_history(events.path, job)
    first = bound.emit("job.start", resumed=history.next_attempt > 0, steps=cfg.n_steps)
    spec = JobSpec(
        job=job,
        out=out.resolve(),
        ledger=Path(os.path.abspath(events.path)) if events.path else None,
        common={"stage": first["stage"]} if "stage" in first else {},
        source=source,
        model=model,
        weights=start.path if start else weights.resolve() if weights else None,
        special_ids=_special_ids(tokenizer) if tokenizer else {},
        training=plain_training(cfg),
        weights_digest=start.digest if start else "",
        rope_factor=start.rope_factor if start else None,
        fill_rows=tuple(start.rows) if start else (),
        heldout=heldout,
    )
    write_json(out / LOADER_FILE, {**asdict(source), "steps": cfg.n_steps})
    policy = RestartPolicy(
        max_restarts=cfg.restart.max_restarts,
        hang_timeout_s=cfg.restart.hang_timeout_s,
        start_timeout_s=cfg.restart.start_timeout_s,
        hang_floor_s=cfg.restart.hang_floor_s,
        standby_after_s=cfg.restart.standby_after_s if cfg.restart.standby else None,
    )
    health = HealthWatch(HostHealth(spec.out), bound)
    with TrainProgress(name, spec, bound) as shown:

        def on_tick() -> None:
            health.tick()
            shown.update()

        supervise(TrainJob(spec), bound, policy, history=history, on_tick=on_tick)
    if tokenizer is not None:
        for folder in (MODEL_DIR, *([LAST_MODEL_DIR] if cfg.average else [])):
            for file in TOKENIZER_FILES:
                if (tokenizer / file).exists():
                    shutil.copyfile(tokenizer / file, out / folder / file)
    bound.emit("job.done")
    metrics = _metrics(cfg, model, spec, events, time.monotonic() - start_s)
    if spec.memory_dir is not None:
        remove_tree(spec.memory_dir)
    remove_tree(out / STATE_DIR)
    return metrics


def _check(cfg: TrainingConfig, model: LlamaConfig, source: SourceSpec) -> None:
    """Find bad input before any process is started."""
    if cfg.seq_len > model.max_seq_len:
        raise PunaError(
            f"seq_len = {cfg.seq_len} is longer than the model's max_seq_len = {model.max_seq_len}",
            "lower seq_len, or raise max_seq_len in the model's section",
        )
    check_layout(cfg, model)
    check_elastic(cfg, model)
    check_log(cfg.log)
    if cfg.predict is not None:
        from puna.train.watch.prediction import check_prediction

        check_prediction(cfg, model)
    opened = source.open()
    if opened.n_rows != cfg.global_batch:
        raise ValueError(f"the source has {opened.n_rows} rows, not {cfg.global_batch}")
    opened.batch(0, 0, cfg.data_ranks)


def _job_id(out: Path) -> str:
    """A killed call's job keeps its id, by which the ledger knows its past."""
    known = out / STATE_DIR / JOB_FILE
    if known.exists():
        return JobSpec.read(known).job
    known.parent.mkdir(parents=True, exist_ok=True)
    return uuid.uuid4().hex[:12]


def _special_ids(folder: Path) -> dict[str, Any]:
    from puna.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return {
        "bos_id": tokenizer.bos_id,
        "eos_ids": sorted(tokenizer.stop_ids),
        "pad_id": tokenizer.pad_id,
    }


def _metrics(
    cfg: TrainingConfig, model: LlamaConfig, spec: JobSpec, events: Ledger, seconds: float
) -> Metrics:
    found: dict[str, Any] = {
        "seconds": seconds,
        "steps": cfg.n_steps,
        "tokens": cfg.tokens_before(cfg.n_steps),
        "n_params": account(model).n_params,
        "world": cfg.nproc,
    }
    if events.path is None:
        return found
    own = [event for event in read_events(events.path) if event.get("job") == spec.job]
    steps = {event["step"]: event for event in own if event["kind"] == "train.step"}
    starts = [event for event in own if event["kind"] == "train.start"]
    if steps:
        last, spent_s = steps[max(steps)], sum(e["step_s"] * e["n_steps"] for e in steps.values())
        n_tokens = sum(event["tokens"] for event in steps.values())
        found |= {
            "first_loss": steps[min(steps)]["loss"],
            "final_loss": last["loss"],
            "tokens_per_s": n_tokens / spent_s,
            "labelled_tokens": _labelled(steps.values()),
        }
    if starts:
        start = starts[-1]
        keys = ("dtype", "dtype_reason", "device", "n_threads", "flops_per_token",
                "peak_flops_measured")  # fmt: skip
        found |= {key: start[key] for key in keys}
        if steps:
            per_s = found["tokens_per_s"] * start["flops_per_token"]
            found["mfu"] = per_s / start["peak_flops_measured"]
    found["goodput"] = job_goodput(own, spec.job).to_json()
    found["headline"] = _headline(found)
    return found


def _labelled(steps: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the tokens with a loss of each source, as the ranks counted them in their batches."""
    totals: dict[str, int] = {}
    for event in steps:
        for name, one in event.get("sources", {}).items():
            totals[name] = totals.get(name, 0) + one["tokens"]
    return totals


def _headline(found: Metrics) -> str:
    parts = [
        f"{format_count(found['n_params'])} parameters, {format_count(found['tokens'])} tokens"
    ]
    if "final_loss" in found:
        parts += [
            f"loss {found['first_loss']:.2f} -> {found['final_loss']:.2f}",
            format_rate(found["tokens_per_s"], "tokens"),
        ]
    faults = found["goodput"]["faults"]
    if faults:
        parts.append(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} survived")
    return ", ".join([*parts, f"goodput {found['goodput']['goodput']:.1%}"])
