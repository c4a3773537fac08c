"""Converting a checkpoint of any format into another one, tensor by tensor.

Nothing is half-written, see :mod:`puna.lm.convert_target`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.lm.convert_target import check_space, check_target, publish
from puna.model.config import LinearScaling, LlamaConfig
from puna.model.formats.checkpoint import Checkpoint, SpecialIds, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from puna.lm.guard_report import GuardReport
    from puna.tokens.tokenizer import Tokenizer

Target = Literal["hf", "meta", "gguf"]
PLAIN_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = (*PLAIN_DTYPES, "Q8_0")
GUARD_FILE = "fp16_guard.json"
"""What the fp16 guard found, beside weights that were forced into float16."""
_ITEM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "Q8_0": 34 / 32}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        to: Format of the result.
        dtype: Of the written weights; the stored one when None, as far as it is one and plain, else
            float32, which holds every other exactly.
        n_shards: Of a Meta checkpoint.
        max_shard_bytes: Largest file of a Hugging Face checkpoint.
        rope_factor: For a Meta checkpoint whose ``params.json`` scales RoPE by an unnamed factor.
        overwrite: Replace a checkpoint that stands at the target.
        force: Write float16 though the guard refuses it, with its report beside the weights.
        probe: Refuse weights that show the marks of a wrong conversion.
    """

    to: Target
    dtype: str | None = None
    n_shards: int = 1
    max_shard_bytes: int | None = None
    rope_factor: float | None = None
    overwrite: bool = False
    force: bool = False
    probe: bool = True


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source: The checkpoint that was read.
        out: Where the result stands.
        to: Its format.
        config: The model.
        dtypes: Type -> number of tensors, as they were stored.
        dtype: As they are now.
        bytes_in: Of the weights that were read.
        bytes_out: Of the files of weights that were written.
        lossless: Whether every value is exactly what it was.
        tokenizer: Whether a tokenizer was carried along.
        seconds: Taken.
        notes: What is worth knowing, one sentence each.
    """

    source: Path
    out: Path
    to: Target
    config: LlamaConfig
    dtypes: Counter[str]
    dtype: str
    bytes_in: int
    bytes_out: int
    lossless: bool
    tokenizer: bool
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def n_tensors(self) -> int:
        """Number of parameters that were converted."""
        return sum(self.dtypes.values())


def convert(
    source: Path,
    out: Path,
    options: Options,
    on_start: Callable[[int], None] = lambda _: None,
    on_tensor: Callable[[str, int], None] = lambda *_: None,
) -> Conversion:
    """Convert a checkpoint.

    Args:
        source: A checkpoint of any format.
        out: A folder, or a ``.gguf`` file.
        options: How.
        on_start: Told the bytes to read.
        on_tensor: Told the name and the stored bytes of each tensor that was written.

    Raises:
        PunaError: The source is damaged, its layout is wrong, its tokenizer is another model's, the
            target is in use or on too small a disk, the format cannot hold the model or the type,
            or float16 cannot.
    """
    start_s = time.monotonic()
    checkpoint = open_checkpoint(source, rope_factor=options.rope_factor)
    dtypes = Counter(stored.dtype for stored in checkpoint.stored.values())
    dtype = options.dtype or default_dtype(checkpoint)
    _check_options(out, options, dtype)
    check_target(checkpoint.path, out, overwrite=options.overwrite)
    n_values = sum(stored.n_elements for stored in checkpoint.stored.values())
    check_space(out, int(n_values * _ITEM_BYTES[dtype]))
    notes = list(checkpoint.notes)
    tokenizer = find_tokenizer(checkpoint.path)
    if tokenizer is None:
        notes.append(f"there is no tokenizer beside {checkpoint.path}: none was written")
    elif tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise PunaError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocabulary only {checkpoint.config.vocab_size}",
            "put the tokenizer that the model was trained with beside the weights, or none",
        )
    rounds = _rounds(checkpoint, dtype)
    guard = None
    if rounds and dtype == "float16":
        guard = _guard(checkpoint, tokenizer, options, notes)
    if options.probe:
        from puna.model.formats.probe import refuse_wrong_layout

        refuse_wrong_layout(checkpoint)
    bytes_in = sum(stored.n_bytes for stored in checkpoint.stored.values())
    on_start(bytes_in)
    job = _Job(checkpoint, tokenizer, options, dtype, on_tensor, guard, notes)
    bytes_out = publish(out, job.write_file if options.to == "gguf" else job.write_folder)
    if options.to == "meta" and isinstance(checkpoint.config.rope_scaling, LinearScaling):
        notes.append("Meta's own code does not know linear RoPE scaling and would ignore it")
    return Conversion(
        checkpoint.path, out, options.to, checkpoint.config, dtypes, dtype, bytes_in, bytes_out,
        not rounds, tokenizer is not None, time.monotonic() - start_s, notes,
    )  # fmt: skip


def default_dtype(checkpoint: Checkpoint) -> str:
    """Return the smallest type that holds all values exactly: that of the matrices, or float32.

    GGUF files keep norms in float32 beside matrices in bfloat16; when the norms fit bfloat16 too,
    as those of a model trained in it do, the result is bfloat16.

    Args:
        checkpoint: Opened; of norms in another type than the matrices the values are read.
    """
    kinds = {one.dtype for one in checkpoint.stored.values() if len(one.shape) == 2}
    only = next(iter(kinds)) if len(kinds) == 1 else ""
    return only if only in PLAIN_DTYPES and not _rounds(checkpoint, only) else "float32"


def _rounds(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether any value changes in this type."""
    if dtype == "float32":  # what quantised values are unpacked to, and wider than all others
        return False
    other = [name for name, one in checkpoint.stored.items() if one.dtype != dtype]
    if any(len(checkpoint.stored[name].shape) > 1 for name in other) or dtype not in PLAIN_DTYPES:
        return True  # unpacked Q8_0 need not become the same blocks again
    if not other:
        return False
    import torch

    kind = getattr(torch, dtype)
    return any(
        not bool((tensor.to(kind).to(tensor.dtype) == tensor).all())
        for _, tensor in checkpoint.tensors(other)
    )


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Load the tokenizer that belongs to a checkpoint; None when there is none.

    Args:
        path: The folder or the ``.gguf`` file of the weights.

    Raises:
        PunaError: There is one, and it is damaged.
    """
    from puna.tokens.tokenizer import load_tokenizer

    if path.is_file():
        from puna.core.gguf import read_gguf

        if "tokenizer.ggml.model" not in read_gguf(path, skip_arrays=True).metadata:
            return None
        return load_tokenizer(path)
    places = [path / "tokenizer.json", path / "tokenizer.model"]
    if (path / "params.json").is_file():
        places.append(path.parent / "tokenizer.model")
    return load_tokenizer(path) if any(place.is_file() for place in places) else None


def _check_options(out: Path, options: Options, dtype: str) -> None:
    if dtype not in DTYPES:
        raise PunaError(f"dtype {dtype!r} is not known", f"use one of {', '.join(DTYPES)}")
    if dtype == "Q8_0" and options.to != "gguf":
        raise PunaError(f"{options.to} checkpoints cannot hold Q8_0", "use --to gguf")
    if dtype == "float16" and options.to == "gguf":
        raise PunaError(
            "float16 is not written to GGUF", "use bfloat16, which loses less, or float32 or Q8_0"
        )
    if (options.to == "gguf") != (out.suffix == ".gguf"):
        raise PunaError(
            f"{out} does not fit --to {options.to}",
            "give a name that ends with .gguf for GGUF, and a folder for the other formats",
        )
    for value, name, target in (
        (options.n_shards != 1, "--shards", "meta"),
        (options.max_shard_bytes is not None, "--max-shard-size", "hf"),
    ):
        if value and options.to != target:
            raise PunaError(f"{name} is for --to {target}", f"leave {name} out")


def _guard(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, options: Options, notes: list[str]
) -> GuardReport | None:
    """Check that float16 can hold the model; return the report when it was forced."""
    from puna.lm.guard import check_fp16

    report = check_fp16(checkpoint, tokenizer=tokenizer)
    notes.append(report.summary())
    if report.is_safe:
        return None
    if not options.force:
        report.raise_if_unsafe()
    return report


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    options: Options
    dtype: str
    on_tensor: Callable[[str, int], None]
    guard: GuardReport | None
    notes: list[str]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        from puna.model.formats.load import check_finite

        for name, tensor in self.checkpoint.tensors():
            check_finite(self.checkpoint, name, tensor)
            yield name, tensor
            del tensor  # or it would live on while the next one is made
            self.on_tensor(name, self.checkpoint.stored[name].n_bytes)

    @property
    def special_ids(self) -> SpecialIds:
        """Those of the files, completed by the tokenizer's."""
        ids, tokenizer = self.checkpoint.special_ids, self.tokenizer
        if tokenizer is None:
            return ids
        return SpecialIds(
            tokenizer.bos_id if ids.bos_id is None else ids.bos_id,
            tuple(dict.fromkeys((*ids.eos_ids, *sorted(tokenizer.stop_ids)))),
            tokenizer.pad_id if ids.pad_id is None else ids.pad_id,
        )

    def write_folder(self, folder: Path) -> None:
        """Write a Hugging Face or Meta folder, with the tokenizer."""
        import torch

        from puna.model.formats.hf import save_hf
        from puna.model.formats.meta_save import save_meta

        config, kind = self.checkpoint.config, getattr(torch, self.dtype)
        if self.options.to == "meta":
            if self.tokenizer is not None:
                self._save_meta_tokenizer(self.tokenizer, folder)
            n_shards = self.options.n_shards
            save_meta(folder, config, self.tensors(), n_shards=n_shards, dtype=kind)
        else:
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
            ids = self.special_ids
            save_hf(
                folder, config, self.tensors(), dtype=kind,
                max_shard_bytes=self.options.max_shard_bytes,
                bos_id=ids.bos_id, eos_ids=ids.eos_ids, pad_id=ids.pad_id,
            )  # fmt: skip
        if self.guard is not None:
            write_json(folder / GUARD_FILE, self.guard.to_json())

    def _save_meta_tokenizer(self, tokenizer: Tokenizer, folder: Path) -> None:
        try:
            tokenizer.save_meta(folder)
        except PunaError as error:
            tokenizer.save(folder)
            self.notes.append(f"tokenizer.json instead of Meta's file: {error.message}")

    def write_file(self, path: Path) -> None:
        """Write a GGUF file, with the tokenizer in it."""
        from puna.model.formats.gguf import save_gguf
        from puna.model.formats.gguf_config import special_ids_from_gguf, special_ids_to_gguf

        metadata: dict[str, Any] = {"general.name": self.checkpoint.path.stem}
        if self.tokenizer is not None:
            try:
                metadata.update(self.tokenizer.gguf_metadata())
            except PunaError as error:
                self.notes.append(f"the file holds no tokenizer: {error.message}")
        ids = self.special_ids
        named = special_ids_from_gguf(metadata | special_ids_to_gguf(ids, metadata)).eos_ids
        lost = [str(id_) for id_ in ids.eos_ids if id_ not in named]
        if lost:
            self.notes.append(f"GGUF has no key left for the end tokens {', '.join(lost)}")
        kind: Any = self.dtype  # checked: not float16
        save_gguf(
            path, self.checkpoint.config, self.tensors(), dtype=kind, metadata=metadata,
            special_ids=ids,
        )  # fmt: skip
