"""Runs a function on several ranks of a process group, each a process of its own.

The processes are forked from one that has torch imported: starting eight takes a second.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_TIMEOUT_S = 900.0


def run_ranks(n_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank; return the results in the order of the ranks.

    Args:
        n_ranks: Processes; they find a gloo group of this size.
        function: Of a module that the processes can import.
        args: Pickled.

    Raises:
        AssertionError: A rank failed; with its traceback.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.pipelining"])
    # The store is served here: a port that was free and is given away by number may be taken by the
    # ranks of another test meanwhile, which then meet these.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = [context.Pipe(duplex=False) for _ in range(n_ranks)]
    ranks = [
        context.Process(
            target=_rank, args=(rank, n_ranks, store.port, end, function, args), daemon=True
        )
        for rank, (_, end) in enumerate(ends)
    ]
    for rank in ranks:
        rank.start()
    try:
        results = []
        for number, (receiver, _) in enumerate(ends):
            assert receiver.poll(_TIMEOUT_S), f"rank {number} is silent"
            is_good, result = pickle.loads(receiver.recv_bytes())
            results.append(result)
            assert is_good, f"rank {number} of {n_ranks} failed:\n{result}"
        return results
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _rank(
    rank: int, n_ranks: int, port: int, end: Any, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        RANK=str(rank), WORLD_SIZE=str(n_ranks), OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # of the parent
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    # Bytes, and not what torch makes of a tensor in a pipe: a handle to this process.
    try:
        dist.init_process_group("gloo", rank=rank, world_size=n_ranks)
        end.send_bytes(pickle.dumps((True, function(*args))))
        dist.barrier()
    except BaseException:  # noqa: BLE001 (told to the test, whatever it is)
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)  # the destructor of a broken group may wait for its peers
