"""``puna plan fabric``: the same job on several networks."""

from __future__ import annotations

import json

import click


@click.command("fabric")
@click.option(
    "--scenario",
    type=click.Choice(("llama3", "llama2")),
    help="A cluster that Meta described, with what was published.",
)
@click.option("--model", "model_name", default="llama3-8b", show_default=True)
@click.option("--gpu", default="h100", show_default=True)
@click.option(
    "--fabric",
    "fabrics",
    multiple=True,
    help="May be given again. Default: ib:400g and roce:400g:oversub=4:qps=16.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    multiple=True,
    help="May be given again. Default: 256, 2048 and 16384.",
)
@click.option("--rows-per-gpu", type=click.FloatRange(min=0.001), default=2.0, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=8192, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def fabric(
    scenario: str | None, model_name: str, gpu: str, fabrics: tuple[str, ...],
    gpus: tuple[int, ...], rows_per_gpu: float, seq_len: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare networks at several scales, each with its own best layout, with 90 % intervals."""
    from puna.cli.model_tables import new_console, new_table
    from puna.core.stage import load_plugins
    from puna.plan.compare import SCENARIOS, collision_table, compare_fabrics, scenario_jobs
    from puna.plan.fabric import BALANCE, parse_fabric
    from puna.plan.hardware import find_gpu
    from puna.plan.job import Job, Layout, find_model

    load_plugins()
    if scenario is not None:
        job, fabrics, gpus, rows_per_gpu = scenario_jobs(scenario)
    else:
        fabrics = fabrics or ("ib:400g", "roce:400g:oversub=4:qps=16")
        gpus = gpus or (256, 2048, 16_384)
        job = Job(
            model=find_model(model_name), gpu=find_gpu(gpu), fabric=parse_fabric(fabrics[0]),
            n_gpus=gpus[0], layout=Layout(), seq_len=seq_len,
            global_batch=max(int(gpus[0] * rows_per_gpu), 1),
        )  # fmt: skip
    cells = compare_fabrics(job, fabrics, gpus, rows_per_gpu)
    hashed = collision_table(parse_fabric(fabrics[-1]))
    if as_json:
        values = {"cells": [one.to_json() for one in cells], "collisions": hashed}
        click.echo(json.dumps(values, indent=2))
        return
    console = new_console()
    table = new_table(
        "Tokens/s per GPU; open: share of exposed communication",
        "fabric", "GPUs", "layout", "mid", "90 %", "vs first", "open",
    )  # fmt: skip
    for one in cells:
        first = next(other for other in cells if other.n_gpus == one.n_gpus)
        lay, speed = one.layout, one.tokens_per_s_gpu
        table.add_row(
            one.fabric, f"{one.n_gpus:,}", f"tp{lay.tp} cp{lay.cp} pp{lay.pp}",
            f"{speed.mid:,.0f}", f"{speed.low:,.0f} to {speed.high:,.0f}",
            f"{speed.mid / first.tokens_per_s_gpu.mid - 1:+.1%}", f"{one.exposed:.1%}",
        )  # fmt: skip
    console.print(table)
    table = new_table(
        "Hashing: throughput that 16 paths leave", "flows per GPU", "p5", "p50", "p95"
    )
    for flows, *shares in hashed:
        table.add_row(str(flows), *(f"{share:.0%}" for share in shares))
    console.print(table)
    priors = ", ".join(f"{k} {mid:.0%} ({a:.0%} to {b:.0%})" for k, (mid, a, b) in BALANCE.items())
    console.print(f"load balancing, assumed: {priors}. Published step times do not identify it, ")
    console.print("because tuned runs hide their communication: give eff=... from nccl-tests.")
    if scenario is not None:
        console.print(f"published: {SCENARIOS[scenario].evidence}")
