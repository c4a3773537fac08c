"""One rank of a training: ``python -m puna.train.worker JOB_JSON ATTEMPT``, alone or by torchrun.

Exit codes: 0 done; 2 a user error (message in the failure note); 3 another rank went away; 1 else.
torch is imported only after the process has tied its life to its parent's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from puna.core.errors import USER_ERROR_EXIT_CODE, PunaError, explain_environment_error
from puna.core.ledger import Ledger
from puna.core.pool import die_with_parent
from puna.resilience.hang import write_stacks_on_signal
from puna.resilience.heartbeat import HeartbeatWriter
from puna.train.spec import JobSpec

PARENT_ENV = "PUNA_PARENT_PID"
"""Process id that a worker must not outlive; the agent sets its own for its workers."""
NODE_ENV = "PUNA_NODE"
"""Number of the machine that a worker runs on, set by whoever starts it."""
STANDBY_ENV = "PUNA_STANDBY"
"""Set for a worker that gets ready and waits; see :mod:`puna.train.standby`."""
LOST_PEER_EXIT_CODE = 3


def main(argv: list[str]) -> int:
    """Run one rank; return the exit code."""
    if PARENT_ENV in os.environ:
        die_with_parent(int(os.environ[PARENT_ENV]))
    # torchrun ends the others when a rank dies; one that died of that could be taken for the first.
    # The supervisor kills all of them in any case, and they die with it and with the agent.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spec, attempt = JobSpec.read(Path(argv[0])), int(argv[1])
    rank = int(os.environ.get("RANK", "0"))
    folder = spec.attempt_dir(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    write_stacks_on_signal(folder, rank)
    if STANDBY_ENV in os.environ:
        from puna.train.standby import get_ready, wait_for_go

        get_ready(spec)
        wait_for_go(folder, rank)
    heart = HeartbeatWriter(folder, rank, int(os.environ.get(NODE_ENV, "0")))
    heart.beat("start", 0)
    events = Ledger(spec.ledger, job=spec.job, **spec.common)
    try:
        _run(spec, attempt, heart, events)
    except BaseException as error:  # noqa: BLE001 (written down for the supervisor, whatever it is)
        return _report(error, heart, spec.out)
    return 0


def _run(spec: JobSpec, attempt: int, heart: HeartbeatWriter, events: Ledger) -> None:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # Notes of libraries to their developers; a person who trains can do nothing about them.
    warnings.filterwarnings("ignore", module=r"torch\.")
    from puna.train.deterministic import be_deterministic
    from puna.train.loop import train
    from puna.train.parallel.layout import Layout
    from puna.train.parallel.world import join_world, leave_world
    from puna.train.preflight import run_preflight

    cfg, restart = spec.training, spec.training.restart
    if cfg.deterministic:
        be_deterministic()
    world = join_world(
        cfg.device, attempt, 2 * max(restart.hang_timeout_s, restart.start_timeout_s),
        Layout.of(cfg.parallel, cfg.nproc),
    )  # fmt: skip
    run_preflight(spec, attempt, world, heart, events)
    train(spec, attempt, world, heart, events)
    leave_world()


def _report(error: BaseException, heart: HeartbeatWriter, out: Path) -> int:
    """Write the failure note for the supervisor and the traceback into the log."""
    from puna.train.parallel.world import is_lost_peer

    shown = explain_environment_error(error, out) or error
    lost_peer = is_lost_peer(error)
    details = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # a full disk: the supervisor meets it, too, and says so
        heart.fail(shown, details, lost_peer=lost_peer)
    print(details, file=sys.stderr, flush=True)  # noqa: T201 (the attempt's log file)
    if isinstance(shown, PunaError):
        return USER_ERROR_EXIT_CODE
    return LOST_PEER_EXIT_CODE if lost_peer else 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after an error the destructor of a broken process group may wait for its peers.
    os._exit(code)
