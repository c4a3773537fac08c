"""PyTorch's distributed checkpoint (DCP), told to write and read safetensors.

A module of its own, because it takes more than half a second to import: a training imports it at
its first checkpoint and not before its first step.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

__all__ = ["CheckpointException", "read", "write"]


def write(
    folder: Path, tensors: Mapping[str, Tensor], *, no_dist: bool, group: ProcessGroup | None = None
) -> None:
    """Write tensors, each rank its part.

    Args:
        folder: Made if it is not there.
        tensors: Sharded or plain.
        no_dist: This rank alone.
        group: All ranks; the default group when None.

    Raises:
        CheckpointException: The same on every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _knowing_that_one_rank_is_alone():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=no_dist, process_group=group)


def read(
    folder: Path, tensors: Mapping[str, Tensor], *, no_dist: bool, group: ProcessGroup | None = None
) -> None:
    """Read into tensors, each rank its part; arguments as in :func:`write`."""
    reader = HuggingFaceStorageReader(str(folder))
    with _knowing_that_one_rank_is_alone():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=no_dist, process_group=group)


@contextlib.contextmanager
def _knowing_that_one_rank_is_alone() -> Iterator[None]:
    """DCP warns that it takes a world of one, also when it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
