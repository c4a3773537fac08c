"""Loading the weights of a checkpoint of any format into a model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.formats.checkpoint import Checkpoint, open_checkpoint
from puna.model.formats.mapped import ITEM_BYTES
from puna.model.formats.parts import parts_of
from puna.model.formats.probe import refuse_wrong_layout
from puna.model.llama import Llama


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    probe: bool = True,
) -> Llama:
    """Load a model tensor by tensor: the peak is the model and one tensor.

    Args:
        checkpoint: An opened checkpoint, or the path of one of any format.
        dtype: Of the parameters; as they are stored when None (float32 for quantised ones).
        device: Where the parameters live.
        probe: Refuse weights that show the marks of a wrong conversion, see
            :mod:`puna.model.formats.probe`.

    Raises:
        PunaError: A file is missing or damaged, a tensor is missing, surplus, of the wrong shape,
            or holds a value that is not finite; the message names it. Or the layout is wrong.
    """
    if isinstance(checkpoint, str | Path):
        checkpoint = open_checkpoint(Path(checkpoint))
    if probe:
        refuse_wrong_layout(checkpoint)
    model = Llama(checkpoint.config, device="meta")
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors():
        check_finite(checkpoint, name, tensor)
        is_mapped = checkpoint.stored[name].dtype in ITEM_BYTES  # else unpacked, nobody else's
        state[name] = tensor.to(device=device, dtype=dtype, copy=is_mapped)
        del tensor  # or it would live on while the next one is made
    model.load_state_dict(state, strict=True, assign=True)
    return model


def check_finite(checkpoint: Checkpoint, name: str, tensor: Float[Tensor, "*shape"]) -> None:
    """Refuse a tensor with NaN or infinity in it.

    Raises:
        PunaError: Names the tensor, the place of the first such value, and the value.
    """
    # A sum is not finite when a value is not; the reverse is rare and settled by looking.
    sums = (float(part.sum(dtype=torch.float32)) for part in parts_of(tensor))
    if all(math.isfinite(value) for value in sums):
        return
    wrong = ~torch.isfinite(tensor)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        stored = checkpoint.stored[name]
        raise PunaError(
            f"{stored.files[0]}: tensor {stored.stored_name} holds {int(wrong.sum())} values that "
            f"are not finite, first {float(tensor[tuple(place)])} at {place}",
            "use a checkpoint from before the training diverged, or download it again",
        )
