"""Precision: which dtype the matrix products take, decided by what the hardware is made for.

The weights, their gradients and the optimiser state are fp32 in either case. bf16 without hardware
for it is several times *slower* than fp32, so ``auto`` looks at capabilities, which are the same in
every rerun, and not at a measurement, which is not.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Precision:
    """A decided precision.

    Attributes:
        dtype: Dtype of the matrix products.
        reason: Why, for the ledger.
    """

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """``float32`` or ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Autocast for the forward pass; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def decide_precision(
    setting: Literal["auto", "fp32", "bf16"], device: torch.device, earlier: str | None = None
) -> Precision:
    """Decide the precision.

    Args:
        setting: From the configuration.
        device: Where the model is.
        earlier: Name of the dtype in the checkpoint that is continued; ``auto`` keeps it, so that a
            run does not change its numbers when it moves to another machine.
    """
    if setting != "auto":
        return Precision(_DTYPES[setting], "configured")
    if earlier is not None:
        return Precision(getattr(torch, earlier), "auto: as in the checkpoint")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "auto: the GPU has bf16")
        return Precision(torch.float32, "auto: the GPU has no bf16")
    features = cpu_bf16_features()
    if features:
        return Precision(torch.bfloat16, f"auto: the CPU has {' and '.join(features)}")
    return Precision(torch.float32, "auto: the CPU has neither avx512_bf16 nor amx_bf16")


def cpu_bf16_features() -> list[str]:
    """Name the instruction sets for bf16 matrix products that this CPU has."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
