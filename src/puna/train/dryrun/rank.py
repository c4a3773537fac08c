"""Building one rank and taking a step with it, on fake tensors; for a process of its own.

PyTorch keeps what it has learnt about a process group, so a second one in the same process would
meet the names of the first one's groups.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard

from puna.train.batch import TensorBatch
from puna.train.dryrun.fake import (
    DryRunRecorder,
    FakeAllocation,
    MemoryRecorder,
    StageWatch,
    fake_world,
    faked,
    fsdp_parameters,
    see_whole_rows,
    whole_rows,
)
from puna.train.dryrun.flight import has_single_stages, passes
from puna.train.dryrun.records import RankRecord, RankTask
from puna.train.dryrun.uneven import Cut
from puna.train.loss import tokens_per_chunk
from puna.train.optim import make_optimizer
from puna.train.parallel.layout import TP, Layout
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.shards import local
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World
from puna.train.precision import Precision

_FP32_BYTES = 4


def planned_precision(task: RankTask) -> Precision:
    """Precision of the matrix products; ``auto`` is taken as bf16, as on GPUs."""
    dtype = torch.float32 if task.cfg.precision == "fp32" else torch.bfloat16
    return Precision(dtype, "planned")


def build(task: RankTask, world: World) -> ParallelModel:
    """Build the stages of a rank as training does."""
    return ParallelModel(
        task.model, task.cfg.seq_len, task.micro_batch, task.n_micro, world, task.parallel,
        planned_precision(task), z_loss=task.cfg.z_loss, memory=task.cfg.memory,
    )  # fmt: skip


def local_shapes(task: RankTask) -> dict[str, tuple[int, ...]]:
    """Build a rank that exists only in name; return the shapes of its parts of the parameters."""
    with fake_world(Layout.of(task.parallel, task.cfg.nproc), task.rank) as world:
        with FakeAllocation(FakeTensorMode()):
            model = build(task, world)
        return {name: tuple(local(p).shape) for name, p in model.named_parameters()}


def step_through(task: RankTask) -> RankRecord:
    """Build a rank that exists only in name and take a step: nothing is allocated or sent."""
    fake = FakeTensorMode()
    warnings.filterwarnings("ignore", module="torch|puna")  # notes to developers, as in a worker
    with fake_world(Layout.of(task.parallel, task.cfg.nproc), task.rank) as world:
        with FakeAllocation(fake):
            model = build(task, world)
        recorder = DryRunRecorder(world)
        see_whole_rows(model.stages)
        # Outside the fake mode: Muon asks the mesh where parts of matrices begin.
        optimizer = make_optimizer(task.cfg.optim, model, world, planned_precision(task).dtype)
        for state in optimizer.state.values():
            state.update({k: fake.from_tensor(x) for k, x in state.items() if type(x) is Tensor})
        batch = faked(whole_rows(task.micro_batch * task.n_micro, task.cfg.seq_len), fake)
        with fake:
            return record_step(task, world, model, optimizer, recorder, batch)


def record_step(
    task: RankTask,
    world: World,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    recorder: DryRunRecorder | MemoryRecorder,
    batch: TensorBatch,
) -> RankRecord:
    """Take a step, as the loop does, and return what was seen; the ranks may be real ones."""
    dtype = planned_precision(task).dtype
    with recorder:
        watch = StageWatch(model.stages, recorder)
        model.forward_backward(batch)
        parameters = list(model.parameters())
        gradients = _storage_bytes(local(p.grad) for p in parameters)
        model.clip_gradients(task.cfg.clip_norm)
        optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values()]
    n_bytes = {
        "parameters": _storage_bytes(map(local, parameters)),
        "gradients": gradients,
        "optimizer": _storage_bytes(map(local, state)),
        "gathered parameters": watch.gathered + _ahead(task, model.stages.values(), dtype),
        "waiting gradients": watch.waiting,
    }
    if any(stage.is_last for stage in model.stages.values()):
        n_bytes["logits of a chunk"] = _logits_bytes(task, world.layout, dtype)
    one_more = None
    if has_single_stages(task.parallel) and task.n_micro == 2:
        one_more = watch.of_one_more(forward_first=task.parallel.pp > 1)
    return RankRecord(
        n_bytes, watch.kept, recorder.counts, one_more, _actions(task, model), _cuts(model)
    )


def _actions(task: RankTask, model: ParallelModel) -> dict[int, list[tuple[str, int]]]:
    if has_single_stages(task.parallel):
        return {}
    (pipeline,) = model._pipelines.values()
    return {
        rank: list(passes(actions)) for rank, actions in pipeline._schedule.pipeline_order.items()
    }


def _ahead(task: RankTask, stages: Iterable[Stage], dtype: torch.dtype) -> int:
    """Bytes of the layers that are gathered one after the other and freed again."""
    if not task.parallel.reshard_after_forward:
        return 0
    units: Counter[str] = Counter()
    for stage in stages:
        for parameter in fsdp_parameters(stage):
            parts = parameter._param_fqn.split(".")
            if parts[0] == "layers":
                units[parts[1]] += parameter._orig_size.numel() * dtype.itemsize
    return (1 + task.parallel.prefetch) * max(units.values(), default=0)


def _logits_bytes(task: RankTask, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of the logits of a chunk: in float32, and as product or gradient once more."""
    rows = -(-task.model.vocab_size // layout.tp)
    n_tokens = min(tokens_per_chunk(rows), task.micro_batch * task.cfg.seq_len)
    return n_tokens * rows * (_FP32_BYTES + dtype.itemsize)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of tensors, padding included; shared memory counts once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _cuts(model: ParallelModel) -> list[Cut]:
    found: dict[str, Cut] = {}
    for name, parameter in model.named_parameters():
        tp_dim = None
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ()
            if TP in names:
                placement = parameter.placements[names.index(TP)]
                tp_dim = placement.dim if isinstance(placement, Shard) else None
        found.setdefault(name, Cut(name, tuple(parameter.shape), tp_dim))
    return list(found.values())
