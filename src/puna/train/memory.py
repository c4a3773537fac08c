"""Which layers of a rank are computed again in the backward pass; imports no torch."""

from __future__ import annotations

from puna.core.units import GIB
from puna.model.activations import Recompute, Shape, fit_layers, head_bytes
from puna.model.config import LlamaConfig
from puna.train.config import MemoryConfig, ParallelConfig
from puna.train.parallel.layout import StagePlan


def plan_recompute(
    memory: MemoryConfig,
    model: LlamaConfig,
    parallel: ParallelConfig,
    plan: StagePlan,
    pp_rank: int,
    n_micro: int,
    shape: Shape,
) -> dict[int, Recompute]:
    """Return, for every layer of a pipeline rank, what is computed again.

    Args:
        memory: From the configuration.
        model: The whole model.
        parallel: How the ranks share it.
        plan: The stages.
        pp_rank: Number of the rank in its pipeline.
        n_micro: Forward passes per step.
        shape: Of one forward pass of this rank.

    Raises:
        PunaError: The budget is too small.
    """
    stages = plan.of(pp_rank)
    layers = [layer for stage in stages for layer in range(*plan.layers[stage])]
    if memory.budget_gib is None:
        return {
            layer: memory.recompute if layer % memory.every == 0 else "none" for layer in layers
        }
    alive = passes_alive(parallel, pp_rank, len(stages), n_micro)
    is_last = plan.n_stages - 1 in stages
    fixed = head_bytes(model, shape) if is_last else 0
    budget = int(memory.budget_gib * GIB)
    chosen = fit_layers(model, [(alive, shape)] * len(layers), fixed, budget)
    return dict(zip(layers, chosen, strict=True))


def passes_alive(parallel: ParallelConfig, pp_rank: int, n_own: int, n_micro: int) -> int:
    """Return how many micro-batches of a stage wait for their backward pass, at most.

    Of each stage of a rank that has several, on average. 1F1B: as many as stages are to come;
    interleaved: as Megatron-LM warms up. Other schedules recompute nothing.
    """
    pp, schedule = parallel.pp, parallel.schedule
    if pp == 1:
        return 1
    if schedule in ("gpipe", "looped_bfs"):
        return n_micro
    if schedule == "1f1b":
        return min(pp - pp_rank, n_micro)
    chunks = 2 * (pp - pp_rank - 1) + (n_own - 1) * pp + 1
    return min(-(-chunks // n_own), n_micro)
