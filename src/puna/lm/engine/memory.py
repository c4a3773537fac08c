"""How much memory the cache may take; imports torch only to ask a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from puna.model.config import LlamaConfig

if TYPE_CHECKING:
    import torch

CACHE_SHARE = 0.5
"""Part of the free memory that the cache may take when nothing else is said."""
_CGROUP = Path("/sys/fs/cgroup")


def default_cache_tokens(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, max_batch: int
) -> int:
    """Return how many tokens the cache may hold.

    :data:`CACHE_SHARE` of the memory that is free now, but no more than ``max_batch`` requests of
    full context.
    """
    token_bytes = 2 * config.n_layers * config.kv_dim * dtype.itemsize
    affordable = int(CACHE_SHARE * free_bytes(device)) // token_bytes
    # At least one request of full context: it may swap, but it is not refused beforehand.
    return min(max(affordable, config.max_seq_len), max_batch * config.max_seq_len)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that can still be allocated."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo_available(), _cgroup_free()]
    known = [one for one in found if one is not None]
    if known:
        return max(min(known), 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _meminfo_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_free() -> int | None:
    """A container's limit minus what it uses; None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return int(limit) - used if limit.isdigit() else None
