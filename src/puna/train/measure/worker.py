"""One rank of the microbenchmarks: ``python -m puna.train.measure.worker PLAN_JSON FOLDER``.

All ranks work at the same time, as in a training, so that they share memory bandwidth and power.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from puna.core.fsio import write_json
from puna.core.pool import die_with_parent
from puna.train.measure.run import RESULT_FILE, MeasurePlan
from puna.train.worker import PARENT_ENV


def main(argv: list[str]) -> None:
    """Measure, and write the result as rank 0."""
    if PARENT_ENV in os.environ:
        die_with_parent(int(os.environ[PARENT_ENV]))
    plan, folder = MeasurePlan(**json.loads(argv[0])), Path(argv[1])
    from puna.train.measure.bench import Bench
    from puna.train.parallel.layout import Layout
    from puna.train.parallel.world import join_world, leave_world

    size = int(os.environ.get("WORLD_SIZE", "1"))
    world = join_world(plan.device, 0, plan.seconds + 60.0, Layout(shard=size))
    begin_s = time.perf_counter()
    with (folder / "progress.txt").open("a", encoding="utf-8") as stream:

        def tell(percent: float, note: str) -> None:
            if world.rank == 0:
                stream.write(f"{percent:.1f} {note}\n")
                stream.flush()

        found: dict[str, Any] = Bench(world, plan, tell).measure()
    if world.rank == 0:
        write_json(folder / RESULT_FILE, found | {"seconds": time.perf_counter() - begin_s})
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
