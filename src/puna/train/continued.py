"""Continued pretraining: what is taken from a checkpoint and what is changed; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.core.fsio import hash_file, hash_json
from puna.lm.convert import find_tokenizer
from puna.lm.inspect_stored import look_at_rows
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.formats.checkpoint import Checkpoint, open_checkpoint
from puna.train.start_config import ContextConfig, InitConfig

if TYPE_CHECKING:
    from puna.tokens.tokenizer import Tokenizer

_SETTINGS_FILES = ("config.json", "params.json")


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        path: The checkpoint.
        rope_factor: See :class:`puna.train.start_config.InitConfig`.
        digest: Identity of its content, wherever it stands.
        model: The model to train: the checkpoint's, with more rows and a longer context if asked.
        stored_rows: Rows of the embedding in the checkpoint.
        new: Rows of tokens that the checkpoint's tokenizer does not have; some may be stored, as
            padding.
        untrained: Other rows in the checkpoint that are initialised again.
    """

    path: Path
    rope_factor: float | None
    digest: str
    model: LlamaConfig
    stored_rows: int
    new: tuple[int, ...]
    untrained: tuple[int, ...]

    @property
    def rows(self) -> list[int]:
        """Rows that get initial values."""
        return sorted({*self.untrained, *self.new})


def plan_start(
    init: InitConfig, context: ContextConfig | None, tokenizer: Tokenizer, tokenizer_digest: str
) -> Start:
    """Open a checkpoint and decide what of it changes.

    Args:
        init: The checkpoint.
        context: Its new context; None leaves it.
        tokenizer: That of the training.
        tokenizer_digest: Of the tokenizer that made the token shards.

    Raises:
        PunaError: There is no checkpoint, the shards or the checkpoint belong to another tokenizer,
            or the context cannot be stretched so.
    """
    checkpoint = open_checkpoint(Path(init.path).expanduser(), rope_factor=init.rope_factor)
    if tokenizer_digest and tokenizer_digest != tokenizer.digest:
        raise PunaError(
            "the token shards were made by another tokenizer than the one of this training "
            f"(digests {tokenizer_digest[:8]} and {tokenizer.digest[:8]})",
            "give the tokenizer of the shards, or run the stage tokens.encode again",
        )
    n_known = _known_ids(checkpoint, tokenizer)
    stored_rows = checkpoint.config.vocab_size
    model = checkpoint.config.model_copy(
        update={"vocab_size": max(stored_rows, tokenizer.vocab_size)}
    )
    if context is not None:
        model = extend_context(model, context)
    untrained: tuple[int, ...] = ()
    if init.untrained == "fill":
        special = sorted(id_ for id_ in tokenizer.special_set if id_ < min(n_known, stored_rows))
        found = look_at_rows(checkpoint, special) if special else None
        if found is not None:
            untrained = tuple(sorted({*found.zero, *(i for one in found.identical for i in one)}))
    return Start(
        checkpoint.path.resolve(), init.rope_factor, content_digest(checkpoint), model,
        stored_rows, tuple(range(n_known, tokenizer.vocab_size)), untrained,
    )  # fmt: skip


def content_digest(checkpoint: Checkpoint) -> str:
    """Return the identity of a checkpoint's content; reads all of its files."""
    files: dict[str, Path] = {
        file.name: file for stored in checkpoint.stored.values() for file in stored.files
    }
    if checkpoint.path.is_dir():
        files |= {
            name: checkpoint.path / name
            for name in _SETTINGS_FILES
            if (checkpoint.path / name).is_file()
        }
    return hash_json({name: hash_file(path) for name, path in files.items()})


def extend_context(model: LlamaConfig, context: ContextConfig) -> LlamaConfig:
    """Return a model with a longer context.

    A model that is scaled already by the same method keeps the context of its pretraining, and its
    factor grows.

    Raises:
        PunaError: The context is not longer, or the model is scaled by another method.
    """
    old, new = model.max_seq_len, context.max_seq_len
    if new <= old:
        raise PunaError(
            f"context.max_seq_len = {new} is not longer than the checkpoint's {old}",
            "raise it, or remove the section `context`",
        )
    factor, scaling = context.factor or new / old, model.rope_scaling
    kind = None if scaling is None else scaling.kind
    if kind is not None and kind != context.method:
        raise PunaError(
            f"the checkpoint's RoPE is scaled by {kind!r} already, context.method is "
            f"{context.method!r}",
            f"set context.method = {kind!r}",
        )
    changes: dict[str, object] = {"max_seq_len": new}
    if context.method == "theta":
        d = model.head_dim
        if context.rope_theta is None and d <= 2:
            raise PunaError(f"heads of width {d} have one rotation only",
                            "give context.rope_theta")  # fmt: skip
        changes["rope_theta"] = context.rope_theta or model.rope_theta * factor ** (d / (d - 2))
    elif context.method == "linear":
        before = scaling.factor if isinstance(scaling, LinearScaling) else 1.0
        changes["rope_scaling"] = LinearScaling(factor=before * factor)
    elif isinstance(scaling, RopeScaling):
        changes["rope_scaling"] = scaling.model_copy(update={"factor": scaling.factor * factor})
    else:
        changes["rope_scaling"] = RopeScaling(
            factor=factor, low_freq_factor=context.low_freq_factor,
            high_freq_factor=context.high_freq_factor, original_max_seq_len=old,
        )  # fmt: skip
    return LlamaConfig.model_validate({**dict(model), **changes})


def _known_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int:
    """Return how many ids have a row that is theirs; all must mean the same to the checkpoint."""
    own = find_tokenizer(checkpoint.path)
    rows = checkpoint.config.vocab_size
    if own is None:
        if tokenizer.vocab_size > rows:
            raise PunaError(
                f"{checkpoint.path} has {rows} rows and no tokenizer; the one of this training has "
                f"{tokenizer.vocab_size} ids, and whether the first {rows} of them are the "
                "checkpoint's cannot be told",
                "put the tokenizer that the model was trained with beside it",
            )
        return rows
    both = min(own.vocab_size, tokenizer.vocab_size)
    wrong = _first(i for i in range(both) if own.piece(i) != tokenizer.piece(i))
    if wrong is not None:
        raise PunaError(
            f"id {wrong} is {own.piece(wrong)!r} to {checkpoint.path}, but "
            f"{tokenizer.piece(wrong)!r} to the tokenizer of the shards",
            "encode the documents with the checkpoint's tokenizer: stage tokens.use",
        )
    return min(both, rows)


def _first(found: Iterable[int]) -> int | None:
    return next(iter(found), None)
