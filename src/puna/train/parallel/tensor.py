"""Tensor parallel: the ranks share each matrix, and between the matrices the tokens.

The plan of Megatron-LM (Shoeybi et al. 2019; sequence parallel: Korthikanti et al. 2022) in
PyTorch's own words: the first matrices of a block are cut by rows, the last ones by columns, norms
and the residual stream by tokens; the embedding and the head are cut by vocabulary. Every parameter
becomes a DTensor, norms too: clipping and optimiser refuse a mixture.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.model.llama import Block


def share_block(block: Block, mesh: DeviceMesh) -> None:
    """Share the matrices of one block."""
    tokens, whole = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(tokens, None, None), desired_input_layouts=(whole, None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=tokens),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=tokens),
    }
    parallelize_module(block, mesh, plan)


def share_ends(stage: nn.Module, mesh: DeviceMesh) -> None:
    """Share what a stage has besides blocks: embedding, last norm, head."""
    plan: dict[str, ParallelStyle] = {}
    names = {name for name, child in stage.named_children() if child is not None}
    if "tok_embeddings" in names:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if "norm" in names:
        plan["norm"] = SequenceParallel(use_local_output=True)
    if "output" in names:
        plan["output"] = ColwiseParallel()
    if plan:
        parallelize_module(stage, mesh, plan)
