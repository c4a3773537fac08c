"""Checksums of matrix products (ABFT), one linear layer per step in turn.

For ``y = x W^T`` the sum of each block of outputs must be ``x`` times the sum of that block of
``W``'s rows: algorithm-based fault tolerance of Huang and Abraham (IEEE Trans. Comput. C-33(6),
1984). Blocks of 64 outputs instead of whole rows keep the rounding noise of the sum, and so the
smallest error that shows, eight times lower at 4,096 outputs, for a sixty-fourth of the product.

The tolerance follows the model of rounding errors that are independent with mean zero (Higham and
Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4: they grow with the root of the length), not the
worst case (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), which is too wide
to see anything in bf16. With unit roundoff ``u`` of the output and ``v`` of the accumulator
(float32), K summands and a block ``J``:

    tol = 4 (u |y_J|_2 + 2 sqrt(K) v sqrt(sum_k x_k^2 |W_Jk|_2^2))

Rounding to nearest has a standard deviation of at most u / sqrt(3) of the value, so 4 u is seven of
them.

Shapes: M rows, K inputs, N outputs, J blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
_SIGMAS = 4.0
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SINGLE = 2.0**-24


@dataclass(frozen=True)
class Mismatch:
    """A product whose checksum is wrong.

    Attributes:
        layer: Its name.
        row: Row of the worst block (a token).
        block: First output of the worst block.
        excess: Difference of the sums in units of the tolerance.
        n_blocks: Blocks beyond the tolerance.
    """

    layer: str
    row: int
    block: int
    excess: float
    n_blocks: int


@torch.no_grad()
def check_product(
    x_MK: Float[Tensor, "... K"],
    weight_NK: Float[Tensor, "N K"],
    y_MN: Float[Tensor, "... N"],
    layer: str = "",
    bias_N: Float[Tensor, " N"] | None = None,
) -> Mismatch | None:
    """Check ``y = x W^T + b`` by the sums of blocks of outputs.

    Args:
        x_MK: Input, as it was multiplied.
        weight_NK: Weight; rounded to y's dtype first, as autocast does.
        y_MN: Output, float32 or a 16-bit format.
        layer: Name for the result.
        bias_N: Added to each row.

    Returns:
        The worst block; None when all sums are within the tolerance.

    Raises:
        ValueError: There is no rounding model for the dtype.
    """
    # Inside autocast the sums would be rounded to 16 bits.
    with torch.autocast(y_MN.device.type, enabled=False):
        return _check(x_MK, weight_NK, y_MN, layer, bias_N)


def _check(
    x_MK: Tensor, weight_NK: Tensor, y_MN: Tensor, layer: str, bias_N: Tensor | None
) -> Mismatch | None:
    unit = _UNIT.get(y_MN.dtype)
    if unit is None:
        raise ValueError(f"no rounding model for {y_MN.dtype}")
    n, k = weight_NK.shape
    pad = -n % BLOCK
    w_NK, y_MN = weight_NK.to(y_MN.dtype).float(), y_MN.reshape(-1, n)
    if pad:  # pads by copying, also by nothing
        w_NK, y_MN = F.pad(w_NK, (0, 0, 0, pad)), F.pad(y_MN, (0, pad))
    w_JBK = w_NK.view(-1, BLOCK, k)
    y_MJB = y_MN.float().view(-1, len(w_JBK), BLOCK)
    x_MK = x_MK.reshape(-1, k).to(y_MN.dtype).float()
    expected_MJ = x_MK @ w_JBK.sum(1).T
    if bias_N is not None:
        expected_MJ += F.pad(bias_N.to(y_MN.dtype).float(), (0, pad)).view(-1, BLOCK).sum(1)
    noise_MJ = (x_MK.square() @ w_JBK.square().sum(1).T).sqrt_() * (2 * math.sqrt(k) * _SINGLE)
    size_MJ = y_MJB.square().sum(2).sqrt()
    tolerance_MJ = _SIGMAS * (unit * size_MJ + noise_MJ)
    wrong_MJ = (y_MJB.sum(2) - expected_MJ).abs()
    # NaN and infinity are wrong, too, and so are values whose square overflows.
    beyond_MJ = ~(wrong_MJ <= tolerance_MJ) | ~tolerance_MJ.isfinite()
    n_beyond = int(beyond_MJ.sum())
    if n_beyond == 0:
        return None
    excess_MJ = (wrong_MJ / tolerance_MJ.clamp_min(1e-38)).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(torch.where(beyond_MJ, excess_MJ, -1.0).argmax())
    row, block = divmod(worst, len(w_JBK))
    return Mismatch(layer, row, block * BLOCK, float(excess_MJ.view(-1)[worst]), n_beyond)


class RotatingCheck:
    """Checks the forward product of one linear layer per step, in turn.

    Args:
        layers: Name and module; whole matrices (no tensor parallelism).
        offset: Ranks begin at different layers.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], offset: int = 0) -> None:
        if not layers:
            raise ValueError("there is no linear layer to check")
        self._layers, self._offset = list(layers.items()), offset
        self._found: list[Mismatch] = []
        self._off: Callable[[], None] = _nothing

    def arm(self, step: int) -> str:
        """Watch the layer whose turn it is until :meth:`take`; return its name."""
        self.take()
        name, layer = self._layers[(step + self._offset) % len(self._layers)]

        def look(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            wrong = check_product(inputs[0], module.weight, output, name, module.bias)
            if wrong is not None:
                self._found.append(wrong)

        self._off = layer.register_forward_hook(look).remove
        return name

    def take(self) -> list[Mismatch]:
        """Stop watching; return what was found since :meth:`arm`."""
        self._off()
        self._off = _nothing
        found, self._found = self._found, []
        return found


def _nothing() -> None:
    """There is no hook to take off."""
