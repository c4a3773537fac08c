"""The page of ``puna data report``: funnel, signals, margins, before and after, in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from puna.core.artifact import ARTIFACT_FILE, Artifact
from puna.core.fsio import write_json, write_text
from puna.data.chain import DATA_STAGES
from puna.data.flow import finished
from puna.data.report.collect import Settings, collect_data
from puna.ui.report.charts.frame import colour_of, figure
from puna.ui.report.charts.funnel import draw_funnel
from puna.ui.report.charts.histogram import CARD_WIDTH, Group, draw_histogram, draw_pairs
from puna.ui.report.collect.data import LABELS, data_section
from puna.ui.report.render import css, environment

PAGE_FILE = "data-report.html"
GROUPS: tuple[Group, ...] = (
    ("rejected_here", "c4", "rejected for it"),
    ("rejected_otherwise", "c7", "rejected for something else"),
    ("kept", "c2", "kept"),
)
_LENGTHS: tuple[Group, ...] = (("before", "c7", "before"),)
_TABLE: tuple[Group, ...] = (("rejected", "c4", "rejected"), ("kept", "c2", "kept"))
_MAX_SOURCES = 8
_MAX_LANGUAGES = 12


def collect_page(
    run_dir: Path, settings: Settings, *, on_step: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Gather the values of the page: those of the data, the funnel, and tokens if there are any.

    Args:
        run_dir: Folder of the run.
        settings: How much is looked at.
        on_step: Told what is looked at next.

    Returns:
        JSON values.

    Raises:
        PunaError: There is no such run, or no data stage of it is finished.
    """
    value = collect_data(run_dir, settings, on_step=on_step)
    tokens = None
    if (run_dir / "tokens.encode" / ARTIFACT_FILE).is_file():
        from puna.ui.report.collect.tokens import tokens_section

        tokens = tokens_section({"tokens": Artifact(run_dir / "tokens.encode")})
    section = data_section(list(finished(run_dir).values()), tokens, 3)
    names = ("n_docs", "n_tokens", "n_bytes")
    value["tokens"] = None if tokens is None else {name: tokens[name] for name in names}
    value["funnel"] = section
    return value


def write_page(value: dict[str, Any], page: Path, numbers: Path | None) -> int:
    """Write the page, and the numbers behind it if a file for them is given; return its bytes."""
    html = render_page(value)
    if numbers is not None:
        write_json(numbers, value)
    write_text(page, html)
    return len(html.encode())


def render_page(value: dict[str, Any]) -> str:
    """Draw the collected values as one HTML page without a script or a request to anywhere."""
    sources = value["funnel"]["sources"] if value["funnel"] else []
    made = environment()
    made.filters["num"] = _number
    done = [stage["stage"] for stage in value["stages"]]
    return made.get_template("data_report.html.j2").render(
        value,
        css=css("report.css", "data_report.css"),
        figures=_figures(value),
        signal_figures=[_signal_figures(i, stage) for i, stage in enumerate(value["stages"])],
        chart_figures=[_chart_figures(i, stage) for i, stage in enumerate(value["stages"])],
        colours=colour_of(sources),
        groups=GROUPS,
        labels=LABELS,
        shown_sources=[_shown_sources(stage) for stage in value["stages"]],
        margins=[_margins(stage) for stage in value["stages"]],
        max_languages=_MAX_LANGUAGES,
        absent=[name for name in DATA_STAGES if name not in done],
    )


def _number(value: float | None) -> str:
    """Write a measured value shortly, whole numbers in full."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _shown_sources(stage: dict[str, Any]) -> list[str]:
    """Return the sources that are columns of the table of reasons, those with most documents."""
    rows = sorted(stage["flow"], key=lambda row: (-row["in_docs"], row["source"]))
    return [row["source"] for row in rows[:_MAX_SOURCES]] if len(rows) > 1 else []


def _margins(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """Join what was rejected and what was kept beside the threshold of each reason."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for signal in stage["signals"]:
        for check in signal["checks"]:
            if check["fails"] is not None:
                kept.setdefault(check["reason"], []).extend(check["kept"])
    return [
        {**reason, "kept": kept.get(reason["reason"])}
        for reason in stage["reasons"]
        if reason["rejected"]
    ]


def _figures(value: dict[str, Any]) -> dict[str, Markup]:
    figures: dict[str, Markup] = {}
    section, corpus = value["funnel"], value["corpus"]
    if section is not None:
        figures["docs"] = figure("docs", lambda w, n: draw_funnel(section, "docs", w, n))
        figures["bytes"] = figure("bytes", lambda w, n: draw_funnel(section, "bytes", w, n))
    after = corpus["after"]
    if corpus["lengths"] is not None:
        outline = "after" if after is not None else None
        drawn = draw_histogram(
            corpus["lengths"], _LENGTHS, [], title="Bytes per document", width=CARD_WIDTH,
            name="lengths", outline=outline,
        )  # fmt: skip
        figures["lengths"] = drawn.markup()
    for name, rows in (
        ("sources", _pairs(corpus, _source_shares)),
        ("languages", _pairs(corpus, _language_shares)),
        ("domains", _pairs(corpus, _domain_shares)),
    ):
        if rows:
            drawn = draw_pairs(rows, title=f"Shares of {name}", width=CARD_WIDTH, name=name)
            figures[name] = drawn.markup()
    return figures


def _pairs(
    corpus: dict[str, Any], shares: Callable[[dict[str, Any]], dict[str, float]]
) -> list[tuple[str, float, float | None]]:
    """Return the eight largest shares before, each with that after."""
    before = shares(corpus["before"])
    after = shares(corpus["after"]) if corpus["after"] is not None else None
    names = sorted(before, key=lambda name: (-before[name], name))[:8]
    return [(name, before[name], None if after is None else after.get(name, 0.0)) for name in names]


def _source_shares(part: dict[str, Any]) -> dict[str, float]:
    total = max(part["docs"], 1)
    return {name: row["docs"] / total for name, row in part["by_source"].items()}


def _language_shares(part: dict[str, Any]) -> dict[str, float]:
    sample = part["sample"]
    shares = {one["name"]: one["share"] for one in sample["languages"]}
    return {**shares, "(program code)": sample["code_share"]} if sample["code_docs"] else shares


def _domain_shares(part: dict[str, Any]) -> dict[str, float]:
    return {one["name"]: one["share"] for one in part["domains"]}


def _signal_figures(index: int, stage: dict[str, Any]) -> list[Markup | None]:
    """Draw the signals of a stage; None where nothing was measured."""
    figures: list[Markup | None] = []
    for number, signal in enumerate(stage["signals"]):
        if signal["histogram"] is None:
            figures.append(None)
            continue
        marks = [
            (one["value"], check["fails"])
            for check in signal["checks"]
            for one in check["thresholds"]
        ]
        drawn = draw_histogram(
            signal["histogram"], GROUPS, marks, title=signal["title"], width=CARD_WIDTH,
            name=f"signal-{index}-{number}",
        )  # fmt: skip
        figures.append(drawn.markup())
    return figures


def _chart_figures(index: int, stage: dict[str, Any]) -> list[Markup]:
    figures = []
    for number, chart in enumerate(stage["charts"]):
        groups: Sequence[Group] = [g for g in _TABLE if g[0] in chart["histogram"]["counts"]]
        drawn = draw_histogram(
            chart["histogram"], groups, [(one, None) for one in chart["thresholds"]],
            title=chart["title"], width=CARD_WIDTH, name=f"chart-{index}-{number}",
        )  # fmt: skip
        figures.append(drawn.markup())
    return figures
