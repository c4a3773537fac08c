"""Puna: from raw documents to a Llama that answers, with every token, hour and byte accounted for.

Read the packages in the order of the story: ``core``, ``data``, ``tokens``, ``model``, ``lm``,
``train``, ``resilience``, ``post``, ``eval``, ``serve``, ``ui``, ``cli``. From Python, :func:`load`
and :func:`load_tokenizer` are the way in; importing puna imports neither torch nor anything else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from puna.core.version import VERSION as __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from puna.lm.language_model import LanguageModel
    from puna.lm.load import DType
    from puna.model.device import Device
    from puna.tokens.tokenizer import Tokenizer

# Read when torch is loaded: how long its waiting threads spin before they sleep. Long spinning
# takes the cores from others as soon as anything else runs, and every operation then takes ten
# times as long; none at all makes forwards of a hundred tokens a third slower. The count is for
# GNU's OpenMP.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["__version__", "load", "load_tokenizer"]


def load(
    path_or_preset: str | Path,
    dtype: DType | torch.dtype | None = None,
    device: Device = "auto",
    quantize: Literal["int8"] | None = None,
    rope_factor: float | None = None,
) -> LanguageModel:
    """Load a language model; see :func:`puna.lm.load.load`.

    Args:
        path_or_preset: A Hugging Face or Meta folder, a ``.gguf`` file, a run, or a preset.
        dtype: Of weights and activations; float32 on a CPU and as stored on a GPU when None.
        device: ``auto`` takes a GPU when there is one.
        quantize: ``int8`` stores the matrices in 8 bit (CPU only).
        rope_factor: Context extension of a Meta folder that does not name it.

    Raises:
        PunaError: There is no such model, or it is damaged or not possible here.
    """
    from puna.lm.load import load as load_language_model

    return load_language_model(path_or_preset, dtype, device, quantize, rope_factor)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer; see :func:`puna.tokens.tokenizer.load_tokenizer`.

    Args:
        path: A model folder, a tokenizer's file, or a ``.gguf`` file.

    Raises:
        PunaError: There is none, or it is damaged.
    """
    from pathlib import Path

    from puna.tokens.tokenizer import load_tokenizer as load_from

    return load_from(Path(path))
