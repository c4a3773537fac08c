"""Burn-in of a node in quarantine: tests with known answers, in a process of their own.

``python -m puna.resilience.burn_in PARENT_PID SECONDS DEVICE`` prints the failed tests as JSON.
torch is imported by that process only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from puna.core.pool import die_with_parent


class BurnIn:
    """A burn-in that runs beside the training.

    Args:
        seconds: How long.
        device: ``auto`` (all GPUs, else the processor), ``auto:N`` (GPU N, else the processor) or
            ``cpu``.
    """

    def __init__(self, seconds: float, device: str = "auto") -> None:
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(seconds), device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def failed(self) -> list[str] | None:
        """Names of the tests that failed; None while they run."""
        code = self._process.poll()
        if code is None:
            return None
        text = self._process.stdout.read() if self._process.stdout is not None else b""
        # A machine that cannot even run the tests has not passed them.
        return json.loads(text) if code == 0 else [f"the tests ended with exit code {code}"]

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def main(argv: list[str]) -> None:
    """Run the tests on each device in turn."""
    die_with_parent(int(argv[0]))
    import torch

    from puna.resilience.sdc.known import run_known

    seconds, device = float(argv[1]), argv[2]
    kind, _, number = device.partition(":")
    n_gpus = torch.cuda.device_count() if kind == "auto" else 0
    devices = [f"cuda:{i}" for i in range(n_gpus) if number in ("", str(i))] or ["cpu"]
    failed = [
        name if one == "cpu" else f"{name} ({one})"
        for one in devices
        for name in run_known(one, seconds=seconds / len(devices))
    ]
    print(json.dumps(failed))  # noqa: T201 (what the parent reads)


if __name__ == "__main__":
    main(sys.argv[1:])
