"""Reads the trace of a rank: where the time went, by part of the model and by kernel.

The trace is the one that a person opens (Chrome's trace format, as PyTorch's profiler writes it),
so the page and the picture cannot disagree. Imports no torch.

An operation's own time is what its children leave. It counts to the innermost mark around it
(``puna.attention`` and so on); in the backward pass, where no module runs, to the part of the
operation whose gradient it computes, which the sequence numbers of autograd tell. Waiting for other
ranks counts as communication wherever it happens. On a GPU the kernels are counted instead of the
host, each to the part of the operation that launched it.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "puna."
"""Start of the names of our marks in a trace."""
STEP_MARK = "puna.step"
PARTS: Mapping[str, str] = {
    "attention": "attention", "feed_forward": "feed-forward", "norm": "norms",
    "head": "head and loss", "embedding": "embedding", "optimizer": "optimiser",
    "communication": "communication", "data": "data", "other": "other",
}  # fmt: skip
"""Parts of a step, in the order of the page, and what they are called."""
_COMMUNICATION = (
    "c10d::", "gloo:", "nccl:", "nccldevkernel", "_c10d_functional::", "record_param_comms",
    "fsdp::all_gather (", "fsdp::post_backward_rs_wait", "all_gather_into_tensor",
)  # fmt: skip
_BACKWARD = "autograd::engine::evaluate_function"
_KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}
_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "python_function"}
_NO_SEQUENCE = 1 << 62


@dataclass
class Kernel:
    """All calls of one operation.

    Attributes:
        name: As in the trace.
        n_calls: In the profiled steps.
        seconds: Their own time, in all.
        flops: Of their matrix products, in all; 0 for what multiplies no matrices.
        kind: ``product``, ``attention`` or ``other``.
    """

    name: str
    n_calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    kind: str = "other"


@dataclass
class Breakdown:
    """Where the time of the profiled steps of one rank went.

    Attributes:
        n_steps: Profiled steps.
        seconds: Wall time of them.
        parts: Seconds of each of :data:`PARTS`; they add up to ``seconds`` on a CPU, and to the
            time of the kernels, with ``other`` for the idle GPU, on a GPU.
        kernels: By own time, largest first.
        without_flops: Seconds of the model's parts in operations that multiply no matrices.
        is_gpu: Whether kernels of a GPU were counted.
    """

    n_steps: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    without_flops: float = 0.0
    is_gpu: bool = False

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products and attention that were computed."""
        return sum(kernel.flops for kernel in self.kernels)

    def gap(self, peak_flops: float) -> list[tuple[str, float]]:
        """Split the time of a step into what the products need at the peak, and the rest.

        Args:
            peak_flops: Of this rank, FLOP/s.

        Returns:
            Names and seconds per step; they add up to the step. A product can be faster than the
            measured peak: then its line is negative.
        """
        at_peak = self.flops / peak_flops
        slower = {"product": 0.0, "attention": 0.0}
        for kernel in self.kernels:
            if kernel.kind in slower:
                slower[kernel.kind] += kernel.seconds - kernel.flops / peak_flops
        lines = [
            ("all products at the peak", at_peak),
            ("matrix products below the peak", slower["product"]),
            ("attention below the peak", slower["attention"]),
            ("operations without products", self.without_flops),
            *((PARTS[name], self.parts[name]) for name in (
                "optimizer", "communication", "data", "other")),
        ]  # fmt: skip
        return [(name, seconds / self.n_steps) for name, seconds in lines]


@dataclass(slots=True)
class _Span:
    name: str
    start: float
    end: float
    args: Mapping[str, Any]
    own: float = 0.0
    parent: _Span | None = None
    part: str | None = None


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Read the events of a trace, packed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def break_down(events: Sequence[Mapping[str, Any]]) -> Breakdown:
    """Break the profiled steps of a rank down.

    Args:
        events: Of :func:`read_trace`.

    Raises:
        ValueError: There is no mark of a step.
    """
    threads: dict[Any, list[_Span]] = defaultdict(list)
    kernels = []
    for event in events:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        start, args = float(event["ts"]), event.get("args", {})
        span = _Span(str(event["name"]), start, start + float(event["dur"]), args)
        if event.get("cat") in _KERNELS:
            kernels.append(span)
        elif event.get("cat") in _HOST:
            threads[event.get("tid")].append(span)
    for spans in threads.values():
        _nest(spans)
    main = next(
        (spans for spans in threads.values() if any(s.name == STEP_MARK for s in spans)), None
    )
    if main is None:
        raise ValueError(f"the trace has no mark {STEP_MARK}")
    forward = _forward_parts(threads.values())
    steps = [span for span in main if span.name == STEP_MARK]
    found = Breakdown(len(steps), sum(span.end - span.start for span in steps) / 1e6)
    if kernels:
        _count_kernels(found, kernels, threads.values(), forward)
    else:
        _count(found, ((span, _part(span, forward), span.own) for span in _inside(main)))
    found.kernels.sort(key=lambda kernel: -kernel.seconds)
    return found


def _nest(spans: list[_Span]) -> None:
    """Give every span its parent and its own time; sorts the spans by start."""
    spans.sort(key=lambda span: (span.start, -span.end))
    stack: list[_Span] = []
    for span in spans:
        while stack and stack[-1].end <= span.start:
            stack.pop()
        span.own = span.end - span.start
        if stack:
            span.parent = stack[-1]
            span.end = min(span.end, stack[-1].end)  # rounding of the clock
            span.own = span.end - span.start
            stack[-1].own -= span.own
        stack.append(span)


def _inside(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Yield the spans within a step, the step itself included."""
    for span in spans:
        if any(one.name == STEP_MARK for one in _upwards(span)):
            yield span


def _upwards(span: _Span | None) -> Iterator[_Span]:
    while span is not None:
        yield span
        span = span.parent


def _forward_parts(threads: Iterable[list[_Span]]) -> dict[int, list[tuple[float, str]]]:
    """Return, for each number of autograd, when operations had it and to which part they count."""
    found: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for spans in threads:
        for span in spans:
            number = span.args.get("Sequence number")
            if number is None or span.name.startswith(_BACKWARD):
                continue
            part = _marked(span)
            if part is not None and 0 <= number < _NO_SEQUENCE:
                found[number].append((span.start, part))
    for places in found.values():
        places.sort()
    return found


def _marked(span: _Span) -> str | None:
    """Return the part of the innermost mark around a span that names one."""
    for one in _upwards(span):
        if one.name.startswith(_BACKWARD):
            return None
        if one.name.startswith(MARK) and one.name.removeprefix(MARK) in PARTS:
            return one.name.removeprefix(MARK)
    return None


def _part(span: _Span, forward: Mapping[int, list[tuple[float, str]]]) -> str:
    """Return the part that a span counts to."""
    if span.part is None:
        span.part = _find_part(span, forward)
    return span.part


def _find_part(span: _Span, forward: Mapping[int, list[tuple[float, str]]]) -> str:
    if span.name.lower().startswith(_COMMUNICATION):
        return "communication"
    if span.name.startswith(MARK) and span.name.removeprefix(MARK) in PARTS:
        return span.name.removeprefix(MARK)
    if span.name.startswith(_BACKWARD):
        # The last operation before it with its number made the node.
        places = forward.get(span.args.get("Sequence number", -1), [])
        earlier = [part for start, part in places if start < span.start]
        if earlier:
            return earlier[-1]
    return _part(span.parent, forward) if span.parent is not None else "other"


def _count(found: Breakdown, spans: Iterable[tuple[_Span, str, float]]) -> None:
    """Add spans with their parts and own times (microseconds)."""
    found.parts = dict.fromkeys(PARTS, 0.0)
    by_name: dict[str, Kernel] = {}
    for span, part, own in spans:
        found.parts[part] += own / 1e6
        kind, flops = product_flops(span.name, span.args)
        if kind == "product" and part == "attention" and "bmm" in span.name:
            kind = "attention"  # batched products of queries, keys and values
        in_model = part not in ("optimizer", "communication", "data", "other")
        if not in_model:
            # An optimiser's products (Muon) are its own; the gap shows them on its line.
            kind, flops = "other", 0.0
        if kind == "other" and in_model:
            found.without_flops += own / 1e6
        if span.name.startswith(MARK):
            continue
        kernel = by_name.setdefault(span.name, Kernel(span.name))
        kernel.n_calls += 1
        kernel.seconds += own / 1e6
        kernel.flops += flops
        if kind != "other":
            kernel.kind = kind
    found.kernels = list(by_name.values())


def _count_kernels(
    found: Breakdown,
    kernels: Sequence[_Span],
    threads: Iterable[list[_Span]],
    forward: Mapping[int, list[tuple[float, str]]],
) -> None:
    """Count kernels of a GPU to the operations that launched them."""
    found.is_gpu = True
    launched = {
        span.args["External id"]: span
        for spans in threads
        for span in spans
        if "External id" in span.args
    }
    counted, seen = [], set()
    for kernel in kernels:
        op = launched.get(kernel.args.get("External id"))
        part = "other" if op is None else _part(op, forward)
        if kernel.name.lower().startswith(_COMMUNICATION):
            part = "communication"
        args: Mapping[str, Any] = {}
        name = kernel.name
        if op is not None and product_flops(op.name, op.args)[0] != "other":
            # The FLOPs of an operation count once, whatever the number of its kernels.
            name, args = op.name, {} if id(op) in seen else op.args
            seen.add(id(op))
        counted.append(
            (_Span(name, kernel.start, kernel.end, args), part, kernel.end - kernel.start)
        )
    _count(found, counted)
    busy = sum(found.parts.values())
    found.parts["other"] += max(0.0, found.seconds - busy)


def product_flops(name: str, args: Mapping[str, Any]) -> tuple[str, float]:
    """Return what kind of product an operation is, and its FLOPs.

    Attention counts as the rectangle that its kernel is given: four FLOPs per query, key and number
    of a head, ten in the backward pass, which computes the scores again.
    """
    dims = args.get("Input Dims", [])
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm", "aten::bmm",
                "aten::baddbmm", "aten::baddbmm_"):  # fmt: skip
        a, b = (dims[1:3] if "add" in name else dims[:2]) or ([], [])
        if len(a) not in (2, 3) or len(b) != len(a):
            return "product", 0.0
        n_batch = a[0] if len(a) == 3 else 1
        return "product", 2.0 * n_batch * a[-2] * a[-1] * b[-1]
    if name.startswith(("aten::_scaled_dot_product_", "aten::_flash_attention")):
        is_backward = "backward" in name
        inputs = dims[1:4] if is_backward else dims[:3]
        if any(len(one) != 4 for one in inputs) or len(inputs) < 2:
            return "attention", 0.0
        (n, heads, queries, width), keys = inputs[0], inputs[1][2]
        return "attention", (10.0 if is_backward else 4.0) * n * heads * queries * keys * width
    return "other", 0.0
