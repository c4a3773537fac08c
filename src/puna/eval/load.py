"""Finding and loading a model with its tokenizer from a folder; imports torch only when loading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puna.core.artifact import ARTIFACT_FILE
from puna.core.errors import PunaError
from puna.model.formats.hf_config import CONFIG_FILE
from puna.tokens.tokenizer import Tokenizer, load_tokenizer
from puna.train.spec import MODEL_DIR

if TYPE_CHECKING:
    from puna.model.llama import Llama

NEWEST_FIRST = ("post.sft", "train.pretrain")
"""Stages that leave a model, the one to prefer first."""
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and the tokenizer beside it."""

    model: Llama
    tokenizer: Tokenizer
    folder: Path

    @property
    def max_seq_len(self) -> int:
        """Longest context in tokens."""
        return self.model.config.max_seq_len


def find_model(where: str | Path, runs_dir: Path = Path("runs")) -> Path:
    """Return the model folder that a path or the name of a run means.

    Args:
        where: A model folder (Hugging Face layout), a finished stage's folder, a run's folder (its
            fine-tuned model, else its pretrained one), or the name of a run in ``runs_dir``.
        runs_dir: Where runs stand.

    Raises:
        PunaError: There is no such path, or no finished model in it.
    """
    path = Path(where)
    if not path.exists() and len(path.parts) == 1 and (runs_dir / path).is_dir():
        path = runs_dir / path
    if not path.exists():
        raise PunaError(
            f"{path} does not exist",
            "give a model folder, or a run such as runs/demo (made by `puna run`)",
        )
    if not path.is_dir():
        raise PunaError(
            f"{path} is a file, not a folder", f"give the folder that holds {CONFIG_FILE}"
        )
    candidates = [path, path / MODEL_DIR]
    candidates += [
        path / stage / MODEL_DIR
        for stage in NEWEST_FIRST
        if (path / stage / ARTIFACT_FILE).is_file()
    ]
    for folder in candidates:
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise PunaError(
        f"{path} holds no model: neither {CONFIG_FILE}, nor {MODEL_DIR}/{CONFIG_FILE}, nor a "
        f"finished stage {' or '.join(NEWEST_FIRST)}",
        "give a model folder, or finish the run (`puna run RECIPE`)",
    )


def load(folder: Path, device: Device = "auto") -> Loaded:
    """Load the model and the tokenizer of a folder; float32 on a CPU, the file's dtype on a GPU.

    Args:
        folder: From :func:`find_model`.
        device: ``auto`` takes a GPU when there is one.

    Raises:
        PunaError: A file is missing or damaged, model and tokenizer do not fit each other, or
            there is no GPU though one is asked for.
    """
    import torch

    from puna.model.formats.load import load_model

    target = resolve_device(device)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32 if target == "cpu" else None, device=target)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise PunaError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary only "
            f"{model.config.vocab_size}",
            "put the tokenizer that the model was trained with into the folder",
        )
    return Loaded(model.eval(), tokenizer, folder)


def resolve_device(device: Device) -> str:
    """Turn ``auto`` into a device.

    Raises:
        PunaError: There is no GPU though one is asked for.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise PunaError("device is 'cuda', but torch sees no GPU", "use 'auto' or 'cpu'")
    return "cuda" if has_gpu and device != "cpu" else "cpu"
