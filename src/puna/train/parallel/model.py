"""A model over all ranks, as the loop sees it: parameters, a step, the norm of the gradient.

Shapes: B rows of this data-parallel rank, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from puna.core.errors import PunaError
from puna.model.activations import Shape, joins_pieces
from puna.model.config import LlamaConfig
from puna.model.llama import init_tensor
from puna.model.names import EMBEDDING, parameter_shapes
from puna.tokens.loader import NO_LABEL
from puna.train.batch import TensorBatch
from puna.train.config import AttentionChoice, Float8, MemoryConfig, ParallelConfig
from puna.train.float8 import check_float8
from puna.train.memory import plan_recompute
from puna.train.parallel.context import ContextShare
from puna.train.parallel.forward import Parts, forward_only
from puna.train.parallel.layout import CP, PP, StagePlan, plan_stages
from puna.train.parallel.shards import copy_part, local, n_copies
from puna.train.parallel.stage import Stage, build_stage
from puna.train.parallel.world import World
from puna.train.precision import Precision
from puna.train.watch.clock import StepClock
from puna.train.watch.communication import time_collectives

if TYPE_CHECKING:
    from puna.train.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class StepReport:
    """What a step was computed on, over all ranks.

    Attributes:
        n_labelled: Labelled tokens.
        n_visible: Keys that the tokens see, summed.
        sources: Summed cross entropy in nats and labelled tokens of each source that had rows.
    """

    n_labelled: float = 0.0
    n_visible: float = 0.0
    sources: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class ParallelModel:
    """The stages of a model that this rank computes.

    Args:
        config: Shape of the whole model.
        seq_len: Tokens per row.
        micro_batch: Rows per forward pass, at most; of shorter rows, as many as have its tokens.
        n_micro: Forward passes per step, at most.
        world: The ranks.
        parallel: How they share the work.
        precision: Of the matrix products.
        z_loss: See :func:`puna.train.loss.cross_entropy_sum`.
        memory: What is computed again in the backward pass; None for nothing.
        float8: Matrix products of the layers in float8.
        attention: How packed documents are kept apart.

    Attributes:
        clock: Counts the parts of a step.
        report: What the last step was computed on.
        n_again: Layers of this rank that are wholly computed again in the backward pass.

    Raises:
        PunaError: The memory budget is too small, or there is no float8 here.
    """

    def __init__(
        self,
        config: LlamaConfig,
        seq_len: int,
        micro_batch: int,
        n_micro: int,
        world: World,
        parallel: ParallelConfig,
        precision: Precision,
        *,
        z_loss: float = 0.0,
        memory: MemoryConfig | None = None,
        float8: Float8 = "off",
        attention: AttentionChoice = "auto",
    ) -> None:
        self.config, self.world = config, world
        self._micro_tokens = micro_batch * seq_len
        self._schedule, self._dtype = parallel.schedule, precision.dtype
        self._gathers_anew = parallel.reshard_after_forward
        self._plan: StagePlan = plan_stages(parallel, config.n_layers)
        check_float8(float8, world.device)
        again = plan_recompute(
            memory or MemoryConfig(), config, parallel, self._plan, world.place(PP), n_micro,
            _shape(micro_batch, seq_len, world, precision),
        )  # fmt: skip
        build = partial(build_stage, z_loss=z_loss, again=again, float8=float8, attention=attention)
        self.stages: dict[int, Stage] = {
            number: build(config, self._plan, number, world, parallel, precision)
            for number in self._plan.of(world.place(PP))
        }
        self.n_again = sum(kind == "full" for kind in again.values())
        self._share = ContextShare(world.place(CP), world.layout.cp)
        self.report = StepReport()
        self.clock = StepClock(world.device)
        if world.device.type == "cpu":
            time_collectives(self.stages.values(), self.clock)
        self._pipelines: dict[tuple[int, int], Pipeline] = {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters; a tied embedding that two of its stages have, twice."""
        for stage in self.stages.values():
            yield from stage.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def forward_backward(self, batch: TensorBatch) -> float:
        """Leave the gradient of the mean loss per labelled token in ``.grad``; return that loss.

        The mean is over the *global* batch, known before the first forward pass, so that it does
        not matter how rows, tokens and ranks divide the labels.

        Args:
            batch: Rows of this rank's data-parallel share, whole.
        """
        labels_BT = self._share.take(batch.labels_BT)
        layout = self.world.layout
        # Exact: whole numbers in fp64.
        labels_S = torch.zeros(max(len(batch.sources), 1), dtype=torch.float64)
        labels_S.index_add_(0, batch.source_B.cpu(), (labels_BT != NO_LABEL).sum(1).cpu().double())
        n_visible, *of_sources = self._sum([batch.n_visible, *labels_S.tolist()])
        n_labelled = sum(of_sources)
        if n_labelled == 0:
            raise PunaError("a batch has no labelled token", "look at how the labels are made")
        for stage in self.stages.values():
            stage.n_labelled = n_labelled / layout.copies
            stage.nats_S = torch.zeros(len(labels_S), dtype=torch.float64, device=self.world.device)
        parts = self._parts(batch)
        if self._plan.n_stages == 1:
            loss = self._run(*parts)
        else:
            loss = self._pipeline_for(*batch.tokens_BT.shape).run(*parts)
        self._add_tied()
        nats = torch.stack([stage.nats_S for stage in self.stages.values()]).sum(0).tolist()
        loss, *nats = self._sum([value / layout.tp for value in (loss, *nats)])
        self.report = StepReport(
            n_labelled / layout.copies,
            n_visible / (layout.copies * layout.cp),
            {
                name: (nats[number], of_sources[number] / layout.copies)
                for number, name in enumerate(batch.sources)
                if of_sources[number]
            },
        )
        return loss

    def replay(self, batch: TensorBatch) -> None:
        """Compute the first micro-batch of any rank's rows again, by the loss of the last step.

        Called by all ranks together, with one stage. Parameters and their gradients stay; those of
        the micro-batch are seen only by hooks on the parameters that compute, which drop them.
        """
        (stage,) = self.stages.values()
        kept = [(parameter, parameter.grad) for parameter in self.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        if isinstance(stage, FSDPModule):
            stage.set_requires_gradient_sync(False)
        stage(*self._pieces(*self._parts(batch))[0]).backward()
        for parameter, grad in kept:
            parameter.grad = grad

    def _parts(self, batch: TensorBatch) -> Parts:
        tokens_BT, positions_BT, labels_BT = map(
            self._share.take, (batch.tokens_BT, batch.positions_BT, batch.labels_BT)
        )
        return tokens_BT, positions_BT, batch.doc_ids_BT, labels_BT, batch.source_B

    def _pieces(self, *parts_BT: Tensor) -> list[tuple[Tensor, ...]]:
        n_rows, seq_len = len(parts_BT[0]), parts_BT[0].shape[1] * self._share.size
        micro_batch = self._micro_batch(n_rows, seq_len)
        return list(zip(*(part.split(micro_batch) for part in parts_BT), strict=True))

    def _run(self, *parts_BT: Tensor) -> float:
        """Compute one micro-batch after the other; return this rank's part of the loss."""
        (stage,) = self.stages.values()
        pieces = self._pieces(*parts_BT)
        total = torch.zeros(1, device=self.world.device)
        for index, piece in enumerate(pieces):
            if isinstance(stage, FSDPModule):
                is_last = index == len(pieces) - 1
                stage.set_requires_gradient_sync(is_last)
                # Gathered once per step, unless memory is too short to keep them gathered at all.
                stage.set_reshard_after_backward(is_last or self._gathers_anew)
            with self.clock.part("forward"):
                loss = stage(*piece)
            with self.clock.part("backward"):
                loss.backward()
            total += loss.detach()
        return total.item()

    def _sum(self, values: list[float]) -> list[float]:
        with self.clock.part("communication"):
            return self.world.sum(values)

    def evaluate(
        self, batches: Sequence[TensorBatch], n_sources: int, beat: Callable[[], None]
    ) -> list[float]:
        """Return the summed cross entropy of each source over all ranks, in nats.

        Neither gradients nor weights change.

        Args:
            batches: Micro-batches of this rank's data-parallel share, as many on every rank, each
                of :meth:`micro_rows` rows.
            n_sources: The batches number them.
            beat: Called before each micro-batch.
        """
        layout, (n_rows, seq_len) = self.world.layout, batches[0].tokens_BT.shape
        for stage in self.stages.values():
            stage.nats_S = torch.zeros(n_sources, dtype=torch.float64, device=self.world.device)

        def parts() -> Iterator[Parts]:
            for batch in batches:
                beat()
                yield self._parts(batch)

        hidden_shape = (n_rows, seq_len // (layout.cp * layout.tp), self.config.dim)
        forward_only(self.stages, self._plan, self.world, parts(), hidden_shape, self._dtype)
        nats_S = torch.stack([stage.nats_S for stage in self.stages.values()]).sum(0)
        return self._sum([nats / layout.tp for nats in nats_S.tolist()])

    def micro_rows(self, seq_len: int) -> int:
        """Return how many rows of a length make a micro-batch."""
        return self._micro_tokens // seq_len

    def _micro_batch(self, n_rows: int, seq_len: int) -> int:
        return min(n_rows, self.micro_rows(seq_len))

    def _pipeline_for(self, n_rows: int, seq_len: int) -> Pipeline:
        """Return the pipeline of a step with so many rows; each is made once."""
        # Half a second to import: PyTorch's schedules bring its compiler.
        from puna.train.parallel.pipeline import Pipeline

        if (n_rows, seq_len) not in self._pipelines:
            micro_batch, layout = self._micro_batch(n_rows, seq_len), self.world.layout
            self._pipelines[n_rows, seq_len] = Pipeline(
                self.stages, self._plan, self._schedule, self.world,
                n_micro=n_rows // micro_batch,
                hidden_shape=(micro_batch, seq_len // (layout.cp * layout.tp), self.config.dim),
                hidden_dtype=self._dtype, clock=self.clock,
            )  # fmt: skip
        return self._pipelines[n_rows, seq_len]

    @property
    def _tied(self) -> list[nn.Parameter]:
        """Copies of a tied embedding on this rank, where first and last stage are not one."""
        if not self.config.tie_embeddings or self._plan.n_stages == 1:
            return []
        return [p for name, p in self.named_parameters() if name == EMBEDDING]

    def _add_tied(self) -> None:
        """Give both copies of a tied embedding (input and head) the sum of their gradients."""
        tied = self._tied
        if len(tied) == 2:
            total = local(tied[0].grad) + local(tied[1].grad)
            for copy in tied:
                local(copy.grad).copy_(total)
        elif tied:
            own, other = local(tied[0].grad), torch.empty_like(local(tied[0].grad))
            ends = {self._plan.owners[0], self._plan.owners[-1]}
            (peer,) = ends - {self.world.place(PP)}
            group = self.world.group(PP)
            to = dist.get_global_rank(group, peer)
            ops = [
                dist.P2POp(dist.isend, own.contiguous(), to, group),
                dist.P2POp(dist.irecv, other, to, group),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            own += other

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradient down to ``max_norm`` (0: leave it); return its norm before.

        The same number in every layout: squares are added in float64, each element once.
        """
        grads, weights = [], []
        tied = {id(p) for p in self._tied}
        for p in self.parameters():
            if p.grad is not None:
                grads.append(local(p.grad))
                weights.append(1 / (n_copies(p) * (2 if id(p) in tied else 1)))
        squares = torch.stack(torch._foreach_norm(grads)).double() ** 2
        weights_N = torch.tensor(weights, dtype=torch.float64, device=squares.device)
        (total,) = self._sum([float((squares * weights_N).sum())])
        norm = total**0.5
        if 0 < max_norm < norm:
            torch._foreach_mul_(grads, max_norm / norm)
        return norm

    @torch.no_grad()
    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Give every parameter its value; each rank keeps its own part and sends nothing.

        Args:
            values: Names and full values of the whole model; one at a time is held in memory.

        Raises:
            ValueError: A value is missing, surplus, or has another shape than its parameter.
        """
        shapes = dict(parameter_shapes(self.config))
        for name, full in values:
            if tuple(full.shape) != shapes.pop(name, None):
                raise ValueError(f"{name} {tuple(full.shape)} fits no parameter of the model")
            for own, parameter in self.named_parameters():
                if own == name:
                    copy_part(parameter, full)
        if shapes:
            raise ValueError(f"no value for {', '.join(shapes)}")

    def fill_random(self, seed: int) -> None:
        """Fill with initial values from a seed: the same for every layout."""
        shapes = parameter_shapes(self.config)
        own = {name for name, _ in self.named_parameters()}
        self.fill(
            (
                name,
                init_tensor(name, shape, seed, self.config)
                if name in own
                else torch.empty(shape, device="meta"),
            )
            for name, shape in shapes.items()
        )


def _shape(micro_batch: int, seq_len: int, world: World, precision: Precision) -> Shape:
    layout = world.layout
    return Shape(
        micro_batch * seq_len // layout.cp, precision.name, layout.tp, layout.cp,
        casts_weights=world.mesh is None,
        joins=joins_pieces(seq_len, world.device.type),
    )  # fmt: skip
