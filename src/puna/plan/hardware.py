"""What a GPU and its network can do at most: presets, and files of the user's own.

Rates are decimal (TB = 10**12 bytes), memory is binary (GiB), FLOPS are dense (no sparsity). The
values are the vendors' data sheets; what a job really gets is fitted (``puna.plan.constants``).
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from puna.core.config import Config
from puna.core.errors import PunaError
from puna.core.fsio import write_text
from puna.core.registry import Registry
from puna.plan.measured import Measured
from puna.plan.own import OwnRun

Family = Literal["ampere", "hopper", "blackwell", "other"]


class Gpu(Config):
    """One accelerator and the domain it shares a fast network with."""

    name: str
    """What tables call it."""
    family: Family = "other"
    """Which fitted efficiencies it shares; `other` has wider intervals."""
    bf16_tflops: float = Field(gt=0)
    """Dense bf16, 10**12 FLOP/s."""
    fp8_tflops: float = Field(default=0.0, ge=0)
    """Dense fp8; 0: it has none."""
    fp4_tflops: float = Field(default=0.0, ge=0)
    """Dense NVFP4; 0: it has none."""
    fp32_tflops: float = Field(default=0.0, ge=0)
    """Dense float32, of CPUs that have no bf16; 0: not planned with."""
    hbm_tb_s: float = Field(gt=0)
    """Bandwidth of its memory, 10**12 bytes/s."""
    memory_gib: float = Field(gt=0)
    """Memory, GiB."""
    sustained: float = Field(default=1.0, gt=0, le=1)
    """Share of the family's efficiency that a lower power limit leaves: clock rates go with the
    cube root of the power."""
    sms: int = Field(default=132, ge=1)
    """Multiprocessors (compute units)."""
    nvlink_gb_s: float = Field(gt=0)
    """NVLink (or PCIe, Infinity Fabric) per direction, 10**9 bytes/s."""
    domain: int = Field(default=8, ge=1)
    """GPUs that NVLink connects."""
    nic_gb_s: float = Field(default=50.0, gt=0)
    """Network per GPU and direction, 10**9 bytes/s."""
    watts: float = Field(default=700.0, gt=0)
    """Power limit (TDP)."""
    usd_per_hour: float = Field(default=2.5, ge=0)
    """Assumed price of a GPU-hour; give your own."""
    measured: Measured | None = None
    """What `puna plan calibrate --measure` found on a machine of this kind; used instead of the
    fitted efficiencies."""
    runs: list[OwnRun] = Field(default_factory=list)
    """Trainings of your own on this hardware (`puna plan calibrate --run`), which every prediction
    with it is corrected by."""


GPUS: Registry[Gpu] = Registry("GPU")
"""Presets of accelerators by name."""

_SMS = {"ampere": 108, "hopper": 132, "blackwell": 148, "other": 304}


def _preset(
    name: str, family: Family, tflops: tuple[float, float, float], hbm_tb_s: float,
    memory_gib: float, nvlink_gb_s: float, domain: int, nic_gb_s: float, watts: float,
    usd_per_hour: float, sustained: float = 1.0,
) -> None:  # fmt: skip
    bf16, fp8, fp4 = tflops
    GPUS.register(name, Gpu(
        name=name, family=family, bf16_tflops=bf16, fp8_tflops=fp8, fp4_tflops=fp4,
        hbm_tb_s=hbm_tb_s, memory_gib=memory_gib, nvlink_gb_s=nvlink_gb_s, domain=domain,
        nic_gb_s=nic_gb_s, watts=watts, usd_per_hour=usd_per_hour, sms=_SMS[family],
        sustained=sustained,
    ))  # fmt: skip


# name, family, (bf16, fp8, fp4), HBM TB/s, GiB, NVLink GB/s, domain, NIC GB/s, W, USD/h (assumed)
_preset("a100", "ampere", (312, 0, 0), 2.039, 80, 300, 8, 25, 400, 1.5)
_preset("a100-40g", "ampere", (312, 0, 0), 1.555, 40, 300, 8, 25, 400, 1.2)
_preset("h100", "hopper", (989.5, 1979, 0), 3.35, 80, 450, 8, 50, 700, 2.5)
_preset("h100-hbm2e", "hopper", (989.5, 1979, 0), 2.4, 96, 450, 8, 50, 500, 2.2, (5 / 7) ** (1 / 3))
_preset("h100-pcie", "hopper", (756, 1513, 0), 2.0, 80, 64, 8, 50, 350, 2.0)
_preset("h100-nvl", "hopper", (835, 1671, 0), 3.9, 94, 300, 2, 50, 400, 2.2)
_preset("h200", "hopper", (989.5, 1979, 0), 4.8, 141, 450, 8, 50, 700, 3.0)
_preset("b200", "blackwell", (2250, 4500, 9000), 8.0, 180, 900, 8, 50, 1000, 4.5)
_preset("gb200", "blackwell", (2500, 5000, 10000), 8.0, 186, 900, 72, 50, 1200, 5.0)
_preset("gb300", "blackwell", (2500, 5000, 15000), 8.0, 279, 900, 72, 100, 1400, 6.0)
_preset("mi300x", "other", (1307, 2615, 0), 5.3, 192, 448, 8, 50, 750, 2.5)

_ALIASES = {
    "h100sxm": "h100", "h100sxm5": "h100", "a100sxm": "a100", "a10080gb": "a100",
    "a10080g": "a100", "a10040gb": "a100-40g", "h10096gb": "h100-hbm2e",
    "h100500w": "h100-hbm2e", "h200sxm": "h200", "gb200nvl72": "gb200", "gb300nvl72": "gb300",
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Return a preset, or the GPU that a TOML file describes.

    Args:
        name: Of a preset, in any spelling (`H100 SXM`), or the path of a ``.toml`` or ``.json``
            file with the fields of :class:`Gpu`.

    Raises:
        PunaError: Unknown preset, unreadable file, or a wrong field.
    """
    if not name.endswith((".toml", ".json")):
        plain = _plain(name)
        known = {_plain(preset): preset for preset in GPUS} | _ALIASES
        return GPUS.get(known.get(plain, name.lower()))
    try:
        text = Path(name).read_text(encoding="utf-8")
        values = json.loads(text) if name.endswith(".json") else tomllib.loads(text)
        return Gpu.model_validate({"name": Path(name).stem, **values})
    except FileNotFoundError as error:
        raise PunaError(
            f"{name}: no such hardware file", "make one with `puna plan calibrate --measure`"
        ) from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = "JSON" if name.endswith(".json") else "TOML"
        raise PunaError(f"{name}: not {kind}: {error}", "see docs/howto/plan.md") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PunaError(
            f"{name}: {where}: {first['msg']} (got {first.get('input')!r})",
            "see docs/howto/plan.md for the fields of a hardware file",
        ) from error


def preset_in(text: str) -> Gpu | None:
    """Return the preset whose name stands in the name that a driver gives its GPU, if any.

    Args:
        text: ``NVIDIA H100 80GB HBM3``.
    """
    known = {_plain(preset): preset for preset in GPUS}
    found = [name for name in known if name in _plain(text)]
    return GPUS.get(known[max(found, key=len)]) if found else None


def write_gpu(path: Path, gpu: Gpu) -> None:
    """Write a hardware file.

    Args:
        path: Ends in ``.toml`` or ``.json``.
        gpu: What to write.

    Raises:
        PunaError: The name ends otherwise.
    """
    values = gpu.model_dump(mode="json", exclude_none=True)
    if path.suffix == ".json":
        write_text(path, json.dumps(values, indent=1) + "\n")
    elif path.suffix == ".toml":
        import tomli_w

        from puna.core.recipe import toml_values

        write_text(path, tomli_w.dumps(toml_values(values)))
    else:
        raise PunaError(
            f"{path}: a hardware file is TOML or JSON", "end the name with .toml or .json"
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
