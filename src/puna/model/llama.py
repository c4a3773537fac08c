"""The Llama in plain PyTorch: one class for Llama 2, 3, 3.1 and 3.2; the configuration differs.

No parallelism and no device-specific call here: how the model is sharded stands in ``train``.

Shapes: B batch, T tokens, C dim, N query heads, K key/value heads, D head_dim, V vocab_size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from puna.model.attention import AttentionKind, AttentionPlan, plan_attention
from puna.model.config import LlamaConfig
from puna.model.rope import Rotation, RotationTable


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019).

    Normalises in float32, returns to x's dtype, then multiplies by the weight: the rounding order
    of Meta's and Hugging Face's code, which matters in 16 bit.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))  # type: ignore[arg-type]

    def forward(self, x_BTC: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Return the normalised x, same shape and dtype."""
        wide_BTC = x_BTC.float()
        # Not vecdot: autocast would have it in 16 bit.
        mean_square = (wide_BTC * wide_BTC).mean(-1, keepdim=True)
        return (wide_BTC * torch.rsqrt(mean_square + self.eps)).type_as(x_BTC) * self.weight


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.wq = _linear(config.dim, config.dim)
        self.wk = _linear(config.dim, config.kv_dim)
        self.wv = _linear(config.dim, config.kv_dim)
        self.wo = _linear(config.dim, config.dim)

    def forward(
        self,
        x_BTC: Float[Tensor, "batch tokens dim"],
        rotation: Rotation,
        plan: AttentionPlan,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix the tokens that may see each other."""
        heads = (-1, self.head_dim)
        q_BTND = rotation.apply(self.wq(x_BTC).unflatten(-1, heads))
        k_BSKD = rotation.apply(self.wk(x_BTC).unflatten(-1, heads))
        v_BSKD = self.wv(x_BTC).unflatten(-1, heads)
        return self.wo(plan(q_BTND, k_BSKD, v_BSKD, self.layer).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = _linear(config.dim, config.ffn_dim)
        self.w2 = _linear(config.ffn_dim, config.dim)
        self.w3 = _linear(config.dim, config.ffn_dim)

    def forward(self, x_BTC: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Transform each token on its own."""
        return self.w2(F.silu(self.w1(x_BTC)) * self.w3(x_BTC))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x_BTC: Float[Tensor, "batch tokens dim"],
        rotation: Rotation,
        plan: AttentionPlan,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return the residual stream after this layer."""
        h_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotation, plan)
        return h_BTC + self.feed_forward(self.ffn_norm(h_BTC))


class Llama(nn.Module):
    """A Llama, initialised with seed 0 unless it is built on the meta device.

    Args:
        config: Shape and function.
        device: Where the parameters live; ``meta`` allocates nothing.
        dtype: Of the parameters.

    Attributes:
        attention_kind: How attention is computed, see :mod:`puna.model.attention`; for benchmarks.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_kind: AttentionKind = "auto"
        with contextlib.nullcontext() if device is None else torch.device(device):
            self.tok_embeddings = _Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.output = None if config.tie_embeddings else _linear(config.dim, config.vocab_size)
        if dtype is not None:
            self.to(dtype)
        self._rotations = RotationTable(config)
        if not self.norm.weight.is_meta:
            self.init_weights(0)

    @property
    def output_weight(self) -> Float[Tensor, "vocab dim"]:
        """Weight of the output head; the embedding itself when tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def forward(
        self,
        tokens_BT: Int[Tensor, "batch tokens"],
        positions_BT: Int[Tensor, "batch tokens"] | None = None,
        doc_ids_BT: Int[Tensor, "batch tokens"] | None = None,
        plan: AttentionPlan | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Return the logits of the next token at every position, in float32.

        Args:
            tokens_BT: Token ids.
            positions_BT: Position of each token in its document; 0 .. T-1 when None.
            doc_ids_BT: Packed documents: tokens see only tokens of the same run of equal ids.
                None: each row is one document.
            plan: Who sees whom, instead of what the documents say; for callers that keep keys and
                values, such as the inference engine. Takes positions.

        Raises:
            ValueError: A plan together with documents, or without positions.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, doc_ids_BT, plan))

    def hidden(
        self,
        tokens_BT: Int[Tensor, "batch tokens"],
        positions_BT: Int[Tensor, "batch tokens"] | None = None,
        doc_ids_BT: Int[Tensor, "batch tokens"] | None = None,
        plan: AttentionPlan | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return the normalised states before the output head; arguments as in :meth:`forward`."""
        n_tokens, device = tokens_BT.shape[1], tokens_BT.device
        if plan is None:
            plan = plan_attention(n_tokens, device, doc_ids_BT, self.attention_kind)
        elif positions_BT is None or doc_ids_BT is not None:
            raise ValueError("an attention plan takes positions and no document ids")
        rotation = self._rotations.at(n_tokens, positions_BT, device)
        h_BTC = self.tok_embeddings(tokens_BT)
        for block in self.layers:
            h_BTC = block(h_BTC, rotation, plan)
        return self.norm(h_BTC)

    def logits(self, hidden_BTC: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Apply the output head; float32."""
        head = self.tok_embeddings.as_head if self.output is None else self.output
        return head(hidden_BTC).float()

    def rotation_at(self, positions_BT: Int[Tensor, "*shape"]) -> Rotation:
        """Return the rotation of positions, for who computes attention apart from this class."""
        return self._rotations.at(0, positions_BT, positions_BT.device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from :func:`init_tensor`; deterministic per seed."""
        for name, parameter in self.named_parameters():
            parameter.copy_(init_tensor(name, tuple(parameter.shape), seed, self.config))


def init_tensor(
    name: str, shape: Sequence[int], seed: int, config: LlamaConfig
) -> Float[Tensor, "*shape"]:
    """Return the initial value of one parameter, in float32 on the CPU.

    Norms are ones; matrices are normal with standard deviation 1/sqrt(columns): fan-in (LeCun et
    al. 1998), which at dim 4096 is 0.016 and, unlike a fixed 0.02, also suits narrow models. The
    two projections that write into the residual stream (wo, w2) are divided by sqrt(2 * n_layers)
    (GPT-2). Each parameter has its own generator, seeded by (seed, name): the value depends neither
    on the order of creation nor on how the model is sharded, so a rank can compute the tensor and
    keep its part.

    Args:
        name: Full parameter name, ``layers.3.attention.wq.weight``.
        shape: Full, unsharded shape.
        seed: Any integer.
        config: Gives n_layers.
    """
    module = name.rsplit(".", 2)[-2]
    if module.endswith("norm"):
        return torch.ones(tuple(shape))
    std = shape[-1] ** -0.5
    if module in ("wo", "w2"):
        std /= math.sqrt(2 * config.n_layers)
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(tuple(shape), generator=generator) * std


class _Linear(nn.Linear):
    """A linear layer without bias; the values come from :func:`init_tensor` alone."""

    def reset_parameters(self) -> None:
        """Do nothing: the default initialisation would only cost time."""


class _Embedding(nn.Embedding):
    """An embedding whose values come from :func:`init_tensor` alone."""

    def reset_parameters(self) -> None:
        """Do nothing: the default initialisation would only cost time."""

    def as_head(self, hidden_BTC: Tensor) -> Tensor:
        """Return the logits of a tied model."""
        return F.linear(hidden_BTC, self.weight)


def _linear(n_in: int, n_out: int) -> nn.Linear:
    return _Linear(n_in, n_out, bias=False)
