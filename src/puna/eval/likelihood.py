"""How likely a model finds tokens: summed negative log-likelihood over packed pieces; needs torch.

Shapes: B rows, T ``seq_len``, C dim, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.tokens.loader import NO_LABEL
from puna.tokens.rows import Piece
from puna.tokens.windows import pack_pieces
from puna.train.loss import cross_entropy_sum


@dataclass(frozen=True)
class Likelihood:
    """A sum over scored tokens.

    Attributes:
        nll_nats: Negative log-likelihood in nats.
        n_tokens: Tokens it is summed over.
    """

    nll_nats: float
    n_tokens: int

    @property
    def bits(self) -> float:
        """Negative log-likelihood in bits."""
        return self.nll_nats / math.log(2)


@torch.inference_mode()
def measure(
    model: Llama,
    pieces: Sequence[Piece],
    seq_len: int,
    rows_per_batch: int,
    pad_id: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Likelihood:
    """Sum the negative log-likelihood of the labels of pieces, each seen on its own.

    The pieces are packed to rows with a document mask, the path that training uses; the matrix
    products are in the model's dtype, the softmax in float32, the sum over batches in float64.

    Args:
        model: On any device.
        pieces: At most ``seq_len`` tokens each.
        seq_len: Positions of a row, T.
        rows_per_batch: Rows per forward, B.
        pad_id: Token at positions that hold nothing.
        on_batch: Called after each batch with the number of its scored tokens.

    Raises:
        PunaError: The likelihood is not a finite number.
    """
    weight_VC = model.output_weight.detach()  # a parameter would make the loss compute gradients
    device = weight_VC.device
    nll_nats, n_tokens = 0.0, 0
    for batch in pack_pieces(pieces, seq_len, rows_per_batch, pad_id):
        hidden_BTC = model.hidden(
            torch.from_numpy(batch.tokens_BT).to(device),
            torch.from_numpy(batch.positions_BT).to(device),
            torch.from_numpy(batch.doc_ids_BT).to(device),
        )
        labels_BT = torch.from_numpy(batch.labels_BT).to(device)
        loss = cross_entropy_sum(hidden_BTC, weight_VC, labels_BT, dtype=weight_VC.dtype)
        n_here = int((batch.labels_BT != NO_LABEL).sum())
        nll_nats += float(loss)
        n_tokens += n_here
        if on_batch is not None:
            on_batch(n_here)
    if not math.isfinite(nll_nats):
        raise PunaError(
            "the likelihood of the held-out text is not finite (NaN or infinity)",
            "check the model: its training diverged, or its dtype overflowed",
        )
    return Likelihood(nll_nats, n_tokens)


def untrained(config: LlamaConfig, seed: int, device: torch.device) -> Llama:
    """Return the model as it was before its first step: freshly initialised from the seed."""
    model = Llama(config)
    model.init_weights(seed)
    return model.to(device).eval()
