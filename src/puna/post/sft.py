"""Stage ``post.sft``: supervised fine-tuning on conversations; imports no torch.

The Llama 3 chat format, whole conversations packed to rows with a document mask, loss on the
assistant's tokens only. Before any training the labels of the first batch are decoded and must be
exactly the assistants' texts. Training itself is :func:`puna.train.stage.train_job`: the same
checkpoints, supervision and exact resume as pretraining.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.progress import say
from puna.core.stage import Artifacts, Metrics, stage
from puna.lm.load import MODEL_DIR
from puna.model.formats.hf_config import read_hf_config
from puna.post.batches import SftBatches, check_labels, encode_pairs
from puna.post.pairs import PAIRS_FILE, read_pairs
from puna.tokens.tokenizer import load_tokenizer
from puna.train.config import AdamWConfig, TrainingConfig
from puna.train.spec import SourceSpec
from puna.train.stage import train_job

CONVERSATIONS_DIR = "conversations"
FACTORY = "puna.post.batches:build_source"
DEFAULT_EPOCHS = 2


class SftAdamWConfig(AdamWConfig):
    """AdamW with Llama 2's peak rate for fine-tuning."""

    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate; 2e-5 is Llama 2's (Touvron et al., 2023). Small models want more."""


class SftConfig(TrainingConfig):
    """Supervised fine-tuning of the pretrained model on instruction pairs."""

    epochs: int | None = Field(default=None, ge=1)
    """Times that every conversation is seen; instead of `steps` or `tokens`. 2 when none of the
    three is given."""
    optim: SftAdamWConfig = Field(default_factory=SftAdamWConfig)
    """Optimiser."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give only one of epochs, steps and tokens, not {' and '.join(given)}"
            )
        if self.batch_ramp:
            raise ValueError("batch_ramp is for pretraining; set global_batch")
        # The rest is checked by the parent; the number of steps of an epoch is not known yet.
        fault_step = self.fault.step if self.fault is not None else 0
        self.with_steps(self.steps or (None if self.tokens else fault_step + 1))
        return self

    def with_steps(self, steps: int | None) -> TrainingConfig:
        """Return the plain training configuration with this number of steps."""
        values = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        optim = AdamWConfig.model_validate(self.optim.model_dump())
        return TrainingConfig.model_validate({**values, "optim": optim, "steps": steps})


@stage(
    "post.sft",
    needs={
        "pairs": "post.annotated|post.pairs",
        "model": "train.pretrain",
        "tokenizer": "tokens.train|tokens.use|tokens.import",
    },
    resumable=True,
)
def fine_tune(cfg: SftConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Fine-tune the pretrained model on instruction pairs, with loss on the answers only.

    Leaves ``model/`` (Hugging Face folder with the tokenizer), ``checkpoints/``,
    ``conversations/`` (what was trained on, for lineage) and ``loader.json``.

    Raises:
        PunaError: No conversation fits into ``seq_len``, or what the training itself refuses.
        RuntimeError: The labels are not exactly the assistants' texts.
    """
    weights = inputs["model"].file(MODEL_DIR)
    tokenizer = load_tokenizer(inputs["tokenizer"].path)
    pairs = read_pairs(inputs["pairs"].file(PAIRS_FILE), "train")
    conversations, counts = encode_pairs(pairs, tokenizer, cfg.seq_len)
    if not len(conversations):
        raise PunaError(
            f"none of {counts.n_in} conversations can be trained on: {counts.rejected}",
            f"raise seq_len = {cfg.seq_len} of [post.sft], or look at post.pairs",
        )
    folder = out / CONVERSATIONS_DIR
    conversations.save(folder)
    batches = SftBatches(conversations, cfg.seq_len, cfg.global_batch, cfg.seed, tokenizer.pad_id)
    messages_of = {pair["id"]: pair["messages"] for pair in pairs}
    check = check_labels(batches, messages_of, tokenizer)
    say(f"  labels of the first batch: {check['n_conversations']} conversations decode to their "
        f"answers exactly")  # fmt: skip
    training = _training(cfg, batches)
    source = SourceSpec(
        FACTORY,
        {
            "folder": str(folder.resolve()),
            "seq_len": cfg.seq_len,
            "global_batch": cfg.global_batch,
            "seed": cfg.seed,
            "pad_id": tokenizer.pad_id,
        },
    )
    metrics = train_job(
        training, read_hf_config(weights), source, out, events,
        tokenizer=inputs["tokenizer"].path, weights=weights, name="post.sft",
    )  # fmt: skip
    n_tokens, n_labels = len(conversations.tokens), int(conversations.is_assistant.sum())
    return {
        **metrics,
        "conversations": {"in": counts.n_in, "kept": counts.n_kept, "rejected": counts.rejected},
        "n_tokens": n_tokens,
        "n_label_tokens": n_labels,
        "fill": batches.fill(),
        "epochs": training.n_steps * cfg.global_batch / batches.rows_per_epoch,
        "label_check": check,
        "headline": _headline(metrics, counts.n_kept),
    }


def _training(cfg: SftConfig, batches: SftBatches) -> TrainingConfig:
    if cfg.tokens is not None:
        return cfg.with_steps(None)
    steps = cfg.steps or batches.steps_of(cfg.epochs or DEFAULT_EPOCHS)
    try:
        return cfg.with_steps(steps)
    except ValidationError as error:  # a fault after the last step: known only now
        text = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise PunaError(f"[post.sft] {text}", "correct the section") from error


def _headline(metrics: Metrics, n_conversations: int) -> str:
    text = f"{n_conversations} conversations, {metrics['steps']} steps"
    if "final_loss" in metrics:
        text += f", loss {metrics['first_loss']:.3f} -> {metrics['final_loss']:.3f}"
    return text
