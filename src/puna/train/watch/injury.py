"""A training that is hurt on purpose, to see what notices it.

Without a planned fault it only passes the call on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from puna.resilience.faults import DAMAGES, FaultInjector, FaultKind
from puna.resilience.sdc.inject import flip_bit
from puna.train.batch import TensorBatch
from puna.train.parallel.model import ParallelModel
from puna.train.parallel.shards import local

_SPIKE = 1e6
_HURT_LAYER = "feed_forward.w2"
_EXPONENT_BITS = 8
_WRONG = 1.001
_TOKEN_BIT = 1


class Injury:
    """Computes the gradients of a step, with the fault that is due in it.

    Args:
        model: The model.
        tensors: Live state, parameters and optimiser, by name.
        injector: Knows when, and hurts the process itself.
    """

    def __init__(
        self, model: ParallelModel, tensors: Mapping[str, Tensor], injector: FaultInjector
    ) -> None:
        self._model, self._tensors, self._injector = model, tensors, injector
        self._is_stuck = False

    def forward_backward(self, step: int, batch: TensorBatch) -> float:
        """Leave gradients in ``.grad``; return the loss."""
        what = self._injector.take(step)
        self._is_stuck |= what == "stuck"
        self._damage_at_rest(what, batch)
        with self._bent(what):
            loss = self._model.forward_backward(batch)
        if what in ("nan", "spike", "flip-gradient"):
            self._damage_gradient(what)
        elif what not in DAMAGES:
            self._injector.strike(what)
        with self._model.clock.part("backward"):
            self._injector.drag()
        return loss

    def _damage_at_rest(self, what: FaultKind | None, batch: TensorBatch) -> None:
        if what == "flip-weight":
            _flip_one_of(dict(self._model.named_parameters()))
        elif what == "flip-optimizer":
            parameters = {id(parameter) for parameter in self._model.parameters()}
            _flip_one_of({n: x for n, x in self._tensors.items() if id(x) not in parameters})
        elif what == "flip-data":
            flip_bit(batch.tokens_BT, batch.tokens_BT.numel() // 2, _TOKEN_BIT)

    def _damage_gradient(self, what: FaultKind) -> None:
        gradient = next(
            part for p in self._model.parameters()
            if p.grad is not None and (part := local(p.grad)).numel()
        )  # fmt: skip
        if what == "nan":
            gradient.view(-1)[0] = math.nan
        elif what == "spike":
            gradient.add_(1.0).mul_(_SPIKE)  # added to, for it may be all zeros
        else:
            _flip(gradient)

    @contextlib.contextmanager
    def _bent(self, what: FaultKind | None) -> Iterator[None]:
        """Damage what a layer gives, meanwhile."""
        if what != "flip-activation" and not self._is_stuck:
            yield
            return
        layer = next(
            module
            for stage in self._model.stages.values()
            for name, module in stage.named_modules()
            if name.endswith(_HURT_LAYER)
        )

        def bend(module: nn.Module, inputs: object, x: Tensor) -> None:
            with torch.no_grad():
                if what == "flip-activation":
                    _flip(x.detach())
                else:
                    x.detach().mul_(_WRONG)

        handle = layer.register_forward_hook(bend)
        try:
            yield
        finally:
            handle.remove()


def _flip_one_of(tensors: Mapping[str, Tensor]) -> None:
    """Flip a bit of the largest: a flip in memory is most likely there."""
    _flip(max((local(x.detach()) for x in tensors.values()), key=Tensor.numel))


def _flip(x: Tensor) -> None:
    """Flip the lowest bit of an exponent, which doubles a value or halves it."""
    bits = 8 * x.element_size()
    flip_bit(x, x.numel() // 2, bits - 1 - _EXPONENT_BITS)
