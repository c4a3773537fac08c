"""Finding and loading a language model, its weights and its tokenizer; imports torch only then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.core.artifact import ARTIFACT_FILE
from puna.core.errors import PunaError
from puna.core.units import format_bytes
from puna.model.accounting import account
from puna.model.config import PRESETS, LlamaConfig
from puna.model.device import Device, pick_device
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from puna.lm.language_model import LanguageModel
    from puna.model.formats.checkpoint import Checkpoint

MODEL_DIR = "model"
"""Folder of a stage that holds the model it leaves."""
NEWEST_FIRST = ("post.sft", "train.pretrain")
"""Stages that leave a model, the one to prefer first."""
_CONFIG_FILES = ("config.json", "params.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")


def find_model(where: str | Path, runs_dir: Path = Path("runs")) -> Path:
    """Return the checkpoint that a path or the name of a run means.

    Args:
        where: A model folder (Hugging Face or Meta layout, or one with a ``.gguf`` file), a
            ``.gguf`` file, a finished stage's folder, a run's folder (its fine-tuned model, else
            its pretrained one), or the name of a run in ``runs_dir``.
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
            "give a model folder, a .gguf file, or a run such as runs/demo (made by `puna run`)",
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise PunaError(
            f"{path} is a file, but no .gguf file", f"give the folder that holds {_CONFIG_FILES[0]}"
        )
    candidates = [path, path / MODEL_DIR]
    candidates += [
        path / stage / MODEL_DIR
        for stage in NEWEST_FIRST
        if (path / stage / ARTIFACT_FILE).is_file()
    ]
    for folder in candidates:
        if any((folder / name).is_file() for name in _CONFIG_FILES):
            return folder
    if len(list(path.glob("*.gguf"))) == 1:
        return path
    raise PunaError(
        f"{path} holds no model: neither {' nor '.join(_CONFIG_FILES)}, nor one .gguf file, nor "
        f"{MODEL_DIR}/{_CONFIG_FILES[0]}, nor a finished stage {' or '.join(NEWEST_FIRST)}",
        "give a model folder, or finish the run (`puna run RECIPE`)",
    )


def load(
    path_or_preset: str | Path,
    dtype: DType | torch.dtype | None = None,
    device: Device = "auto",
    quantize: Literal["int8"] | None = None,
    rope_factor: float | None = None,
) -> LanguageModel:
    """Load a language model, ready to generate.

    Args:
        path_or_preset: Whatever :func:`find_model` takes; or, when there is no such path or run,
            the name of a preset (``puna model list``): random weights of seed 0, no tokenizer.
        dtype: Of weights and activations. None: float32 on a CPU, as stored on a GPU (float32 for
            quantised files and presets). float16 is checked first, see :mod:`puna.lm.guard`.
        device: ``auto`` takes a GPU when there is one.
        quantize: ``int8`` stores the matrices in 8 bit, one scale per output row (CPU only).
        rope_factor: Context extension of a Meta folder whose ``params.json`` only says that RoPE is
            scaled: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2 1B and 3B.

    Raises:
        PunaError: There is no such model, a file is missing or damaged, model and tokenizer do not
            fit each other, the device or dtype is not possible here, or the model would overflow
            float16.
    """
    import torch

    from puna.lm.language_model import LanguageModel
    from puna.model.formats.load import load_model
    from puna.model.llama import Llama

    target = pick_device(device)
    kind = _torch_dtype(dtype, target)
    if is_preset(path_or_preset):
        config = PRESETS.get(str(path_or_preset))
        _check_memory(str(path_or_preset), config, kind, target)
        model = Llama(config, device=target, dtype=kind)
        return _finish(LanguageModel(model), quantize)
    checkpoint = _open(find_model(path_or_preset), rope_factor)
    tokenizer = _tokenizer_beside(checkpoint.path)
    vocab_size = checkpoint.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise PunaError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocabulary only {vocab_size}",
            "put the tokenizer that the model was trained with beside it",
        )
    _check_memory(str(checkpoint.path), checkpoint.config, kind, target)
    if dtype is not None and kind is torch.float16:
        from puna.lm.guard import check_fp16

        check_fp16(checkpoint, tokenizer=tokenizer).raise_if_unsafe()
    model = load_model(checkpoint, dtype=kind, device=target)
    stop_ids = checkpoint.special_ids.eos_ids
    return _finish(LanguageModel(model, tokenizer, checkpoint.path, stop_ids), quantize)


def is_preset(name: str | Path) -> bool:
    """Tell whether a name means a preset: it is one, and there is no such path or run."""
    path = Path(name)
    known = str(name) in PRESETS
    return known and not path.exists() and not (Path("runs") / path).is_dir()


def _torch_dtype(dtype: Any, device: torch.device) -> torch.dtype | None:
    import torch

    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype) and str(dtype).removeprefix("torch.") in DTYPES:
        return dtype
    if dtype not in DTYPES:
        raise PunaError(f"dtype {dtype!r} is not known", f"use one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _check_memory(
    name: str, config: LlamaConfig, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Refuse weights that cannot fit before the system kills the process for trying."""
    from puna.lm.engine.memory import free_bytes

    # As stored: 16 bit or more.
    needed = account(config).n_params * (2 if dtype is None else dtype.itemsize)
    free = free_bytes(device)
    if needed > free:
        raise PunaError(
            f"the weights of {name} need {format_bytes(needed)} on {device}, "
            f"{format_bytes(free)} are free",
            "choose a smaller dtype or model; `puna model inspect` shows the bytes of each",
        )


def _open(path: Path, rope_factor: float | None) -> Checkpoint:
    from puna.model.formats.checkpoint import open_checkpoint

    if rope_factor is None:
        return open_checkpoint(path)
    if not (path / "params.json").is_file() or (path / "config.json").is_file():
        raise PunaError(
            f"rope_factor is given, but {path} says itself how RoPE is scaled",
            "leave it out; it is for Meta folders, whose params.json lacks the factor",
        )
    from puna.model.formats.meta import MetaCheckpoint

    return MetaCheckpoint(path, rope_factor=rope_factor)


def _tokenizer_beside(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint; None when it has none, which only text needs."""
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return load_tokenizer(path)


def _finish(language_model: LanguageModel, quantize: Literal["int8"] | None) -> LanguageModel:
    model = language_model.model.eval()
    if quantize is not None:
        if quantize != "int8":
            raise PunaError(f"quantize {quantize!r} is not known", "use 'int8'")
        if model.norm.weight.device.type != "cpu":
            raise PunaError(
                "quantize is for decoding on a CPU", 'leave it out, or set device="cpu"'
            )
        from puna.lm.quant import quantize_int8

        quantize_int8(model)
    return language_model
