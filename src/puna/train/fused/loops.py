"""The loops: norm, rotation, gate, softmax of attention and of the loss, and their gradients.

Every loop takes rows ``first`` to ``last``, so that threads can share them. Values are float32 or
bfloat16 (:mod:`puna.train.fused.numbers`), all arithmetic is float32. Sums over a row have 64
partial sums, element ``i`` in number ``i % 64``, so that compilers make vectors of them and the
result is the same on every processor and for any number of threads.

Shapes: M rows (tokens, or tokens times heads), C width, D head_dim, H head_dim / 2, S keys,
V vocabulary, L lanes.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Float, Int, kernel
from puna.lm.cpu.intrinsics import divide
from puna.train.fused.numbers import exp, narrow, widen

LANES = 64
_LANES = LANES
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_LOWEST = np.float32(-np.inf)


@kernel
def _sum(x_C: Array, lanes_L: Array) -> Float:
    whole = len(x_C) // _LANES * _LANES
    lanes_L[:] = _ZERO
    for c in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes_L[i] += x_C[c + i]
    for c in range(whole, len(x_C)):
        lanes_L[c - whole] += x_C[c]
    half = _LANES // 2
    while half:
        for i in range(half):
            lanes_L[i] += lanes_L[i + half]
        half //= 2
    return lanes_L[0]


@kernel
def _largest(x_C: Array, lanes_L: Array) -> Float:
    whole = len(x_C) // _LANES * _LANES
    lanes_L[:] = _LOWEST
    for c in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes_L[i] = max(lanes_L[i], x_C[c + i])
    for c in range(whole, len(x_C)):
        lanes_L[0] = max(lanes_L[0], x_C[c])
    half = _LANES // 2
    while half:
        for i in range(half):
            lanes_L[i] = max(lanes_L[i], lanes_L[i + half])
        half //= 2
    return lanes_L[0]


@kernel
def norm(
    first: Int, last: Int, x_MC: Array, weight_C: Array, eps: Float, out_MC: Array, scale_M: Array
) -> None:
    """Write x / sqrt(mean(x**2) + eps) * weight, and the factor of each row."""
    dim = x_MC.shape[1]
    row_C, lanes_L = np.empty(dim, np.float32), np.empty(_LANES, np.float32)
    for m in range(first, last):
        x_C, out_C = x_MC[m], out_MC[m]
        for c in range(dim):
            value = widen(x_C[c])
            row_C[c] = value * value
        mean = divide(_sum(row_C, lanes_L), np.float32(dim))
        scale = divide(_ONE, np.sqrt(mean + np.float32(eps)))
        scale_M[m] = scale
        for c in range(dim):
            out_C[c] = narrow(widen(x_C[c]) * scale * widen(weight_C[c]), out_C[c])


@kernel
def norm_backward(
    first: Int, last: Int, grad_MC: Array, x_MC: Array, weight_C: Array, scale_M: Array,
    part_rows: Int, grad_x_MC: Array, sums_PC: Array,
) -> None:  # fmt: skip
    """Write the gradient of x, and add that of the weight; ``first`` and ``last`` count parts.

    Each part of ``part_rows`` rows has a sum of its own in ``sums``.
    """
    dim = x_MC.shape[1]
    row_C, lanes_L = np.empty(dim, np.float32), np.empty(_LANES, np.float32)
    for m in range(first * part_rows, min(last * part_rows, len(x_MC))):
        grad_C, x_C, out_C, scale = grad_MC[m], x_MC[m], grad_x_MC[m], scale_M[m]
        sums_C = sums_PC[m // part_rows]
        for c in range(dim):
            row_C[c] = widen(grad_C[c]) * widen(x_C[c])
        for c in range(dim):
            sums_C[c] += row_C[c] * scale
            row_C[c] *= widen(weight_C[c])
        along = divide(_sum(row_C, lanes_L), np.float32(dim)) * scale * scale
        for c in range(dim):
            value = widen(grad_C[c]) * widen(weight_C[c]) - widen(x_C[c]) * along
            out_C[c] = narrow(value * scale, out_C[c])


@kernel
def rotate(
    first: Int, last: Int, x_MND: Array, cos_PH: Array, sin_PH: Array, sign: Float, out_MND: Array
) -> None:
    """Write every head rotated by the angle of its token, times ``sign``: -1 turns it back.

    Tokens after the last angle begin with the first one again.
    """
    n_heads, half = x_MND.shape[1], x_MND.shape[2] // 2
    turn = np.float32(sign)
    for m in range(first, last):
        cos_H, sin_H = cos_PH[m % len(cos_PH)], sin_PH[m % len(cos_PH)]
        for n in range(n_heads):
            x_D, out_D = x_MND[m, n], out_MND[m, n]
            for i in range(half):
                a, b, sin = widen(x_D[i]), widen(x_D[i + half]), sin_H[i] * turn
                out_D[i] = narrow(a * cos_H[i] - b * sin, out_D[i])
                out_D[i + half] = narrow(b * cos_H[i] + a * sin, out_D[i])


@kernel
def gate(first: Int, last: Int, gate_MC: Array, up_MC: Array, out_MC: Array) -> None:
    """Write silu(gate) * up."""
    for m in range(first, last):
        gate_C, up_C, out_C = gate_MC[m], up_MC[m], out_MC[m]
        for c in range(len(gate_C)):
            a = widen(gate_C[c])
            out_C[c] = narrow(divide(a, _ONE + exp(-a)) * widen(up_C[c]), out_C[c])


@kernel
def gate_backward(
    first: Int, last: Int, grad_MC: Array, gate_MC: Array, up_MC: Array, grad_gate_MC: Array,
    grad_up_MC: Array,
) -> None:  # fmt: skip
    """Write the gradients of gate and up."""
    sigmoid_C = np.empty(gate_MC.shape[1], np.float32)
    for m in range(first, last):
        grad_C, gate_C, up_C = grad_MC[m], gate_MC[m], up_MC[m]
        to_gate_C, to_up_C = grad_gate_MC[m], grad_up_MC[m]
        # Loops over few arrays each: with more, compilers give up on making vectors of them.
        for c in range(len(sigmoid_C)):
            sigmoid_C[c] = divide(_ONE, _ONE + exp(-widen(gate_C[c])))
        for c in range(len(sigmoid_C)):
            product = widen(grad_C[c]) * widen(gate_C[c]) * sigmoid_C[c]
            to_up_C[c] = narrow(product, to_up_C[c])
        for c in range(len(sigmoid_C)):
            slope = sigmoid_C[c] * (_ONE + widen(gate_C[c]) * (_ONE - sigmoid_C[c]))
            sigmoid_C[c] = slope * widen(up_C[c])
        for c in range(len(sigmoid_C)):
            to_gate_C[c] = narrow(widen(grad_C[c]) * sigmoid_C[c], to_gate_C[c])


@kernel
def dots(first: Int, last: Int, a_MD: Array, b_MD: Array, out_M: Array) -> None:
    """Write the dot product of each row of ``a`` with that of ``b``."""
    row_D, lanes_L = np.empty(a_MD.shape[1], np.float32), np.empty(_LANES, np.float32)
    for m in range(first, last):
        a_D, b_D = a_MD[m], b_MD[m]
        for d in range(len(row_D)):
            row_D[d] = widen(a_D[d]) * widen(b_D[d])
        out_M[m] = _sum(row_D, lanes_L)


@kernel
def softmax(
    first: Int, last: Int, x_MS: Array, begin_M: Array, end_M: Array, factor: Float,
    log_sum_M: Array,
) -> None:  # fmt: skip
    """Replace scores by the softmax of ``factor`` times them over keys ``begin`` to ``end``.

    Keys outside get 0. Also writes the logarithm of the sum of exponentials.
    """
    n_keys = x_MS.shape[1]
    row_S, lanes_L = np.empty(n_keys, np.float32), np.empty(_LANES, np.float32)
    scale = np.float32(factor)
    for m in range(first, last):
        x_S = x_MS[m]
        begin, end = begin_M[m], end_M[m]
        seen_s, kept_s = x_S[begin:end], row_S[: end - begin]
        for s in range(len(kept_s)):
            kept_s[s] = widen(seen_s[s]) * scale
        top = _largest(kept_s, lanes_L)
        for s in range(len(kept_s)):
            kept_s[s] = exp(kept_s[s] - top)
        total = _sum(kept_s, lanes_L)
        log_sum_M[m] = top + np.log(total)
        part = divide(_ONE, total)
        x_S[:begin] = 0
        for s in range(len(kept_s)):
            seen_s[s] = narrow(kept_s[s] * part, seen_s[s])
        x_S[end:] = 0


@kernel
def softmax_backward(
    first: Int, last: Int, x_MS: Array, grad_MS: Array, begin_M: Array, end_M: Array,
    factor: Float, log_sum_M: Array, mean_M: Array,
) -> None:  # fmt: skip
    """Replace scores by their softmax, and the gradient of it by that of the scores.

    ``mean`` is the sum over keys of softmax times gradient.
    """
    scale = np.float32(factor)
    for m in range(first, last):
        x_S, grad_S, log_sum, mean = x_MS[m], grad_MS[m], log_sum_M[m], mean_M[m]
        begin, end = begin_M[m], end_M[m]
        x_S[:begin] = 0
        grad_S[:begin] = 0
        x_s, grad_s = x_S[begin:end], grad_S[begin:end]
        for s in range(len(x_s)):
            weight = exp(widen(x_s[s]) * scale - log_sum)
            x_s[s] = narrow(weight, x_s[s])
            grad_s[s] = narrow(weight * (widen(grad_s[s]) - mean) * scale, x_s[s])
        x_S[end:] = 0
        grad_S[end:] = 0


@kernel
def cross_entropy(
    first: Int, last: Int, logits_MV: Array, label_M: Array, z_loss: Float, nats_M: Array,
    log_sum_M: Array,
) -> None:  # fmt: skip
    """Replace logits by the gradient of the loss, and write each token's cross entropy."""
    row_V, lanes_L = np.empty(logits_MV.shape[1], np.float32), np.empty(_LANES, np.float32)
    for m in range(first, last):
        logits_V, label = logits_MV[m], label_M[m]
        for v in range(len(row_V)):
            row_V[v] = widen(logits_V[v])
        target, top = row_V[label], _largest(row_V, lanes_L)
        for v in range(len(row_V)):
            row_V[v] = exp(row_V[v] - top)
        total = _sum(row_V, lanes_L)
        nats_M[m] = np.log(total) + top - target
        log_sum_M[m] = np.log(total) + top
        part = divide(_ONE + np.float32(2.0) * np.float32(z_loss) * log_sum_M[m], total)
        for v in range(len(row_V)):
            logits_V[v] = narrow(row_V[v] * part, logits_V[v])
        logits_V[label] = narrow(row_V[label] * part - _ONE, logits_V[label])
