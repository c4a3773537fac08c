"""Loops of a proxy's step that the trainer does not have: heads apart and together, sums.

Values are float32 or the bits of bfloat16 (:mod:`puna.train.fused.numbers`).

Shapes: M tokens of all rows, T tokens of a row, C width, N query heads, K key/value heads,
R = N / K query heads that share keys, D head_dim, H = D / 2, G = rows times K, Q = T * R queries of
a group (token by token), W = (N + 2 K) D, S keys.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, Float, Int, kernel
from puna.train.fused.numbers import narrow, widen


@kernel
def _turn(x_D: Array, cos_H: Array, sin_H: Array, sign: Float, out_D: Array) -> None:
    half = len(x_D) // 2
    for i in range(half):
        a, b, sin = widen(x_D[i]), widen(x_D[i + half]), sin_H[i] * sign
        out_D[i] = narrow(a * cos_H[i] - b * sin, out_D[i])
        out_D[i + half] = narrow(b * cos_H[i] + a * sin, out_D[i])


@kernel
def split_heads(
    qkv_MW: Array, cos_MH: Array, sin_MH: Array, n_tokens: Int, q_GQD: Array, k_GTD: Array,
    v_GTD: Array,
) -> None:  # fmt: skip
    """Write queries and keys rotated, and values, group by group."""
    n_shared, dim = q_GQD.shape[1] // n_tokens, q_GQD.shape[2]
    n_groups = len(q_GQD) * n_tokens // len(qkv_MW)
    keys, one = n_groups * n_shared, np.float32(1.0)
    for m in range(len(qkv_MW)):
        x_W, cos_H, sin_H = qkv_MW[m], cos_MH[m], sin_MH[m]
        row, t = m // n_tokens, m % n_tokens
        for k in range(n_groups):
            g = row * n_groups + k
            for r in range(n_shared):
                at = (k * n_shared + r) * dim
                _turn(x_W[at : at + dim], cos_H, sin_H, one, q_GQD[g, t * n_shared + r])
            at = (keys + k) * dim
            _turn(x_W[at : at + dim], cos_H, sin_H, one, k_GTD[g, t])
            at += n_groups * dim
            v_GTD[g, t] = x_W[at : at + dim]


@kernel
def join_heads(
    grad_q_GQD: Array, grad_k_GTD: Array, grad_v_GTD: Array, cos_MH: Array, sin_MH: Array,
    n_tokens: Int, grad_MW: Array,
) -> None:  # fmt: skip
    """Write the gradient of what :func:`split_heads` read."""
    n_shared, dim = grad_q_GQD.shape[1] // n_tokens, grad_q_GQD.shape[2]
    n_groups = len(grad_q_GQD) * n_tokens // len(grad_MW)
    keys, back = n_groups * n_shared, np.float32(-1.0)
    for m in range(len(grad_MW)):
        x_W, cos_H, sin_H = grad_MW[m], cos_MH[m], sin_MH[m]
        row, t = m // n_tokens, m % n_tokens
        for k in range(n_groups):
            g = row * n_groups + k
            for r in range(n_shared):
                at = (k * n_shared + r) * dim
                _turn(grad_q_GQD[g, t * n_shared + r], cos_H, sin_H, back, x_W[at : at + dim])
            at = (keys + k) * dim
            _turn(grad_k_GTD[g, t], cos_H, sin_H, back, x_W[at : at + dim])
            at += n_groups * dim
            x_W[at : at + dim] = grad_v_GTD[g, t]


@kernel
def by_token(x_GQD: Array, n_tokens: Int, out_MC: Array) -> None:
    """Write the heads of each token beside each other."""
    n_shared, dim = x_GQD.shape[1] // n_tokens, x_GQD.shape[2]
    n_groups = len(x_GQD) * n_tokens // len(out_MC)
    for m in range(len(out_MC)):
        row, t = m // n_tokens, m % n_tokens
        for k in range(n_groups):
            for r in range(n_shared):
                at = (k * n_shared + r) * dim
                out_MC[m, at : at + dim] = x_GQD[row * n_groups + k, t * n_shared + r]


@kernel
def by_group(x_MC: Array, n_tokens: Int, out_GQD: Array) -> None:
    """Write the heads of each token to their groups: what :func:`by_token` turns back."""
    n_shared, dim = out_GQD.shape[1] // n_tokens, out_GQD.shape[2]
    n_groups = len(out_GQD) * n_tokens // len(x_MC)
    for m in range(len(x_MC)):
        row, t = m // n_tokens, m % n_tokens
        for k in range(n_groups):
            for r in range(n_shared):
                at = (k * n_shared + r) * dim
                out_GQD[row * n_groups + k, t * n_shared + r] = x_MC[m, at : at + dim]


@kernel
def softmax_gradient(
    weight_MS: Array, grad_MS: Array, begin_M: Array, end_M: Array, factor: Float, mean_M: Array
) -> None:
    """Replace the gradient of a softmax by that of its scores; ``weight`` is what it gave."""
    scale = np.float32(factor)
    for m in range(len(weight_MS)):
        begin, end, mean = begin_M[m], end_M[m], mean_M[m]
        grad_MS[m, :begin] = 0
        weight_s, grad_s = weight_MS[m, begin:end], grad_MS[m, begin:end]
        for s in range(len(weight_s)):
            value = widen(weight_s[s]) * (widen(grad_s[s]) - mean) * scale
            grad_s[s] = narrow(value, grad_s[s])
        grad_MS[m, end:] = 0


@kernel
def add(a_N: Array, b_N: Array, out_N: Array) -> None:
    """Write a + b; ``out`` may be ``a``."""
    for n in range(len(a_N)):
        out_N[n] = a_N[n] + widen(b_N[n])


@kernel
def add_narrow(a_N: Array, b_N: Array, out_N: Array) -> None:
    """Add b to a, and write the sum also in the precision of ``out``."""
    for n in range(len(a_N)):
        a_N[n] += b_N[n]
    for n in range(len(a_N)):
        out_N[n] = narrow(a_N[n], out_N[n])


@kernel
def add_rows(grad_MC: Array, token_M: Array, out_VC: Array) -> None:
    """Add the gradient of each token to the row of its id."""
    for m in range(len(grad_MC)):
        row_C, grad_C = out_VC[token_M[m]], grad_MC[m]
        for c in range(len(grad_C)):
            row_C[c] += grad_C[c]
