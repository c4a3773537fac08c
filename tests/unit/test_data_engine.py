"""The engine: same bytes for any number of workers, resume, conservation, relational steps."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.core.errors import PunaError
from puna.data.dedup.kernels import SignatureKernel
from puna.data.engine import ConservationError, EngineConfig, open_engine
from puna.data.engine.local import LocalMap, map_shards
from puna.data.engine.shards import (
    ROW_GROUP_BYTES,
    VERDICT_FIELDS,
    ShardWriter,
    add_digests,
    ids_digest,
    list_shards,
    write_shard,
)
from puna.data.filters.rules import FilterKernel, SourceRules
from puna.data.schema import DOCUMENTS_DIR
from puna.data.testing import (
    KilledOnce,
    folder_bytes,
    kept_rows,
    make_documents,
    read_rows,
    rejected_rows,
)

TEXTS = [(f"s{i % 3}", f"doc-{i}", f"text number {i} " * (i % 7)) for i in range(60)]
RULES = SourceRules(profile="none", filters=[{"name": "length", "settings": {"min": 40}}])
KERNEL = FilterKernel(RULES.make(), {})


@pytest.fixture
def documents(tmp_path):
    return make_documents(tmp_path / "in", TEXTS, n_shards=4).path / DOCUMENTS_DIR


@dataclass(frozen=True)
class Broken:
    """A kernel that misbehaves in a chosen way."""

    how: str
    columns: tuple[str, ...] = field(default=("text",), repr=False)

    def adds(self):
        return pa.schema(VERDICT_FIELDS)

    def prepare(self):
        pass

    def __call__(self, batch, shard, first_row):
        n = batch.num_rows - (self.how == "loses a row" and shard.index == 2)
        schema = pa.schema(VERDICT_FIELDS[:3]) if self.how == "forgets a column" else self.adds()
        arrays = [pa.array([None] * n, f.type) for f in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def test_judge_keeps_and_rejects_with_everything_a_row_had(documents, tmp_path):
    manifest = map_shards("step", documents, tmp_path / "out", KERNEL, LocalMap(1))
    rows = {row["id"]: row for row in read_rows(documents)}
    kept, rejected = kept_rows(tmp_path / "out"), rejected_rows(tmp_path / "out")
    assert len(kept) + len(rejected) == len(rows) == manifest.rows_in == 60
    for row in [*kept, *rejected]:
        assert {name: row[name] for name in rows[row["id"]]} == rows[row["id"]]
    assert all(len(row["text"]) >= 40 for row in kept)
    assert {(row["step"], row["reason"], row["threshold"]) for row in rejected} == {
        ("step", "length.short", 40.0)
    }
    assert all(row["value"] == len(row["text"]) < 40 for row in rejected)
    flow = manifest.flow()
    assert sum(part["in_bytes"] for part in flow.values()) == sum(len(t[2]) for t in TEXTS)
    assert flow["s1"]["rejected"]["length.short"]["docs"] == sum(
        row["source"] == "s1" for row in rejected
    )


@dataclass(frozen=True)
class Cut:
    """A kernel that keeps the first ten bytes of a text, and drops documents of source ``s2``."""

    columns: tuple[str, ...] = field(default=("source", "text"), repr=False)

    def adds(self):
        return pa.schema([*VERDICT_FIELDS, ("text", pa.large_string()), ("n_cut", pa.int64())])

    def prepare(self):
        pass

    def __call__(self, batch, shard, first_row):
        texts, sources = batch["text"].to_pylist(), batch["source"].to_pylist()
        dropped = [source == "s2" for source in sources]
        columns = [
            ["test.dropped" if drop else None for drop in dropped],
            [1.0 if drop else None for drop in dropped],
            [0.0 if drop else None for drop in dropped],
            [None] * len(texts),
            [text[:10] for text in texts],
            [len(text) - len(text[:10]) for text in texts],
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, self.adds(), strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.adds())


def test_a_kernel_may_rewrite_the_text_of_what_is_kept(documents, tmp_path):
    manifest = map_shards("step", documents, tmp_path / "out", Cut(), LocalMap(1))
    before = {row["id"]: row["text"] for row in read_rows(documents)}
    kept, rejected = kept_rows(tmp_path / "out"), rejected_rows(tmp_path / "out")
    assert len(kept) == 40
    assert len(rejected) == 20
    for row in kept:
        assert row["text"] == before[row["id"]][:10]
        assert row["n_bytes"] == len(row["text"]) == len(before[row["id"]]) - row["n_cut"]
    assert all(row["text"] == before[row["id"]] for row in rejected)
    flow = manifest.flow()
    assert sum(part["in_bytes"] for part in flow.values()) == sum(map(len, before.values()))
    assert flow["s0"]["kept_bytes"] == sum(r["n_bytes"] for r in kept if r["source"] == "s0")
    assert flow["s2"]["rejected"]["test.dropped"]["bytes"] == flow["s2"]["in_bytes"]


def test_same_bytes_for_any_number_of_workers(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    map_shards("step", documents, tmp_path / "one", KERNEL, LocalMap(1))
    with LocalMap(2) as workers:
        map_shards("step", documents, tmp_path / "two", KERNEL, workers)
    one = folder_bytes(tmp_path / "one")
    assert one == folder_bytes(tmp_path / "two")
    assert len(one) == 9  # two datasets of four shards, and the manifest


def _killed_at_shard_2(documents, tmp_path):
    """Make the kernel, and the folder ``whole`` with what it gives when it is not killed."""
    kernel = KilledOnce(KERNEL, 2, tmp_path / "flag")
    kernel.flag.touch()
    map_shards("step", documents, tmp_path / "whole", kernel, LocalMap(1))
    kernel.flag.unlink()
    return kernel


def test_a_killed_worker_is_named_and_the_next_attempt_continues(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("puna.data.engine.local.SMALL_INPUT_BYTES", 0)
    kernel, out = _killed_at_shard_2(documents, tmp_path), tmp_path / "out"
    killed = pytest.raises(PunaError, match="a worker process was killed")
    with killed, LocalMap(2) as workers:
        map_shards("step", documents, out, kernel, workers)
    assert not (out / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("documents/part-*.parquet")
            if (out / ".marks" / f"{path.name}.json").exists()}  # fmt: skip
    assert done
    map_shards("step", documents, out, kernel, LocalMap(1))
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())


def test_a_killed_run_continues_to_the_same_bytes(documents, tmp_path):
    """SIGKILL of the whole process in the middle of a shard: leftovers vanish, bytes are equal."""
    kernel, out = _killed_at_shard_2(documents, tmp_path), tmp_path / "out"
    code = f"""
from pathlib import Path
from puna.data.engine.local import LocalMap, map_shards
from puna.data.testing import KilledOnce
from puna.data.filters.rules import FilterKernel, SourceRules
rules = SourceRules.model_validate({RULES.model_dump(mode="json")!r})
kernel = KilledOnce(FilterKernel(rules.make(), {{}}), 2, Path({str(tmp_path / "flag")!r}))
map_shards("step", Path({str(documents)!r}), Path({str(out)!r}), kernel, LocalMap(1))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert [path for path in out.rglob("*.tmp") if path.name.startswith(".part-00002")]
    marks = [json.loads(path.read_text())["key"] for path in sorted((out / ".marks").iterdir())]
    before = (out / "documents" / "part-00001.parquet").stat().st_mtime_ns
    map_shards("step", documents, out, kernel, LocalMap(1))
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
    keys = [entry["key"] for entry in json.loads((out / "manifest.json").read_text())["shards"]]
    assert marks == keys[:2]
    assert (out / "documents" / "part-00001.parquet").stat().st_mtime_ns == before


def test_a_mark_of_another_kernel_or_of_changed_files_does_not_count(documents, tmp_path):
    out = tmp_path / "out"
    map_shards("step", documents, out, Broken("keeps all"), LocalMap(1))
    assert len(kept_rows(out)) == 60
    again = map_shards("step", documents, out, KERNEL, LocalMap(1))
    assert 0 < again.rows_kept < 60
    manifest = (out / "manifest.json").read_bytes()
    shard = out / "documents" / "part-00001.parquet"
    write_shard(shard, pq.read_table(shard).slice(1))
    map_shards("step", documents, out, KERNEL, LocalMap(1))
    assert (out / "manifest.json").read_bytes() == manifest
    assert len(kept_rows(out)) == again.rows_kept


def test_a_kernel_that_loses_a_row_is_named_with_step_and_shard(documents, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ConservationError, match=r"my\.step, shard part-00002\.parquet.*returned 14"
    ):
        map_shards("my.step", documents, out, Broken("loses a row"), LocalMap(1))
    assert not (out / "manifest.json").exists()
    assert not (out / "documents" / "part-00002.parquet").exists()
    with pytest.raises(TypeError, match="promised"):
        map_shards("my.step", documents, out, Broken("forgets a column"), LocalMap(1))


@pytest.mark.parametrize("damage", ["lose", "double", "exchange"])
def test_conservation_is_checked_from_the_files(documents, tmp_path, damage, monkeypatch):
    """What the writer put into the file is read back: equal counts are not enough."""
    original = ShardWriter.write

    def write(self, batch):
        if "reason" not in batch.schema.names and batch.num_rows > 2:
            rows = {"lose": [0, 2], "double": [0, 0, 1, 2], "exchange": [0, 0, 2]}[damage]
            rest = list(range(3, batch.num_rows))
            batch = batch.take(pa.array(rows + rest))
        original(self, batch)

    monkeypatch.setattr(ShardWriter, "write", write)
    expected = {"lose": "wrote 14", "double": "wrote 16", "exchange": "same number, but other ids"}
    with pytest.raises(ConservationError, match=f"part-00000.*read 15 rows, .*{expected[damage]}"):
        map_shards("step", documents, tmp_path / "out", KERNEL, LocalMap(1))


def test_ids_digest_is_free_of_order_and_sees_doubles():
    a, b, c = (pa.array(ids) for ids in (["x", "y"], ["y", "x"], ["x", "x"]))
    assert ids_digest(a) == ids_digest(b) != ids_digest(c)
    assert add_digests(ids_digest(a), ids_digest(c)) == ids_digest(pa.array(["x", "x", "y", "x"]))


def test_strange_missing_and_damaged_shards_are_named(documents, tmp_path):
    (documents / ".part-00000.parquet.swp").touch()
    with pytest.raises(PunaError, match="which is not a shard"):
        list_shards(documents)
    (documents / ".part-00000.parquet.swp").unlink()
    path = documents / "part-00001.parquet"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(PunaError, match=r"shard part-00001\.parquet is missing"):
        list_shards(documents)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PunaError, match=r"part-00001\.parquet: not a readable Parquet file"):
        list_shards(documents)
    with pytest.raises(PunaError, match="does not exist"):
        list_shards(tmp_path / "nowhere")


def test_unordered_input_is_refused(documents, tmp_path):
    path = documents / "part-00000.parquet"
    table = pq.read_table(path)
    write_shard(path, table.take(list(range(table.num_rows))[::-1]))
    with pytest.raises(PunaError, match="not in strict order of their ids"):
        map_shards("step", documents, tmp_path / "out", KERNEL, LocalMap(1))


def test_a_shard_file_depends_on_its_rows_alone(tmp_path):
    """However the rows arrive, the row groups and the bytes are the same."""
    n = 5000
    texts, n_bytes = ["word " * (i % 50) for i in range(n)], -(-ROW_GROUP_BYTES // 1000)
    table = pa.table({"id": [f"{i:05d}" for i in range(n)], "text": texts,
                      "n_bytes": [n_bytes * (i % 2) for i in range(n)]})  # fmt: skip
    write_shard(tmp_path / "whole.parquet", table)
    writer = ShardWriter(tmp_path / "parts.parquet", table.schema)
    start = 0
    for size in (1, 1999, 7, 2048, 900, 45):
        for batch in table.slice(start, size).to_batches():
            writer.write(batch)
        start += size
    writer.close()
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "parts.parquet").read_bytes()
    file = pq.ParquetFile(tmp_path / "whole.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [2000, 2000, 1000]  # cut by bytes: two documents are one thousandth


def test_annotate_carries_and_numbers_rows(documents, tmp_path):
    with open_engine(EngineConfig(workers=1), tmp_path / "scratch") as engine:
        kernel = SignatureKernel(32)
        manifest = engine.annotate("sign", documents, tmp_path / "a", kernel, carry=["source"])
        relation = engine.read(tmp_path / "a" / "rows")
        assert engine.count(relation) == manifest.rows_in == 60
        table = engine.collect(relation.select("node", "id", "source"), ["node"])
    assert table["node"].to_pylist() == list(range(60))
    expected = [(row["id"], row["source"]) for row in read_rows(documents)]
    assert list(zip(*table.select(["id", "source"]).to_pydict().values(), strict=True)) == expected
    assert not (tmp_path / "scratch").exists()
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["step"] == "sign"


@dataclass(frozen=True)
class Largest:
    """A group kernel: the largest value of each group."""

    def adds(self):
        return pa.schema([pa.field("key", pa.int64()), pa.field("most", pa.int64())])

    def __call__(self, table):
        best = {}
        for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True):
            best[key] = max(best.get(key, value), value)
        rows = list(best.items())
        columns = [pa.array([row[i] for row in rows], pa.int64()) for i in (0, 1)]
        return pa.Table.from_arrays(columns, schema=self.adds())


def test_groups_are_never_torn_and_writes_are_cut_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("puna.data.engine.ordered.GROUP_ROWS", 10)
    monkeypatch.setattr("puna.data.engine.duck.STREAM_ROWS", 7)
    rows = [(key, key * 100 + i) for key in range(20) for i in range(1 + (key * 5) % 23)]
    table = pa.table({"key": [r[0] for r in rows], "value": [r[1] for r in rows],
                      "shard": [r[0] // 8 for r in rows]})  # fmt: skip
    with open_engine(EngineConfig(workers=1), tmp_path / "scratch") as engine:
        relation = engine.put(table, tmp_path / "put")
        found = engine.groups(relation, tmp_path / "g", Largest(), by="key", order_by=["value"])
        result = engine.collect(found, ["key"])
        assert result["key"].to_pylist() == list(range(20))
        assert result["most"].to_pylist() == [
            max(v for k, v in rows if k == key) for key in range(20)
        ]
        some = relation.filter(relation.shard != 1)
        order = ["shard", "value"]
        engine.write(some, tmp_path / "cut", order_by=order, n_shards=4)
        total = some.group_by("shard").agg(total=some.value.sum())
        engine.write(total, tmp_path / "sum", order_by=["shard"])
    sizes = [shard.n_rows for shard in list_shards(tmp_path / "cut")]
    assert sizes == [sum(k // 8 == i for k, _ in rows) if i != 1 else 0 for i in range(4)]
    assert [row["key"] for row in read_rows(tmp_path / "cut")] == [
        k for k, _ in rows if k // 8 != 1
    ]
    assert pq.read_schema(tmp_path / "sum" / "part-00000.parquet").field("total").type == pa.int64()


def test_an_unknown_engine_is_named(tmp_path):
    with pytest.raises(PunaError, match="unknown data engine 'spork'"):
        open_engine(EngineConfig(engine="spork"), tmp_path)


def test_the_disk_is_full(documents, tmp_path, monkeypatch):
    """The error reaches the caller, nothing is published and no torn file has a final name."""

    def full(self):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ShardWriter, "close", full)
    with pytest.raises(OSError, match="No space left"):
        map_shards("step", documents, tmp_path / "out", KERNEL, LocalMap(1))
    assert not list((tmp_path / "out").rglob("part-*"))
