"""The configuration of training; imports no torch.

:class:`TrainingConfig` is what every kind of training has (pretraining, fine-tuning);
:class:`PretrainConfig` adds the model and the mix of sources.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from puna.core.config import Config, Execution, Seed
from puna.model.activations import Recompute
from puna.model.config import ModelConfig
from puna.tokens.curriculum import Curriculum, Phase
from puna.tokens.ramp import Ramp
from puna.train.checkpoint_config import CheckpointConfig
from puna.train.eval_config import EvalConfig
from puna.train.fault_config import FaultConfig
from puna.train.launch_config import LaunchConfig
from puna.train.log_config import LogConfig
from puna.train.numbers_config import NumbersConfig
from puna.train.optim_config import AdamWConfig, AverageConfig, OptimConfig
from puna.train.predict_config import PredictConfig
from puna.train.preflight_config import PreflightConfig
from puna.train.restart_config import RestartConfig
from puna.train.schedule_config import CosineConfig, RampConfig, ScheduleConfig, plan_ramp, steps_of
from puna.train.sdc_config import SdcConfig
from puna.train.start_config import CacheConfig, ContextConfig, InitConfig

ScheduleKind = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]


Float8 = Literal["off", "tensorwise", "rowwise"]
AttentionChoice = Literal["auto", "mask"]


class ParallelConfig(Config):
    """How the ranks share the work; it does not change the result, beyond rounding.

    Ranks are numbered as Llama 3 did: neighbours share a tensor (TP), then a context (CP), then a
    pipeline (PP), and what is left is data parallel. ``tp * cp * pp * replicate`` divides the
    number of ranks; the rest of it shards parameters, gradients and optimiser (FSDP).
    """

    tp: int = Field(default=1, ge=1)
    """Ranks that share each matrix, and between matrices the tokens (sequence parallel)."""
    cp: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each row, for long rows."""
    pp: int = Field(default=1, ge=1)
    """Ranks that share the layers."""
    replicate: int = Field(default=1, ge=1)
    """Copies of the sharded model (HSDP): parameters are gathered inside a copy only."""
    schedule: ScheduleKind = "1f1b"
    """Order of the micro-batches in the pipeline."""
    stages: int | None = Field(default=None, ge=1)
    """Stages of the pipeline over all its ranks; None means one per rank (two for the schedules
    that interleave)."""
    less_first: int = Field(default=0, ge=0)
    """Layers that the first stage has less than its equal share, for the embedding's memory."""
    less_last: int = Field(default=0, ge=0)
    """Layers that the last stage has less than its equal share, for the head's work and memory."""
    reshard_after_forward: bool = False
    """Free the gathered parameters after the forward pass and gather them again for the backward
    one: less memory, half as much traffic more. Llama 3 kept them."""
    prefetch: int = Field(default=1, ge=0)
    """Layers whose parameters are gathered ahead of the one that computes."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimiser in the host's memory (GPU only)."""


class MemoryConfig(Config):
    """What a layer keeps for the backward pass, and what it computes again; changes no result."""

    recompute: Recompute = "none"
    """`selective`: norms, rotations and the feed-forward's elementwise part, a tenth to a fifth of
    the time, for about half of the memory. `full`: the whole layer, up to a third more time;
    it keeps its input only."""
    every: int = Field(default=1, ge=1)
    """Only every n-th layer computes again."""
    budget_gib: float | None = Field(default=None, gt=0)
    """GiB of activations that a rank may keep, instead of `recompute`: as few layers as needed
    compute again, by an estimate (see `puna model`'s accounting) before the first step."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.budget_gib is not None and (self.recompute, self.every) != ("none", 1):
            raise ValueError("give either memory.budget_gib or memory.recompute and every")
        return self


class TrainingConfig(Config):
    """What every kind of training has."""

    seed: Seed = 0
    """Seed of the initial weights, the data order and all else that is random."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; give either `steps` or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Token budget, rounded up to whole steps; give either `steps` or `tokens`."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens per row."""
    global_batch: int = Field(default=16, ge=1)
    """Rows per optimiser step, over all ranks."""
    batch_ramp: list[RampConfig] = Field(default_factory=list)
    """Smaller batches at the beginning, in the order of time; `global_batch` and `seq_len` are
    those at the end. Llama 3 405B: 4M tokens of 4,096 until 252M, 8M of 8,192 until 2.87T, then
    16M."""
    micro_batch: int = Field(default=0, ge=0)
    """Rows per forward pass of one rank; fewer means less memory, the result stays the same up to
    rounding. 0 means all rows of the rank at once."""
    nproc: int = Field(default=1, ge=1)
    """Ranks (processes); the parameters are sharded over them."""
    launch: Execution[LaunchConfig] = Field(default_factory=LaunchConfig)
    """Machines that the ranks run on."""
    parallel: Execution[ParallelConfig] = Field(default_factory=ParallelConfig)
    """How the ranks share the work."""
    attention: Execution[AttentionChoice] = "auto"
    """How packed documents, and the shares of a row, are kept apart. `auto` takes the fastest way
    there is: on a GPU flex attention, compiled, which skips the blocks that a mask hides. `mask`
    makes one call with a mask, which needs no compiler. Flex attention was not run on a GPU."""
    memory: Execution[MemoryConfig] = Field(default_factory=MemoryConfig)
    """What is computed again in the backward pass to save memory."""
    deterministic: Execution[bool] = False
    """Take only algorithms that give the same bits in every run, and refuse what has none. A CPU
    does so anyway; on a GPU it is slower."""
    optim: OptimConfig = Field(default_factory=AdamWConfig)
    """Optimiser."""
    schedule: ScheduleConfig = Field(default_factory=CosineConfig)
    """Learning rate over the run."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the square of the logarithm of the softmax's denominator in the loss, which keeps
    logits from drifting; PaLM took 1e-4. The loss that is shown contains it. 0 leaves it out."""
    average: AverageConfig | None = None
    """An average of the weights as the final model, `model/`; the weights of the last step are then
    in `model-last/`. It takes 4 bytes per parameter more, sharded as the parameters are."""
    clip_norm: float = Field(default=1.0, ge=0)
    """The gradient is scaled down to this norm where it is longer; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; `auto` takes bf16 where the hardware is made for it."""
    float8: Float8 = "off"
    """Matrix products of the layers in float8 with one scale for each operand (`tensorwise`) or for
    each of its rows (`rowwise`), on GPUs of compute capability 8.9 and 9.0; needs `puna[float8]`.
    It was not run on a GPU; without a compiler the casts may cost more than it gains."""
    device: Execution[Literal["auto", "cpu", "cuda"]] = "auto"
    """Where to train; `auto` takes the GPUs when there are any."""
    checkpoint: Execution[CheckpointConfig] = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    restart: Execution[RestartConfig] = Field(default_factory=RestartConfig)
    """Detection and restart."""
    preflight: Execution[PreflightConfig] = Field(default_factory=PreflightConfig)
    """Tests before the first step of each attempt; they change no result."""
    numbers: Execution[NumbersConfig] = Field(default_factory=NumbersConfig)
    """What follows a loss or a gradient that cannot be right."""
    sdc: Execution[SdcConfig] = Field(default_factory=SdcConfig)
    """Checks for silent data corruption; they change no result."""
    predict: Execution[PredictConfig | None] = None
    """Compare steps with the planner's prediction; none when absent."""
    fault: Execution[FaultConfig | None] = None
    """A fault on purpose; none when absent."""
    prefetch: Execution[int] = Field(default=2, ge=0)
    """Batches that a thread makes ahead, downloads included; 0 makes each when it is needed."""
    log_every: Execution[int] = Field(default=1, ge=1)
    """Steps between two `train.step` events in the ledger."""
    log: Execution[LogConfig] = Field(default_factory=LogConfig)
    """Where the numbers go beside the ledger and the terminal."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"give either steps or tokens (steps={self.steps}, tokens={self.tokens})"
            )
        nodes = self.launch.nodes
        if self.nproc % nodes:
            low = self.nproc - self.nproc % nodes
            near = " or ".join(str(ranks) for ranks in (low, low + nodes) if ranks)
            raise ValueError(
                f"launch.nodes={nodes} machines do not share nproc={self.nproc} ranks equally; "
                f"use nproc={near}"
            )
        p = self.parallel
        inner = p.tp * p.cp * p.pp * p.replicate
        if self.nproc % inner:
            low = self.nproc - self.nproc % inner
            near = " or ".join(str(ranks) for ranks in (low, low + inner) if ranks)
            raise ValueError(
                f"parallel.tp={p.tp} x cp={p.cp} x pp={p.pp} x replicate={p.replicate} does not "
                f"divide nproc={self.nproc}; use nproc={near}"
            )
        for n_rows in (self.global_batch, *(one.global_batch for one in self.batch_ramp)):
            self._check_rows(n_rows)
        plan_ramp(self.batch_ramp, self.global_batch, self.seq_len)
        if self.sdc.replay_every and p.tp * p.cp * p.pp > 1:
            raise ValueError(
                f"sdc.replay_every={self.sdc.replay_every} compares micro-batches of ranks, and "
                f"parallel.tp={p.tp} x cp={p.cp} x pp={p.pp} cuts them; set it to 0"
            )
        if (self.restart.min_nproc or 1) > self.nproc:
            raise ValueError(
                f"restart.min_nproc={self.restart.min_nproc} is more than nproc={self.nproc}; "
                f"use at most {self.nproc}"
            )
        fault = self.fault
        if fault is not None and fault.enabled:
            if fault.rank >= self.nproc:
                raise ValueError(
                    f"fault.rank={fault.rank} does not exist: nproc={self.nproc} ranks count from 0"
                )
            if fault.step >= self.n_steps:
                raise ValueError(
                    f"fault.step={fault.step} never comes: the run has {self.n_steps} steps"
                )
        return self

    def _check_rows(self, global_batch: int) -> None:
        if global_batch % self.data_ranks:
            low = global_batch - global_batch % self.data_ranks
            near = " or ".join(str(rows) for rows in (low, low + self.data_ranks) if rows)
            raise ValueError(
                f"global_batch={global_batch} rows do not divide among the "
                f"{self.data_ranks} data-parallel ranks of nproc={self.nproc}; "
                f"use global_batch={near}"
            )
        rank_batch = global_batch // self.data_ranks
        if self.micro_batch and rank_batch % self.micro_batch:
            fitting = [n for n in range(1, rank_batch + 1) if rank_batch % n == 0]
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide the {rank_batch} rows of a "
                f"rank (global_batch={global_batch} / {self.data_ranks} data-parallel ranks); "
                f"use one of {', '.join(map(str, fitting))}"
            )

    @property
    def ramp(self) -> Ramp:
        """The batch ramp in steps of this run."""
        return plan_ramp(self.batch_ramp, self.global_batch, self.seq_len)

    @property
    def batch_shapes(self) -> list[tuple[int, int]]:
        """Rows of seq_len per step, and tokens of the rows they are cut into, over the run."""
        ramp = self.ramp
        return [
            *((stair.n_rows, self.seq_len // stair.n_pieces) for stair in ramp.stairs),
            (self.global_batch, self.seq_len),
        ]

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before one."""
        return self.ramp.rows_before(step) * self.seq_len

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks: those that take different rows."""
        p = self.parallel
        return self.nproc // (p.tp * p.cp * p.pp)

    @property
    def rank_batch(self) -> int:
        """Rows per step of one data-parallel rank, at most."""
        return max(n_rows for n_rows, _ in self.batch_shapes) // self.data_ranks

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimiser step after the ramp, over all ranks."""
        return self.global_batch * self.seq_len

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.steps is not None:
            return self.steps
        return self.ramp.steps_for(math.ceil((self.tokens or 1) / self.seq_len))


class PhaseConfig(Config):
    """Weights of the sources from some step on (curriculum, annealing)."""

    start: float | None = Field(default=None, gt=0)
    """When: below 1 a share of all steps, from 1 on a step; give this or `start_tokens`."""
    start_tokens: int | None = Field(default=None, ge=1)
    """When: after so many tokens of the run, rounded up to a whole step."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Share of the tokens of each source, any positive scale; 0 leaves a source out."""
    blend: float = Field(default=0.0, ge=0)
    """From `start` on the weights move to these in a straight line, over a share of all steps
    (below 1) or a number of steps (from 1 on); 0 changes them at once."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.start is None) == (self.start_tokens is None):
            raise ValueError(
                f"give either start or start_tokens (start={self.start}, "
                f"start_tokens={self.start_tokens})"
            )
        return self


class PretrainConfig(TrainingConfig):
    """Pretraining on packed documents, from random weights or from a checkpoint."""

    init: InitConfig | None = None
    """Checkpoint to go on from, which also gives the shape of the model; none means random weights.
    `init = "folder"` is enough."""
    context: ContextConfig | None = None
    """A longer context than that of `init`."""
    shards: str = ""
    """Token shards in a store: the URL (`s3://`, `gs://`, `https://`) of a folder of tokens.encode,
    instead of the run's own."""
    cache: Execution[CacheConfig] = Field(default_factory=CacheConfig)
    """Where shards of a store are kept on this machine."""
    on_damage: Execution[Literal["stop", "skip"]] = "stop"
    """When the tokens of a document are not those that were written (each 64 KiB has a hash): stop
    and name them, or leave such documents out and record `data.left_out`."""

    eval: Execution[EvalConfig | None] = None
    """Bits per byte of held-out documents in the middle of the training; none when absent."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="demo"))
    """Shape of the model that starts from random weights."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Share of the tokens of each source, any positive scale; empty means by the number of tokens
    that each source has."""
    mix: str = ""
    """Schedule that `puna mix schedule` wrote: it brings weights and phases, and is for the tokens
    of this run. Sources that it does not name are left out."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Other weights from given steps on, in the order of time; `weights` are those of the start."""
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """How often the documents of a source may be read; a source that is not named has no limit."""
    used_up: Literal["refuse", "share"] = "refuse"
    """When a source would be read more often than `max_epochs`: refuse the run before it starts, or
    give its share to the other sources from there on."""

    @field_validator("init", mode="before")
    @classmethod
    def _short_init(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.init is not None and self.model != type(self).model_fields["model"].get_default(
            call_default_factory=True
        ):
            raise ValueError("init brings the shape of the model; remove the section `model`")
        if self.context is not None and self.init is None:
            raise ValueError("context is for a checkpoint: give init; else set model.max_seq_len")
        return self

    @property
    def curriculum(self) -> Curriculum:
        """The phases in steps of this run."""
        n_steps = self.n_steps
        return Curriculum(
            [
                Phase(
                    self.ramp.steps_for(math.ceil(phase.start_tokens / self.seq_len))
                    if phase.start_tokens is not None
                    else steps_of(phase.start or 0.0, n_steps),
                    dict(phase.weights),
                    steps_of(phase.blend, n_steps),
                )
                for phase in self.phases
            ],
            dict(self.max_epochs),
            self.used_up,
            n_steps,
        )

    @model_validator(mode="after")
    def _one_mix(self) -> Self:
        if self.mix and (self.weights or self.phases):
            raise ValueError("mix brings weights and phases; remove them, or remove mix")
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.weights and not sum(self.weights.values()) > 0:
            raise ValueError(f"weights={self.weights} are all zero; give one source more than 0")
        return self
