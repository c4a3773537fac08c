"""The loops between the matrices: exponentials, norms, the gate, rotation.

They add nothing across elements but in stated orders, so compilers may vectorise them freely
without changing a bit.

Shapes: N tokens, C dim, D head_dim, H head_dim / 2.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from puna.data.kernels.buffers import Array, Float, Int, kernel
from puna.lm.cpu.intrinsics import (
    BFLOAT16,
    FLOAT32,
    INT8,
    LINE_BYTES,
    WIDTHS,
    bits_to_float,
    divide,
    float_to_bits,
    load_float,
    store_float,
)
from puna.lm.cpu.matmul import multiply
from puna.lm.cpu.products import BLOCK, BLOCK_BYTES

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that its product with a small integer is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer
_SMALLEST = np.float32(-87.0)
_LARGEST = np.float32(88.0)
# Taylor coefficients of exp around 0: the argument is at most ln(2) / 2, the error below 2 ulp.
_C2, _C3, _C4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_C5, _C6, _C7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
_ONE = np.float32(1.0)
_WIDTHS = WIDTHS
_BLOCK, _BLOCK_WORDS, _HEADER_WORDS = BLOCK, BLOCK_BYTES // 2, LINE_BYTES // 2
_LARGEST_INTEGER = np.float32(32767.0)
_NAN = np.float32(np.nan)
_MAGNITUDE, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_TINY = np.int32(27 << 23)  # 2**-100: has no float32 that it could be divided by


@njit(nogil=True, inline="always")
def exp(x: Float) -> Float:
    """Return e**x in float32 without a call, so that loops over it become vectors.

    Outside of [-87, 88] the value at the end of that range; NaN stays NaN.
    """
    inside = min(max(x, _SMALLEST), _LARGEST)
    n = inside * _LOG2_E + _ROUND - _ROUND
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    p = _C6 + r * _C7
    p = _C5 + r * p
    p = _C4 + r * p
    p = _C3 + r * p
    p = _C2 + r * p
    p = r + r * r * p + _ONE
    value = p * bits_to_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return x if x != x else value


@kernel
def normalise(
    x_NC: Array, kind: Int, weight: Int, eps: Float, first: Int, count: Int, out_NC: Array
) -> None:
    """Write RMSNorm of some tokens to the first rows of ``out_NC``.

    Args:
        x_NC: float32.
        kind: Of the norm's weight.
        weight: Its address.
        eps: Added to the mean square.
        first: First token.
        count: Tokens.
        out_NC: float32.
    """
    dim = x_NC.shape[1]
    for t in range(count):
        x_C, out_C = x_NC[first + t], out_NC[t]
        at = x_C.ctypes.data
        multiply(FLOAT32, at, 0, 0, 1, 0, at, 0, 1, dim, out_C.ctypes.data, 0, 0)
        factor = divide(_ONE, np.sqrt(divide(out_C[0], np.float32(dim)) + eps))
        if kind == BFLOAT16:
            for c in range(dim):
                out_C[c] = x_C[c] * factor * load_float(BFLOAT16, weight + 2 * c)
        else:
            for c in range(dim):
                out_C[c] = x_C[c] * factor * load_float(FLOAT32, weight + 4 * c)


@kernel
def narrow(x_NI: Array, n_tokens: Int, out_NB: Array) -> None:
    """Round tokens to 16 bits, as products with int8 weights take them.

    Each block of columns has a scale, its largest magnitude over 32767. A block with a value that
    is not finite has the scale NaN; one of values below 2**-100 counts as zeros.

    Args:
        x_NI: float32.
        n_tokens: Tokens.
        out_NB: int16, the words that :func:`puna.lm.cpu.products.words_of` says.
    """
    size = x_NI.shape[1]
    for t in range(n_tokens):
        for first in range(0, size, _BLOCK):
            x_I = x_NI[t, first : min(size, first + _BLOCK)]
            bits_I = x_I.view(np.int32)
            largest = np.int32(0)
            for i in range(len(bits_I)):
                largest = max(largest, bits_I[i] & _MAGNITUDE)
            scale = factor = np.float32(0.0)
            if largest >= _INFINITE:
                scale = _NAN
            elif largest >= _TINY:
                scale = divide(bits_to_float(largest), _LARGEST_INTEGER)
                factor = divide(_LARGEST_INTEGER, bits_to_float(largest))
            start = first // _BLOCK * _BLOCK_WORDS
            store_float(FLOAT32, out_NB[t, start:].ctypes.data, scale)
            out_I = out_NB[t, start + _HEADER_WORDS :]
            for i in range(len(x_I)):
                out_I[i] = np.int16(float_to_bits(x_I[i] * factor + _ROUND))


@kernel
def gate(gate_NF: Array, up_NF: Array, n_tokens: Int, first: Int, last: Int) -> None:
    """Replace the gate by silu(gate) * up, for some columns."""
    for t in range(n_tokens):
        gate_F, up_F = gate_NF[t, first:last], up_NF[t, first:last]
        for c in range(last - first):
            value = gate_F[c]
            gate_F[c] = divide(value, _ONE + exp(-value)) * up_F[c]


@kernel
def rotate(x_D: Array, cos_H: Array, sin_H: Array, scale: Float) -> None:
    """Rotate one head in place, rotate-half, and multiply it."""
    half = len(cos_H)
    for i in range(half):
        a, b = x_D[i], x_D[i + half]
        x_D[i] = (a * cos_H[i] - b * sin_H[i]) * scale
        x_D[i + half] = (b * cos_H[i] + a * sin_H[i]) * scale


@kernel
def copy_head(x_D: Array, kind: Int, address: Int) -> None:
    """Store one head in the cache."""
    for i in range(len(x_D)):
        store_float(kind, address + i * _WIDTHS[kind], x_D[i])


@kernel
def embed(kind: Int, row: Int, scale: Int, out_C: Array) -> None:
    """Read one row of the embedding; ``scale`` is the address of an int8 row's scale."""
    factor = load_float(FLOAT32, scale) if kind == INT8 else _ONE
    for c in range(len(out_C)):
        out_C[c] = load_float(kind, row + c * _WIDTHS[kind]) * factor
