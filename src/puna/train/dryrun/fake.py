"""One rank of a world of any size in one process: nothing is allocated, nothing is sent.

The process group is PyTorch's ``fake`` one and the tensors are fake ones, which have a shape, a
type and a device and no memory. Everything else is the code that trains.

Shapes: B rows of this data-parallel rank, T tokens per row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from puna.model.attention import AttentionPlan, plan_attention
from puna.tokens.loader import Batch
from puna.train.batch import TensorBatch
from puna.train.dryrun.collectives import CollectiveRecorder
from puna.train.dryrun.records import Collective
from puna.train.parallel.layout import PP, Layout
from puna.train.parallel.stage import Stage
from puna.train.parallel.world import World, make_world

_aten, _prim = torch.ops.aten, torch.ops.prim
_MAKES_FAKE = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)  # in torch.tensor


@contextlib.contextmanager
def fake_world(layout: Layout, rank: int) -> Iterator[World]:
    """Be one rank of a world that does not exist.

    Raises:
        ValueError: This process is in a process group already.
    """
    if dist.is_initialized():
        raise ValueError("a dry run needs a process of its own: there is a process group")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    n_ranks = layout.data * layout.pp * layout.cp * layout.tp
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
        try:
            yield make_world(torch.device("cpu"), 1, layout)
        finally:
            dist.destroy_process_group()


class FakeAllocation(TorchDispatchMode):
    """Gives fake memory where a module of the meta device is moved to a real one.

    Modules are built outside the fake mode: under it, PyTorch cannot convert them.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace only ``empty_like`` of a meta tensor on another device."""
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until DTensor has made it a call of plain tensors
        if func is _aten.empty_like.default and type(args[0]) is Tensor and args[0].is_meta:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type != "meta":
                with self._fake:
                    return torch.empty(args[0].shape, dtype=args[0].dtype, device=device)
        return func(*args, **kwargs)


class DryRunRecorder(CollectiveRecorder):
    """Records collectives, and answers what fake tensors cannot: as whole, labelled rows would."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.memory = LiveMemory()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer, or do what was asked for."""
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        is_real = tensors and not any(isinstance(x, FakeTensor) for x in tensors)
        if is_real and func not in _MAKES_FAKE:
            with unset_fake_temporarily():  # a real mesh's places of ranks
                return func(*args, **kwargs)
        if func is _prim.device.default:
            return args[0].fake_device  # two thirds of all calls
        if func is _aten.nonzero.default:
            # Which tokens have a label: all.
            return torch.arange(args[0].numel(), device=args[0].device).unsqueeze(1)
        if func is _aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **kwargs)
        self.memory.note(result)
        return result


class MemoryRecorder(CollectiveRecorder):
    """Records collectives and memory of a real run, to compare a dry one with."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.memory = LiveMemory()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what was asked for."""
        result = func(*args, **kwargs)
        self.memory.note(result)
        return result


class LiveMemory:
    """The memory of the tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def note(self, result: Any) -> None:
        """Remember the tensors of a result."""
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.device.type != "meta":
                reference = StorageWeakRef(x.untyped_storage())
                self._storages[reference.cdata] = reference

    def n_bytes(self) -> int:
        """Bytes of all that is left."""
        total = 0
        for key in list(self._storages):
            # None once it is gone.
            storage = torch.UntypedStorage._new_with_weak_ptr(key)
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total


class StageWatch:
    """Looks at a rank's stages at the beginning and end of their passes.

    Attributes:
        kept: Bytes that the last forward pass of each stage kept for its backward pass.
        gathered: Most bytes of gathered parameters of all stages at one time.
        waiting: Most bytes of gradients that wait, whole, for the last micro-batch.
    """

    def __init__(self, stages: dict[int, Stage], recorder: DryRunRecorder | MemoryRecorder) -> None:
        self.kept: dict[int, int] = {}
        self.gathered = self.waiting = 0
        self._stages, self._recorder, self._before = stages, recorder, 0
        self._forward_ends: list[Counter[Collective]] = []
        self._backward_starts: list[Counter[Collective]] = []
        for number, stage in stages.items():
            stage.register_forward_pre_hook(self._begin)
            stage.register_forward_hook(self._end(number))

    def of_one_more(self, *, forward_first: bool) -> Counter[Collective]:
        """Return the collectives of one more micro-batch, after a step of two with one stage.

        Those of the second forward pass and of the first backward pass, which is not the last one;
        and each message to a neighbour as often as in one of the two.

        Args:
            forward_first: Both forward passes come before both backward passes. Otherwise the
                first backward pass comes between the forward passes.
        """
        first, second = self._forward_ends
        found = second - first
        if forward_first:
            start, stop = self._backward_starts
            found += stop - start
        for key in [key for key in found if key.dim == PP]:
            del found[key]
        for key, count in self._recorder.counts.items():
            if key.dim == PP and key.kind in ("send", "receive"):
                found[key] = count // 2
        return found

    def _begin(self, *_: Any) -> None:
        self._before = self._recorder.memory.n_bytes() - self._look()

    def _end(self, number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            self._forward_ends.append(self._recorder.counts.copy())
            self.kept[number] = self._recorder.memory.n_bytes() - self._look() - self._before
            if output.requires_grad:
                output.register_hook(self._begin_backward)

        return hook

    def _begin_backward(self, _: Tensor) -> None:
        self._backward_starts.append(self._recorder.counts.copy())
        self._look()

    def _look(self) -> int:
        """Return the bytes of gathered parameters."""
        gathered = sum(map(gathered_bytes, self._stages.values()))
        self.gathered = max(self.gathered, gathered)
        self.waiting = max(self.waiting, sum(map(waiting_bytes, self._stages.values())))
        return gathered


def gathered_bytes(stage: Stage) -> int:
    """Bytes of the parameters that FSDP has gathered at this moment."""
    return sum(
        x.untyped_storage().nbytes()
        for parameter in fsdp_parameters(stage)
        for x in parameter.all_gather_outputs
    )


def waiting_bytes(stage: Stage) -> int:
    """Bytes of the gradients of gathered parameters that wait for the last micro-batch."""
    total = 0
    for parameter in fsdp_parameters(stage):
        grad = parameter.unsharded_accumulated_grad
        if grad is None and hasattr(parameter, "_unsharded_param"):
            grad = parameter.unsharded_param.grad
        if grad is not None:
            total += getattr(grad, "_local_tensor", grad).untyped_storage().nbytes()
    return total


def fsdp_parameters(stage: Stage) -> Iterator[Any]:
    """FSDP's own records of a stage's parameters."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                yield from group.fsdp_params


def see_whole_rows(stages: dict[int, Stage]) -> None:
    """Let stages take every row as one document; where documents end cannot be read.

    Attention is one fused call, as on a GPU, and not the blocks that are faster on a CPU.
    """
    for stage in stages.values():
        stage._plan = _whole_rows_plan(stage)  # type: ignore[method-assign]


def _whole_rows_plan(stage: Stage) -> Callable[..., AttentionPlan]:
    original, device = stage._plan, stage._world.device
    if stage._world.layout.cp > 1:
        return lambda seq_len, _: original(seq_len, None)
    return lambda seq_len, _: plan_attention(seq_len, device, None, "causal")


def whole_rows(n_rows: int, seq_len: int) -> TensorBatch:
    """Make rows (B, T) of one document each, in which every token has a label."""
    ids_BT = np.zeros((n_rows, seq_len), np.int64)
    small_BT = np.zeros((n_rows, seq_len), np.int32)
    return TensorBatch.of(Batch(ids_BT, ids_BT.copy(), small_BT, small_BT), torch.device("cpu"))


def faked(batch: TensorBatch, fake: FakeTensorMode) -> TensorBatch:
    """Return the batch as fake tensors."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors: dict[str, Any] = {
        name: fake.from_tensor(value) for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)
