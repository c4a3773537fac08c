"""One proxy run in a worker process; what is the same in all runs of a process is made once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from puna.core.fsio import write_json
from puna.mix.proxy.config import ProxyConfig
from puna.mix.proxy.corpus import Target, consumed, make_loader, make_targets
from puna.tokens.shards import TokenShards

SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        run: Its key.
        shares: Share of each source, above zero.
        seed: Of initial weights and order of documents.
        shards: Folder of the shards.
        proxy: JSON values of a :class:`ProxyConfig`.
        data: Digest of what is trained on.
        targets: Targets and digests of what they hold.
        path: Where the result goes.
    """

    run: str
    shares: dict[str, float]
    seed: int
    shards: str
    proxy: str
    data: str
    targets: dict[str, str]
    path: Path


@dataclass(frozen=True)
class _Lab:
    """What all runs of a process share."""

    shards: TokenShards
    proxy: ProxyConfig
    model: Any
    targets: list[Target]
    dtype: str


@lru_cache(maxsize=1)
def _lab(shards: str, proxy: str) -> _Lab:
    import torch

    from puna.mix.proxy.model import ProxyModel
    from puna.train.precision import decide_precision

    torch.set_num_threads(1)
    cfg, opened = ProxyConfig.model_validate_json(proxy), TokenShards(shards)
    precision = decide_precision(cfg.precision, torch.device("cpu"))
    model = ProxyModel(
        cfg.model(opened.vocab_size), cfg.global_batch, cfg.seq_len, cfg.optim, precision.dtype
    )
    return _Lab(opened, cfg, model, make_targets(opened, cfg), precision.name)


def make_run(job: Job) -> dict[str, Any]:
    """Train a mix, measure it, and write the result; return it.

    A loss that is no number ends the run; its losses are then missing in the result.
    """
    from puna.model.accounting import account
    from puna.train.schedule import lr_factor

    lab = _lab(job.shards, job.proxy)
    cfg, model = lab.proxy, lab.model
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    loader = make_loader(lab.shards, cfg, job.shares, job.seed)
    model.fill(job.seed)
    loss, data_s = math.nan, 0.0
    for step in range(cfg.n_steps):
        at_s = time.perf_counter()
        batch = loader.batch(step, 0, 1)
        data_s += time.perf_counter() - at_s
        lr = cfg.optim.lr * lr_factor(cfg.schedule, step, cfg.n_steps)
        loss = model.step(batch, lr, cfg.clip_norm)
        if not math.isfinite(loss):
            break
    train_s = time.perf_counter() - begin_s
    losses = {
        one.name: one.bits_per_byte(sum(float(model.evaluate(b).sum()) for b in one.batches))
        for one in lab.targets
    }
    diverged = not all(math.isfinite(value) for value in (loss, *losses.values()))
    found = {
        "schema": SCHEMA, "run": job.run, "data": job.data, "targets": job.targets,
        "mix": job.shares, "seed": job.seed, "dtype": lab.dtype,
        "n_params": account(model.config).n_params, "n_tokens": cfg.n_tokens,
        "consumed": consumed(loader, cfg.n_steps), "diverged": diverged,
        "losses": {name: None if diverged else value for name, value in losses.items()},
        "train_loss": None if diverged else loss, "train_s": train_s, "data_s": data_s,
        "cpu_s": time.process_time() - cpu_s, "seconds": time.perf_counter() - begin_s,
    }  # fmt: skip
    write_json(job.path, found)
    return found
