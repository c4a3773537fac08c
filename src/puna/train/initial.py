"""The values that a training starts from, one parameter at a time.

Shapes: V rows of the embedding, D width of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from puna.model.formats.checkpoint import open_checkpoint
from puna.model.names import EMBEDDING, HEAD
from puna.train.spec import JobSpec

NOISE = 0.1
"""Spread of a new row around the mean row, as a share of the spread of the trained rows (ours):
enough to tell new tokens apart, too little to leave the cloud of the others."""


def starting_tensors(spec: JobSpec) -> Iterator[tuple[str, Float[Tensor, "*shape"]]]:
    """Yield the parameters of the checkpoint that a job starts from, with its new rows.

    Raises:
        PunaError: A file is damaged where a tensor lies.
    """
    if spec.weights is None:
        raise ValueError("the job starts from random weights")
    for name, full in open_checkpoint(spec.weights, rope_factor=spec.rope_factor).tensors():
        if name in (EMBEDDING, HEAD) and spec.fill_rows:
            yield name, fill_rows(name, full, spec.model.vocab_size, spec.fill_rows,
                                  spec.training.seed)  # fmt: skip
        else:
            yield name, full


def fill_rows(
    name: str, stored_VD: Float[Tensor, "stored dim"], n_rows: int, rows: Sequence[int], seed: int
) -> Float[Tensor, "rows dim"]:
    """Return an embedding (or head) with more rows, some of them initialised.

    Such a row is the mean of all others plus noise: a new token begins as a likely one and not as
    an outlier (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
    The noise of a row depends on seed, parameter and row alone.

    Args:
        name: Of the parameter.
        stored_VD: As in the checkpoint.
        n_rows: Rows of the result, at least those that are stored.
        rows: Rows to initialise; all rows that are not stored must be among them.
        seed: Of the training.
    """
    n_stored, dim = stored_VD.shape
    full_VD = torch.empty(n_rows, dim)
    full_VD[:n_stored] = stored_VD
    trained = torch.ones(n_stored, dtype=torch.bool)
    trained[[row for row in rows if row < n_stored]] = False
    others_VD = full_VD[:n_stored][trained]
    mean_D = others_VD.mean(0)
    std_D = others_VD.std(0) if len(others_VD) > 1 else torch.zeros(dim)
    for row in rows:
        digest = hashlib.blake2b(f"{seed}\0{name}\0{row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        full_VD[row] = mean_D + NOISE * std_D * torch.randn(dim, generator=generator)
    return full_VD
