"""torchrun, tied to the life of its parent: ``python -m puna.train.agent PARENT_PID ARGUMENTS``.

torchrun's own agent outlives its parent, and its workers outlive the agent; a ``kill -9`` would
then leave processes that go on training. Here the agent dies with the process that started it and
the workers die with the agent.
"""

from __future__ import annotations

import os
import sys

from puna.core.pool import die_with_parent
from puna.train.worker import PARENT_ENV


def main(argv: list[str]) -> None:
    """Become a torchrun agent."""
    die_with_parent(int(argv[0]))
    os.environ[PARENT_ENV] = str(os.getpid())
    from torch.distributed.run import main as torchrun

    torchrun(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
