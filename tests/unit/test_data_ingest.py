"""Stage data.ingest: documents, quarantine, conservation, duplicates, errors, resuming."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data import ingest_unit
from puna.data.extract.normalise import normalise
from puna.data.ingest import IngestConfig, external_state, ingest_documents
from puna.data.ingest_plan import make_plan
from puna.data.schema import DOCUMENT_SCHEMA, document_id
from puna.data.sources import WorkItem
from puna.data.sources.files import FilesConfig


def run(out: Path, *sources, **options):
    out.mkdir(exist_ok=True)
    cfg = IngestConfig(sources=sources, **{"workers": 1, **options})
    return ingest_documents(cfg, {}, out, Ledger(None))


def rows(out: Path) -> list[dict]:
    tables = [pq.read_table(path) for path in sorted((out / "documents").iterdir())]
    return pa.concat_tables(tables).to_pylist()


def quarantine(out: Path) -> list[dict]:
    lines = (out / "quarantine.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines if line]


def files(name: str, *paths, **options) -> FilesConfig:
    return FilesConfig(name=name, paths=tuple(map(str, paths)), **options)


def same_tree(left: Path, right: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    return content(left) == content(right)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Every format, with one damaged record or file of each kind."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": f"line {i} ü", "url": f"http://e.org/{i}"}) for i in range(50)]
    lines[7] = '{"text": "cut'
    lines[11] = json.dumps({"text": "half an emoji \ud83d"})
    lines[13] = json.dumps({"text": "  \n "})
    data = "\n".join(lines).encode()
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])
    )
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(data)[:-7])
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20)]}), folder / "d.parquet")
    (folder / "cut.parquet").write_bytes((folder / "d.parquet").read_bytes()[:-9])
    (folder / "page.html").write_text("<html><body><p>A page with a paragraph.</p></body></html>")
    (folder / "koi.txt").write_bytes(("Привет, это обычный русский текст. " * 5).encode("koi8-r"))
    (folder / "crlf.md").write_bytes(b"# Title\r\n\r\ne\xcc\x81\x00t\xc3\xa9\r\n" + b"x" * 200)
    (folder / "noise.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (folder / "empty.txt").write_text("")
    (folder / "_hidden.txt").write_text("hidden files are read")
    (folder / "strange.xyz").write_text("no known format")
    (folder / "man").mkdir()
    (folder / "man" / "x.1").write_text(".SH NAME\nx \\- a page\n")
    return folder


def test_documents_and_their_flow(corpus, tmp_path):
    out = tmp_path / "out"
    metrics = run(out, files("mix", corpus / "**", metadata_fields=("url",)))
    found = rows(out)
    by_path = {row["path"]: row for row in found}
    assert by_path["a.jsonl#1"]["text"] == "line 0 ü"
    assert json.loads(by_path["a.jsonl#1"]["metadata"]) == {"url": "http://e.org/0"}
    assert by_path["a.jsonl#1"]["id"] == document_id("mix", "a.jsonl#1")
    assert by_path["a.jsonl#1"]["n_bytes"] == len("line 0 ü".encode())
    assert by_path["crlf.md"]["text"] == "# Title\n\nété\n" + "x" * 200
    assert by_path["koi.txt"]["text"].startswith("Привет")
    assert json.loads(by_path["koi.txt"]["metadata"]) == {"encoding": "koi8-r"}
    assert by_path["page.html"]["text"] == "A page with a paragraph."
    assert by_path["man/x.1"]["text"] == "NAME\nx - a page\n"
    assert by_path["_hidden.txt"]["text"] == "hidden files are read"
    assert {row["source"] for row in found} == {"mix"}
    flow = metrics["flow"]["mix"]
    rejected = {reason: entry["docs"] for reason, entry in flow["rejected"].items()}
    assert rejected["quarantine.corrupt-zstd"] == 1
    assert rejected["quarantine.corrupt-parquet"] == 1
    assert rejected["quarantine.binary"] == 1
    assert rejected["quarantine.format"] == 1
    assert rejected["quarantine.json"] == rejected["quarantine.surrogate"]
    assert rejected["quarantine.json"] >= 3
    assert (
        flow["kept_docs"]
        == len(found)
        == metrics["flow"]["mix"]["in_docs"] - sum(rejected.values())
    )
    assert flow["kept_bytes"] == sum(row["n_bytes"] for row in found)
    assert metrics["encodings"] == {"koi8-r": 1}
    assert metrics["docs_per_s"] > 0
    assert metrics["read_bytes"] == sum(p.stat().st_size for p in corpus.rglob("*") if p.is_file())
    assert sorted(path.name for path in out.iterdir()) == [
        "documents", "manifest.json", "quarantine.jsonl",
    ]  # fmt: skip


def test_the_quarantine_names_the_place_of_each_bad_record(corpus, tmp_path):
    run(tmp_path / "out", files("mix", corpus / "a.jsonl"))
    cut, half = quarantine(tmp_path / "out")
    assert (cut["source"], cut["path"], cut["record"], cut["reason"]) == (
        "mix", "a.jsonl", 8, "json",
    )  # fmt: skip
    data = (corpus / "a.jsonl").read_bytes()
    assert data[cut["offset"] :].startswith(b'{"text": "cut\n')
    assert (half["path"], half["record"], half["reason"]) == ("a.jsonl", 12, "surrogate")
    assert "character 14" in half["error"]
    assert half["n_records"] == 1


def test_shards_have_one_source_sorted_ids_and_the_schema(corpus, tmp_path):
    out = tmp_path / "out"
    run(
        out,
        files("one", corpus / "*.jsonl"),
        files("two", corpus / "*.gz", corpus / "*.txt"),
        shard_bytes=300,
    )
    shards = sorted((out / "documents").iterdir())
    assert len(shards) > 4
    assert [path.name for path in shards] == [f"part-{i:05d}.parquet" for i in range(len(shards))]
    manifest = json.loads((out / "manifest.json").read_text())["shards"]
    for path, entry in zip(shards, manifest, strict=True):
        table = pq.read_table(path)
        assert table.schema.equals(DOCUMENT_SCHEMA)
        ids = table.column("id").to_pylist()
        assert ids == sorted(ids)
        assert set(table.column("source").to_pylist()) == {entry["source"]}
        assert (entry["file"], entry["rows"]) == (f"documents/{path.name}", table.num_rows)
        assert entry["ids_digest"] == f"{sum(int(i, 16) for i in ids) % 2**128:032x}"


def test_a_large_file_becomes_several_shards(tmp_path):
    lines = "".join(json.dumps({"text": "x" * 90 + str(i)}) + "\n" for i in range(100))
    (tmp_path / "a.jsonl").write_text(lines)
    run(tmp_path / "out", files("x", tmp_path / "a.jsonl"), shard_bytes=2000)
    sizes = [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out/documents").iterdir())]
    assert sum(sizes) == 100
    assert len(sizes) == 5
    assert {json.loads(r["metadata"] or "{}") == {} for r in rows(tmp_path / "out")} == {True}


def test_workers_do_not_change_a_byte(corpus, tmp_path):
    outs = [tmp_path / f"out{n}" for n in (1, 2, 3)]
    for n_workers, out in zip((1, 2, 3), outs, strict=True):
        run(out, files("mix", corpus / "**"), shard_bytes=500, workers=n_workers)
    assert same_tree(outs[0], outs[1])
    assert same_tree(outs[0], outs[2])


def test_the_place_of_a_corpus_does_not_change_its_ids(corpus, tmp_path):
    run(tmp_path / "out1", files("mix", corpus / "**"))
    moved = tmp_path / "deep" / "elsewhere"
    moved.parent.mkdir()
    corpus.rename(moved)
    run(tmp_path / "out2", files("mix", moved / "**"))
    assert same_tree(tmp_path / "out1", tmp_path / "out2")


# duplicates


def write_ids(path: Path, *ids) -> None:
    lines = [json.dumps({"id": i, "text": f"{path.name} {n}"}) for n, i in enumerate(ids)]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("shard_bytes", [1, 60, 10**6])
def test_the_second_of_equal_ids_is_set_aside(tmp_path, shard_bytes):
    write_ids(tmp_path / "a.jsonl", "x", "y", "x", 1)
    write_ids(tmp_path / "b.jsonl", "z", "1", "y", "w")
    out = tmp_path / "out"
    source = files("ids", tmp_path / "*.jsonl", id_field="id")
    metrics = run(out, source, shard_bytes=shard_bytes)
    assert {row["path"]: row["text"] for row in rows(out)} == {
        "x": "a.jsonl 0", "y": "a.jsonl 1", "1": "a.jsonl 3", "z": "b.jsonl 0", "w": "b.jsonl 3",
    }  # fmt: skip
    flow = metrics["flow"]["ids"]
    assert (flow["in_docs"], flow["kept_docs"]) == (8, 5)
    assert flow["rejected"]["quarantine.duplicate-id"]["docs"] == 3
    places = sorted(entry["path"] for entry in quarantine(out))
    assert places == ["a.jsonl#3", "b.jsonl#2", "b.jsonl#3"]


def test_a_shard_of_nothing_but_duplicates_is_not_written(tmp_path):
    write_ids(tmp_path / "a.jsonl", "x", "y")
    write_ids(tmp_path / "b.jsonl", "x", "y")
    run(tmp_path / "out", files("ids", tmp_path / "*.jsonl", id_field="id"), shard_bytes=60)
    assert [p.name for p in (tmp_path / "out/documents").iterdir()] == ["part-00000.parquet"]


@pytest.mark.parametrize("shard_bytes", [60, 10**6])
def test_strict_refuses_equal_ids(tmp_path, shard_bytes):
    write_ids(tmp_path / "a.jsonl", "x", "y")
    write_ids(tmp_path / "b.jsonl", "z", "x")
    source = files("ids", tmp_path / "*.jsonl", id_field="id")
    with pytest.raises(PunaError, match=r"b\.jsonl#2: duplicate-id: .* 'x'"):
        run(tmp_path / "out", source, strict=True, shard_bytes=shard_bytes)


# errors


def test_strict_names_the_first_bad_record(corpus, tmp_path):
    with pytest.raises(PunaError, match=r"'mix': a\.jsonl, record 8 \(byte [\d,]+\): json"):
        run(tmp_path / "out", files("mix", corpus / "a.jsonl"), strict=True)
    with pytest.raises(PunaError, match=r"noise\.txt: binary"):
        run(tmp_path / "out", files("mix", corpus / "noise.txt"), strict=True)


def test_strict_is_content_with_good_input(corpus, tmp_path):
    source = files("mix", corpus / "d.parquet", corpus / "empty.txt")
    metrics = run(tmp_path / "out", source, strict=True)
    assert metrics["flow"]["mix"]["kept_docs"] == 20
    assert metrics["flow"]["mix"]["rejected"] == {"empty": {"docs": 1, "bytes": 0}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"bad\nworse\n", "of 2 records, 2 quarantine.json; the first: a.jsonl#1: json"),
        ("a.jsonl", b'{"body": "x"}\n', "fields here: body"),
        ("a.jsonl", b"\n\n", "hold no record"),
        ("a.jsonl", b"", "hold no record"),
        ("a.txt", b" \n", "of 1 records, 1 empty"),
        ("a.txt", b"\0\1\2" * 50, "1 quarantine.binary"),
        ("a.parquet", b"PAR1 no", "1 quarantine.corrupt-parquet"),
        ("a.warc.gz", gzip.compress(b"WARC", mtime=0)[:-3], "quarantine.corrupt"),
    ],
)
def test_a_source_that_gives_nothing_is_an_error(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(PunaError, match="source 'bad' gives no document") as caught:
        run(tmp_path / "out", files("good", tmp_path / "good.txt"), files("bad", tmp_path / name))
    assert words in caught.value.message


def test_missing_files_and_empty_selections(tmp_path):
    with pytest.raises(PunaError, match="matches no file"):
        run(tmp_path / "out", files("x", tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(PunaError, match="has no file"):
        run(tmp_path / "out", files("x", tmp_path / "a.txt", exclude=("*",)))


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValidationError, match="2 sources are called 'x'"):
        IngestConfig(sources=(files("x", "a"), files("x", "b")))


def test_errors_in_workers_reach_the_user(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(PunaError, match=r"gone\.txt: no such file"):
        run(tmp_path / "out", files("x", tmp_path / "*.txt"), workers=2, shard_bytes=1)


# listing and plan


def test_the_external_state_follows_the_files(corpus):
    cfg = IngestConfig(sources=(files("mix", corpus / "*.jsonl"),))
    before = external_state(cfg)
    assert before == external_state(cfg)
    assert before["sources"]["mix"]["items"] == 1
    (corpus / "a.jsonl").write_text('{"text": "other"}')
    assert external_state(cfg) != before
    (corpus / "a.jsonl").unlink()
    assert "matches no file" in external_state(cfg)["unavailable"]


def test_the_plan_groups_neighbours_up_to_the_size(tmp_path):
    items = [WorkItem(f"{i:02d}", "", size) for i, size in enumerate([4, 4, 4, 20, 1, 1, 9])]
    source = files("x", "a")
    units = make_plan([(source, items)], 10, False, tmp_path)
    assert [[item.n_bytes for item in unit.items] for unit in units] == [
        [4, 4],
        [4],
        [20],
        [1, 1],
        [9],
    ]
    assert len({unit.digest for unit in units}) == 5


def test_a_lost_document_is_noticed(corpus, tmp_path, monkeypatch):
    original = ingest_unit.write_documents
    monkeypatch.setattr(
        ingest_unit, "write_documents", lambda path, table: original(path, table.slice(1))
    )
    with pytest.raises(RuntimeError, match="does not hold the ids"):
        run(tmp_path / "out", files("mix", corpus / "a.jsonl"))
    monkeypatch.setattr(ingest_unit, "write_documents", original)
    monkeypatch.setattr(ingest_unit._UnitWriter, "_count_in", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"'mix': 0 records in, 47 kept, 3 rejected, 47 in"):
        run(tmp_path / "out2", files("mix", corpus / "a.jsonl"))


# resuming


def test_finished_units_are_not_read_again(corpus, tmp_path, monkeypatch):
    source, out = files("mix", corpus / "**"), tmp_path / "out"
    run(tmp_path / "reference", source, shard_bytes=500)
    done = []
    original = ingest_unit.write_json

    def stop_after_three(path, value):
        original(path, value)
        done.append(path.name)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ingest_unit, "write_json", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(out, source, shard_bytes=500)
    monkeypatch.setattr(ingest_unit, "write_json", original)
    metrics = run(out, source, shard_bytes=500)
    assert metrics["units_resumed"] == 3
    assert same_tree(out, tmp_path / "reference")


def test_a_damaged_or_outdated_unit_is_read_again(corpus, tmp_path, monkeypatch):
    source, out = files("mix", corpus / "*.jsonl*"), tmp_path / "out"
    monkeypatch.setattr("puna.data.ingest.remove_tree", lambda path: None)
    monkeypatch.setattr("puna.data.ingest_publish._publish_part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(out, source, shard_bytes=400)
    monkeypatch.undo()
    parts = sorted((out / ".work").glob("*.parquet"))
    damaged = bytearray(parts[0].read_bytes())
    damaged[50] ^= 1
    parts[0].write_bytes(damaged)
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "new"}'))
    metrics = run(out, source, shard_bytes=400)
    assert metrics["units_resumed"] == metrics["units"] - 2
    run(tmp_path / "reference", source, shard_bytes=400)
    assert same_tree(out, tmp_path / "reference")


def test_normalisation_is_idempotent_on_what_was_written(corpus, tmp_path):
    run(tmp_path / "out", files("mix", corpus / "**"))
    for row in rows(tmp_path / "out"):
        assert normalise(row["text"]) == row["text"]
