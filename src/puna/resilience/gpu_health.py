"""What NVIDIA's driver tells of the GPUs of this host, through ``pynvml`` where it is installed.

Written by the API of NVML (https://docs.nvidia.com/deploy/nvml-api/); it was not run on a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

_SLOWED_FOR = (0x08, 0x20, 0x40, 0x80)
"""Bits of the reasons for a lower clock: hardware, software heat, hardware heat, power brake."""


def read_gpus() -> dict[str, float]:
    """Return ``gpu_ecc, gpu_slowed, gpu_xid`` summed over the GPUs; empty without any."""
    driver = _driver()
    return {} if driver is None else driver.read()


@cache
def _driver() -> Driver | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # type: ignore[import-not-found]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no GPU
        return None
    return Driver(pynvml)


class Driver:
    """The GPUs by NVML.

    Args:
        nvml: The module ``pynvml``, initialised.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._n_xids = nvml, 0
        count = nvml.nvmlDeviceGetCount()
        self._gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._xids = nvml.nvmlEventSetCreate()
        for gpu in self._gpus:
            self._ask(nvml.nvmlDeviceRegisterEvents, gpu, nvml.nvmlEventTypeXidCriticalError,
                      self._xids)  # fmt: skip

    def read(self) -> dict[str, float]:
        """Return the values."""
        nvml = self._nvml
        while self._ask(nvml.nvmlEventSetWait_v2, self._xids, 0) is not None:
            self._n_xids += 1
        errors = [
            self._ask(nvml.nvmlDeviceGetTotalEccErrors, gpu,
                      nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
            for gpu in self._gpus
        ]  # fmt: skip
        reasons = [
            self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) for gpu in self._gpus
        ]
        return {
            "gpu_ecc": float(sum(n or 0 for n in errors)),
            "gpu_slowed": float(sum(any((r or 0) & bit for bit in _SLOWED_FOR) for r in reasons)),
            "gpu_xid": float(self._n_xids),
        }

    def _ask(self, function: Any, *arguments: Any) -> Any:
        """Call NVML; None where the GPU does not support it (or, of events, has none)."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None
