"""The SVG builder: ticks, scales, thinning and escaping hold for any input."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from puna.ui.report.svg import (
    Scale,
    Svg,
    nice_ticks,
    number,
    padded,
    polyline_path,
    thin_out,
    tick_text,
)

finite = st.floats(min_value=-1e9, max_value=1e9)
printable = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")))


@given(low=finite, span=st.floats(min_value=1e-6, max_value=1e9), n=st.integers(1, 12))
def test_ticks_are_round_even_and_inside(low: float, span: float, n: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, n)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert len(ticks) <= n + 2
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3, abs_tol=slack) for step in steps)


@given(finite)
def test_numbers_are_short_and_close(value: float) -> None:
    text = number(value)
    assert text != "-0"
    assert abs(float(text) - value) <= 0.0501 + abs(value) * 1e-12


@given(st.lists(finite, max_size=30), st.booleans())
def test_padded_range_holds_the_values(values: list[float], zero: bool) -> None:
    low, high = padded([*values, math.nan, math.inf], zero=zero)
    assert low < high
    if not zero:
        assert all(low <= value <= high for value in values)


@given(low=finite, span=st.floats(min_value=1e-3, max_value=1e6), share=st.floats(0, 1))
def test_scale_is_linear(low: float, span: float, share: float) -> None:
    scale = Scale(low, low + span, 10.0, 110.0)
    assert math.isclose(scale(low + share * span), 10 + 100 * share, abs_tol=1e-2)
    assert Scale(3.0, 3.0, 0.0, 10.0)(3.0) == 5.0


@given(st.lists(finite, max_size=400), st.integers(2, 50))
def test_thinning_keeps_order_and_extremes(values: list[float], n_most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    kept = thin_out(points, n_most)
    assert len(kept) <= max(n_most, 2)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    if values:
        assert max(y for _, y in kept) == max(values)
        assert min(y for _, y in kept) == min(values)


@given(text=printable, tip=printable, attribute=printable)
def test_drawing_is_well_formed_with_any_text(text: str, tip: str, attribute: str) -> None:
    svg = Svg(10, 10, text, tip, "name")
    svg.text(1, 2, text, cls=attribute, tip=tip)
    root = ET.fromstring(str(svg.markup()))
    title, desc, drawn = root
    assert (title.text or "") == text
    assert (desc.text or "") == tip
    assert drawn.tag == "text"
    assert "".join(drawn.itertext()) == tip + text


def test_line_is_interrupted_where_there_is_no_value() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 4.0), (4.0, 5.25)]
    assert polyline_path(points) == "M0,1L1,2M3,4L4,5.2"


def test_tick_texts() -> None:
    shown = {0: "0", 3e-4: "3e-4", 2.5e-3: "2.5e-3", 0.5: "0.5", 8: "8", 1500: "1500",
             20_000: "20k", 2_500_000: "2.5M"}  # fmt: skip
    assert {value: tick_text(value) for value in shown} == shown
