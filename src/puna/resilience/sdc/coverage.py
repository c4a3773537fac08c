"""What the checks find: bits flipped at every site of a tiny training, each trial counted."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from puna.resilience.sdc.abft import RotatingCheck
from puna.resilience.sdc.digest import digest_all
from puna.resilience.sdc.peers import Peers, run_threads
from puna.resilience.sdc.trial import SITES, Flip, Found, Site, run_trial

_HARM = 1e-3
_GEMM_HARM = 0.25
_N_LAYERS = 3


@dataclass
class SiteCoverage:
    """What was found of the flips at one site.

    Attributes:
        site: The site.
        trials: Flips.
        harmful: Of them, those that change the update of the step by more than a thousandth.
        checked: Flips found when every check looks (replay due, the flipped layer's turn).
        harmful_checked: Of the harmful ones.
        scheduled: Flips found with replay of 1 in k and one layer per step, on average.
        missed: Harmful flips not found under this schedule, on average.
        healed: Found flips after which the parameters are those of the clean run, every bit.
        named: Found flips whose rank alone was named.
        detectors: How many each check found.
        large: Flips of a product that move it by more than a quarter of its mean magnitude.
        large_found: Of those, found by the checksum of the product.
    """

    site: Site
    trials: int = 0
    harmful: int = 0
    checked: int = 0
    harmful_checked: int = 0
    scheduled: float = 0.0
    missed: float = 0.0
    healed: int = 0
    named: int = 0
    detectors: dict[str, int] | None = None
    large: int = 0
    large_found: int = 0


@dataclass
class Coverage:
    """The coverage of all sites.

    Attributes:
        n_ranks: Replicas.
        replay_every: Micro-batches of which one is computed again.
        sites: By site.
        false_alarms: In clean trials.
        clean: Clean trials.
        overhead: Share of a step's time, by check.
    """

    n_ranks: int
    replay_every: int
    sites: list[SiteCoverage]
    false_alarms: int
    clean: int
    overhead: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure_coverage(
    n_trials: int,
    *,
    n_ranks: int = 3,
    replay_every: int = 64,
    seed: int = 0,
    on_trial: Callable[[], None] = lambda: None,
) -> Coverage:
    """Flip bits and count.

    Args:
        n_trials: Flips per site; as many trials again without one.
        n_ranks: Replicas, 2 or 3.
        replay_every: Micro-batches of which one is computed again.
        seed: Of the places.
        on_trial: Called after each.
    """
    rng = random.Random(seed)
    clean = _run(n_ranks, None, protect=False)[0].parameters
    table = []
    for site in SITES:
        row = SiteCoverage(site, detectors={})
        for _ in range(n_trials):
            flip = Flip(
                site, rng.randrange(n_ranks), rng.random(), rng.random(), rng.randrange(_N_LAYERS)
            )
            _count(row, flip, clean, n_ranks, replay_every)
            on_trial()
        table.append(row)
    alarms = 0
    for _ in range(n_trials):
        found = _run(n_ranks, None, protect=True)
        alarms += any(one.detectors or one.error for one in found)
        on_trial()
    return Coverage(n_ranks, replay_every, table, alarms, n_trials, measure_overhead(replay_every))


def _run(n_ranks: int, flip: Flip | None, *, protect: bool) -> list[Found]:
    def one(peers: Peers) -> Found:
        own = replace(flip) if flip is not None else None
        found = run_trial(peers, own, protect=protect, layer=flip.layer if flip else None)
        if flip is not None and own is not None and peers.rank == flip.rank:
            flip.moved = own.moved
        return found

    return run_threads(n_ranks, one)


def _count(row: SiteCoverage, flip: Flip, clean: dict[str, Tensor], n_ranks: int, k: int) -> None:
    bare = _run(n_ranks, replace(flip), protect=False)
    is_harmful = any(_harm(one, clean) > _HARM for one in bare)
    found = _run(n_ranks, flip, protect=True)
    detectors = {name for one in found for name in one.detectors}
    if any(one.error for one in found):
        detectors.add("gave up")
    row.trials += 1
    row.harmful += is_harmful
    row.checked += bool(detectors)
    row.harmful_checked += is_harmful and bool(detectors)
    seen = _scheduled(detectors, k)
    row.scheduled += seen
    row.missed += is_harmful * (1 - seen)
    row.healed += bool(detectors) and all(_is_same(one.parameters, clean) for one in found)
    row.named += bool(detectors) and found[0].named == {flip.rank}
    counts = row.detectors if row.detectors is not None else {}
    for name in detectors:
        counts[name] = counts.get(name, 0) + 1
    if flip.site == "product":
        is_large = not flip.moved <= _GEMM_HARM
        row.large += is_large
        row.large_found += is_large and "products" in detectors


def _scheduled(detectors: set[str], k: int) -> float:
    """Chance that a transient flip is found when replay and products take turns."""
    if "state" in detectors or "gave up" in detectors:
        return 1.0
    by_replay = 1 / k if "replay" in detectors else 0.0
    by_product = 1 / _N_LAYERS if "products" in detectors else 0.0
    return 1 - (1 - by_replay) * (1 - by_product)


def _harm(found: Found, clean: dict[str, Tensor]) -> float:
    """Return how far the update is off, in units of the clean update; infinity for no number."""
    off = sum(float((found.parameters[n] - clean[n]).double().square().sum()) for n in clean)
    own = sum(float((clean[n] - found.before[n]).double().square().sum()) for n in clean)
    ratio = (off / own) ** 0.5
    return ratio if ratio == ratio else float("inf")


def _is_same(own: dict[str, Tensor], clean: dict[str, Tensor]) -> bool:
    return all(torch.equal(own[name], clean[name]) for name in clean)


def measure_overhead(replay_every: int, rounds: int = 5) -> dict[str, float]:
    """Measure the cost of the checks on this machine, as shares of a step's time.

    The step is that of eight layers of 8.4 million parameters and 2,048 rows, AdamW, fp32; step and
    checks take turns, and medians are compared.

    Args:
        replay_every: Micro-batches of which one is computed again.
        rounds: Turns.
    """
    torch.manual_seed(0)
    linears = [nn.Linear(1024, 1024) for _ in range(8)]
    model = nn.Sequential(*(part for linear in linears for part in (linear, nn.GELU())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x_BC = torch.randn(2048, 1024)
    check = RotatingCheck({str(number): linear for number, linear in enumerate(linears)})

    def compute() -> None:
        model(x_BC).square().mean().backward()

    def step() -> None:
        compute()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def digest() -> None:
        digest_all(
            [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        )

    def forward(number: int | None) -> None:
        with torch.no_grad():
            if number is not None:
                check.arm(number)
            model(x_BC)
            check.take()

    jobs: dict[str, Callable[[], None]] = {
        "step": step, "digest": digest, "forward": partial(forward, None),
        "checked": partial(forward, 3), "compute": compute,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            begin_s = time.perf_counter()
            job()
            if number >= 2:
                times[name].append(time.perf_counter() - begin_s)
    median = {name: statistics.median(values) for name, values in times.items()}
    checked = median["checked"] - median["forward"]
    return {
        "state after each update": median["digest"] / median["step"],
        "state at rest": median["digest"] / median["step"],
        "replay": median["compute"] / median["step"] / replay_every,
        "products": max(checked, 0.0) / median["step"],
    }
