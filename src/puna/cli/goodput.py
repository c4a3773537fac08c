"""``puna goodput``: where the time of a training went, what went wrong, and what that will cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from puna.cli.model_tables import new_console, new_table


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--stage", help="The stage whose training it is; the last one that trained.")
@click.option("--page", type=click.Path(path_type=Path), help="Also write a page with pictures.")
@click.option("--gpus", "n_gpus", type=click.IntRange(min=1), help="Project to this many GPUs.")
@click.option("--days", type=click.FloatRange(min=0.1, max=3650), default=54.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def goodput(
    run: Path, stage: str | None, page: Path | None, n_gpus: int | None, days: float, as_json: bool
) -> None:
    """Account for every second of the last training of RUN, the folder of a run.

    With --gpus: what this run's detection, restart and checkpoint times would make of a training on
    that many GPUs, with failures as often as published (puna plan failures).
    """
    from puna.core.ledger import LEDGER_FILE
    from puna.ui.report.collect.training import describe_training

    own, others = _events(run / LEDGER_FILE, stage)
    found = describe_training(own)
    answer: dict[str, Any] = {
        "run": str(run), "stage": own[0]["stage"], "goodput": found["goodput"],
        "incidents": found["incidents"], "attempts": found["attempts"],
        "prediction": found["prediction"],
    }  # fmt: skip
    if n_gpus is not None:
        answer["projection"] = _projection(own, found["goodput"]["faults"], n_gpus, days)
    if page is not None:
        from puna.ui.goodput_page import write_page

        write_page(answer, page)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    _print(answer)
    if others:
        click.echo(f"also trained here: {', '.join(others)} (--stage)")
    if page is not None:
        click.echo(f"page: {page}")


def _events(ledger: Path, stage: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the events of the last training job of a run, or of a stage; other stages that train.

    Raises:
        PunaError: There is none.
    """
    from puna.core.errors import PunaError
    from puna.core.ledger import read_events
    from puna.ui.report.collect.training import job_events

    if not ledger.is_file():
        raise PunaError(
            f"{ledger.parent} is not the folder of a run: it has no {ledger.name}",
            "give the folder that `puna run` made, below runs/",
        )
    events = [e for e in read_events(ledger) if "stage" in e]
    jobs = [e["stage"] for e in events if e.get("job") is not None]
    chosen = stage or (jobs[-1] if jobs else None)
    if chosen not in jobs:
        where = f"stage {stage} of {ledger.parent}" if stage else str(ledger.parent)
        raise PunaError(f"{where} has trained nothing", "give a run, or a stage, that trains")
    others = sorted(set(jobs) - {chosen})
    return job_events([e for e in events if e["stage"] == chosen]), others


def _projection(
    own: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]], n_gpus: int, days: float
) -> dict[str, Any]:
    """Say what a large training would make of this run's times.

    Raises:
        PunaError: The run has no fault and no checkpoint to learn from.
    """
    from puna.core.errors import PunaError
    from puna.plan import failures as f

    detect = [fault["detect_s"] for fault in faults if fault.get("detect_s") is not None]
    recover = [fault["recover_s"] for fault in faults if fault.get("recover_s") is not None]
    stalls = {
        kind: [e["seconds"] for e in own if e["kind"] == f"train.{kind}" and "seconds" in e]
        for kind in ("snapshot", "checkpoint")
    }
    if not recover or not stalls["checkpoint"]:
        raise PunaError(
            "the run recovered from no fault, so its restart is not known",
            "make it fail once: train.pretrain.fault.rank=0 train.pretrain.fault.step=5; or give "
            "the times to `puna plan failures`",
        )
    load_s = 0.0  # it is a part of the time to recover
    tiers = [f.Tier(name="disk", survives="many", every_s=600, stall_s=max(stalls["checkpoint"]),
                    load_s=load_s)]  # fmt: skip
    if stalls["snapshot"]:
        tiers.insert(0, f.Tier(name="memory", survives="process", every_s=60,
                               stall_s=median(stalls["snapshot"]), load_s=load_s))  # fmt: skip
    cluster = f.at_best_intervals(
        n_gpus,
        f.Reliability(tiers=tuple(tiers), detect_s=median(detect), restart_s=median(recover)),
    )
    return {
        "n_gpus": n_gpus, "days": days, "cluster": cluster.model_dump(),
        "simulated": vars(f.simulate(n_gpus, cluster, days)),
        "sensitivity": [
            {"change": change, "goodput": f.closed_form(n_gpus, changed)}
            for change, changed in _changes(cluster)
        ],
    }  # fmt: skip


def _changes(cluster: Any) -> list[tuple[str, Any]]:
    tiers = tuple(t.model_copy(update={"stall_s": 10 * t.stall_s}) for t in cluster.tiers)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("as measured", {}),
        ("checkpoints 10 times as slow", {"tiers": tiers}),
        ("restart 10 times as slow", {"restart_s": 10 * cluster.restart_s}),
        ("detection 10 times as slow", {"detect_s": 10 * cluster.detect_s}),
        ("failures twice as often", {"mtbf_factor": cluster.mtbf_factor / 2}),
    ]
    return [(text, cluster.model_copy(update=update)) for text, update in changes]


def _print(answer: dict[str, Any]) -> None:
    from puna.core.units import format_duration
    from puna.ui.report.charts.time import BUCKET_NAMES

    console, found = new_console(), answer["goodput"]
    wall_s = found["wall_s"]
    console.print(f"{answer['stage']}: goodput {found['goodput']:.1%} of {format_duration(wall_s)}")
    table = new_table(None, "part", "seconds", "share")
    for bucket, seconds in found["buckets"].items():
        share = seconds / wall_s if wall_s else 0.0
        table.add_row(BUCKET_NAMES[bucket], f"{seconds:,.2f}", f"{share:.1%}")
    table.add_row("in all", f"{sum(found['buckets'].values()):,.2f}", "")
    console.print(table)
    if (predicted := answer["prediction"]) is not None and predicted["actual_s"]:
        console.print(
            f"a step took {format_duration(predicted['actual_s'])}, predicted were "
            f"{format_duration(predicted['step_s'])} ({predicted['ratio'] - 1:+.0%})"
        )
    for incident in answer["incidents"]:
        console.print(_in_words(incident), markup=False)
    if not answer["incidents"]:
        console.print("no incident: it ran through in one attempt")
    if "projection" in answer:
        _print_projection(console, answer["projection"])


def _in_words(incident: dict[str, Any]) -> str:
    """Tell an incident in a sentence."""
    from puna.core.units import format_duration

    words = [f"after {format_duration(incident['after_s'])}: "]
    words.append(incident.get("message") or incident["what"])
    if incident.get("on_purpose"):
        words.append(" (on purpose)")
    if incident.get("detect_s") is not None:
        words.append(f"; noticed after {format_duration(incident['detect_s'])}")
    if incident.get("recover_s") is not None:
        words.append(f", training again {format_duration(incident['recover_s'])} later")
        words.append(f", {incident['steps_lost']} steps computed again")
    elif incident["is_fault"]:
        words.append("; not recovered")
    return "".join(words)


def _print_projection(console: Any, projection: dict[str, Any]) -> None:
    got, cluster = projection["simulated"], projection["cluster"]
    console.print(
        f"on {projection['n_gpus']:,} GPUs for {projection['days']:g} days with this run's times: "
        f"effective training time {got['p50']:.1%} (5 to 95 % of simulated runs: {got['p5']:.1%} "
        f"to {got['p95']:.1%}), {got['interruptions']:.0f} interruptions"
    )
    tiers = ", ".join(
        f"{t['name']} every {t['every_s']:.0f} s ({t['stall_s']:.2f} s)" for t in cluster["tiers"]
    )
    console.print(
        f"assumed: detection {cluster['detect_s']:.2f} s, restart {cluster['restart_s']:.1f} s, "
        f"checkpoints {tiers}: a small model's times, which larger states and clusters raise"
    )
    table = new_table("What it depends on", "change", "effective time")
    for row in projection["sensitivity"]:
        table.add_row(row["change"], f"{row['goodput']:.1%}")
    console.print(table)
