"""How a classifier is trained and evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from puna.core.config import Config, Execution
from puna.data.quality import calibrate
from puna.data.quality.classifier import DEFAULT_MAX_BYTES
from puna.data.quality.ngram import MAX_ORDER
from puna.data.quality.prepare import Preparation

Kind = Literal["fasttext", "ngram", "embedding", "transformer", "lexical"]


class TrainConfig(Config):
    """How a classifier is trained and evaluated."""

    kind: Kind = "fasttext"
    """`fasttext`: words and word n-grams; `ngram`: a byte n-gram model of the positives;
    `embedding`: a head over an embedder that stays as it is; `transformer`: an encoder that is
    fine-tuned with its head; `lexical`: a head over counts of code, formulas and steps."""
    embedder: str = ""
    """embedding, transformer: folder of the embedder, static or (transformer: only) an encoder."""
    lexical: bool = False
    """embedding: append the lexical features."""
    passage_tokens: int = Field(default=256, ge=8)
    """embedding, transformer: tokens of a passage; an encoder takes no more than it can."""
    passages: int = Field(default=2, ge=1)
    """embedding, transformer: passages of a text that are looked at, from its start."""
    device: Execution[str] = "auto"
    """embedding, transformer: where the encoder trains: `cpu`, `cuda`; `auto`: a GPU if there is
    one."""
    tune_epochs: int = Field(default=2, ge=1)
    """transformer: passes at most."""
    tune_lr: float = Field(default=2e-5, gt=0)
    """transformer: peak learning rate of the encoder."""
    head_lr: float = Field(default=1e-3, gt=0)
    """transformer: peak learning rate of the head."""
    tune_batch: int = Field(default=16, ge=1)
    """transformer: passages of a step."""
    weight_decay: float = Field(default=0.01, ge=0)
    """transformer: of AdamW."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """transformer: share of the steps in which the learning rates rise."""
    evaluations: int = Field(default=4, ge=1)
    """transformer: looks at held-out texts (a tenth of those that train) per pass."""
    patience: int = Field(default=4, ge=1)
    """transformer: looks without improvement after which training stops."""
    dim: int = Field(default=32, ge=2, le=1024)
    """fastText: dimension of the vectors."""
    epochs: int = Field(default=10, ge=1)
    """fastText: passes over the training texts."""
    lr: float = Field(default=0.5, gt=0)
    """fastText: learning rate at the start; it falls to 0."""
    word_ngrams: int = Field(default=2, ge=1, le=5)
    """fastText: longest word n-gram."""
    min_count: int = Field(default=3, ge=1)
    """fastText: words that occur less often have no vector of their own."""
    n_buckets: int = Field(default=2**18, ge=1)
    """fastText: hash buckets of the word n-grams."""
    order: int = Field(default=6, ge=2, le=MAX_ORDER)
    """ngram: longest n-gram, bytes."""
    preparation: Preparation = "words"
    """fastText: what a text is turned into, `words` or (line ends become spaces only) `plain`."""
    max_bytes: int = Field(default=DEFAULT_MAX_BYTES, ge=64)
    """Bytes of each text that are looked at."""
    calibration: calibrate.Method = "platt"
    """Two classes: `platt` (keeps all differences) or `isotonic` (any shape, makes ties)."""
    calibration_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of the texts that calibrates and sets thresholds."""
    test_share: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the texts that is only measured on."""
    raters: Literal["one", "several"] = "one"
    """`several`: records of one text are ratings of it; scores become their mean, labels the most
    frequent one. `one`: texts whose records contradict each other are left out."""
    unseen_sources: tuple[str, ...] = ()
    """Sources that are only measured on, and reported apart."""
    keep_from: float = 3.0
    """Scores: grade from which a text counts as good (3 in FineWeb-Edu)."""
    n_resamples: int = Field(default=500, ge=0)
    """Resamples of the bootstrap; 0 leaves the intervals out."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the division, the initial vectors, the order and the bootstrap."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.calibration_share + self.test_share > 0.6:
            raise ValueError("calibration_share and test_share leave less than 40 % for training")
        if (self.kind in ("embedding", "transformer")) != bool(self.embedder):
            raise ValueError(
                f"kind={self.kind} needs an embedder; give embedder=FOLDER"
                if not self.embedder
                else f"kind={self.kind} takes no embedder"
            )
        return self
