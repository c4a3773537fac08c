"""The two orders of the rows of wq and wk; torch is not imported.

RoPE rotates pairs of a head's elements. Meta's and GGUF files pair 2i with 2i + 1 (interleaved),
Hugging Face's files and our models pair i with i + D/2 (rotate-half). Same function, other rows.

Shapes: R rows (heads * D), C columns, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def to_rotate_half(w_RC: Float[Tensor, "rows dim"], head_dim: int) -> Float[Tensor, "rows dim"]:
    """Return wq or wk with the rows of each head moved from pairs (2i, 2i+1) to (i, i+D/2).

    Args:
        w_RC: In the order of Meta's and GGUF files.
        head_dim: Rows of a head.
    """
    n_columns = w_RC.shape[1]
    return w_RC.reshape(-1, head_dim // 2, 2, n_columns).transpose(1, 2).reshape(-1, n_columns)


def to_interleaved(w_RC: Float[Tensor, "rows dim"], head_dim: int) -> Float[Tensor, "rows dim"]:
    """Return wq or wk in the order of Meta's and GGUF files; undoes :func:`to_rotate_half`.

    Args:
        w_RC: In our order.
        head_dim: Rows of a head.
    """
    n_columns = w_RC.shape[1]
    return w_RC.reshape(-1, 2, head_dim // 2, n_columns).transpose(1, 2).reshape(-1, n_columns)
