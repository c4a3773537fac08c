"""Exact accounting of a Llama from its configuration alone: no tensor is allocated, no torch.

Bytes are parameters times the width of the dtype. MiB is 2**20 bytes and MB 10**6 bytes; tables
show both, because the difference (4.9 %) has misled readers before.

FLOPs follow the usual model-FLOPs convention (Kaplan et al. 2020; PaLM, appendix B): a multiply and
an add are two operations, only matrix products count, and a training step costs three forwards::

    forward  = 2 * matmul_params + 4 * n_layers * dim * visible_tokens      per token
    training = 3 * forward

``matmul_params`` are all weights that multiply the token: attention, feed-forward and the output
head (also when it is tied to the embedding); the lookup in the embedding is free. The second term
is attention (scores and weighted values). ``visible_tokens`` is ``seq_len`` when causality is not
counted, the convention of most published MFU figures, and ``(seq_len + 1) / 2`` when it is.
Recomputed activations are not counted (that would be hardware FLOPs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.core.errors import PunaError
from puna.core.units import MB, MIB
from puna.model.config import LlamaConfig

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1,
}  # fmt: skip
"""Width of one element in bytes."""

FLOPS_CONVENTION = (
    "matrix products only, multiply-add = 2, training = 3 x forward, embedding lookup free, "
    "attention over the whole context (no causal discount)"
)


@dataclass(frozen=True)
class Parts:
    """Parameters of each part, whole model (all layers together)."""

    embedding: int
    """Token embedding; when tied it is also the output head."""
    output_head: int
    """Zero when tied to the embedding."""
    kv_projections: int
    """wk and wv of all layers."""
    qo_projections: int
    """wq and wo of all layers."""
    ffn: int
    """w1, w2 and w3 of all layers."""
    norms: int
    """Two per layer and the last one."""

    def items(self) -> list[tuple[str, int]]:
        """Name and parameters of each part, in the order of the tables."""
        return [(name, getattr(self, name)) for name in PART_NAMES]


PART_NAMES = tuple(Parts.__dataclass_fields__)
PART_LABELS: Mapping[str, str] = {
    "embedding": "embedding", "output_head": "output head", "kv_projections": "K/V projections",
    "qo_projections": "Q/O projections", "ffn": "FFN", "norms": "norms",
}  # fmt: skip
"""What tables and pictures call the parts."""
_PART_OF_MODULE = {
    "tok_embeddings": "embedding", "output": "output_head", "wk": "kv_projections",
    "wv": "kv_projections", "wq": "qo_projections", "wo": "qo_projections", "w1": "ffn",
    "w2": "ffn", "w3": "ffn", "attention_norm": "norms", "ffn_norm": "norms", "norm": "norms",
}  # fmt: skip


def part_of(name: str) -> str:
    """Return the part that a parameter counts to.

    Args:
        name: Ours: ``layers.3.attention.wq.weight``.

    Raises:
        KeyError: Not a parameter of a Llama.
    """
    return _PART_OF_MODULE[name.rsplit(".", 2)[-2]]


@dataclass(frozen=True)
class Accounting:
    """What a configuration costs."""

    config: LlamaConfig
    parts: Parts

    @property
    def n_params(self) -> int:
        """All parameters; a tied matrix counts once."""
        return sum(n for _, n in self.parts.items())

    @property
    def n_matmul_params(self) -> int:
        """Parameters that multiply every token: attention, feed-forward, head (also when tied)."""
        c, p = self.config, self.parts
        return p.kv_projections + p.qo_projections + p.ffn + c.vocab_size * c.dim

    def n_bytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of the weights.

        Raises:
            PunaError: Unknown dtype.
        """
        return self.n_params * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes that one token leaves in the KV cache.

        2 (keys and values) * n_layers * n_kv_heads * head_dim * width of an element.

        Raises:
            PunaError: Unknown dtype.
        """
        return 2 * self.config.n_layers * self.config.kv_dim * dtype_bytes(dtype)

    def kv_bytes(self, n_tokens: int | None = None, dtype: str = "bfloat16") -> int:
        """Bytes of the KV cache of one sequence.

        Args:
            n_tokens: Length; the full context (``max_seq_len``) when None.
            dtype: Element type of the cache.

        Raises:
            PunaError: Unknown dtype.
        """
        length = self.config.max_seq_len if n_tokens is None else n_tokens
        return length * self.kv_bytes_per_token(dtype)

    def workspace_bytes(self, n_tokens: int, n_logits: int = 1, dtype: str = "bfloat16") -> int:
        """Estimate what one forward needs beside weights and cache; right within a factor of two.

        Counted is the largest set of activations that live at once: in a block the residual stream,
        its normalised copy (also in float32) and either the three feed-forward products or
        queries, keys, values and their rotated copies; at the end the logits, in float32 too.

        Args:
            n_tokens: Tokens of the forward; an engine that prefills in chunks passes the chunk.
            n_logits: Positions whose logits are computed: one per sequence when generating.
            dtype: Of the activations.

        Raises:
            PunaError: Unknown dtype.
        """
        c, width = self.config, dtype_bytes(dtype)
        inner = max(3 * c.ffn_dim, 4 * c.dim + 4 * c.kv_dim)
        block = n_tokens * ((2 * c.dim + inner) * width + 4 * c.dim)
        head = n_tokens * c.dim * width + n_logits * c.vocab_size * (width + 4)
        return max(block, head)

    def flops_per_token(
        self, seq_len: int | None = None, *, training: bool = True, causal: bool = False
    ) -> int:
        """FLOPs per token, averaged over a sequence; see the module's text for the convention.

        Args:
            seq_len: Tokens in the sequence; the full context when None.
            training: Forward and backward (three forwards) instead of one forward.
            causal: Count only the positions a token can see, (seq_len + 1) / 2 on average.
        """
        c = self.config
        length = c.max_seq_len if seq_len is None else seq_len
        # 4 * dim * visible: 2 for the multiply-add, 2 for scores and values; kept whole by halving.
        twice_visible = length + 1 if causal else 2 * length
        forward = 2 * self.n_matmul_params + 2 * c.n_layers * c.dim * twice_visible
        return 3 * forward if training else forward

    def layer_flops_per_token(self, seq_len: int) -> float:
        """FLOPs per token of the forward pass of one layer, by the convention of the module."""
        c, p = self.config, self.parts
        weights = (p.kv_projections + p.qo_projections + p.ffn) / c.n_layers
        return 2 * weights + 4 * c.dim * seq_len

    def flops_by_documents(
        self, n_tokens: float, n_visible: float, *, training: bool = True
    ) -> float:
        """FLOPs of packed documents, attention counted by what each token can see.

        Args:
            n_tokens: All tokens.
            n_visible: Keys that they see, summed: n * (n + 1) / 2 for a document of n tokens.
            training: Forward and backward instead of one forward.
        """
        c = self.config
        forward = 2 * self.n_matmul_params * n_tokens + 4 * c.n_layers * c.dim * n_visible
        return 3 * forward if training else forward

    def to_json(self, dtype: str = "bfloat16", seq_len: int | None = None) -> dict[str, Any]:
        """Return every number as JSON values.

        Args:
            dtype: Element type of weights and cache.
            seq_len: Sequence length of the FLOPs; the full context when None.

        Raises:
            PunaError: Unknown dtype.
        """
        width = dtype_bytes(dtype)
        length = self.config.max_seq_len if seq_len is None else seq_len
        return {
            "config": self.config.model_dump(),
            "dtype": dtype,
            "n_params": self.n_params,
            "n_bytes": self.n_bytes(dtype),
            "parts": {name: {"params": n, "n_bytes": n * width} for name, n in self.parts.items()},
            "kv_bytes_per_token": self.kv_bytes_per_token(dtype),
            "kv_bytes_full_context": self.kv_bytes(dtype=dtype),
            "flops": {
                "seq_len": length,
                "convention": FLOPS_CONVENTION,
                "forward_per_token": self.flops_per_token(length, training=False),
                "training_per_token": self.flops_per_token(length),
            },
        }


@dataclass(frozen=True)
class PartDelta:
    """One line of a comparison; deltas are ``b - a``."""

    name: str
    a_params: int
    b_params: int
    delta_bytes: int

    @property
    def delta_params(self) -> int:
        """Parameters that b has more."""
        return self.b_params - self.a_params

    @property
    def delta_mib(self) -> float:
        """``delta_bytes`` in 2**20 bytes."""
        return self.delta_bytes / MIB

    @property
    def delta_mb(self) -> float:
        """``delta_bytes`` in 10**6 bytes."""
        return self.delta_bytes / MB

    def to_json(self) -> dict[str, Any]:
        """Return the line as JSON values."""
        names = (
            "name", "a_params", "b_params", "delta_params", "delta_bytes", "delta_mib", "delta_mb",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Comparison:
    """Two models side by side: what the change of each number in the configuration costs."""

    a: Accounting
    b: Accounting
    dtype: str
    lines: list[PartDelta]
    """One per part."""
    total: PartDelta
    changed: dict[str, tuple[Any, Any]]
    """Fields of the configuration that differ: name -> (a, b)."""

    def to_json(self, seq_len: int | None = None) -> dict[str, Any]:
        """Return both accountings and the deltas as JSON values."""
        return {
            "dtype": self.dtype,
            "a": self.a.to_json(self.dtype, seq_len),
            "b": self.b.to_json(self.dtype, seq_len),
            "parts": [line.to_json() for line in self.lines],
            "total": self.total.to_json(),
            "changed": {name: list(pair) for name, pair in self.changed.items()},
        }


def dtype_bytes(dtype: str) -> int:
    """Return the width of one element.

    Raises:
        PunaError: Unknown dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise PunaError(f"unknown dtype {dtype!r}", f"use one of: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def account(config: LlamaConfig) -> Accounting:
    """Count a configuration exactly, without allocating anything."""
    c = config
    table = c.vocab_size * c.dim
    return Accounting(
        config,
        Parts(
            embedding=table,
            output_head=0 if c.tie_embeddings else table,
            kv_projections=c.n_layers * 2 * c.dim * c.kv_dim,
            qo_projections=c.n_layers * 2 * c.dim * c.dim,
            ffn=c.n_layers * 3 * c.dim * c.ffn_dim,
            norms=(2 * c.n_layers + 1) * c.dim,
        ),
    )


def compare(a: LlamaConfig, b: LlamaConfig, dtype: str = "bfloat16") -> Comparison:
    """Compare two configurations part by part.

    Raises:
        PunaError: Unknown dtype.
    """
    left, right = account(a), account(b)
    width = dtype_bytes(dtype)

    def line(name: str, n_a: int, n_b: int) -> PartDelta:
        return PartDelta(name, n_a, n_b, (n_b - n_a) * width)

    pairs = zip(left.parts.items(), right.parts.items(), strict=True)
    fields_a, fields_b = a.model_dump(), b.model_dump()
    return Comparison(
        left,
        right,
        dtype,
        [line(name, n_a, n_b) for (name, n_a), (_, n_b) in pairs],
        line("total", left.n_params, right.n_params),
        {
            name: (fields_a[name], fields_b[name])
            for name in fields_a
            if fields_a[name] != fields_b[name]
        },
    )
