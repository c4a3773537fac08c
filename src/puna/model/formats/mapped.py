"""Tensors as views of memory-mapped files; torch is imported when the first one is made."""

from __future__ import annotations

import math
import mmap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per value of the plain (not quantised) types that weights are stored in."""
RELOAD = "download or write the checkpoint again"
"""What to do about a damaged file."""


class MappedFile:
    """A file in memory, read on touch; the tensors keep the mapping alive.

    The mapping is read-only and shared, so that a file larger than the memory can be mapped and
    its pages can be dropped again: a tensor must be copied before it is changed.

    Args:
        path: A file of at least one byte.

    Raises:
        PunaError: The file is empty or gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, FileNotFoundError) as error:
            raise PunaError(f"{path} is damaged: it is empty or gone", RELOAD) from error

    def tensor(
        self, offset_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> Float[Tensor, "*shape"]:
        """Return a view of a contiguous tensor.

        Args:
            offset_bytes: Of its first value in the file.
            dtype: A key of ``ITEM_BYTES``.
            shape: Outermost dimension first.

        Raises:
            PunaError: The file ends before the tensor does.
        """
        import torch

        raw = self.raw(offset_bytes, math.prod(shape) * ITEM_BYTES[dtype])
        return raw.view(getattr(torch, dtype)).view(shape)

    def raw(self, offset_bytes: int, n_bytes: int) -> UInt8[Tensor, " n_bytes"]:
        """Return a view of some bytes.

        Raises:
            PunaError: The file ends before they do.
        """
        import torch

        if n_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if offset_bytes + n_bytes > len(self._map):
            raise PunaError(f"{self.path} is damaged: it ends inside a tensor", RELOAD)
        with warnings.catch_warnings():
            # torch has no read-only tensors and says so; the docstring says it too.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(
                self._map, dtype=torch.uint8, count=n_bytes, offset=offset_bytes
            )
