"""Deterministic mode: the same bits in every run on the same hardware and layout."""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Take deterministic algorithms only, in this process from here on.

    An operation that has none raises. Must be called before the first use of a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # It would fill every empty tensor, for programs that read what they have not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
