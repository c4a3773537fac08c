"""The compiled step of a model on a CPU; the engine calls it for forwards of few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from puna.lm.cpu.crew import Crew
from puna.lm.cpu.intrinsics import BFLOAT16, FLOAT32, INT8
from puna.lm.cpu.matmul import SCRATCH
from puna.lm.cpu.step import Buffers, Cache, Call, Shape, Weights, forward
from puna.lm.quant import Int8Embedding, Int8Linear
from puna.model.llama import Llama

if TYPE_CHECKING:
    from puna.lm.engine.pool import KVPool

_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
_MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
_SCORES_GROWTH_TOKENS = 1024


def is_supported(model: Llama) -> bool:
    """Tell whether a model can be decoded here: on a CPU, one dtype the kernels know."""
    found = {_stored(module)[0].dtype for module in _modules(model)}
    norms = {model.norm.weight.dtype}
    return (
        model.norm.weight.device.type == "cpu"
        and len(found) == 1
        and found <= _KINDS.keys()
        and norms <= {torch.float32, torch.bfloat16}
        and all(_stored(module)[0].is_contiguous() for module in _modules(model))
    )


class CpuDecoder:
    """Computes forwards of few tokens from a model's own parameters, in place.

    In float32 it agrees with the model's own forward to rounding. With 16-bit weights and cache the
    activations are float32 all the same, more exact than the model's own forward. A token's results
    have the same bits whatever other tokens share the call, for any number of threads.

    Not thread-safe: one thread calls it, its crew helps. When parameters are replaced (not changed
    in place), make a new decoder.

    Args:
        model: See :func:`is_supported`.
        n_threads: PyTorch's number when None.

    Raises:
        ValueError: The model is not supported.
    """

    def __init__(self, model: Llama, n_threads: int | None = None) -> None:
        if not is_supported(model):
            raise ValueError("the compiled step needs a CPU model of float32, bfloat16 or int8")
        c = model.config
        self._model = model
        self._crew = Crew(n_threads or torch.get_num_threads())
        self._shape = Shape(
            c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size
        )  # fmt: skip
        self._weights, self._owners = _weights(model)
        self._buffers: Buffers | None = None
        self._n_tokens = self._n_rows = self._n_keys = 0

    def forward(
        self,
        tokens_N: Int64[np.ndarray, " tokens"],
        positions_N: Int64[np.ndarray, " tokens"],
        tables_NM: Int32[np.ndarray, "tokens blocks"],
        pool: KVPool,
        rows_R: Int64[np.ndarray, " rows"] | None = None,
    ) -> Float[Tensor, "rows vocab"]:
        """Compute tokens, store their keys and values, and return logits.

        Args:
            tokens_N: Ids; several tokens of one request in the order of their positions.
            positions_N: Position of each token in its request.
            tables_NM: Blocks of its request, enough for its position.
            pool: Keys and values, float32 or bfloat16, on the CPU.
            rows_R: Tokens whose logits are wanted; all when None.

        Returns:
            float32, a tensor of its own.
        """
        n = len(tokens_N)
        if rows_R is None:
            rows_R = np.arange(n)
        rotation = self._model.rotation_at(torch.from_numpy(positions_N))
        cache = Cache(
            _KINDS[pool.keys[0].dtype],
            np.array([tensor.data_ptr() for tensor in pool.keys], np.int64),
            np.array([tensor.data_ptr() for tensor in pool.values], np.int64),
            pool.block_tokens,
        )
        shared = len(np.unique(tables_NM[:, 0])) < n  # two tokens of one request
        call = Call(
            tokens_N, positions_N, tables_NM, rotation.cos.numpy(), rotation.sin.numpy(), rows_R,
            int(shared),
        )  # fmt: skip
        logits_RV = torch.empty(len(rows_R), self._shape.vocab_size)
        buffers = self._fitting(n, int(positions_N.max()) + 1)._replace(logits_RV=logits_RV.numpy())
        buffers.counter[0] = 0
        n_threads = self._crew.n_threads
        self._crew.run(
            lambda thread: forward(
                thread, n_threads, self._weights, self._shape, cache, call, buffers
            )
        )
        return logits_RV

    def _fitting(self, n_tokens: int, n_keys: int) -> Buffers:
        """Return buffers that are large enough; they grow and stay."""
        if self._buffers is None or n_tokens > self._n_tokens or n_keys > self._n_keys:
            self._n_tokens = max(n_tokens, self._n_tokens)
            self._n_keys = -(-max(n_keys, self._n_keys) // _SCORES_GROWTH_TOKENS)
            self._n_keys *= _SCORES_GROWTH_TOKENS
            s, n, threads = self._shape, self._n_tokens, self._crew.n_threads
            n_qkv = (s.n_heads + 2 * s.n_kv_heads) * s.head_dim
            group = s.n_heads // s.n_kv_heads
            shapes = {
                "x_NC": (n, s.dim),
                "normed_PNC": (threads, n, s.dim),
                "qkv_NQ": (n, n_qkv),
                "mixed_NC": (n, s.dim),
                "gate_NF": (n, s.ffn_dim),
                "up_NF": (n, s.ffn_dim),
                "scores_PGS": (threads, group, self._n_keys),
                "scratch_P16": (threads, SCRATCH),
                "logits_RV": (0, s.vocab_size),
            }
            arrays = {name: torch.empty(shape).numpy() for name, shape in shapes.items()}
            self._buffers = Buffers(counter=np.zeros(1, np.int64), **arrays)
        return self._buffers


def _modules(model: Llama) -> list[torch.nn.Module]:
    """Every module with a matrix: the layers' in the order of the tables, embedding, head."""
    found: list[torch.nn.Module] = []
    for layer in model.layers:
        attention, feed = layer.attention, layer.feed_forward
        found += [
            getattr(attention if name in ("wq", "wk", "wv", "wo") else feed, name)
            for name in _MATRICES
        ]
    head = model.tok_embeddings if model.output is None else model.output
    return [*found, model.tok_embeddings, head]


def _stored(module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a module's matrix as it is stored, and the scales of its rows."""
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return module.weight, module.scales
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach(), None


def _weights(model: Llama) -> tuple[Weights, list[Tensor]]:
    stored = [_stored(module) for module in _modules(model)]
    addresses = np.array([weight.data_ptr() for weight, _ in stored], np.int64)
    scales = np.array([0 if s is None else s.data_ptr() for _, s in stored], np.int64)
    norms = [
        torch.stack((layer.attention_norm.weight, layer.ffn_norm.weight)) for layer in model.layers
    ]
    n_layers = len(norms)
    weights = Weights(
        _KINDS[stored[0][0].dtype],
        addresses[:-2].reshape(n_layers, 7),
        scales[:-2].reshape(n_layers, 7),
        torch.stack(norms).detach().float().numpy().copy(),
        model.norm.weight.detach().float().numpy().copy(),
        int(addresses[-2]),
        int(scales[-2]),
        int(addresses[-1]),
        int(scales[-1]),
        np.float32(model.config.norm_eps),
    )
    return weights, [tensor for pair in stored for tensor in pair if tensor is not None]
