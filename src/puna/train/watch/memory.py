"""The most memory that a process has taken so far."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of this process in bytes.

    On a GPU the tensors that PyTorch allocated there; on a CPU the resident set of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # VmHWM begins anew with a program; getrusage's peak is inherited from whoever started it.
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
