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
        return cls.on_host(batch).to(device)

    @classmethod
    def on_host(cls, batch: Batch, *, pin: bool = False) -> TensorBatch:
        """Take a batch as tensors on the host.

        Args:
            batch: The rows.
            pin: Copy them to memory from which a GPU fetches by itself.
        """
        arrays = (batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT)
        tensors = [torch.from_numpy(array) for array in arrays]
        return cls(*(tensor.pin_memory() if pin else tensor for tensor in tensors))

    def to(self, device: torch.device) -> TensorBatch:
        """Copy to a device; from pinned memory the copy goes on while the host does other work."""
        tensors = (self.tokens_BT, self.labels_BT, self.doc_ids_BT, self.positions_BT)
        return TensorBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))
