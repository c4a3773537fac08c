"""The same data stages on a Spark cluster: a standalone master and two workers on the loopback."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from spark_cluster import spark_cluster

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import quality, semantic  # importing them registers them
from puna.data.chain import DATA_STAGES
from puna.data.engine import ConservationError, EngineConfig, open_engine
from puna.data.engine.local import LocalMap, map_shards
from puna.data.engine.spark_session import wrap_java
from puna.data.filters.rules import FilterKernel, SourceRules
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.quality.train import TrainConfig, train_classifier
from puna.data.schema import DOCUMENTS_DIR
from puna.data.sources.files import FilesConfig
from puna.data.testing import folder_bytes, make_documents, rejected_rows
from tests.integration.test_data_chain import STAGES, recipe, write_inputs
from tests.unit.test_data_engine import Broken, Largest
from tests.unit.test_data_quality import BAD, FAST, GOOD, make_examples, make_text
from tests.unit.test_data_remote import LINES, Web
from tests.unit.test_data_semantic import write_embedder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas"),
]

TEXTS = [(f"s{i % 3}", f"doc-{i}", f"text number {i} " * (i % 7)) for i in range(60)]
RULES = SourceRules(profile="none", filters=[{"name": "length", "settings": {"min": 40}}])
KERNEL = FilterKernel(RULES.make(), {})
MODEL_STAGES = (semantic, quality)
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "spark.executor.memory": "600m",
    "spark.sql.shuffle.partitions": "4",
    # kernels of the tests, and what their module imports, are no installed packages
    "spark.executorEnv.PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with spark_cluster(tmp_path_factory.mktemp("cluster")) as url:
        yield url


def config(cluster):
    return EngineConfig(engine=cluster, spark=SETTINGS)


@pytest.fixture
def engine(cluster, tmp_path):
    with open_engine(config(cluster), tmp_path / "scratch") as opened:
        yield opened
    assert not (tmp_path / "scratch").exists()


@pytest.fixture
def documents(tmp_path):
    return make_documents(tmp_path / "in[1]", TEXTS, n_shards=4).path / DOCUMENTS_DIR


@pytest.mark.exhaustive
def test_executors_read_remote_sources_by_themselves(cluster, tmp_path):
    web = Web()
    web.break_after, web.n_breaks = 50_000, 4
    for n in range(4):
        web.files[f"/{n}.jsonl"] = LINES[: 110 * 1000 * (n + 1)]
    paths = tuple(f"{web.url}/{n}.jsonl" for n in range(4))
    source = FilesConfig(name="web", paths=paths, root=web.url)
    found = []
    for engine, more in (("duckdb", {}), (cluster, {"spark": SETTINGS})):
        out = tmp_path / f"out{len(found)}"
        out.mkdir()
        cfg = IngestConfig(sources=(source,), shard_bytes=100_000, engine=engine, **more)
        ingest_documents(cfg, {}, out, Ledger(None))
        found.append(folder_bytes(out / DOCUMENTS_DIR))
    web.stop()
    assert len(found[0]) > 4
    assert found[0] == found[1]
    assert web.n_breaks == 0


def test_kernels_and_relations_give_the_same_bytes(engine, documents, tmp_path):
    def everything(engine, out):
        judged = engine.judge("step", documents, out / "judged", KERNEL)
        rows = engine.read(documents)
        rows = rows.mutate(shard=(rows.n_bytes % 5).cast("int32"), group=rows.n_bytes % 7)
        engine.write(rows.select("id", "n_bytes"), out / "one", order_by=["n_bytes", "id"])
        some = rows.filter(rows.shard != 2)
        engine.write(some.select("shard", "id", "text"), out / "cut", order_by=["shard", "id"],
                     n_shards=5)  # fmt: skip
        engine.write(rows.filter(rows.n_bytes < 0), out / "none", order_by=["id"])
        pairs = rows.select(key="group", value="n_bytes")
        most = engine.groups(pairs, out / "most", Largest(), by="key", order_by=["value"])
        table = engine.collect(most, ["key"])
        total = rows.group_by("source").agg(n=rows.count(), total=rows.n_bytes.sum())
        return judged, table, engine.collect(total, ["source"]), engine.count(some)

    with open_engine(EngineConfig(workers=1), tmp_path / "local-scratch") as local:
        expected = everything(local, tmp_path / "local")
    assert everything(engine, tmp_path / "spark") == expected
    one, two = (
        {name: data for name, data in folder_bytes(tmp_path / side).items() if "most" not in name}
        for side in ("local", "spark")
    )
    assert one == two
    assert expected[0].rows_kept not in (0, 60)


@pytest.mark.exhaustive
def test_a_kernel_that_loses_rows_is_found(engine, documents, tmp_path):
    with pytest.raises(ConservationError, match="returned"):
        engine.judge("step", documents, tmp_path / "out", Broken("loses a row"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.exhaustive
def test_bad_input_and_programs_errors_come_back(engine, documents, tmp_path):
    first = documents / "part-00000.parquet"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PunaError, match=r"part-00000\.parquet"):
        engine.judge("step", documents, tmp_path / "out", KERNEL)
    first.write_bytes(whole)
    with pytest.raises(Exception, match="promised"):
        engine.judge("step", documents, tmp_path / "out", Broken("forgets a column"))


@dataclass(frozen=True)
class KillsTheExecutor:
    """A kernel whose first call on a shard kills the executor's JVM, and its Python with it."""

    inner: FilterKernel
    flag: Path = field(repr=False)

    @property
    def columns(self):
        return self.inner.columns

    def adds(self):
        return self.inner.adds()

    def prepare(self):
        pass

    def __call__(self, batch, shard, first_row):
        if shard.index == 2 and not self.flag.exists():
            parents = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()
            executor = int(parents[1])  # executor > Python daemon > this process
            assert b"ExecutorBackend" in Path(f"/proc/{executor}/cmdline").read_bytes()
            self.flag.write_text(str(executor))
            os.kill(executor, signal.SIGKILL)
            time.sleep(60)
        return self.inner(batch, shard, first_row)


@pytest.mark.exhaustive
def test_the_work_of_a_killed_executor_is_done_by_another(engine, documents, tmp_path):
    map_shards("step", documents, tmp_path / "local", KERNEL, LocalMap(1))
    kernel = KillsTheExecutor(KERNEL, tmp_path / "flag")
    engine.judge("step", documents, tmp_path / "spark", kernel)
    assert not Path("/proc", (tmp_path / "flag").read_text()).exists()
    for dataset in ("documents", "rejected"):
        one, two = (folder_bytes(tmp_path / side / dataset) for side in ("local", "spark"))
        assert one == two


@pytest.mark.exhaustive
def test_the_whole_chain_gives_the_same_bytes(cluster, tmp_path):
    write_inputs(tmp_path)
    run_recipe(recipe(tmp_path, "local", 1))
    run_recipe(recipe(tmp_path, "spark", 0, engine=cluster, spark={**SETTINGS}))
    stages = [name for name in DATA_STAGES if (tmp_path / "local" / name).is_dir()]
    assert len(stages) == len(STAGES)
    for stage in stages:
        one, two = (folder_bytes(tmp_path / run / stage) for run in ("local", "spark"))
        differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
        assert differing <= {"artifact.json", "config.toml"}, stage  # times, and the engine


@pytest.mark.exhaustive
def test_the_stages_with_models_give_the_same_bytes(cluster, tmp_path):
    rng = random.Random(3)
    texts = {f"d{k:02d}": make_text(rng, rng.random(), 80) for k in range(60)}
    for k in range(0, 60, 4):  # the same words in another order say the same to the embedder
        texts[f"o{k:02d}"] = " ".join(rng.sample(words := texts[f"d{k:02d}"].split(), len(words)))
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(rows), encoding="utf-8")
    known = sorted({word.lower() for word in (*GOOD, *BAD)})
    vectors = np.random.default_rng(0).normal(size=(len(known), 16))
    embedder = write_embedder(tmp_path / "embedder", known, vectors)
    train_classifier(TrainConfig(**FAST), make_examples(300), tmp_path / "classifier")
    scorer = {"classifier": str(tmp_path / "classifier"), "keep_share": 0.7}
    source = {"kind": "files", "name": "web", "paths": [str(tmp_path / "in.jsonl")],
              "id_field": "id"}  # fmt: skip
    data = {
        "ingest": {"sources": [source], "shard_bytes": 5_000},
        "semantic": {"embedder": str(embedder), "clusters": 3, "write_index": True},
        "quality": {"scorers": {"quality": scorer}},
    }
    common = {"runs_dir": str(tmp_path), "data": data}
    run_recipe(resolve({"name": "local", "workers": 1, **common}))
    run_recipe(resolve({"name": "spark", "engine": cluster, "spark": {**SETTINGS}, **common}))
    assert len(list((tmp_path / "local" / "data.ingest" / DOCUMENTS_DIR).glob("*.parquet"))) > 3
    for stage in (f"data.{module.__name__.rpartition('.')[2]}" for module in MODEL_STAGES):
        assert rejected_rows(tmp_path / "local" / stage)
        one, two = (folder_bytes(tmp_path / run / stage) for run in ("local", "spark"))
        differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
        assert differing <= {"artifact.json", "config.toml"}, stage  # times, and the engine


def test_a_cluster_that_cannot_work_is_named(cluster, tmp_path, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        free = server.getsockname()[1]
    nobody = EngineConfig(engine=f"spark://127.0.0.1:{free}")
    with (
        open_engine(nobody, tmp_path / "scratch") as engine,
        pytest.raises(PunaError, match="no Spark master answers"),
    ):
        engine.put(pa.table({"a": [1]}), tmp_path / "put")
    monkeypatch.setattr("puna.data.engine.spark_session._EXECUTOR_WAIT_S", 3.0)
    greedy = EngineConfig(engine=cluster, memory_mib=500_000)
    with (
        open_engine(greedy, tmp_path / "scratch") as engine,
        pytest.raises(PunaError, match="gave no executor"),
    ):
        engine.put(pa.table({"a": [1]}), tmp_path / "put")


def test_a_small_java_runtime_is_wrapped(tmp_path):
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    java = wrap_java(fake, tmp_path) / "bin" / "java"
    given = ["-Xmx1g", "--add-modules=jdk.incubator.vector", "a b"]
    assert subprocess.check_output([java, *given], text=True) == "-Xmx1g a b\n"
