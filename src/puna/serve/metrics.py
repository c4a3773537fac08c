"""What the server counts, in the text format that Prometheus reads."""

from __future__ import annotations

import bisect
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from puna.lm.engine.types import EngineStats

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LINUX_STATM = Path("/proc/self/statm")


class Histogram:
    """Counts values by upper bounds.

    Args:
        bounds: Ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterable[str]:
        """Yield the samples."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of the server; belongs to the event loop."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_token_s = Histogram(FIRST_TOKEN_BUCKETS_S)
        self.inter_token_s = Histogram(INTER_TOKEN_BUCKETS_S)
        self.request_s = Histogram(REQUEST_BUCKETS_S)

    def text(self, n_outstanding: int, stats: EngineStats, is_ready: bool) -> str:
        """Return everything in Prometheus's text format.

        Args:
            n_outstanding: Choices that were admitted and have not ended.
            stats: Of the engine.
            is_ready: Whether requests are taken.
        """
        lines: list[str] = []

        def put(name: str, kind: str, what: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples))

        def one(name: str, kind: str, what: str, value: float) -> None:
            put(name, kind, what, [f"{name} {value}"])

        put("puna_responses_total", "counter", "Responses by path and status; 499: the client left "
            "before there was one.", (f'puna_responses_total{{path="{path}",code="{code}"}} {n}'
            for (path, code), n in sorted(self.responses.items())))  # fmt: skip
        put("puna_cancelled_total", "counter", "Requests ended early, by reason.",
            (f'puna_cancelled_total{{reason="{reason}"}} {n}'
             for reason, n in sorted(self.cancelled.items())))  # fmt: skip
        one("puna_ready", "gauge", "1 while requests are taken.", int(is_ready))
        one("puna_queue_length", "gauge", "Sequences that wait for the engine.",
            max(n_outstanding - stats.n_running, 0))  # fmt: skip
        one("puna_running", "gauge", "Sequences that the engine computes.", stats.n_running)
        one("puna_cache_blocks_used", "gauge", "Cache blocks that hold tokens.", stats.used_blocks)
        one("puna_cache_blocks_reserved", "gauge", "Cache blocks that running sequences may need.",
            stats.reserved_blocks)  # fmt: skip
        one("puna_cache_blocks_total", "gauge", "Most cache blocks.", stats.total_blocks)
        one("puna_cache_bytes", "gauge", "Memory of the cache now.", stats.cache_bytes)
        one("puna_engine_steps_total", "counter", "Steps of the engine.", stats.n_steps_total)
        one("puna_prompt_tokens_total", "counter", "Prompt tokens of sequences that began.",
            self.prompt_tokens)  # fmt: skip
        one("puna_generated_tokens_total", "counter", "Tokens generated.", self.generated_tokens)
        for name, what, histogram in (
            ("puna_time_to_first_token_seconds", "From a request's arrival.", self.first_token_s),
            ("puna_inter_token_seconds", "Between a sequence's tokens.", self.inter_token_s),
            ("puna_request_seconds", "From a request's arrival to its end.", self.request_s),
        ):
            put(name, "histogram", what, histogram.lines(name))
        one("process_cpu_seconds_total", "counter", "Processor time used.", time.process_time())
        if (n_bytes := resident_bytes()) is not None:
            one("process_resident_memory_bytes", "gauge", "Resident memory.", n_bytes)
        return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Return the memory of this process; None where the system does not tell."""
    try:
        return int(_LINUX_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
