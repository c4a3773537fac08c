"""Large memory pages for the weights.

A step reads every weight once, and with pages of 4 KiB the processor looks up an address every
60 cache lines, in a virtual machine through two tables. Linux can merge them into pages of 2 MiB
where they are; measured on SmolLM2-135M, a step of one token then takes 25 % less time in float32.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25  # linux/mman.h, since Linux 6.1
_WORTHWHILE_BYTES = 64 << 20
_FAILURES_IN_A_ROW = 16


def merge_pages(tensors: Sequence[Tensor]) -> threading.Thread | None:
    """Ask Linux to merge the pages of tensors, on a thread that ends with the work.

    Nothing else changes: contents and addresses stay, and where it is not possible (another system,
    a mapped file, no free memory) the pages stay as they are. It keeps the tensors until it is
    done, for a gigabyte about three seconds of one processor.

    Args:
        tensors: On the CPU.

    Returns:
        The thread; None when there is nothing to do: little memory, or the system's setting is
        ``never`` or unknown.
    """
    if sum(t.numel() * t.element_size() for t in tensors) < _WORTHWHILE_BYTES:
        return None
    try:
        is_off = "[never]" in (_SETTINGS / "enabled").read_text()
        page_bytes = int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None
    if is_off or not sys.platform.startswith("linux"):
        return None
    arguments = (list(tensors), page_bytes)
    thread = threading.Thread(target=_merge, args=arguments, name="puna-pages", daemon=True)
    thread.start()
    return thread


def _merge(tensors: list[Tensor], page_bytes: int) -> None:
    pages: set[int] = set()
    for tensor in tensors:
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        pages.update(range(tensor.data_ptr() // page_bytes, (end - 1) // page_bytes + 1))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    failures = 0
    for page in sorted(pages):
        failed = madvise(page * page_bytes, page_bytes, _MADV_COLLAPSE) != 0
        failures = failures + 1 if failed else 0
        if failures == _FAILURES_IN_A_ROW:
            return  # each may have searched for free memory
