"""A batch on the device.

Shapes: B rows of this rank, T tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.tokens.loader import Batch


@dataclass(frozen=True)
class TensorBatch:
    """A :class:`puna.tokens.loader.Batch` on the device."""

    tokens_BT: Tensor
    labels_BT: Tensor
    doc_ids_BT: Tensor
    positions_BT: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TensorBatch:
        """Move a batch to the device."""
        arrays = (batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))
