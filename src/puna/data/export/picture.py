"""The picture of a composition: bars of tokens by source, language, domain and licence, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from puna.core.units import format_count
from puna.data.export.markdown import plain

WIDTH, LABEL_WIDTH, NUMBER_WIDTH, BAR_HEIGHT, GAP = 860, 230, 180, 16, 6
MAX_BARS = 16
ONCE, AGAIN = "#7a5c3e", "#d3b28c"
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.h{font-weight:600}.n{fill:#555}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.n{fill:#aaa}}"
)


def picture(card: Mapping[str, Any]) -> str:
    """Draw the composition of a card.

    Each bar is the tokens of one pass over a group: dark, each document once; light, what
    repetition adds. The bars of a panel share a scale, and the rest is summed up in the last.
    """
    counts = card["counts"]
    panels = [
        (name.removeprefix("by_").removeprefix("metadata."), groups)
        for name, groups in counts.items()
        if name.startswith("by_") and isinstance(groups, Mapping)
    ]
    licences = dict(card["licences"]["known"])
    if licences and card["licences"]["unknown_docs"]:
        licences["unknown"] = card["licences"]["unknown"]
    if licences:
        panels.append(("licence", licences))
    parts, y = [], 28
    for title, groups in panels:
        drawn, y = _panel(title, groups, y)
        parts += drawn
    kind = "counted" if counts["token_counts"] == "tokenizer" else "estimated"
    legend = (
        f'<rect x="10" y="{y}" width="12" height="12" fill="{ONCE}"/>'
        f'<text x="28" y="{y + 11}">tokens ({kind}), each document once</text>'
        f'<rect x="330" y="{y}" width="12" height="12" fill="{AGAIN}"/>'
        f'<text x="348" y="{y + 11}">added by repetition</text>'
    )
    height = y + 26
    title = escape(f"Composition of {plain(card['name'])}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{title}"><title>{title}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}{legend}</svg>\n"
    )


def _panel(title: str, groups: Mapping[str, Mapping[str, int]], y: int) -> tuple[list[str], int]:
    """Draw a panel from ``y`` downwards; return its elements and where it ends."""
    rows = sorted(groups.items(), key=lambda item: (-item[1]["tokens_read"], item[0]))
    if len(rows) > MAX_BARS:
        rest = rows[MAX_BARS - 1 :]
        sums = {key: sum(one[key] for _, one in rest) for key in ("n_tokens", "tokens_read")}
        rows = [*rows[: MAX_BARS - 1], (f"{len(rest)} others", sums)]
    total = sum(one["tokens_read"] for _, one in rows) or 1
    longest = max((max(one["tokens_read"], one["n_tokens"]) for _, one in rows), default=1) or 1
    room = WIDTH - LABEL_WIDTH - NUMBER_WIDTH
    parts = [f'<text class="h" x="10" y="{y}">by {escape(plain(title))}</text>']
    y += 10
    for name, one in rows:
        once = room * one["n_tokens"] / longest
        again = room * (one["tokens_read"] - one["n_tokens"]) / longest
        label = plain(name)
        label = label if len(label) <= 28 else f"{label[:27]}…"
        base = y + 13
        parts.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{base}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{once:.1f}" height="{BAR_HEIGHT}" '
            f'fill="{ONCE}"/>'
            f'<rect x="{LABEL_WIDTH + once:.1f}" y="{y}" width="{again:.1f}" '
            f'height="{BAR_HEIGHT}" fill="{AGAIN}"/>'
            f'<text class="n" x="{LABEL_WIDTH + once + again + 6:.1f}" y="{base}">'
            f"{format_count(one['tokens_read'])} · {one['tokens_read'] / total:.1%}</text>"
        )
        y += BAR_HEIGHT + GAP
    return parts, y + 24
