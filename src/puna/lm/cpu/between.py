"""A forward of many tokens: products by PyTorch, and what lies between them compiled.

PyTorch's products of many rows are as fast as they get; its norms, rotations, gates and sums each
read and write all activations, several times over, which in 16 bits takes as long as the products.
Here each of them is one pass, and the residual stream stays float32.

A token's results have the same bits whatever other tokens there are, as far as PyTorch's products
give them.

Shapes: T tokens, C dim, F ffn_dim, H head_dim / 2, P threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import types
from numba.extending import overload
from torch import Tensor

from puna.data.kernels.buffers import Array, kernel
from puna.data.kernels.buffers import Float as Float32
from puna.data.kernels.buffers import Int as Whole
from puna.lm.cpu.crew import crew_of
from puna.lm.cpu.elementwise import exp
from puna.lm.cpu.intrinsics import FLOAT32, bits_to_float, divide, float_to_bits
from puna.lm.cpu.matmul import multiply
from puna.lm.cpu.schedule import take
from puna.lm.cpu.structures import PROGRESS_COLUMNS
from puna.model.llama import Block, Llama, RMSNorm

if TYPE_CHECKING:
    from puna.lm.engine.paged import PagedAttention

_FLOAT32 = FLOAT32
_BELOW_HALF, _HALF_BITS, _ONE_BIT = np.int32(0x7FFF), np.int32(16), np.int32(1)
_QUIET = np.int32(0x40)
_ONE = np.float32(1.0)
_TOKENS = 16  # of a piece
_VALUES = 1 << 14  # of a piece
_SUM_FLOATS = 16  # a cache line, of which a sum takes the first


class BetweenProducts:
    """Computes the states of packed tokens with a model's own parameters.

    Args:
        model: On the CPU; its norms, and so its activations, are float32 or bfloat16. Its matrices
            may be quantised.
        n_threads: That share the work between the products.
    """

    def __init__(self, model: Llama, n_threads: int) -> None:
        self._model, self._n_threads = model, n_threads
        self._dtype = model.norm.weight.dtype
        self._progress_T = np.zeros(PROGRESS_COLUMNS, np.int64)
        self._sums_P16 = np.zeros((n_threads, _SUM_FLOATS), np.float32)

    def hidden(
        self, tokens_BT: Int[Tensor, "1 tokens"], plan: PagedAttention
    ) -> Float[Tensor, "tokens dim"]:
        """Return the normalised states before the output head.

        Args:
            tokens_BT: Ids.
            plan: Attention; knows the tokens' positions.
        """
        model = self._model
        rotation = model.rotation_at(plan.positions_BT)
        cos_TH, sin_TH = rotation.cos[0].numpy(), rotation.sin[0].numpy()
        x_TC = model.tok_embeddings(tokens_BT)[0].float()
        normed_TC = torch.empty(x_TC.shape, dtype=self._dtype)
        added_TC: Tensor | None = None
        for block in model.layers:
            assert isinstance(block, Block)
            self._normalise(x_TC, added_TC, block.attention_norm, normed_TC)
            added_TC = self._attention(block, normed_TC, cos_TH, sin_TH, plan)
            self._normalise(x_TC, added_TC, block.ffn_norm, normed_TC)
            forward = block.feed_forward
            gate_TF = forward.w1(normed_TC)
            self._gate(gate_TF, forward.w3(normed_TC))
            added_TC = forward.w2(gate_TF)
        self._normalise(x_TC, added_TC, model.norm, normed_TC)
        return normed_TC

    def _attention(
        self, block: Block, x_TC: Tensor, cos_TH: np.ndarray, sin_TH: np.ndarray,
        plan: PagedAttention,
    ) -> Tensor:  # fmt: skip
        attention = block.attention
        q_TC, k_TC, v_TC = (product(x_TC) for product in (attention.wq, attention.wk, attention.wv))
        self._rotate(q_TC, k_TC, cos_TH, sin_TH)
        heads = (1, len(x_TC), -1, attention.head_dim)
        mixed_BTND = plan(q_TC.view(heads), k_TC.view(heads), v_TC.view(heads), attention.layer)
        return attention.wo(mixed_BTND[0].flatten(-2))

    def _normalise(
        self, x_TC: Tensor, added_TC: Tensor | None, norm: RMSNorm, out_TC: Tensor
    ) -> None:
        """Add to the residual stream, and write its norm."""
        adds = int(added_TC is not None)
        x, added, out = (
            x_TC.numpy(),
            _stored(out_TC if added_TC is None else added_TC),
            _stored(out_TC),
        )
        weight, eps = _stored(norm.weight.detach()), np.float32(norm.eps)
        self._share(
            lambda thread, progress: _normalise_sums(
                progress, x, added, adds, weight, eps, out, self._sums_P16[thread]
            )
        )

    def _rotate(self, q_TC: Tensor, k_TC: Tensor, cos_TH: np.ndarray, sin_TH: np.ndarray) -> None:
        """Rotate queries and keys in place."""
        heads = (len(q_TC), -1, 2 * cos_TH.shape[1])
        q, k = _stored(q_TC.view(heads)), _stored(k_TC.view(heads))
        self._share(lambda _, progress: _rotate_heads(progress, q, k, cos_TH, sin_TH))

    def _gate(self, gate_TF: Tensor, up_TF: Tensor) -> None:
        """Replace the gate by silu(gate) * up."""
        gate, up = _stored(gate_TF.flatten()), _stored(up_TF.flatten())
        self._share(lambda _, progress: _gate_values(progress, gate, up))

    def _share(self, task: Callable[[int, int], None]) -> None:
        """Run a kernel on all threads, which take its pieces from the same count."""
        self._progress_T[:] = 0
        progress = self._progress_T.ctypes.data
        crew_of(self._n_threads).run(lambda thread: task(thread, progress))


def _stored(x: Tensor) -> np.ndarray:
    """Look at a tensor as kernels do."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _get(values: Array, i: Whole) -> Float32:
    """Return a stored value as float32; bfloat16 is stored as int16."""
    raise NotImplementedError


def _put(values: Array, i: Whole, value: Float32) -> None:
    """Store a float32, rounded to the nearest even where it is stored as bfloat16."""
    raise NotImplementedError


@overload(_get)
def _overload_get(values: Array, i: Whole) -> Callable[..., Float32]:
    return _get_wider if values.dtype == types.int16 else _get_as_it_is


@overload(_put)
def _overload_put(values: Array, i: Whole, value: Float32) -> Callable[..., None]:
    return _put_rounded if values.dtype == types.int16 else _put_as_it_is


def _get_as_it_is(values: Array, i: Whole) -> Float32:
    return values[i]


def _get_wider(values: Array, i: Whole) -> Float32:
    return bits_to_float(np.int32(values[i]) << _HALF_BITS)


def _put_as_it_is(values: Array, i: Whole, value: Float32) -> None:
    values[i] = value


def _put_rounded(values: Array, i: Whole, value: Float32) -> None:
    bits = float_to_bits(value)
    rounded = (bits + _BELOW_HALF + ((bits >> _HALF_BITS) & _ONE_BIT)) >> _HALF_BITS
    values[i] = np.int16((bits >> _HALF_BITS) | _QUIET if value != value else rounded)


@kernel
def _normalise_sums(
    progress: Whole, x_TC: Array, added_TC: Array, adds: Whole, weight_C: Array, eps: Float32,
    out_TC: Array, sum_1: Array,
) -> None:  # fmt: skip
    """Add what a product gave to tokens of the residual stream, and write their RMSNorm."""
    n_tokens, dim = x_TC.shape
    n_pieces = (n_tokens + _TOKENS - 1) // _TOKENS
    piece = take(progress, 0, n_pieces)
    while piece < n_pieces:
        for t in range(piece * _TOKENS, min(n_tokens, (piece + 1) * _TOKENS)):
            x_C, added_C, out_C = x_TC[t], added_TC[t], out_TC[t]
            if adds:
                for c in range(dim):
                    x_C[c] += _get(added_C, c)
            at = x_C.ctypes.data
            multiply(_FLOAT32, at, 0, 0, 1, 0, at, 0, 1, dim, sum_1.ctypes.data, 0, 0)
            factor = divide(_ONE, np.sqrt(divide(sum_1[0], np.float32(dim)) + eps))
            for c in range(dim):
                _put(out_C, c, x_C[c] * factor * _get(weight_C, c))
        piece = take(progress, 0, n_pieces)


@kernel
def _rotate_heads(
    progress: Whole, q_TND: Array, k_TKD: Array, cos_TH: Array, sin_TH: Array
) -> None:
    """Rotate the heads of tokens in place, rotate-half."""
    n_tokens, n_heads, n_kv = len(q_TND), q_TND.shape[1], k_TKD.shape[1]
    half = cos_TH.shape[1]
    n_pieces = (n_tokens + _TOKENS - 1) // _TOKENS
    piece = take(progress, 0, n_pieces)
    while piece < n_pieces:
        for t in range(piece * _TOKENS, min(n_tokens, (piece + 1) * _TOKENS)):
            cos_H, sin_H = cos_TH[t], sin_TH[t]
            for head in range(n_heads + n_kv):
                x_D = q_TND[t, head] if head < n_heads else k_TKD[t, head - n_heads]
                x_H, y_H = x_D[:half], x_D[half:]
                for i in range(half):
                    a, b = _get(x_H, i), _get(y_H, i)
                    _put(x_H, i, a * cos_H[i] - b * sin_H[i])
                    _put(y_H, i, b * cos_H[i] + a * sin_H[i])
        piece = take(progress, 0, n_pieces)


@kernel
def _gate_values(progress: Whole, gate_N: Array, up_N: Array) -> None:
    """Replace values of the gate by silu(gate) * up."""
    n_values = len(gate_N)
    n_pieces = (n_values + _VALUES - 1) // _VALUES
    piece = take(progress, 0, n_pieces)
    while piece < n_pieces:
        mine = slice(piece * _VALUES, min(n_values, (piece + 1) * _VALUES))
        gate_I, up_I = gate_N[mine], up_N[mine]
        for i in range(len(gate_I)):
            value = _get(gate_I, i)
            _put(gate_I, i, divide(value, _ONE + exp(-value)) * _get(up_I, i))
        piece = take(progress, 0, n_pieces)
