"""Context parallel: the ranks share the tokens of each row.

A row is cut into twice as many chunks as there are ranks; a rank takes one from the front and its
mirror image from the back, so that all have the same number of visible keys (Llama 3, section
3.3.2). Keys and values are gathered, which with few key/value heads is little, and each rank
computes the attention of its own queries. PyTorch's experimental ``context_parallel`` has no CPU
kernel and takes no document masks.

Shapes: B rows, T tokens of a whole row, L tokens of a chunk, S keys, N query heads, K key/value
heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from puna.model.attention import AttentionKind, AttentionPlan, attend, plan_blocks


@dataclass(frozen=True)
class ContextShare:
    """Which tokens of a row a rank takes.

    Attributes:
        index: Of this rank among those that share the row.
        size: How many they are.
    """

    index: int
    size: int

    def chunks(self) -> tuple[int, int]:
        """Numbers of this rank's two chunks, of twice :attr:`size`."""
        return self.index, 2 * self.size - 1 - self.index

    def take(self, x_BT: Tensor) -> Tensor:
        """Return this rank's tokens of whole rows (B, T), in their order."""
        if self.size == 1:
            return x_BT
        parts = x_BT.chunk(2 * self.size, dim=1)
        return torch.cat([parts[number] for number in self.chunks()], dim=1)

    def order(self) -> list[int]:
        """Where each chunk of a row stands when the ranks' tokens are laid end to end."""
        place = {}
        for index in range(self.size):
            first, second = ContextShare(index, self.size).chunks()
            place[first], place[second] = 2 * index, 2 * index + 1
        return [place[number] for number in range(2 * self.size)]


class ContextPlan:
    """Attention of this rank's queries over the keys of whole rows.

    See :class:`puna.model.attention.AttentionPlan`. Gradients of keys and values come back from all
    ranks, summed.

    Args:
        share: This rank's tokens.
        group: Ranks that share the rows.
        n_tokens: Of a whole row, T.
        device: Where the model runs.
        doc_ids_BT: Documents of the whole rows: tokens see only tokens of the same run of equal
            ids; None: each row is one document.
        kind: ``mask`` makes one call per chunk with a mask; ``blocks`` computes block by block and
            skips what no query sees; ``auto`` takes blocks on a GPU.
    """

    def __init__(
        self,
        share: ContextShare,
        group: dist.ProcessGroup,
        n_tokens: int,
        device: torch.device,
        doc_ids_BT: Int[Tensor, "batch tokens"] | None = None,
        kind: AttentionKind = "auto",
    ) -> None:
        self._share, self._group = share, group
        self._masks: list[Tensor] = []
        self._blocks: AttentionPlan | None = None
        at_T = torch.arange(n_tokens, device=device)
        if kind == "blocks" or (kind == "auto" and device.type == "cuda"):
            self._blocks = plan_blocks(share.take(at_T[None])[0], n_tokens, doc_ids_BT)
            return
        n_chunk = n_tokens // (2 * share.size)
        for number in share.chunks():
            start, stop = number * n_chunk, (number + 1) * n_chunk
            mask = at_T[start:stop, None] >= at_T[None, :stop]
            if doc_ids_BT is not None:
                runs_BT = _runs(doc_ids_BT)
                same_BLS = runs_BT[:, start:stop, None] == runs_BT[:, None, :stop]
                mask = (same_BLS & mask).unsqueeze(1)
            self._masks.append(mask)

    def __call__(self, q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, layer: int = 0) -> Tensor:
        """Return the weighted values of each of this rank's queries."""
        keys, values = self._gather(k_BSKD), self._gather(v_BSKD)
        if self._blocks is not None:
            return self._blocks(q_BTND, keys, values)
        parts = []
        for q_BLND, mask in zip(q_BTND.chunk(2, dim=1), self._masks, strict=True):
            n_keys = mask.shape[-1]
            parts.append(attend(q_BLND, keys[:, :n_keys], values[:, :n_keys], mask=mask))
        return torch.cat(parts, dim=1)

    def _gather(self, x_BSKD: Tensor) -> Tensor:
        """Return keys or values of whole rows, in order."""
        # Not torch.distributed.nn's all_gather: its gradient is wrong for permuted layouts on gloo.
        gathered = funcol.all_gather_tensor_autograd(x_BSKD.contiguous(), 1, self._group)
        chunks = funcol.wait_tensor(gathered).chunk(2 * self._share.size, dim=1)
        return torch.cat([chunks[place] for place in self._share.order()], dim=1)


def _runs(doc_ids_BT: Tensor) -> Tensor:
    """Number the runs of equal ids inside each row."""
    starts_BT = torch.zeros_like(doc_ids_BT)
    starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return starts_BT.cumsum(1)
