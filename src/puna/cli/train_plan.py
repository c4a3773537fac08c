"""``puna train plan``: what a training of any size will need, before any of it exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from puna.cli.model_tables import new_console, new_table

if TYPE_CHECKING:
    from puna.train.dryrun.plan import JobPlan

_STAGE = "train.pretrain"
_COLUMNS = (
    ("parameters", "params"), ("gradients", "grads"), ("optimizer", "optim"),
    ("average", "average"), ("gathered parameters", "gathered"),
    ("waiting gradients", "waiting"), ("activations", "activ."), ("logits of a chunk", "logits"),
)  # fmt: skip


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--world", type=click.IntRange(min=1), help="Ranks; default: nproc of the recipe.")
@click.option(
    "--device-memory", default="80GB", show_default=True, help="Of one device, to compare with."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(
    recipe: Path, overrides: tuple[str, ...], world: int | None, device_memory: str, as_json: bool
) -> None:
    """Predict memory and traffic of a training with any number of ranks, without running it.

    Builds one rank of each kind of RECIPE's [train.pretrain] with the code that trains, on tensors
    without memory and a group of ranks that does not exist, checks how everything is divided, and
    takes a step. KEY=VALUE overrides a key of the recipe.
    """
    from puna.cli.common import load_stages
    from puna.core.errors import PunaError
    from puna.core.recipe import load_recipe
    from puna.train.config import PretrainConfig
    from puna.train.dryrun.plan import parse_bytes, plan_job

    load_stages()
    limit = parse_bytes(device_memory, "--device-memory")
    if world is not None:
        overrides = (*overrides, f"{_STAGE}.nproc={world}")
    configs = load_recipe(recipe, overrides).stage_configs()
    cfg = configs[_STAGE][1] if _STAGE in configs else None
    if not isinstance(cfg, PretrainConfig):
        raise PunaError(f"{recipe} has no [{_STAGE}]", "a plan is made of that section")
    if cfg.init is not None:
        raise PunaError(
            f"{recipe} goes on from a checkpoint, whose shape is not known before it is read",
            f"plan with {_STAGE}.model, the shape of the checkpoint, instead of init",
        )
    found = plan_job(cfg, cfg.model.resolve())
    if as_json:
        click.echo(json.dumps(found.to_json(limit), indent=2))
        return
    _print(found, limit)


def _print(plan: JobPlan, limit: int) -> None:
    from puna.core.units import format_bytes, format_count

    console, layout = new_console(), plan.layout
    shape = " x ".join(
        f"{name} {size}"
        for name, size in (
            ("TP", layout.tp), ("CP", layout.cp), ("PP", layout.pp), ("FSDP", layout.shard),
            ("copies", layout.replicate),
        )
        if size > 1
    )  # fmt: skip
    console.print(
        f"Prediction for {layout.n_ranks:,} ranks ({shape or 'one'}): "
        f"{format_count(plan.n_params)} parameters, {plan.tokens_per_step:,} tokens per step in "
        f"{plan.n_micro} micro-batches, {plan.dtype}"
    )
    _print_memory(plan, limit)
    _print_collectives(plan)
    for line in plan.uneven:
        console.print(f"uneven: {line}")
    for line in plan.notes:
        console.print(f"note: {line}")
    largest = plan.largest
    is_enough = largest.total_bytes <= limit
    console.print(
        f"{'fits' if is_enough else 'DOES NOT FIT'}: {format_bytes(largest.total_bytes)} of "
        f"{format_bytes(limit)} at pipeline rank {largest.pp_rank} (prediction)",
        style="green" if is_enough else "red",
    )
    console.print(
        f"built {plan.n_built} ranks, stepped through {plan.n_stepped} of them, "
        f"in {plan.seconds:.1f} s"
    )


def _print_memory(plan: JobPlan, limit: int) -> None:
    from puna.core.units import GIB, format_count

    columns = [pair for pair in _COLUMNS if any(rank.n_bytes.get(pair[0]) for rank in plan.ranks)]
    table = new_table(
        "Memory of a rank at each place of the pipeline, GiB", "PP", "layers", "params of stage",
        *(label for _, label in columns), "total", "of device", tight=True,
    )  # fmt: skip
    for rank in plan.ranks:
        spans = " ".join(
            f"{start}-{stop - 1}" if stop > start else "-" for _, start, stop in rank.stages
        )
        marks = ("E" if rank.has_embedding else "") + ("H" if rank.has_head else "")
        table.add_row(
            str(rank.pp_rank), f"{spans} {marks}".strip(), format_count(rank.n_params),
            *(f"{rank.n_bytes.get(name, 0) / GIB:.2f}" for name, _ in columns),
            f"{rank.total_bytes / GIB:.2f}", f"{rank.total_bytes / limit:.0%}",
        )  # fmt: skip
    new_console().print(table)
    new_console().print("E: with the embedding, H: with the head and the loss")


def _print_collectives(plan: JobPlan) -> None:
    from puna.core.units import format_bytes

    kinds = {rank.recorded_at: rank for rank in plan.ranks if rank.pp_rank == rank.recorded_at}
    table = new_table(
        "Collectives of a rank in one step", "PP", "dimension", "kind", "ranks", "calls",
        "bytes of the tensors", "sent (ring)",
    )  # fmt: skip
    for rank in kinds.values():
        sums: dict[tuple[str, str, int], list[float]] = {}
        for one, count in rank.collectives.items():
            total = sums.setdefault((one.dim, one.kind, one.n_ranks), [0, 0, 0])
            for at, value in enumerate((count, count * one.n_bytes, count * one.sent_bytes)):
                total[at] += value
        same = [str(other.pp_rank) for other in plan.ranks if other.recorded_at == rank.pp_rank]
        name = same[0] if len(same) == 1 else f"{same[0]}..{same[-1]}"
        for (dim, kind, n_ranks), (count, n_bytes, sent) in sorted(sums.items()):
            table.add_row(
                name, dim, kind, f"{n_ranks:,}", f"{int(count):,}", format_bytes(n_bytes),
                format_bytes(sent),
            )  # fmt: skip
            name = ""
        table.add_section()
    new_console().print(table)
