"""A batch on the device.

Shapes: B rows of this rank, T tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from puna.tokens.loader import Batch


@dataclass(frozen=True)
class TensorBatch:
    """A :class:`puna.tokens.loader.Batch` on the device.

    Attributes:
        sources: Names of all sources of the training; none when the batch does not know them.
        source_B: Number of each row's source among them; zeros when the batch knows none.
        n_visible: Keys that the tokens see, summed: what attention inside documents has to do.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    doc_ids_BT: Tensor
    positions_BT: Tensor
    source_B: Tensor
    sources: tuple[str, ...] = ()
    n_visible: int = 0

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
        source_B = batch.source_B
        if source_B is None:
            source_B = np.zeros(len(batch.tokens_BT), np.int64)
        arrays = (
            batch.tokens_BT, batch.labels_BT, batch.doc_ids_BT, batch.positions_BT, source_B
        )  # fmt: skip
        tensors = [torch.from_numpy(array) for array in arrays]
        n_visible = int((batch.positions_BT.astype(np.int64) + 1).sum(where=batch.doc_ids_BT >= 0))
        return cls(
            *(tensor.pin_memory() if pin else tensor for tensor in tensors),
            sources=batch.sources, n_visible=n_visible,
        )  # fmt: skip

    def to(self, device: torch.device) -> TensorBatch:
        """Copy to a device; from pinned memory the copy goes on while the host does other work."""
        names = ("tokens_BT", "labels_BT", "doc_ids_BT", "positions_BT", "source_B")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)
