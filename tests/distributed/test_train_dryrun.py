"""What a dry run predicts is what real processes do: collectives, bytes, and what passes keep."""

from __future__ import annotations

import warnings

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.train.config import AdamWConfig, MemoryConfig, ParallelConfig, TrainingConfig
from puna.train.dryrun.plan import plan_job
from puna.train.dryrun.records import RankRecord, RankTask
from puna.train.optim_config import MuonConfig
from puna.train.parallel.layout import CP, PP, SHARD, TP, Layout
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

# A vocabulary and layers that do not divide; keys of a size of their own.
MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=32
)


def training(n_ranks: int, rows: int, parallel: dict, **values) -> TrainingConfig:
    usual = {"micro_batch": 1, "precision": "fp32", "optim": AdamWConfig()}
    return TrainingConfig(
        steps=1, seq_len=32, global_batch=rows, nproc=n_ranks, parallel=ParallelConfig(**parallel),
        **{**usual, **values},
    )  # fmt: skip


def real_steps(jobs: list[tuple[TrainingConfig, LlamaConfig]]) -> list[RankRecord]:
    """Take one step of each training as one rank of this group."""
    from puna.train import loss
    from puna.train.dryrun.fake import MemoryRecorder, see_whole_rows, whole_rows
    from puna.train.dryrun.rank import build, planned_precision, record_step
    from puna.train.fused import fuse
    from puna.train.optim import make_optimizer
    from puna.train.parallel.world import make_world

    warnings.filterwarnings("ignore", module=r"torch\.")
    # The loops for CPUs keep other things than what a GPU does.
    for module in (fuse, loss):
        module.is_fused = lambda x: False
    found = []
    for cfg, model in jobs:
        world = make_world(torch.device("cpu"), 1, Layout.of(cfg.parallel, cfg.nproc))
        n_micro = cfg.rank_batch // (cfg.micro_batch or cfg.rank_batch)
        task = RankTask(cfg, model, cfg.parallel, world.rank, n_micro)
        stages = build(task, world)
        stages.fill_random(0)
        see_whole_rows(stages.stages)
        optimizer = make_optimizer(cfg.optim, stages, world, planned_precision(task).dtype)
        batch = whole_rows(cfg.rank_batch, cfg.seq_len)
        found.append(record_step(task, world, stages, optimizer, MemoryRecorder(world), batch))
    return found


JOBS: dict[int, list[tuple[int, dict, dict]]] = {
    2: [
        (8, {}, {}),
        (2, {}, {"precision": "bf16"}),
        (8, {"reshard_after_forward": True}, {"micro_batch": 2}),
        (8, {"replicate": 2}, {}),
        (4, {"tp": 2}, {"optim": MuonConfig(lr=0.02)}),
        (4, {"cp": 2}, {"memory": MemoryConfig(recompute="full")}),
        (4, {"pp": 2}, {"precision": "bf16", "memory": MemoryConfig(recompute="selective")}),
        (3, {"pp": 2, "schedule": "gpipe"}, {}),
        (6, {"pp": 2, "schedule": "interleaved_1f1b"}, {}),
        (8, {"pp": 2, "schedule": "looped_bfs"}, {}),
        (6, {"pp": 2, "schedule": "interleaved_zero_bubble"}, {}),
        (6, {"pp": 2, "schedule": "zbv"}, {}),
        (6, {"pp": 2, "schedule": "dualpipev"}, {}),
    ],
    4: [
        (16, {"pp": 2, "less_last": 1}, {"precision": "bf16"}),
        (6, {"tp": 2, "pp": 2}, {"precision": "bf16"}),
        (8, {"tp": 2, "cp": 2}, {}),
        (8, {"pp": 4, "reshard_after_forward": True}, {}),
    ],
    8: [(8, {"tp": 2, "pp": 2}, {}), (8, {"replicate": 2, "tp": 2}, {})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("n_ranks", "one_in"),
    [
        (2, 4),
        *(pytest.param(n, 1, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for n in (2, 4, 8)),
    ],
)
def test_dry_run_predicts_what_real_ranks_do(n_ranks, one_in):
    for tied in (False, True) if n_ranks == 2 else (False,):
        model = MODEL.model_copy(update={"tie_embeddings": tied})
        wanted = JOBS[n_ranks][::one_in] if not tied else [(4, {"pp": 2}, {}), (4, {"tp": 2}, {})]
        jobs = [
            (training(n_ranks, rows, parallel, **more), model) for rows, parallel, more in wanted
        ]
        of_ranks = run_ranks(n_ranks, real_steps, jobs)
        for at, (cfg, _) in enumerate(jobs):
            layout = Layout.of(cfg.parallel, n_ranks)
            plan = plan_job(cfg, model, workers=2)
            for rank, records in enumerate(of_ranks):
                place, real = layout.coordinates(rank), records[at]
                planned = plan.ranks[place[PP]]
                if place[TP]:
                    continue  # has a smaller part of the vocabulary; the largest is planned
                what = f"{cfg.parallel} rank {rank}"
                assert dict(planned.collectives) == dict(real.collectives), what
                for name, n_bytes in planned.n_bytes.items():
                    if name not in real.n_bytes:
                        continue
                    # The state of a short part is not padded as the part itself is.
                    is_short = name == "optimizer" and (place[SHARD] or place[CP])
                    assert real.n_bytes[name] == n_bytes or (
                        is_short and real.n_bytes[name] < n_bytes
                    ), (name, what)
                least = max(real.kept.values()) - longer_held(cfg, model)
                assert planned.n_bytes["activations"] >= least, what


@pytest.mark.slow
@pytest.mark.exhaustive
def test_activations_of_a_pass_are_those_of_real_tensors():
    """To the byte; with tensor parallel but for one tensor that a real group holds longer."""
    for kind in ("none", "selective", "full"):
        jobs = [
            (training(2, 2, parallel, memory=MemoryConfig(recompute=kind), precision="fp32"), MODEL)
            for parallel in ({}, {"tp": 2}, {"cp": 2, "reshard_after_forward": True})
        ]  # fmt: skip
        (records, _) = run_ranks(2, real_steps, jobs)
        for (cfg, model), real in zip(jobs, records, strict=True):
            plan = plan_job(cfg, model, workers=2)
            planned, kept = plan.ranks[0].n_bytes["activations"], sum(real.kept.values())
            assert planned <= kept <= planned + longer_held(cfg, model), cfg.parallel


def longer_held(cfg: TrainingConfig, model: LlamaConfig) -> int:
    """Bytes of the tensor that a real tensor-parallel group holds until its next collective."""
    if cfg.parallel.tp == 1:
        return 0
    return cfg.rank_batch * cfg.seq_len * model.dim * 4
