"""A standalone Spark cluster on the loopback, from the pip package: a master and some workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from puna.data.engine.spark_session import find_java

_WAIT_S = 120


@contextlib.contextmanager
def spark_cluster(folder: Path, *, n_workers: int = 2, memory: str = "1g") -> Iterator[str]:
    """Start a master and workers of one core each; yield the master's URL; end them.

    Args:
        folder: Existing folder for logs and the workers' files.
        n_workers: Workers.
        memory: Memory that a worker may give to executors.
    """
    find_java(folder)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    url = f"spark://127.0.0.1:{port}"
    place = ("--host", "127.0.0.1", "--webui-port", "0")
    limits = ("--cores", "1", "--memory", memory, "--work-dir", str(folder / "work"))
    processes = [_start(folder, "master", "--port", str(port), *place)]
    try:
        _await(port, folder / "master.log")
        processes += [
            _start(folder, f"worker-{index}", *place, *limits, url) for index in range(n_workers)
        ]
        yield url
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(_WAIT_S)


def _start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    import pyspark

    home = Path(pyspark.__file__).parent
    kind = name.partition("-")[0]
    command = ["setpriv", "--pdeathsig", "KILL", f"{home}/bin/spark-class",
               f"org.apache.spark.deploy.{kind}.{kind.capitalize()}", *arguments]  # fmt: skip
    environment = {**os.environ, "SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1",
                   "SPARK_DAEMON_MEMORY": "512m", "PYSPARK_PYTHON": sys.executable}  # fmt: skip
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)


def _await(port: int, log: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no Spark master: {log.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            return
