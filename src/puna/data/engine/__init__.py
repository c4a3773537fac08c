"""The data engine behind one narrow interface: DuckDB embedded here, Spark on a cluster.

A stage uses only :class:`Engine`: *kernels* (Arrow batch in, Arrow columns of the same length out)
are mapped over Parquet shards; *relational* steps (distinct, joins, group-by, windows) are Ibis
expressions on relations that :meth:`Engine.read` returns. Files are listed, and the conservation of
rows is checked, by our code from the written Parquet files, never by the engine.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from puna.core.config import Config, DataEngine, Execution, SparkSettings, Workers
from puna.core.errors import PunaError
from puna.data.engine.base import (
    ConservationError,
    Engine,
    GroupKernel,
    Kernel,
    Manifest,
    Shard,
    ShardReport,
)

__all__ = [
    "ConservationError", "Engine", "EngineConfig", "GroupKernel", "Kernel", "Manifest", "Shard",
    "ShardReport", "open_engine",
]  # fmt: skip


class EngineConfig(Config):
    """Where and with how much a data stage runs; none of it changes the result."""

    engine: DataEngine = "duckdb"
    """Data engine: `duckdb` (embedded, this machine), or a Spark master: `spark://host:port`,
    `local[2]`, `yarn`, `k8s://...`. The result is the same, to the byte."""
    spark: SparkSettings = Field(default_factory=dict)
    """Settings of Spark, such as `"spark.executor.cores" = "4"`."""
    workers: Workers = 0
    """Worker processes (on Spark: cores); 0 means one per usable core (on Spark: all there are)."""
    memory_mib: Execution[int] = 2048
    """Memory that relational steps may use, MiB; beyond it they spill to the stage's folder (on
    Spark: of each executor, on its local disks)."""


def open_engine(cfg: EngineConfig, scratch: Path) -> Engine:
    """Return the engine that a stage's configuration names; use it as a context manager.

    Args:
        cfg: The stage's configuration.
        scratch: Folder for spill files inside the stage's own folder; removed on exit.

    Raises:
        PunaError: No such engine.
    """
    if cfg.engine == "duckdb":
        from puna.data.engine.duck import DuckDBEngine

        return DuckDBEngine(scratch, n_workers=cfg.workers, memory_mib=cfg.memory_mib)
    from puna.data.engine.spark_session import MASTERS

    if not MASTERS.fullmatch(cfg.engine):
        raise PunaError(
            f"unknown data engine {cfg.engine!r}",
            "known: duckdb, spark://HOST:PORT, local[N], yarn, k8s://...",
        )
    from puna.data.engine.spark import SparkEngine

    return SparkEngine(
        cfg.engine, scratch, n_workers=cfg.workers, memory_mib=cfg.memory_mib, settings=cfg.spark
    )
