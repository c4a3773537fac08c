"""Stage ``report``: one self-contained page about a run, and the numbers behind it."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from puna.core.config import Config
from puna.core.fsio import write_json, write_text
from puna.core.ledger import Ledger
from puna.core.stage import Artifacts, Metrics, stage
from puna.core.units import format_bytes
from puna.data.chain import DATA_STAGES

REPORT_FILE = "report.html"
NUMBERS_FILE = "report.json"


class ReportConfig(Config):
    """The report of a run."""

    title: str = Field(default="", max_length=200)
    """Heading; the name of the run when empty."""
    max_reasons: int = Field(default=8, ge=1)
    """Rejection reasons named per stage; the rest is summed up in one line."""
    max_samples: int = Field(default=12, ge=0)
    """Samples shown."""


@stage(
    "report",
    needs={
        **{f"{name.rpartition('.')[2]}?": name for name in DATA_STAGES},
        "tokenizer?": "tokens.train|tokens.use|tokens.import",
        "tokens?": "tokens.encode",
        "pretrain?": "train.pretrain",
        "pairs?": "post.annotated|post.pairs",
        "sft?": "post.sft",
        "bpb?": "eval.bpb",
        "samples?": "eval.samples",
    },
)
def make_report(cfg: ReportConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Write one self-contained page about the run, and the numbers behind it.

    Writes ``report.html`` (no script, no request to anywhere) and ``report.json``. A recipe with
    only some of the stages gives a report of what there is.
    """
    from puna.ui.report.collect import collect
    from puna.ui.report.render import render

    start_s = time.monotonic()
    value = collect(inputs, events.path, title=cfg.title, max_reasons=cfg.max_reasons)
    page = render(value, max_samples=cfg.max_samples)
    write_json(out / NUMBERS_FILE, value)
    write_text(out / REPORT_FILE, page)
    n_bytes = len(page.encode())
    return {
        "seconds": time.monotonic() - start_s,
        "n_bytes": n_bytes,
        "n_stages": len(inputs),
        "headline": f"{len(inputs)} stages on one page of {format_bytes(n_bytes)}",
    }
