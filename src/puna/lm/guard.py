"""The fp16 guard: float16 ends at 65504, and a model trained in bfloat16 may need more.

Two checks, one pass over the weights:

- static: every value of every tensor survives the conversion (no overflow to infinity, no mass
  underflow);
- dynamic: a sample runs through the model in float32 and no activation leaves the range. In
  transformers issue 27179 all weights are small, yet in one layer silu(w1 x) = 255.9 meets
  w3 x = 261.75; their product 66,979 becomes infinity, and every logit NaN a layer later.

A sample can show that a model overflows; that it never does, no sample can prove. The report
therefore also states the headroom: the limit by the largest activation seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from puna.lm.guard_probe import Probe
from puna.lm.guard_report import (
    FP16_MAX,
    FP16_ROUNDS_TO_NORMAL,
    FP16_ROUNDS_TO_ZERO,
    GuardReport,
    WeightRange,
)
from puna.lm.guard_sample import random_rows, text_rows
from puna.model.config import LlamaConfig
from puna.model.formats.checkpoint import Checkpoint, open_checkpoint
from puna.model.llama import Block, Llama, RMSNorm
from puna.model.names import EMBEDDING, HEAD, NORM, layer_shapes

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

_CHUNK_VALUES = 1 << 15  # inside the cache, and small enough for torch not to wake other threads


def check_fp16(
    source: Checkpoint | Path | str | Llama,
    *,
    tokenizer: Tokenizer | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    activations: bool = True,
) -> GuardReport:
    """Check whether a model may become float16.

    The weights are read once, block by block; memory is one block in float32 and the sample's
    states.

    Args:
        source: A checkpoint of any format, its path, or a model in memory (left as it is).
        tokenizer: Of the model; makes the sample from text.
        ids: The sample itself, one row per sequence; instead of the built-in text. Without ids and
            tokenizer the sample is pseudo-random, the same every time.
        activations: Also run the sample.

    Raises:
        PunaError: The path holds no checkpoint, or the checkpoint is damaged.
        ValueError: A row of ``ids`` is empty, longer than the context, or holds an id that the
            model does not have.
    """
    if isinstance(source, str | Path):
        source = open_checkpoint(source)
    model = _InMemory(source) if isinstance(source, Llama) else _OnDisk(source)
    kind, rows = _sample(model, tokenizer, ids) if activations else ("none", [])
    weights: list[WeightRange] = []
    with torch.inference_mode():
        probe = _run(model, rows, weights)
    return GuardReport(
        model.what, weights, list(probe.peaks.values()) if probe else [], kind, len(rows),
        sum(map(len, rows)),
    )  # fmt: skip


def weight_range(name: str, tensor: Float[Tensor, "*shape"]) -> WeightRange:
    """Look at one tensor as float16 would hold it.

    Args:
        name: For the report.
        tensor: Any float dtype.
    """
    largest, place = 0.0, 0
    n_bad = n_over = n_zeroed = n_small = 0
    error, norm = 0.0, 0.0
    flat = tensor.detach().reshape(-1)
    for index, chunk in enumerate(flat.split(_CHUNK_VALUES)):
        wide = chunk.float().cpu()
        magnitude = wide.abs().numpy()  # numpy compares and searches faster than torch on a CPU
        top = int(magnitude.argmax())  # a NaN counts as the largest
        value = float(wide[top])
        if math.isfinite(largest) and not abs(value) <= abs(largest):
            largest, place = value, index * _CHUNK_VALUES + top
        if not math.isfinite(value):
            magnitude = magnitude[np.isfinite(magnitude)]
            n_bad += wide.numel() - len(magnitude)
        if not abs(value) <= FP16_MAX:
            n_over += int(np.count_nonzero(magnitude > FP16_MAX))
        n_small += int(np.count_nonzero(magnitude < FP16_ROUNDS_TO_NORMAL))
        n_zeroed += int(np.count_nonzero(magnitude <= FP16_ROUNDS_TO_ZERO))
        n_zeroed -= int(np.count_nonzero(magnitude == 0))
        n_small -= int(np.count_nonzero(magnitude == 0))
        if not (n_over or n_bad):
            error += float(torch.linalg.vector_norm(wide.half().float() - wide)) ** 2
            norm += float(torch.linalg.vector_norm(wide)) ** 2
    relative = math.sqrt(error / norm) if norm and not (n_over or n_bad) else 0.0
    at = tuple(int(i) for i in np.unravel_index(place, tensor.shape))
    return WeightRange(
        name, flat.numel(), largest, at, n_bad, n_over, n_zeroed, n_small - n_zeroed, relative
    )


class _InMemory:
    """A model, seen as the parts that the guard walks through."""

    def __init__(self, model: Llama) -> None:
        self.config = model.config
        self.what = "the model"
        self.bos_id: int | None = None
        self._parameters = {name: value.detach() for name, value in model.named_parameters()}

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._parameters[name]


class _OnDisk:
    """A checkpoint, seen as the parts that the guard walks through."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.what = str(checkpoint.path)
        self.bos_id = checkpoint.special_ids.bos_id
        self._checkpoint = checkpoint

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        return self._checkpoint.tensors(names)


def _run(
    model: _InMemory | _OnDisk, rows: list[list[int]], weights: list[WeightRange]
) -> Probe | None:
    """Check every tensor and, when there are rows, run them; one block is in memory at a time."""

    def checked(*names: str) -> dict[str, Tensor]:
        found = {}
        for name, tensor in model.tensors(names):
            weights.append(weight_range(name, tensor))
            found[name] = tensor.float() if rows and name not in (EMBEDDING, HEAD) else tensor
        return found

    config = model.config
    embedding = checked(EMBEDDING)[EMBEDDING]
    probe = Probe(config, rows, embedding) if rows else None
    del embedding
    for layer in range(config.n_layers):
        block = checked(*(f"layers.{layer}.{name}" for name in layer_shapes(config)))
        if probe is not None:
            probe.run_block(layer, _block(config, layer, block))
        del block  # before the next one is read
    norm = checked(NORM)[NORM]
    head = None if config.tie_embeddings else checked(HEAD)[HEAD]
    if probe is not None:
        if head is None:
            head = next(tensor for _, tensor in model.tensors([EMBEDDING]))
        last = RMSNorm(config.dim, config.norm_eps)
        last.load_state_dict({"weight": norm}, assign=True)
        probe.finish(last, head)
    return probe


def _block(config: LlamaConfig, layer: int, tensors: dict[str, Tensor]) -> Block:
    with torch.device("meta"):
        block = Block(config, layer)
    prefix = f"layers.{layer}."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    block.load_state_dict(state, assign=True)
    return block


def _sample(
    model: _InMemory | _OnDisk, tokenizer: Tokenizer | None, ids: Sequence[Sequence[int]] | None
) -> tuple[str, list[list[int]]]:
    config = model.config
    if ids is not None:
        rows = [list(row) for row in ids]
        for row in rows:
            if not 0 < len(row) <= config.max_seq_len:
                raise ValueError(f"a row of {len(row)} ids; the context is {config.max_seq_len}")
            if not 0 <= min(row) <= max(row) < config.vocab_size:
                raise ValueError(f"a row with ids outside 0..{config.vocab_size - 1}")
        return "given", rows
    bos_id = model.bos_id if tokenizer is None else tokenizer.bos_id
    rows = random_rows(config.vocab_size, config.max_seq_len, bos_id)
    if tokenizer is None:
        return "random", rows
    return "text", text_rows(tokenizer, config.max_seq_len, config.vocab_size) + rows
