"""One optimiser step, in its parts: forward and backward, clipping, a look at the numbers.

Shapes: B rows of this rank, T tokens per row, D width.
"""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.tokens.loader import NO_LABEL
from puna.train.batch import TensorBatch
from puna.train.loss import cross_entropy_sum
from puna.train.parallel.fsdp import set_gradient_sync
from puna.train.parallel.world import World
from puna.train.precision import Precision


def forward_backward(
    model: Llama, batch: TensorBatch, micro_batch: int, precision: Precision, world: World
) -> float:
    """Leave the gradient of the mean loss per labelled token in ``.grad``; return that loss.

    The mean is over the *global* batch, known before the first forward pass, so that it does not
    matter how rows and ranks divide the labels.
    """
    (n_labelled,) = world.sum([float((batch.labels_BT != NO_LABEL).sum())])
    if n_labelled == 0:
        raise PunaError("a batch has no labelled token", "look at how the labels are made")
    fields = (
        batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT, batch.source_B
    )  # fmt: skip
    pieces = zip(*(part.split(micro_batch) for part in fields), strict=True)
    parts = [TensorBatch(*piece) for piece in pieces]
    total = torch.zeros((), device=world.device)
    for index, part in enumerate(parts):
        set_gradient_sync(model, index == len(parts) - 1)
        with precision.context(world.device):
            hidden_BTD = model.hidden(part.tokens_BT, part.positions_BT, part.doc_ids_BT)
        loss = cross_entropy_sum(
            hidden_BTD, model.output_weight, part.labels_BT, dtype=precision.dtype
        )
        loss = loss / n_labelled
        loss.backward()
        total += loss.detach()
    return world.sum([total.item()])[0]


def clip_gradients(model: Llama, max_norm: float) -> float:
    """Scale the gradient down to ``max_norm`` (0: leave it); return its norm before."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.item()


def check_finite(step: int, loss: float, grad_norm: float, lr: float) -> None:
    """Stop a run that has left the numbers; a restart would only repeat it.

    Raises:
        PunaError: The loss or the norm of the gradient is NaN or infinite.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise PunaError(
            f"step {step}: the loss is {loss} and the gradient's norm {grad_norm} (lr {lr:.3g})",
            "lower optim.lr, lengthen schedule.warmup or lower clip_norm; the checkpoints before "
            "this step are good",
        )
