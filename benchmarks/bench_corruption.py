"""Which checkpoints notice that they were damaged: ours, torch.save, safetensors, DCP.

    python benchmarks/bench_corruption.py [--trials 200]

A state of 8 float32 tensors is saved in each format. Every trial damages a copy (one random bit
flipped; 4 KiB zeroed; cut at a random length; a file, or a tensor where there is one file, swapped
with that of another step) and loads it. "Silent" is a load without an error whose values are not
those that were saved; damage that no value shows is harmless and counts as neither.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.train.checkpoint import dcp
from puna.train.checkpoint.manifest import MANIFEST_FILE, DamagedCheckpointError, seal, verify

State = dict[str, Tensor]
BLOCK_BYTES = 4096


def make_state(seed: int) -> State:
    """Eight matrices."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(256, 256, generator=generator) for i in range(8)}


def save_ours(folder: Path, state: State) -> None:
    """As training saves."""
    dcp.write(folder, state, no_dist=True)
    seal(folder, step=1, world=1, identity="benchmark", dtype="float32")


def load_ours(folder: Path) -> State:
    """As training loads."""
    verify(folder)
    state = {name: torch.empty_like(value) for name, value in make_state(0).items()}
    dcp.read(folder, state, no_dist=True)
    return state


def load_dcp(folder: Path) -> State:
    """DCP's own format."""
    state = {name: torch.empty_like(value) for name, value in make_state(0).items()}
    torch_dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


FORMATS: dict[str, tuple[Callable[[Path, State], object], Callable[[Path], State]]] = {
    "puna": (save_ours, load_ours),
    "torch.save": (
        lambda folder, state: torch.save(state, folder / "state.pt"),
        lambda folder: torch.load(folder / "state.pt", weights_only=True),
    ),
    "safetensors": (
        lambda folder, state: save_file(state, folder / "state.safetensors"),
        lambda folder: load_file(folder / "state.safetensors"),
    ),
    "DCP": (
        lambda folder, state: torch_dcp.save(state, checkpoint_id=folder, no_dist=True),
        load_dcp,
    ),
}


def payload(folder: Path, rng: random.Random) -> Path:
    """A file that holds tensors."""
    files = sorted(p for p in folder.iterdir() if p.name not in (MANIFEST_FILE, ".metadata"))
    return rng.choice(files)


def flip(folder: Path, other: Path, rng: random.Random) -> None:
    """Flip one bit."""
    path = payload(folder, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero(folder: Path, other: Path, rng: random.Random) -> None:
    """Zero a block."""
    path = payload(folder, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) - BLOCK_BYTES)
    data[start : start + BLOCK_BYTES] = bytes(BLOCK_BYTES)
    path.write_bytes(data)


def cut(folder: Path, other: Path, rng: random.Random) -> None:
    """Cut the file."""
    path = payload(folder, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def swap(folder: Path, other: Path, rng: random.Random) -> None:
    """Take a file of another step."""
    path = payload(folder, rng)
    shutil.copyfile(other / path.name, path)


DAMAGES = {"bit flip": flip, "4 KiB zeroed": zero, "truncated": cut, "swapped": swap}


def trial(name: str, damage: Callable, saved: tuple[Path, Path], rng: random.Random) -> str:
    """Damage a copy and load it; return what came of it."""
    _, load = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(saved[0], copy)
        damage(copy, saved[1], rng)
        try:
            found = load(copy)
        except DamagedCheckpointError:
            return "detected"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "detected"
    state = make_state(0)
    same = all(torch.equal(found.get(key, torch.empty(0)), state[key]) for key in state)
    return "harmless" if same else "silent"


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    missed = 0
    print(f"{options.trials} trials each: detected / silently wrong / harmless")
    print(f"{'':14s}" + "".join(f"{damage:>18s}" for damage in DAMAGES))
    for name, (save, _) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "saved", Path(folder) / "other"
            for number, place in enumerate(saved):
                place.mkdir()
                save(place, make_state(number))
            cells = []
            for damage in DAMAGES.values():
                rng = random.Random(f"{name} {damage.__name__}")
                counts = Counter(trial(name, damage, saved, rng) for _ in range(options.trials))
                cells.append(f"{counts['detected']} / {counts['silent']} / {counts['harmless']}")
                if name == "puna":
                    missed += options.trials - counts["detected"]
        print(f"{name:14s}" + "".join(f"{cell:>18s}" for cell in cells))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
