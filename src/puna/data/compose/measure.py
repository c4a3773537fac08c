"""Relational steps of the stage: sums of groups, thresholds of parts, what was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.core.errors import PunaError
from puna.data.split import TRAIN

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import pyarrow as pa

    from puna.data.compose.solve import Part
    from puna.data.engine import Engine

_EPSILON = 1e-9
MAX_GROUPS = 10_000
"""Groups are listed in the metrics and on the card (ours)."""
GroupKey = tuple[str, int, tuple[str, ...]]
"""Split, part, values of the ``by`` columns."""


@dataclass(frozen=True)
class CountedTokens:
    """Takes the counts that ``tokens.count`` has made with the tokenizer."""

    columns: tuple[str, ...] = ("n_tokens",)

    def __call__(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return the tokens of each document, int64 [n_docs]."""
        return batch.column("n_tokens").to_numpy(zero_copy_only=False).astype(np.int64)


def group_sums(engine: Engine, rows: ir.Table, n_by: int) -> list[dict[str, Any]]:
    """Sum up documents and tokens: per split, part and group ``docs`` and ``tokens``.

    Raises:
        PunaError: There are more groups than anyone can mean.
    """
    keys = ["split_name", "part", *(f"group_{index}" for index in range(n_by))]
    sums = rows.group_by(keys).agg(docs=rows.count(), tokens=rows.tokens.sum())
    n_groups = engine.count(rows.select(keys).distinct())
    if n_groups > MAX_GROUPS:
        raise PunaError(
            f"data.compose.by makes {n_groups:,} groups, more than {MAX_GROUPS:,}",
            "group by columns with few values, such as source, language or a label",
        )
    return [
        {"split": row["split_name"], "part": row["part"], "docs": row["docs"],
         "tokens": row["tokens"], "values": tuple(row[key] for key in keys[2:])}
        for row in engine.collect(sums, keys).to_pylist()
    ]  # fmt: skip


def fixed_reads(
    engine: Engine, rows: ir.Table, factors: Mapping[int, float], folder: Path
) -> dict[int, int]:
    """Return the tokens that parts with a fixed factor read: part -> tokens, copies counted.

    Args:
        engine: The engine.
        rows: Rows of the groups kernel.
        factors: Part -> factor.
        folder: Gets the factors as a table.
    """
    if not factors:
        return {}
    table = _part_table({index: _cut(factor) for index, factor in factors.items()})
    joined = rows.filter(rows.split_name == TRAIN).inner_join(engine.put(table, folder), "part")
    times = joined.base + (joined.draw < joined.threshold).cast("int64")
    sums = joined.group_by("part").agg(reads=(joined.tokens * times).sum())
    return {row["part"]: row["reads"] for row in engine.collect(sums, ["part"]).to_pylist()}


def _cut(factor: float) -> tuple[int, float]:
    """Cut a factor into whole repetitions and the probability of one more."""
    whole = math.floor(factor + _EPSILON)
    rest = factor - whole
    return whole, rest if rest > _EPSILON else 0.0


def _part_table(parts: Mapping[int, tuple[int, float]]) -> pa.Table:
    """Return the table part, base, threshold."""
    import pyarrow as pa

    base, threshold = zip(*parts.values(), strict=True)
    return pa.table({
        "part": pa.array(list(parts), pa.int32()), "base": pa.array(base, pa.int64()),
        "threshold": pa.array(threshold, pa.float64()),
    })  # fmt: skip


def part_thresholds(
    engine: Engine, rows: ir.Table, parts: Sequence[Part], folder: Path
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Turn factors into whole repetitions and a threshold for the random draws.

    A fixed factor takes its fraction as the threshold: the choice then depends on nothing but the
    document. Where tokens are asked for (shares, a budget), the threshold is the quantile of the
    draws that gives them, to one document (or cluster), not only on average.

    Args:
        engine: The engine.
        rows: Rows of the groups kernel.
        parts: The solved parts.
        folder: Gets the table part, base, threshold.

    Returns:
        Repetitions and threshold of each part.
    """
    import ibis
    import pyarrow as pa

    base, limit = map(list, zip(*(_cut(part.factor) for part in parts), strict=True))
    wanted = {
        index: limit[index] * part.n_tokens
        for index, part in enumerate(parts)
        if part.fixed is None and limit[index] > 0
    }
    if wanted:
        table = pa.table({"part": pa.array(list(wanted), pa.int32()),
                          "wanted": pa.array(list(wanted.values()), pa.float64())})  # fmt: skip
        asked = engine.put(table, folder.with_name("wanted"))
        train = rows.filter(rows.split_name == TRAIN)
        # Documents of one cluster have one draw and stay together.
        drawn = train.group_by("part", "draw").agg(tokens=train.tokens.sum())
        window = ibis.window(group_by="part", order_by="draw", rows=(None, 0))
        drawn = drawn.mutate(before=drawn.tokens.sum().over(window) - drawn.tokens)
        drawn = drawn.inner_join(asked, "part")
        past = drawn.filter(drawn.before >= drawn.wanted)
        first = engine.collect(past.group_by("part").agg(draw=past.draw.min()), ["part"])
        limit = [1.0 if index in wanted else one for index, one in enumerate(limit)]
        for row in first.to_pylist():
            limit[row["part"]] = row["draw"]
    engine.put(_part_table(dict(enumerate(zip(base, limit, strict=True)))), folder)
    return tuple(base), tuple(limit)


def reached(
    engine: Engine, rows: ir.Table, parts: ir.Table, documents: ir.Table, n_by: int
) -> dict[GroupKey, dict[str, int]]:
    """Sum up what is read of each group in one pass, copies counted in ``tokens``.

    Args:
        engine: The engine.
        rows: Rows of the groups kernel.
        parts: Table part, base, threshold.
        documents: What the stage has written; its repetitions count.
        n_by: Number of ``by`` columns.

    Raises:
        PunaError: What was written does not follow the thresholds (never seen; a guard).
    """
    import ibis

    joined = rows.inner_join(documents.select("id", "repeat"), "id").inner_join(parts, "part")
    once_more = (joined.draw < joined.threshold).cast("int64")
    expected = ibis.cases((joined.split_name == TRAIN, joined.base + once_more), else_=1)
    joined = joined.mutate(times=joined.repeat.cast("int64"), expected=expected)
    wrong = engine.count(joined.filter(joined.times != joined.expected))
    if wrong:
        raise PunaError(f"data.compose: {wrong} documents have another `repeat` than their draws "
                        "give", "this is a fault of puna; please report it")  # fmt: skip
    keys = ["split_name", "part", *(f"group_{index}" for index in range(n_by))]
    sums = joined.group_by(keys).agg(
        docs=joined.count(), tokens=(joined.tokens * joined.times).sum()
    )
    return {
        (row["split_name"], row["part"], tuple(row[key] for key in keys[2:])): {
            "docs": row["docs"], "tokens": row["tokens"],
        }
        for row in engine.collect(sums, keys).to_pylist()
    }  # fmt: skip
