"""The compiled step of a model on a CPU; the engine calls it for forwards of few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from puna.lm.cpu.attention import MOST_SPANS, SPAN_KEYS
from puna.lm.cpu.crew import crew_of
from puna.lm.cpu.intrinsics import BFLOAT16, FLOAT32, INT8, LANES
from puna.lm.cpu.pages import merge_pages
from puna.lm.cpu.products import words_of
from puna.lm.cpu.step import forward, head
from puna.lm.cpu.structures import (
    PROGRESS_COLUMNS,
    STAGES_PER_LAYER,
    Buffers,
    Cache,
    Call,
    Shape,
    Weights,
)
from puna.lm.quant import Int8Embedding, Int8Linear
from puna.model.llama import Llama
from puna.model.names import parameter_shapes

if TYPE_CHECKING:
    from puna.lm.engine.pool import KVPool

_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
_NORM_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_MATRICES = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)
_CALLS_BEFORE_MERGING = 64
"""Steps after which it is likely that more steps will pay for merging pages."""
_NORMS = ("attention_norm", "ffn_norm")


def is_supported(model: Llama) -> bool:
    """Tell whether a model can be decoded here.

    It is on the CPU, all matrices have one of the types that the kernels know, and so do the norms.
    """
    stored = _matrices(model)
    matrices = [weight for weight, _ in stored]
    norms = _norms(model)
    kinds = {weight.dtype for weight in matrices}
    norm_kinds = {weight.dtype for weight in norms}
    return (
        len(kinds) == len(norm_kinds) == 1
        and kinds <= _KINDS.keys()
        and norm_kinds <= _NORM_KINDS.keys()
        and all(w.device.type == "cpu" and w.is_contiguous() for w in (*matrices, *norms))
        and all(scales is None or scales.dtype == torch.float32 for _, scales in stored)
    )


class CpuDecoder:
    """Computes forwards of few tokens from a model's own parameters, in place.

    In float32 it agrees with the model's own forward to rounding. With 16-bit weights and cache the
    activations are float32 all the same, more exact than the model's own forward; what int8 weights
    are multiplied by is rounded to 16 bits. A token's results have the same bits whatever other
    tokens share the call, for any number of threads.

    Not thread-safe: one thread calls it, its crew helps. Parameters may change in place; when they
    are replaced (``load_state_dict(assign=True)``, ``to``, ``quantize_int8``), make a new decoder.

    Args:
        model: See :func:`is_supported`.
        n_threads: PyTorch's number when None.

    Attributes:
        shape: Sizes of the model.
        weights: Where its parameters lie.

    Raises:
        ValueError: The model is not supported, or a parameter does not fit its configuration.
    """

    def __init__(self, model: Llama, n_threads: int | None = None) -> None:
        if not is_supported(model):
            raise ValueError("the compiled step needs a CPU model of float32, bfloat16 or int8")
        _check_shapes(model)
        c = model.config
        self._model = model
        self.n_threads = n_threads or torch.get_num_threads()
        self.shape = Shape(
            c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size
        )  # fmt: skip
        self.weights, self._owners = _weights(model)
        self._buffers: Buffers | None = None
        self._n_tokens = self._n_spans = self._n_keys = self._n_calls = 0

    def forward(
        self,
        tokens_N: Int64[np.ndarray, " tokens"],
        positions_N: Int64[np.ndarray, " tokens"],
        tables_NM: Int32[np.ndarray, "tokens blocks"],
        pool: KVPool,
        rows_R: Int64[np.ndarray, " rows"] | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Compute tokens, store their keys and values, and return logits.

        A token sees the keys of its request up to its own position: those stored by earlier calls
        and those of the tokens of this one.

        Args:
            tokens_N: Ids, at least one.
            positions_N: Position of each token in its request.
            tables_NM: Blocks of its request, enough for its position; the rest is not read.
            pool: Keys and values, float32 or bfloat16, on the CPU.
            rows_R: Tokens whose logits are wanted; all when None.

        Returns:
            float32, a tensor of its own.
        """
        self._n_calls += 1
        if self._n_calls == _CALLS_BEFORE_MERGING:
            merge_pages(self._owners)
        # One type of array, so that there is one compiled function.
        tokens_N, positions_N = _plain(tokens_N, np.int64), _plain(positions_N, np.int64)
        tables_NM = _plain(tables_NM, np.int32)
        rows_R = np.arange(len(tokens_N)) if rows_R is None else _plain(rows_R, np.int64)
        cos_NH, sin_NH = self.rotation_at(positions_N)
        cache = self.cache_of(pool)
        logits_RV = torch.empty(len(rows_R), self.shape.vocab_size)
        call = Call(
            tokens_N, positions_N, tables_NM, cos_NH.numpy(), sin_NH.numpy(), rows_R,
            logits_RV.numpy(),
        )  # fmt: skip
        buffers = self._fitting(len(tokens_N), int(positions_N.max()) + 1)
        buffers.progress_T[:] = 0
        buffers.joined_NK[:] = 0
        n_threads, weights, shape = self.n_threads, self.weights, self.shape
        crew_of(n_threads).run(
            lambda thread: forward(thread, n_threads, weights, shape, cache, call, buffers)
        )
        return logits_RV

    def logits(self, x_RC: Float[np.ndarray, "rows dim"]) -> Float[Tensor, "rows vocab"]:
        """Return the logits of what the layers gave; float32, a tensor of its own."""
        n_rows = len(x_RC)
        logits_RV = torch.empty(n_rows, self.shape.vocab_size)
        if not n_rows:
            return logits_RV
        buffers = self._fitting(n_rows, 1)
        buffers.x_NC[:n_rows] = x_RC
        buffers.progress_T[:] = 0
        rows_R, out_RV = np.arange(n_rows), logits_RV.numpy()
        n_threads, weights, shape = self.n_threads, self.weights, self.shape
        crew_of(n_threads).run(
            lambda thread: head(thread, n_threads, 0, weights, shape, rows_R, out_RV, buffers)
        )
        return logits_RV

    def cache_of(self, pool: KVPool) -> Cache:
        """Return where a pool's keys and values lie; valid until it grows."""
        return Cache(
            _NORM_KINDS[pool.keys[0].dtype],
            np.array([tensor.data_ptr() for tensor in pool.keys], np.int64),
            np.array([tensor.data_ptr() for tensor in pool.values], np.int64),
            pool.block_tokens,
        )

    def rotation_at(self, positions: Int64[np.ndarray, "*shape"]) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions."""
        rotation = self._model.rotation_at(torch.from_numpy(positions))
        return rotation.cos, rotation.sin

    def _fitting(self, n_tokens: int, n_keys: int) -> Buffers:
        """Return buffers that are large enough; they grow and stay."""
        n_spans = min(-(-n_keys // SPAN_KEYS), MOST_SPANS)
        per_span = SPAN_KEYS * -(-n_keys // (SPAN_KEYS * MOST_SPANS))
        have = (self._n_tokens, self._n_spans, self._n_keys)
        need = (n_tokens, n_spans, per_span)
        if self._buffers is None or any(n > h for n, h in zip(need, have, strict=True)):
            self._n_tokens, self._n_spans, self._n_keys = map(max, need, have)
            self._buffers = self._new_buffers()
        return self._buffers

    def _new_buffers(self) -> Buffers:
        s, n, threads = self.shape, self._n_tokens, self.n_threads
        group = s.n_heads // s.n_kv_heads
        n_words = words_of(max(s.dim, s.ffn_dim)) if self.weights.kind == INT8 else 0
        stages = 2 + STAGES_PER_LAYER * self._model.config.n_layers
        shapes = {
            "x_NC": (n, s.dim),
            "normed_PNC": (threads, n, s.dim),
            "qkv_NQ": (n, (s.n_heads + 2 * s.n_kv_heads) * s.head_dim),
            "mixed_NC": (n, s.dim),
            "gate_NF": (n, s.ffn_dim),
            "up_NF": (n, s.ffn_dim),
            "scores_PGS": (threads, group, self._n_keys),
            "parts_NKZGE": (n, s.n_kv_heads, self._n_spans, group, s.head_dim + 2),
            "lanes_P16": (threads, LANES),
        }
        return Buffers(
            progress_T=np.zeros(stages * PROGRESS_COLUMNS, np.int64),
            joined_NK=np.zeros((n, s.n_kv_heads), np.int64),
            narrow_PNB=torch.empty((threads, n, n_words), dtype=torch.int16).numpy(),
            **{name: torch.empty(shape).numpy() for name, shape in shapes.items()},
        )


def _plain(array: np.ndarray, dtype: type) -> np.ndarray:
    return np.require(array, dtype, ["C", "W"])


def _check_shapes(model: Llama) -> None:
    """The compiled step reads memory by the configuration alone."""
    for name, shape in parameter_shapes(model.config).items():
        module = model.get_submodule(name.rpartition(".")[0])
        found = tuple(_stored(module)[0].shape)
        if found != shape:
            raise ValueError(f"{name} has the shape {found}, its configuration says {shape}")


def _stored(module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a module's weight as it is stored, and the scales of its rows."""
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return module.weight, module.scales
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach(), None


def _matrices(model: Llama) -> list[tuple[Tensor, Tensor | None]]:
    """Every matrix: the layers' in the order of the tables, the embedding, the head."""
    modules = [
        model.get_submodule(f"layers.{layer}.{name}")
        for layer in range(model.config.n_layers)
        for name in _MATRICES
    ]
    head = model.tok_embeddings if model.output is None else model.output
    return [_stored(module) for module in (*modules, model.tok_embeddings, head)]


def _norms(model: Llama) -> list[Tensor]:
    """Every norm's weight: two per layer, then the last."""
    names = [f"layers.{layer}.{name}" for layer in range(model.config.n_layers) for name in _NORMS]
    return [_stored(model.get_submodule(name))[0] for name in (*names, "norm")]


def _weights(model: Llama) -> tuple[Weights, list[Tensor]]:
    """Return the addresses of all parameters, and the tensors that own the memory."""
    stored, norms = _matrices(model), _norms(model)
    n_layers = model.config.n_layers
    addresses = np.array([weight.data_ptr() for weight, _ in stored], np.int64)
    scales = np.array([0 if s is None else s.data_ptr() for _, s in stored], np.int64)
    norm_addresses = np.array([norm.data_ptr() for norm in norms], np.int64)
    weights = Weights(
        _KINDS[stored[0][0].dtype],
        addresses[:-2].reshape(n_layers, len(_MATRICES)),
        scales[:-2].reshape(n_layers, len(_MATRICES)),
        _NORM_KINDS[norms[0].dtype],
        norm_addresses[:-1].reshape(n_layers, len(_NORMS)),
        int(norm_addresses[-1]),
        int(addresses[-2]),
        int(scales[-2]),
        int(addresses[-1]),
        int(scales[-1]),
        np.float32(model.config.norm_eps),
    )
    return weights, [*(tensor for pair in stored for tensor in pair if tensor is not None), *norms]
