"""Embeddings of a transformer encoder: any sentence-transformers or Hugging Face folder on disk.

The folder holds `config.json`, weights as safetensors and `tokenizer.json`; what it holds as code
is not run. Pooling is that of `1_Pooling/config.json` (Reimers & Gurevych 2019, "Sentence-BERT"),
the mean over tokens without it. Uses torch when it is called.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from puna.core.errors import PunaError
from puna.data.semantic.passages import open_tokenizer, unit_rows

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

Pooling = Literal["mean", "cls", "lasttoken"]

_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_MAX_TOKENS = 512
"""Tokens of a passage for a model whose files do not tell how many it was made for."""


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        model: A model of transformers.
        tokenizer: Its tokenizer, without padding and truncation.
        pooling: How the states of the tokens become one vector.
        max_tokens: Longest passage, special tokens included.
        pad: Id that fills up short passages of a batch.
        dim: Width of an embedding.
        n_threads: Threads of torch on a CPU; 0: as many as it likes.
        batch_tokens: Tokens, padding included, of one call.
    """

    model: Any
    tokenizer: Tokenizer
    pooling: Pooling
    max_tokens: int
    pad: int
    dim: int
    n_threads: int = 1
    batch_tokens: int = 8192

    def embed(self, passages: list[list[int]]) -> np.ndarray:
        """Return the embeddings of passages, of unit length: float32 [n, dim].

        Args:
            passages: Token ids with special tokens, as :meth:`Passages.cut` gives them.
        """
        import torch

        out = np.zeros((len(passages), self.dim), np.float32)
        order = sorted(range(len(passages)), key=lambda k: (len(passages[k]), k))
        with _threads(self.n_threads), torch.inference_mode():
            for batch in self._batches(passages, order):
                out[batch] = self.states([passages[k] for k in batch]).float().cpu().numpy()
        return unit_rows(out)

    def _batches(self, passages: list[list[int]], order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for k in order:  # the longest of a batch comes last
            if batch and (len(batch) + 1) * len(passages[k]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(k)
        if batch:
            yield batch

    def states(self, passages: list[list[int]]) -> torch.Tensor:
        """Return pooled states [n, dim] of one batch, with gradients where they are wanted."""
        import torch

        lengths = [len(ids) for ids in passages]
        ids = np.full((len(passages), max(lengths)), self.pad, np.int64)
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids[mask] = np.concatenate([np.asarray(one, np.int64) for one in passages])
        device = self.model.device
        tokens, known = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        states = self.model(input_ids=tokens, attention_mask=known.long()).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "lasttoken":
            return states[torch.arange(len(passages)), torch.tensor(lengths) - 1]
        weights = known[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


@contextlib.contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """Let torch use so many threads: worker processes share the cores already."""
    import torch

    before = torch.get_num_threads()
    if n_threads:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_encoder(folder: Path, device: str = "auto", n_threads: int = 1) -> Encoder:
    """Load an encoder; nothing is downloaded and no code of the folder is run.

    Args:
        folder: The model.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto``: a GPU if there is one.
        n_threads: Threads of torch on a CPU; 0: as many as it likes.

    Raises:
        PunaError: transformers is not installed, or the folder is no encoder that can be used.
    """
    pooling = read_pooling(folder)
    tokenizer = open_tokenizer(folder)
    try:
        import torch
        from transformers import AutoModel
    except ImportError as error:
        raise PunaError(
            f"{folder}: an encoder needs transformers ({error})",
            "install `puna[semantic]`, or use a static embedder (`puna data embedder distil`)",
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        model = model.to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PunaError(
            f"{folder}: transformers cannot load this encoder ({why})",
            "give a folder with config.json and model.safetensors",
        ) from error
    config = model.config
    pad = config.pad_token_id
    return Encoder(
        model, tokenizer, pooling, _longest(folder, config), 0 if pad is None else pad,
        config.hidden_size, n_threads,
    )  # fmt: skip


def _longest(folder: Path, config: Any) -> int:
    """Return the tokens that the model takes, special ones included."""
    own = _read_json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions begin behind the padding id, so two of 514 are never used.
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= (config.pad_token_id or 0) + 1
    return min(own or _MAX_TOKENS, positions or _MAX_TOKENS)


def read_pooling(folder: Path) -> Pooling:
    """Return how the folder's model pools.

    Raises:
        PunaError: It does something that is not known here.
    """
    modules = _read_json(folder / "modules.json", [])
    strange = [one["type"] for one in modules if one["type"].split(".")[-1] not in _KNOWN_MODULES]
    if strange:
        raise PunaError(f"{folder / 'modules.json'}: the module {strange[0]} is not known",
                        f"use a model of {', '.join(_KNOWN_MODULES)}")  # fmt: skip
    path = folder / "1_Pooling" / "config.json"
    named = [one["path"] for one in modules if one["type"].endswith("Pooling")]
    if named:
        path = folder / named[0] / "config.json"
    settings = _read_json(path, {"pooling_mode_mean_tokens": True})
    chosen = [name for name, value in settings.items()
              if name.startswith("pooling_mode_") and value is True]  # fmt: skip
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise PunaError(f"{path}: pooling by {', '.join(chosen) or 'nothing'} is not known",
                        f"use a model with one of {', '.join(_POOLINGS)}")  # fmt: skip
    return _POOLINGS[chosen[0]]


def _read_json(path: Path, absent: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except ValueError as error:
        raise PunaError(f"{path} is damaged ({error})", "copy the model anew") from error
