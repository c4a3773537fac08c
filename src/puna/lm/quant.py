"""int8 weights: one scale per output channel.

Decoding on a CPU reads every weight once per token, so a quarter of the bytes is up to four times
the tokens. Rounding to 8 bits per row (symmetric, largest magnitude at 127) is the mildest of the
usual schemes. The modules here leave activations as they are; the compiled step of a CPU rounds
them to 16 bits (:mod:`puna.lm.cpu.products`).

Shapes: O rows (output channels), I columns, V vocab_size, C dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from puna.model.llama import Llama

_MAX = 127
_WIDENED_VALUES = 1 << 24  # of a matrix at once: 64 MiB in float32


def quantize_rows(
    weight_OI: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """Round a matrix to int8; row i is about ``scales[i] * values[i]``.

    A row of zeros has the scale 0; one with a value that is not finite has such a scale, so that it
    shows in the results.
    """
    wide_OI = weight_OI.float()
    scales_O = wide_OI.abs().amax(dim=1) / _MAX
    safe_O1 = torch.where(scales_O > 0, scales_O, 1.0).unsqueeze(1)
    return (wide_OI / safe_O1).round().clamp_(-_MAX, _MAX).to(torch.int8), scales_O


class _Int8Matrix(nn.Module):
    """An int8 matrix with a scale per row; computes in the dtype of what it multiplies."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight_OI: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        values_OI, scales_O = quantize_rows(weight_OI)
        self.dtype = dtype
        self.register_buffer("weight", values_OI)
        self.register_buffer("scales", scales_O)


def _scaled_product(x_BTI: Tensor, weight_OI: Tensor, scales_O: Tensor) -> Tensor:
    """Multiply by the rounded values, then scale.

    PyTorch multiplies no int8 by float, so the values are widened first, some rows at a time.
    """
    n_rows, n_columns = weight_OI.shape
    at_once = max(1, _WIDENED_VALUES // n_columns)
    if n_rows <= at_once:
        return F.linear(x_BTI, weight_OI.to(x_BTI.dtype)) * scales_O.to(x_BTI.dtype)
    out_BTO = x_BTI.new_empty((*x_BTI.shape[:-1], n_rows))
    for start in range(0, n_rows, at_once):
        rows = slice(start, start + at_once)
        out_BTO[..., rows] = _scaled_product(x_BTI, weight_OI[rows], scales_O[rows])
    return out_BTO


class Int8Linear(_Int8Matrix):
    """A linear layer; worth it for the many rows of a prompt, too: they share the widening."""

    def forward(self, x_BTI: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """Return x times the matrix."""
        return _scaled_product(x_BTI, self.weight, self.scales)


class Int8Embedding(_Int8Matrix):
    """A table of token vectors; also the head of a tied model."""

    def forward(self, tokens_BT: Int[Tensor, ...]) -> Float[Tensor, "... dim"]:
        """Return the vectors of tokens."""
        rows = self.weight[tokens_BT].to(self.dtype)
        return rows * self.scales[tokens_BT].to(self.dtype).unsqueeze(-1)

    def as_head(self, hidden_BTC: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Return the logits of a tied model."""
        return _scaled_product(hidden_BTC, self.weight, self.scales)


@torch.no_grad()
def quantize_int8(model: Llama) -> None:
    """Replace every matrix of a model by its int8 form, one at a time; norms stay.

    A tied head stays one matrix with the embedding. The model can then no longer be trained or
    saved. A quantised model stays as it is.

    Args:
        model: On any device but ``meta``.
    """
    dtype = model.norm.weight.dtype
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, dtype))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, Int8Embedding(child.weight, dtype))
