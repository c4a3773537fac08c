"""What the fp16 guard found; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from puna.core.errors import PunaError

FP16_MAX = 65504.0
"""Largest finite float16."""
FP16_ROUNDS_TO_ZERO = 2.0**-25
"""Up to this magnitude a value becomes zero: half of the smallest float16, 2**-24."""
FP16_ROUNDS_TO_NORMAL = 2.0**-14 - 2.0**-25
"""Below it a value becomes subnormal (or zero): one bit of precision less per halving."""
MAX_RELATIVE_ERROR = 2.0**-8
"""A tensor may lose this share of its norm: what storing it as bfloat16 loses at worst."""
MAX_ZEROED_SHARE = 0.01
"""Share of a tensor's values that may become zero."""
_LISTED = 10
_FIX = (
    "keep bfloat16 or float32, which reach to 3.4e38; `puna model convert --force` writes float16 "
    "all the same, with this finding beside the weights"
)

WeightProblem = Literal["not finite", "overflow", "underflow"]


@dataclass(frozen=True)
class WeightRange:
    """The values of one tensor, seen from float16.

    Attributes:
        name: Our name of the parameter.
        n_values: Values of the tensor.
        largest: The value of the largest magnitude, with its sign.
        at: Its index.
        n_not_finite: Values that are NaN or infinite before any conversion.
        n_overflow: Finite values beyond 65504.
        n_zeroed: Values other than zero that become zero.
        n_subnormal: Values that become subnormal.
        relative_error: Norm of what conversion changes, by the norm of the tensor; 0 when values
            overflow or are not finite.
    """

    name: str
    n_values: int
    largest: float
    at: tuple[int, ...]
    n_not_finite: int = 0
    n_overflow: int = 0
    n_zeroed: int = 0
    n_subnormal: int = 0
    relative_error: float = 0.0

    @property
    def problem(self) -> WeightProblem | None:
        """Why the tensor must not become float16, or None."""
        if self.n_not_finite:
            return "not finite"
        if self.n_overflow:
            return "overflow"
        lost = self.n_zeroed / max(self.n_values, 1)
        if lost > MAX_ZEROED_SHARE or self.relative_error > MAX_RELATIVE_ERROR:
            return "underflow"
        return None

    def describe(self) -> str:
        """Say what is wrong in one clause."""
        place = f"tensor {self.name}"
        if self.problem == "not finite":
            return f"{place} holds {self.n_not_finite:,} values that are not finite"
        if self.problem == "overflow":
            return (
                f"{place} holds {self.largest:,g} at {list(self.at)}, beyond float16's "
                f"{FP16_MAX:,.0f}"
            )
        return (
            f"{place} is too small for float16: {self.n_zeroed:,} of {self.n_values:,} values "
            f"become zero, {self.n_subnormal:,} lose precision (relative error "
            f"{self.relative_error:.2g}; its largest value is {self.largest:.3g} at "
            f"{list(self.at)})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the range as JSON values."""
        return {**_plain(asdict(self)), "problem": self.problem}


@dataclass(frozen=True)
class Peak:
    """The largest activation at one place of the model.

    Attributes:
        layer: Number of the block; None outside the blocks.
        place: The module and which side of it: ``layers.30.feed_forward.w2 input``.
        value: Largest magnitude, with its sign.
        row: Which sequence of the sample.
        position: Which token of that sequence.
        token_id: That token.
        channel: Index in the last dimension; of the scores, the query head.
        n_over: Values beyond 65504 at this place in the whole sample.
        factors: For the input of w2, the two numbers whose product it is: silu(w1 x) and w3 x.
    """

    layer: int | None
    place: str
    value: float
    row: int
    position: int
    token_id: int
    channel: int
    n_over: int = 0
    factors: tuple[float, float] | None = None

    @property
    def is_safe(self) -> bool:
        """Whether float16 holds the value."""
        return abs(self.value) <= FP16_MAX  # false for NaN

    def describe(self) -> str:
        """Say where and how much in one clause."""
        product = ""
        if self.factors is not None:
            product = f" (silu(w1 x) {self.factors[0]:,.7g} x w3 x {self.factors[1]:,.7g})"
        return (
            f"{self.place}: {self.value:,.7g}{product} at token {self.position} (id "
            f"{self.token_id}) of sample {self.row}, channel {self.channel}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the peak as JSON values."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class GuardReport:
    """Whether a model may become float16.

    Attributes:
        what: The model, for messages.
        weights: Every parameter, in the order of the model.
        peaks: Every place of the model, in the order of computation; empty when no activations
            were probed.
        sample: What was run: ``text``, ``random`` or ``given`` ids.
        n_rows: Sequences that were run.
        n_tokens: Tokens that were run.
    """

    what: str
    weights: Sequence[WeightRange]
    peaks: Sequence[Peak]
    sample: str
    n_rows: int
    n_tokens: int

    @cached_property
    def bad_weights(self) -> list[WeightRange]:
        """Tensors that must not become float16."""
        return [one for one in self.weights if one.problem is not None]

    @cached_property
    def overflows(self) -> list[Peak]:
        """Places whose activations float16 cannot hold, first in the order of computation."""
        return [peak for peak in self.peaks if not peak.is_safe]

    @property
    def is_safe(self) -> bool:
        """Whether nothing speaks against float16."""
        return not self.bad_weights and not self.overflows

    @cached_property
    def highest(self) -> list[Peak]:
        """The peaks nearest to the limit or beyond it, the largest first."""
        order = sorted(self.peaks, key=lambda peak: -_magnitude(peak.value))
        return order[:_LISTED]

    @property
    def headroom(self) -> float | None:
        """Limit by the largest activation: below 1 it overflows; None without a probe."""
        if not self.peaks:
            return None
        largest = _magnitude(self.highest[0].value)
        return FP16_MAX / largest if largest else float("inf")

    def findings(self) -> list[str]:
        """Return what speaks against float16, one clause each, weights first."""
        return [one.describe() for one in (*self.bad_weights, *self.overflows)]

    def summary(self) -> str:
        """Say the result in one line."""
        findings = self.findings()
        if findings:
            rest = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
            return f"not safe in float16: {findings[0]}{rest}"
        if not self.peaks:
            return "the weights fit float16; activations were not probed"
        peak = self.highest[0]
        return (
            f"safe in float16: largest activation {_magnitude(peak.value):,.6g} "
            f"({peak.place}) over {self.n_tokens} tokens, limit {FP16_MAX:,.0f}"
        )

    def raise_if_unsafe(self, fix: str = _FIX) -> None:
        """Refuse the conversion when anything speaks against it.

        Args:
            fix: What the user can do instead.

        Raises:
            PunaError: Names the first tensor or layer, its value, and how many more there are.
        """
        if not self.is_safe:
            raise PunaError(f"{self.what} is {self.summary()}", fix)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values; only what is near the limits is listed."""
        largest = max(self.weights, key=lambda one: _magnitude(one.largest), default=None)
        return {
            "dtype": "float16",
            "limit": FP16_MAX,
            "safe": self.is_safe,
            "summary": self.summary(),
            "sample": {"kind": self.sample, "rows": self.n_rows, "tokens": self.n_tokens},
            "headroom": _plain(self.headroom),
            "weights": {
                "tensors": len(self.weights),
                "largest": None if largest is None else largest.to_json(),
                "unsafe": [one.to_json() for one in self.bad_weights],
            },
            "activations": {
                "places": len(self.peaks),
                "highest": [peak.to_json() for peak in self.highest],
                "unsafe": [peak.to_json() for peak in self.overflows],
            },
        }


def _magnitude(value: float) -> float:
    return abs(value) if value == value else float("inf")  # NaN is beyond everything


def _plain(value: Any) -> Any:
    """Write numbers that JSON lacks as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
