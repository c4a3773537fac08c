"""The part of a Llama that one rank computes: all of it, or some layers of a pipeline.

Built on the meta device, shared by tensor parallel, sharded by FSDP, then allocated: no rank ever
holds the whole model. The names of the parameters are those of the whole model.

Shapes: B rows, T tokens of this rank's share of a row, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from puna.model.activations import Recompute
from puna.model.attention import AttentionPlan, plan_attention
from puna.model.config import LlamaConfig
from puna.model.llama import Block, Llama
from puna.model.rope import Rotation, RotationTable
from puna.train.config import AttentionChoice, Float8, ParallelConfig
from puna.train.float8 import use_float8
from puna.train.fused.attention import plan_fused
from puna.train.fused.fuse import FusedRotation, fuse
from puna.train.loss import cross_entropy_sum, tokens_per_chunk
from puna.train.parallel.context import ContextPlan, ContextShare
from puna.train.parallel.layout import CP, TP, StagePlan
from puna.train.parallel.tensor import share_block, share_ends
from puna.train.parallel.threads import give_back_memory, is_large
from puna.train.parallel.world import World
from puna.train.precision import Precision
from puna.train.recompute import recompute


class Stage(nn.Module):
    """Some consecutive layers, with the embedding when they are the first, the head when the last.

    Args:
        config: Of the whole model.
        plan: All stages.
        number: Of this one.
        world: The ranks.
        precision: Of the matrix products.
        z_loss: See :func:`puna.train.loss.cross_entropy_sum`.
        attention: How packed documents are kept apart.

    Attributes:
        n_labelled: Labelled tokens of the global batch; set before a step. The loss of a
            micro-batch is divided by it.
        nats_S: Summed cross entropy of each source (S); set to zeros before a step.
    """

    def __init__(
        self,
        config: LlamaConfig,
        plan: StagePlan,
        number: int,
        world: World,
        precision: Precision,
        z_loss: float = 0.0,
        attention: AttentionChoice = "auto",
    ) -> None:
        super().__init__()
        self.is_first, self.is_last = number == 0, number == plan.n_stages - 1
        whole = Llama(config, device="meta", dtype=torch.float32)
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.tok_embeddings = whole.tok_embeddings
        self.layers = nn.ModuleDict(
            {str(layer): whole.layers[layer] for layer in range(*plan.layers[number])}
        )
        if self.is_last:
            self.norm = whole.norm
            if whole.output is not None:
                self.output = whole.output
        self.n_labelled = 1.0
        self.nats_S = torch.zeros(1, dtype=torch.float64, device=world.device)
        self._is_tied, self._attention = config.tie_embeddings, attention
        self._world, self._precision, self._z_loss = world, precision, z_loss
        self._share = ContextShare(world.place(CP), world.layout.cp)
        self._rotations = RotationTable(config)

    @property
    def blocks(self) -> list[Block]:
        """The layers."""
        return list(self.layers.values())  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        positions_BT: Int[Tensor, "B T"],
        doc_ids_BS: Int[Tensor, "B S"] | None,
        labels_BT: Int[Tensor, "B T"],
        source_B: Int[Tensor, " B"],
    ) -> Tensor:
        """Return the residual stream, or, on the last stage, this micro-batch's part of the loss.

        Args:
            x: Token ids (B, T) on the first stage, else the residual stream of the stage before.
            positions_BT: Position of each token in its document.
            doc_ids_BS: Documents of whole rows; None when each row is one.
            labels_BT: Next token of each position.
            source_B: Number of each row's source.

        Returns:
            (B, T, C), of this rank's share of the tokens under tensor parallel; or one number (1,).
        """
        with self._precision.context(self._world.device):
            seq_len = positions_BT.shape[1] * self._share.size
            plan = self._plan(seq_len, doc_ids_BS)
            rotation = self._rotation(seq_len, positions_BT)
            # In bf16 the residual stream is bfloat16, too, in every layout: sharded parameters are
            # gathered in it, and it is what travels between stages.
            h_BTC = self._embed(x) if self.is_first else x
            for block in self.layers.values():
                h_BTC = block(h_BTC, rotation, plan)
            if not self.is_last:
                return h_BTC
            h_BTC = self.norm(h_BTC)
        # Not a view: the zero-bubble schedules detach it in place.
        return torch.stack([self._loss(h_BTC, labels_BT, source_B) / self.n_labelled])

    def _embed(self, ids_BT: Tensor) -> Tensor:
        h_BTC = self.tok_embeddings(ids_BT).to(self._precision.dtype)
        if h_BTC.requires_grad and h_BTC.is_cpu and is_large(self.tok_embeddings.weight.numel()):
            # Next is the gradient of the embedding, a piece of its own, when all that the layers
            # needed is free and kept: at this moment the process is at its largest.
            h_BTC.register_hook(lambda _: give_back_memory())
        return h_BTC

    def _plan(self, seq_len: int, doc_ids_BS: Tensor | None) -> AttentionPlan:
        device = self._world.device
        if self._share.size == 1:
            is_auto = self._attention == "auto"
            if is_auto and device.type == "cpu" and self._precision.dtype == torch.bfloat16:
                return plan_fused(seq_len, doc_ids_BS)
            kind = "auto" if doc_ids_BS is None else self._attention
            return plan_attention(seq_len, device, doc_ids_BS, kind)
        return ContextPlan(
            self._share, self._world.group(CP), seq_len, device, doc_ids_BS, self._attention
        )

    def _rotation(self, seq_len: int, positions_BT: Tensor) -> Rotation:
        # Positions are below seq_len; asking the tensor for its largest would wait for the device.
        table = self._rotations.at(seq_len, None, self._world.device)
        return FusedRotation(table.cos[positions_BT], table.sin[positions_BT])

    def _loss(
        self,
        hidden_BTC: Float[Tensor, "B T C"],
        labels_BT: Int[Tensor, "B T"],
        source_B: Int[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        head = self.tok_embeddings if self._is_tied else self.output
        weight_VC, group, first, chunk = head.weight, None, 0, None
        if self._world.layout.tp > 1:
            group = self._world.group(TP)
            # Of the largest part: parts may differ, the number of collectives may not.
            chunk = tokens_per_chunk(-(-weight_VC.shape[0] // self._world.layout.tp))
            # Each rank has all tokens and a part of the vocabulary; the gradients of the tokens
            # come back as a sum over the parts.
            hidden_BTC = funcol.wait_tensor(
                funcol.all_gather_tensor_autograd(hidden_BTC.contiguous(), 1, group)
            )
        if isinstance(weight_VC, DTensor):
            first = _first_row(weight_VC)
            weight_VC = weight_VC.to_local()
        nats_B = torch.zeros(len(labels_BT), dtype=torch.float64, device=labels_BT.device)
        loss = cross_entropy_sum(
            hidden_BTC, weight_VC, labels_BT, dtype=self._precision.dtype,
            chunk_tokens=chunk, group=group, first_id=first, z_loss=self._z_loss, nats_B=nats_B,
        )  # fmt: skip
        self.nats_S.index_add_(0, source_B, nats_B)
        return loss


def _first_row(weight_VC: DTensor) -> int:
    """Number of the first row of this rank's part of a matrix that is cut by rows."""
    n_rows, size = weight_VC.shape[0], weight_VC.device_mesh.size()
    per_rank = -(-n_rows // size)  # as torch.chunk cuts
    return min(n_rows, per_rank * weight_VC.device_mesh.get_local_rank())


def build_stage(
    config: LlamaConfig,
    plan: StagePlan,
    number: int,
    world: World,
    parallel: ParallelConfig,
    precision: Precision,
    *,
    z_loss: float = 0.0,
    again: Mapping[int, Recompute] | None = None,
    float8: Float8 = "off",
    attention: AttentionChoice = "auto",
) -> Stage:
    """Build a stage whose parameters are allocated and have no values yet.

    Args:
        config: Of the whole model.
        plan: All stages.
        number: Of this one.
        world: The ranks.
        parallel: How they share the work.
        precision: Of the matrix products.
        z_loss: See :func:`puna.train.loss.cross_entropy_sum`.
        again: Per layer what is computed again in the backward pass; None for nothing.
        float8: See :func:`puna.train.float8.use_float8`.
        attention: How packed documents are kept apart.
    """
    stage = Stage(config, plan, number, world, precision, z_loss, attention)
    fuse(stage)
    for block in stage.blocks:
        use_float8(block, float8)
    for layer, kind in (again or {}).items():
        if str(layer) in stage.layers:
            recompute(stage.layers[str(layer)], kind)  # type: ignore[arg-type]
    if world.tp_mesh is not None:
        for block in stage.blocks:
            share_block(block, world.tp_mesh)
        share_ends(stage, world.tp_mesh)
    if world.fsdp_mesh is not None:
        shard(stage, stage.blocks, world, parallel, precision)
    return stage.to_empty(device="cpu" if parallel.cpu_offload else world.device)  # type: ignore[return-value]


def shard(
    stage: nn.Module,
    blocks: list[Block],
    world: World,
    parallel: ParallelConfig,
    precision: Precision,
) -> None:
    """Shard parameters: each block is one unit, and what is left is another.

    A unit's parameters are gathered for its forward pass and, unless configured otherwise, stay
    until its backward pass is done (ZeRO-2; Llama 3 trained like this). In bf16 they travel as
    bfloat16; gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy()
    if precision.dtype != torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    wrap: Callable[..., Any] = partial(
        fully_shard,
        mesh=world.fsdp_mesh,
        reshard_after_forward=parallel.reshard_after_forward,
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy(),
    )
    for block in blocks:
        wrap(block)
    wrap(stage)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed, never averaged: the loss is divided by the number of labelled
            # tokens of the global batch already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    units: list[Any] = list(blocks)
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + parallel.prefetch])
        unit.set_modules_to_backward_prefetch(units[max(0, i - parallel.prefetch) : i][::-1])
