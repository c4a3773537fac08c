"""What the ranks test together before a training begins, and the order of all tests."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from puna.core.errors import PunaError, explain_environment_error
from puna.core.ledger import Ledger
from puna.model.accounting import account
from puna.resilience import preflight
from puna.resilience.heartbeat import HeartbeatWriter
from puna.resilience.protocols import PreflightError
from puna.train.metrics import synchronize
from puna.train.optim_config import MuonConfig
from puna.train.parallel.world import World
from puna.train.spec import CHECKPOINTS_DIR, JobSpec

_MIB = 1 << 20
_LARGEST = 1 << 20
_MOST_RATES = 64
"""Ranks up to which each one's rate is written down."""
_N_NUMBERS = 4096
_ROUNDS = 2
"""Exchanges that are timed; the first one may have to connect."""
_FLOAT_BYTES = 4


def run_preflight(
    spec: JobSpec, attempt: int, world: World, heart: HeartbeatWriter, events: Ledger
) -> None:
    """Test this rank, compare it with the others, and test the ways between them.

    Args:
        spec: The job.
        attempt: Number of this attempt, from 0.
        world: The ranks; all call this.
        heart: Heartbeat of this rank.
        events: Ledger, bound to the job.

    Raises:
        PreflightError: This machine failed a test, or numbers arrived changed.
        PunaError: The ranks do not run the same, or no checkpoint can be saved and the recipe
            demands it.
    """
    cfg = spec.training.preflight
    if not cfg.enabled:
        return
    begin_s = time.monotonic()
    n_threads = torch.get_num_threads()
    if cfg.seconds == 0:
        # Threads that wait for one another on a busy machine cost ten times what they compute.
        torch.set_num_threads(1)
    try:
        preflight.check_answers(world.device, cfg.seconds, lambda: heart.beat("start", 0))
    finally:
        torch.set_num_threads(n_threads)
    checks: dict[str, Any] = {"answers_s": time.monotonic() - begin_s}
    disk = _check_disk(spec, world.rank) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    shown = world.gather((preflight.handshake(_settings(spec)), disk))
    preflight.check_handshakes([one for one, _ in shown])
    checks["disks"] = {str(rank): one for rank, (_, one) in enumerate(shown) if one is not None}
    if world.mesh is not None:
        checks |= _check_ways(world, cfg.exchange_mib * _MIB)
    if world.rank == 0:
        events.emit(
            "preflight.done", attempt=attempt, seconds=time.monotonic() - begin_s,
            burn_in_s=cfg.seconds, **checks,
        )  # fmt: skip


def _settings(spec: JobSpec) -> dict[str, object]:
    """What must be the same on all ranks: the job, and its configuration key by key."""
    training = spec.training.model_dump(mode="json")
    return {
        "the model": spec.model.model_dump(mode="json"),
        "the source": [spec.source.factory, spec.source.kwargs],
        "the weights to start from": [spec.weights_digest, spec.fill_rows, spec.rope_factor],
        **{f"{name} of the recipe": value for name, value in training.items()},
    }


def _check_disk(spec: JobSpec, rank: int) -> dict[str, Any]:
    """Test the folder of the checkpoints; a lack of room stops only where one must be saved.

    Returns:
        ``write_bytes_per_s, read_bytes_per_s``, and ``warning`` where there is a lack.
    """
    cfg = spec.training
    folder = spec.out / CHECKPOINTS_DIR
    found: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shortage = preflight.find_shortage(folder, checkpoint_bytes(spec))
        if cfg.preflight.disk_mib and shortage is None:
            times = preflight.check_disk(folder, cfg.preflight.disk_mib * _MIB, str(rank))
            found = {
                "write_bytes_per_s": times.n_bytes / times.write_s,
                "read_bytes_per_s": times.n_bytes / times.read_s,
            }
    except OSError as error:
        if error.errno == errno.EIO:
            raise PreflightError(f"{folder}: {error}") from error
        shown = explain_environment_error(error, folder)
        if shown is None:
            raise
        shortage = shown.message
    if shortage is not None and cfg.checkpoint.on_failure == "stop":
        raise PunaError(
            f"before the first step: {shortage}",
            'make room or correct the folder; checkpoint.on_failure = "continue" trains anyway',
        )
    return found | ({} if shortage is None else {"warning": shortage})


def checkpoint_bytes(spec: JobSpec) -> int:
    """Size of a checkpoint, about: weights, their average and the optimiser's moments in fp32."""
    cfg = spec.training
    n_values = 1 + (1 if isinstance(cfg.optim, MuonConfig) else 2) + (cfg.average is not None)
    return account(spec.model).n_params * _FLOAT_BYTES * n_values


def _check_ways(world: World, n_bytes: int) -> dict[str, Any]:
    """Send whole numbers to all, add them up, send bytes around; measure how fast these arrive.

    Raises:
        PreflightError: Something of this rank arrived changed, by what most others say.
    """
    problems = [*_wrong_numbers(world)]
    seconds, is_right = _send_around(world, n_bytes)
    before = (world.rank - 1) % world.size
    if not is_right:
        problems.append((before, f"what it sent to rank {world.rank} arrived changed"))
    told = world.gather((seconds, problems))
    found = [problem for _, problems in told for problem in problems]
    if found:
        # One rank ends, the others lose it: so the note of the failure names the right one.
        ((accused, _),) = Counter(rank for rank, _ in sorted(found)).most_common(1)
        if accused == world.rank:
            raise PreflightError("; ".join(text for rank, text in found if rank == accused))
    rates = [n_bytes / seconds for seconds, _ in told]
    slowest = min(range(world.size), key=lambda rank: rates[rank])
    return {
        "exchange_bytes": n_bytes,
        "exchange_bytes_per_s": rates if world.size <= _MOST_RATES else [],
        "slowest_bytes_per_s": rates[slowest],
        "slowest_way": [(slowest - 1) % world.size, slowest],
    }


def _wrong_numbers(world: World) -> Iterator[tuple[int, str]]:
    """Gather and add whole numbers over all ranks; yield who gave wrong ones, and how it showed."""
    mine = _numbers(world.rank, world.device)
    parts = [torch.empty_like(mine) for _ in range(world.size)]
    total = mine.clone()
    dist.all_gather(parts, mine)
    dist.all_reduce(total)
    wanted, is_right = torch.zeros_like(mine), True
    for rank, part in enumerate(parts):
        right = _numbers(rank, world.device)
        wanted += right
        if not torch.equal(part, right):
            is_right = False
            yield rank, f"what it sent to all arrived changed at rank {world.rank}"
    if is_right and not torch.equal(total, wanted):
        yield world.rank, f"a sum over {world.size} ranks came out wrong"


def _numbers(rank: int, device: torch.device) -> torch.Tensor:
    """Whole numbers that only this rank has."""
    at = torch.arange(_N_NUMBERS, dtype=torch.int64)
    return ((at * 2_654_435_761 + rank * 40_503) % _LARGEST).to(device)


def _send_around(world: World, n_bytes: int) -> tuple[float, bool]:
    """Let each rank send to the next one, all at once; seconds, and whether all arrived intact."""
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    if before == world.rank:
        return float("inf"), True
    pattern = torch.arange(n_bytes, device=world.device).remainder(251).to(torch.uint8)
    out, received, best_s = pattern + world.rank % 5, torch.empty_like(pattern), float("inf")
    for _ in range(_ROUNDS):
        received.zero_()
        world.barrier()
        begin_s = time.perf_counter()
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, received, before)]
        )
        for work in works:
            work.wait()
        synchronize(world.device)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return best_s, torch.equal(received, pattern + before % 5)
