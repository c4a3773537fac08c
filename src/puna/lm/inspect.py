"""What a model is and what it costs, before a single weight is loaded; imports no torch.

Only headers are read (and the embedding rows of special tokens), so the answer takes less than a
second for a checkpoint of any size. ``deep=True`` reads every weight as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.lm.inspect_family import Family, family_of
from puna.lm.inspect_stored import SpecialRows, Stored, look_at_rows, summarise
from puna.lm.inspect_tokenizer import TokenizerMatch, has_tokenizer, match_tokenizer
from puna.lm.load import find_model, is_preset
from puna.model.accounting import Accounting, account, dtype_bytes
from puna.model.config import PRESETS, LlamaConfig
from puna.model.formats.checkpoint import Checkpoint, open_checkpoint
from puna.model.formats.hf_config import CONFIG_FILE, read_hf_config
from puna.model.names import parameter_shapes

PRESET_DTYPE = "bfloat16"
"""Type of a preset's weights when none is asked for: Meta's."""
CHUNK_TOKENS = 512
"""Prompts are computed in chunks of this many tokens, whatever their length."""
_MAX_ROWS = 4096  # special tokens looked at; the largest tokenizers have about a thousand
_16_BIT = 2


@dataclass(frozen=True)
class Plan:
    """Bytes that running a model needs.

    Attributes:
        dtype: Of the weights.
        cache_dtype: Of keys, values and activations: as the weights, bfloat16 when those are
            smaller than 16 bit.
        batch: Sequences at once.
        context: Tokens of each.
        weights: Bytes of the weights; of int8, with a scale per row and norms in ``cache_dtype``.
        cache: Bytes of the KV cache when every sequence is full.
        workspace: Estimate of the activations of one step.
        available: Memory of this machine that is free now; None when unknown.
    """

    dtype: str
    cache_dtype: str
    batch: int
    context: int
    weights: int
    cache: int
    workspace: int
    available: int | None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.workspace

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "batch": self.batch,
            "context": self.context,
            "weight_bytes": self.weights,
            "kv_cache_bytes": self.cache,
            "workspace_bytes": self.workspace,
            "total_bytes": self.total,
            "available_bytes": self.available,
        }


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found out.

    Attributes:
        name: As it was asked for.
        kind: ``preset``, ``config`` (a folder without weights), ``hf``, ``meta`` or ``gguf``.
        path: The checkpoint; None for a preset.
        cost: The configuration and its exact accounting.
        family: By the configuration's numbers.
        plan: Bytes that running it needs.
        stored: Its files; None without weights.
        tokenizer: Held against the model; None when there is none.
        special_rows: Untrained rows of special tokens; None when there is nothing to read.
        notes: What is unusual, one sentence each.
        problems: What is wrong, one sentence each.
        deep: What reading every weight showed; None when that was not asked for.
    """

    name: str
    kind: str
    path: Path | None
    cost: Accounting
    family: Family
    plan: Plan
    stored: Stored | None = None
    tokenizer: TokenizerMatch | None = None
    special_rows: SpecialRows | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    deep: dict[str, Any] | None = None

    @property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return self.cost.config

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; docs/howto/inspect-and-convert.md explains each key."""
        width = dtype_bytes(self.plan.dtype)
        parts: dict[str, dict[str, int]] = {
            name: {"params": n, "bytes": n * width} for name, n in self.cost.parts.items()
        }
        if self.stored is not None:
            for name, n_bytes in self.stored.parts.items():
                parts[name]["stored_bytes"] = n_bytes
        c = self.config
        return {
            "name": self.name,
            "kind": self.kind,
            "path": None if self.path is None else str(self.path),
            "family": self.family.name,
            "preset": self.family.preset,
            "params": self.cost.n_params,
            "dtype": self.plan.dtype,
            "weight_bytes": self.plan.weights,
            "kv_bytes_per_token": self.cost.kv_bytes_per_token(self.plan.cache_dtype),
            "parts": parts,
            "stored": None if self.stored is None else self.stored.to_json(),
            "context": c.max_seq_len,
            "rope": {
                "theta": c.rope_theta,
                "scaling": None if c.rope_scaling is None else c.rope_scaling.model_dump(),
            },
            "config": c.model_dump(),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_json(),
            "special_rows": None if self.special_rows is None else self.special_rows.to_json(),
            "plan": self.plan.to_json(),
            "notes": self.notes,
            "problems": self.problems,
            "deep": self.deep,
        }


def inspect_model(
    name_or_path: str | Path,
    *,
    batch: int = 1,
    context: int | None = None,
    dtype: str | None = None,
    rope_factor: float | None = None,
    deep: bool = False,
) -> Inspection:
    """Tell what a model is and what running it costs.

    Args:
        name_or_path: A preset, a Hugging Face or Meta folder, a ``.gguf`` file, a run or one of its
            stages.
        batch: Sequences of the byte plan.
        context: Tokens of each; the model's full context when None.
        dtype: Of the weights of the byte plan; as stored when None, float32 when that is
            quantised, bfloat16 for a preset.
        rope_factor: For a Meta folder whose ``params.json`` only says that RoPE is scaled.
        deep: Also read every weight: values that are not finite, fitness for float16, layout.

    Raises:
        PunaError: There is no such model, it is damaged, the dtype is unknown, or the context is
            longer than the model's.
    """
    opened = open_model(name_or_path, rope_factor)
    checkpoint, config = opened.checkpoint, opened.config
    cost = account(config)
    chosen = dtype or (PRESET_DTYPE if opened.stored is None else opened.stored.load_dtype)
    plan = plan_bytes(cost, chosen, batch, context)
    notes, problems = list(opened.notes), []
    match, rows, looked = None, None, None
    if checkpoint is not None:
        match, rows = _look_at_tokens(checkpoint, notes, problems)
        if deep:
            from puna.lm.inspect_deep import look_deep

            looked = look_deep(checkpoint, match)
            problems += looked["problems"]
    return Inspection(
        str(name_or_path), opened.kind, opened.path, cost, family_of(config), plan, opened.stored,
        match, rows, notes, problems, looked,
    )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A model whose headers were read.

    Attributes:
        kind: As in :class:`Inspection`.
        path: The checkpoint; None for a preset.
        config: The model.
        checkpoint: None for a preset, and for a folder without weights.
        stored: Its files.
        notes: What is unusual.
    """

    kind: str
    path: Path | None
    config: LlamaConfig
    checkpoint: Checkpoint | None = None
    stored: Stored | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what the files are as JSON values."""
        return {
            "kind": self.kind,
            "path": None if self.path is None else str(self.path),
            "stored": None if self.stored is None else self.stored.to_json(),
        }


def open_model(name_or_path: str | Path, rope_factor: float | None = None) -> Opened:
    """Find a model by name or path and read its headers.

    Args:
        name_or_path: As for :func:`inspect_model`.
        rope_factor: As for :func:`inspect_model`.

    Raises:
        PunaError: There is no such model, or it is damaged.
    """
    name = str(name_or_path)
    if is_preset(name):
        if rope_factor is not None:
            raise PunaError(
                f"--rope-factor is given, but the preset {name} says itself how RoPE is scaled",
                "leave it out; it is for Meta folders, whose params.json lacks the factor",
            )
        return Opened("preset", None, PRESETS.get(name))
    if _looks_like_a_name(name):
        PRESETS.get(name)  # raises, and proposes the nearest
    path = find_model(name)
    if _has_no_weights(path):
        note = f"there are no weights in this folder, only {CONFIG_FILE}"
        return Opened("config", path, read_hf_config(path), notes=(note,))
    checkpoint = open_checkpoint(path, rope_factor=rope_factor)
    stored = summarise(checkpoint.stored)
    return Opened(
        checkpoint.kind, checkpoint.path, checkpoint.config, checkpoint, stored,
        tuple(checkpoint.notes),
    )  # fmt: skip


def plan_bytes(cost: Accounting, dtype: str, batch: int = 1, context: int | None = None) -> Plan:
    """Count the bytes that running a model needs.

    Args:
        cost: Of the model.
        dtype: Of the weights.
        batch: Sequences at once.
        context: Tokens of each; the model's full context when None.

    Raises:
        PunaError: Unknown dtype, or the context is longer than the model's.
    """
    longest = cost.config.max_seq_len
    if context is not None and context > longest:
        raise PunaError(
            f"a context of {context:,} tokens, the model was made for {longest:,}",
            f"give at most --context {longest}",
        )
    length = longest if context is None else context
    cache_dtype = dtype if dtype_bytes(dtype) >= _16_BIT else PRESET_DTYPE
    return Plan(
        dtype, cache_dtype, batch, length,
        _weight_bytes(cost, dtype, cache_dtype),
        batch * cost.kv_bytes(length, cache_dtype),
        cost.workspace_bytes(min(batch * length, CHUNK_TOKENS), batch, cache_dtype),
        _available_bytes(),
    )  # fmt: skip


def _weight_bytes(cost: Accounting, dtype: str, norm_dtype: str) -> int:
    if dtype != "int8":
        return cost.n_bytes(dtype)
    # As puna.lm.quant holds them: a float32 scale for every row of a matrix, norms not quantised.
    matrices = [shape for shape in parameter_shapes(cost.config).values() if len(shape) > 1]
    scales = sum(dtype_bytes("float32") * rows for rows, _ in matrices)
    return sum(map(math.prod, matrices)) + scales + cost.parts.norms * dtype_bytes(norm_dtype)


def _looks_like_a_name(name: str) -> bool:
    path = Path(name)
    return not path.exists() and not (Path("runs") / path).is_dir() and (
        len(path.parts) == 1 and path.suffix not in (".gguf", ".safetensors", ".pth")
    )  # fmt: skip


def _has_no_weights(path: Path) -> bool:
    return (
        path.is_dir()
        and (path / CONFIG_FILE).is_file()
        and not any(path.glob("*.safetensors*"))
        and not any(path.glob("pytorch_model*.bin"))
    )


def _look_at_tokens(
    checkpoint: Checkpoint, notes: list[str], problems: list[str]
) -> tuple[TokenizerMatch | None, SpecialRows | None]:
    rows = checkpoint.config.vocab_size
    ids = checkpoint.special_ids
    special = {*ids.eos_ids, *(i for i in (ids.bos_id, ids.pad_id) if i is not None)}
    match = None
    if has_tokenizer(checkpoint.path):
        try:
            match = match_tokenizer(checkpoint.path, rows, ids)
        except PunaError as error:  # the model itself may still be sound
            problems.append(f"the tokenizer cannot be read: {error.message}")
        else:
            special |= set(match.outline.special.values())
            problems += match.problems
    else:
        notes.append("there is no tokenizer beside the weights")
    inside = sorted(id_ for id_ in special if id_ < rows)[:_MAX_ROWS]
    return match, look_at_rows(checkpoint, inside) if inside else None


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    free = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else int(free) * 1024
