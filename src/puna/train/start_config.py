"""What a training starts from and where its tokens come from; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from puna.core.config import Config
from puna.core.units import GIB
from puna.tokens.remote import Cache
from puna.train.store_options import StoreOptions


class InitConfig(Config):
    """A checkpoint to go on from; `init = "folder"` is short for `init.path`."""

    path: str
    """A Hugging Face or Meta folder, or a .gguf file."""
    rope_factor: float | None = Field(default=None, ge=1.0)
    """Factor of a Meta folder whose params.json says only that RoPE is scaled: 8 for Llama 3.1 and
    3.3, 32 for Llama 3.2 1B and 3B."""
    untrained: Literal["keep", "fill"] = "keep"
    """Rows of special tokens that nobody trained (all zero, or equal to another's): leave them, or
    give them the mean of the other rows and a little noise, as rows of new tokens get it."""


class ContextConfig(Config):
    """A longer context than the checkpoint was trained with."""

    max_seq_len: int = Field(ge=2)
    """The new context in tokens."""
    method: Literal["llama3", "linear", "theta"] = "llama3"
    """How RoPE is stretched: `llama3` divides long wavelengths only (Llama 3.1), `linear` all
    positions (position interpolation, Chen et al. 2023), `theta` raises the base (Xiong et al.
    2023)."""
    factor: float | None = Field(default=None, gt=1.0)
    """By how much; None means new context / old context. Llama 3.1 took 8 from 8K to 128K."""
    rope_theta: float | None = Field(default=None, gt=1.0)
    """New base for `theta`; None means old base * factor ** (d / (d - 2)) with d the width of a
    head, which slows the slowest rotation by just the factor."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """For `llama3`: wavelengths above old context / this are divided by the factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """For `llama3`: wavelengths below old context / this are kept."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.rope_theta is not None and self.method != "theta":
            raise ValueError(f'rope_theta={self.rope_theta} is for method = "theta" only')
        return self


class CacheConfig(Config):
    """Where shards from a store are kept on this machine."""

    folder: str = ""
    """The folder; several runs and all ranks of a machine may share it. Empty means
    `$XDG_CACHE_HOME/puna/shards`, or `~/.cache/puna/shards`."""
    max_gib: float = Field(default=100.0, gt=0)
    """Size of all chunks together; those that were not used for longest go."""
    storage_options: StoreOptions = Field(default_factory=dict)
    """Options for the store (fsspec), such as `anon` or `endpoint_url`; never secrets, which belong
    into the environment or the store's own files."""

    def open(self) -> Cache:
        """Return the cache."""
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(self.folder or f"{home}/puna/shards").expanduser().absolute()
        return Cache(folder, int(self.max_gib * GIB), dict(self.storage_options))
