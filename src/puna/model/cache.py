"""The KV cache: keys and values of the tokens seen so far, per layer, grown in blocks.

Key slot j of a row always holds the token at position j. Rows may have different lengths: slots
beyond a row's length hold leftovers that no query sees, and are overwritten by its next tokens.

Shapes: B batch, T new tokens, S key slots in use, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from puna.model.attention import AttentionPlan, plan_cached
from puna.model.config import LlamaConfig

BLOCK_TOKENS = 256


class KVCache:
    """Keys and values of one batch of sequences.

    A cache belongs to one thread and one batch; :meth:`puna.model.llama.Llama.forward` fills it.

    Args:
        config: Of the model.
        batch: Rows, B.
        dtype: Of keys and values: the model's activation dtype.
        device: The model's.
        reserve_tokens: Allocate this many slots at once, to avoid growing.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reserve_tokens: int = 0,
    ) -> None:
        self.config = config
        self.lengths: list[int] = [0] * batch
        self._dtype, self._device = dtype, torch.device(device)
        self._capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._starts: list[int] = self.lengths
        self._n_new = 0
        self._slots: Tensor | None = None
        self._grow(reserve_tokens)

    @property
    def capacity_tokens(self) -> int:
        """Slots allocated per row."""
        return self._capacity

    def begin(self, n_tokens: int) -> AttentionPlan:
        """Make room for ``n_tokens`` new tokens per row and return how they see the cache.

        Raises:
            ValueError: A row would exceed the model's ``max_seq_len``.
        """
        n_keys = max(self.lengths) + n_tokens
        if n_keys > self.config.max_seq_len:
            raise ValueError(
                f"{n_keys} tokens in the KV cache exceed max_seq_len={self.config.max_seq_len}"
            )
        self._grow(n_keys)
        self._starts, self._n_new = list(self.lengths), n_tokens
        uniform = min(self._starts) == max(self._starts)
        self._slots = None if uniform else self.positions(n_tokens)
        return plan_cached(self._starts, n_tokens, n_keys, self._device)

    def positions(self, n_tokens: int) -> Tensor:
        """Return the positions (B, T) of the next ``n_tokens`` tokens of each row."""
        starts_B1 = torch.tensor(self.lengths).unsqueeze(1)
        return (starts_B1 + torch.arange(n_tokens)).to(self._device)

    def append(
        self,
        layer: int,
        k_BTKD: Float[Tensor, "batch tokens kv_heads head_dim"],
        v_BTKD: Float[Tensor, "batch tokens kv_heads head_dim"],
    ) -> tuple[
        Float[Tensor, "batch keys kv_heads head_dim"], Float[Tensor, "batch keys kv_heads head_dim"]
    ]:
        """Store one layer's new keys and values; return old and new together (B, S, K, D)."""
        keys, values = self._keys[layer], self._values[layer]
        n_keys = max(self._starts) + self._n_new
        if self._slots is None:
            start = self._starts[0]
            keys[:, start:n_keys] = k_BTKD
            values[:, start:n_keys] = v_BTKD
        else:
            rows_B1 = torch.arange(len(self._starts), device=self._device).unsqueeze(1)
            keys[rows_B1, self._slots] = k_BTKD
            values[rows_B1, self._slots] = v_BTKD
        return keys[:, :n_keys], values[:, :n_keys]

    def end(self) -> None:
        """Count the tokens announced by :meth:`begin` as seen, after the last layer."""
        self.lengths = [start + self._n_new for start in self._starts]

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens of each row beyond its length (padding of a ragged prompt).

        Raises:
            ValueError: The number of rows differs, or a length exceeds what the row holds.
        """
        if len(lengths) != len(self.lengths):
            raise ValueError(f"{len(lengths)} lengths for {len(self.lengths)} rows")
        if any(not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot cut rows of {self.lengths} tokens to {lengths}")
        self.lengths = list(lengths)

    def _grow(self, n_tokens: int) -> None:
        if n_tokens <= self._capacity:
            return
        c = self.config
        blocks = math.ceil(n_tokens / BLOCK_TOKENS)
        capacity = max(n_tokens, min(blocks * BLOCK_TOKENS, c.max_seq_len))
        shape = (len(self.lengths), capacity, c.n_kv_heads, c.head_dim)
        used = max(self.lengths)
        for tensors in (self._keys, self._values):
            for layer in range(c.n_layers):
                new = torch.zeros(shape, dtype=self._dtype, device=self._device)
                if self._capacity:
                    new[:, :used] = tensors[layer][:, :used]
                    tensors[layer] = new
                else:
                    tensors.append(new)
        self._capacity = capacity
