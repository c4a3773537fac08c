"""Counts, export and card of a whole small run: formats, resuming, refusals, hostile texts."""

import errno
import gzip
import hashlib
import io
import json
import re
import tomllib

import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from click.testing import CliRunner

from puna.cli.data import data
from puna.core.errors import PunaError
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import compose, dedup, filter, ingest, safety, split
from puna.data.export import count_corpus, export_run, publish
from puna.data.export.card import clean
from puna.data.export.markdown import cell
from puna.data.export.write import write_file
from puna.data.testing import folder_bytes, kept_rows, rejected_rows

STAGES = (ingest, filter, safety, dedup, split, compose)  # importing registers them
EVIL = "<script>alert(1)</script> | `x` [a](http://evil.example) ![i](x)"


def recipe(root, workers=1):
    sources = [
        {"kind": "files", "name": name, "paths": [str(root / f"{name}.jsonl")], "id_field": "id",
         "metadata_fields": ["licence"]}
        for name in ("web", "books")
    ]  # fmt: skip
    return resolve({
        "name": "small", "runs_dir": str(root / "runs"), "workers": workers,
        "data": {
            "ingest": {"sources": sources, "shard_bytes": 20_000},
            "filter": {"default": {"profile": "none", "filters": ["length"]}},
            "safety": {}, "dedup": {}, "split": {"heldout_fraction": 0.1},
            "compose": {
                "groups": [{"match": {"source": "books"}, "repeat": 2.5},
                           {"match": {"source": "web"}, "rate": 0.5}],
            },
        },
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    for name in ("web", "books"):
        with (root / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(60):
                digest = hashlib.sha256(f"{name}{i}".encode()).hexdigest()
                words = " ".join(re.findall("..", digest * 6))
                licence = (EVIL, "MIT", "unknown", None)[i % 4]
                row = {"id": f"{name}-{i}", "text": f"{words} é {EVIL if i == 1 else ''}"}
                if i == 7:
                    row["text"] = "short"
                if licence:
                    row["licence"] = licence
                file.write(json.dumps(row) + "\n")
    run_recipe(recipe(root))
    return root / "runs" / "small"


def test_counts_add_up_and_tell_repetition(run):
    rows = kept_rows(run / "data.compose")
    found = count_corpus(run, ["split", "source", "licence"])
    assert found.total.docs == len(rows)
    assert found.total.n_bytes == sum(row["n_bytes"] for row in rows)
    estimate = {row["id"]: -(-row["n_bytes"] // 4) for row in rows}
    assert found.total.n_tokens == sum(estimate.values())
    assert found.total.tokens_read == sum(estimate[row["id"]] * row["repeat"] for row in rows)
    books = found.over("split", "source")["train", "books"]
    assert 2 < books.tokens_read / books.n_tokens < 3
    assert {licence for _, _, licence in found.groups} == {EVIL, "MIT", "(none)"}
    with pytest.raises(PunaError, match="no column 'topic'"):
        count_corpus(run, ["topic"])


def test_the_commands_print_a_table_and_json(run, tmp_path):
    shown = CliRunner().invoke(data, ["count", str(run), "--by", "source,language"])
    assert shown.exit_code == 0
    assert "estimated at 4 bytes per token" in shown.output
    shown = CliRunner().invoke(data, ["count", str(run), "--by", "source", "--json"])
    assert [row["values"] for row in json.loads(shown.output)["groups"]] == [
        {"source": "books"}, {"source": "web"},
    ]  # fmt: skip
    shown = CliRunner().invoke(data, ["export", str(run), str(tmp_path / "a"), "--shard-size", "x"])
    assert isinstance(shown.exception, PunaError)
    shown = CliRunner().invoke(data, ["export", str(run), str(tmp_path / "a")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "a" / "README.md").is_file()


def test_why_tells_the_repetition(run):
    row = next(row for row in kept_rows(run / "data.compose") if row["repeat"] == 3)
    shown = CliRunner().invoke(data, ["why", row["id"], "--run", str(run)])
    assert "in split 'train', read 3 times in a pass" in shown.output
    row = rejected_rows(run / "data.compose")[0]
    shown = CliRunner().invoke(data, ["why", row["id"], "--run", str(run)])
    assert "by data.compose: compose.sampled_out" in shown.output


def read_lines(path):
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    elif path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read()
    return [json.loads(line) for line in raw.decode().splitlines()]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_format_holds_all_documents_once_and_the_same_bytes(run, tmp_path, file_format):
    for name in ("a", "b"):
        manifest = export_run(run, tmp_path / name, file_format=file_format, shard_bytes=8_000)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert len(manifest["files"]) > 2
    rows = []
    for entry in manifest["files"]:
        path = tmp_path / "a" / entry["path"]
        assert re.fullmatch(r"data/(train|heldout)-\d{5}-of-\d{5}\." + file_format, entry["path"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        part = pq.read_table(path).to_pylist() if file_format == "parquet" else read_lines(path)
        assert {row["split"] for row in part} == {entry["split"]}
        rows += part
    expected = {row["id"]: row for row in kept_rows(run / "data.compose")}
    assert len(rows) == len(expected)
    for row in rows:
        licence = row.pop("licence")
        assert row == expected[row["id"]]
        given = json.loads(row["metadata"]).get("licence")
        assert licence == (None if given in (None, "unknown") else given)
    assert not list(tmp_path.glob("*.partial"))


def test_copies_columns_and_splits(run, tmp_path):
    manifest = export_run(run, tmp_path / "a", columns=["licence", "copy"], splits=["train"],
                          copies=True)  # fmt: skip
    rows = pq.read_table(tmp_path / "a" / "data").to_pylist()
    assert set(rows[0]) == {"id", "text", "licence", "copy"}
    wanted = sorted(
        (row["id"], number)
        for row in kept_rows(run / "data.compose")
        if row["split"] == "train"
        for number in range(row["repeat"])
    )
    assert sorted((row["id"], row["copy"]) for row in rows) == wanted
    assert manifest["rows"] == len(wanted) > manifest["docs"]
    with pytest.raises(PunaError, match="no column 'x'"):
        export_run(run, tmp_path / "b", columns=["x"])
    with pytest.raises(PunaError, match="split 'test'"):
        export_run(run, tmp_path / "b", splits=["test"])
    assert not (tmp_path / "b").exists()


def test_a_folder_with_anything_in_it_is_refused_and_force_replaces_exports_only(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_run(run, out)
    before = folder_bytes(out)
    with pytest.raises(PunaError, match="is not empty"):
        export_run(run, out)
    export_run(run, out, force=True, file_format="jsonl")
    assert folder_bytes(out) != before
    (out / "mine.txt").write_text("do not delete")
    with pytest.raises(PunaError, match=r"mine\.txt"):
        export_run(run, out, force=True)
    other = tmp_path / "home"
    other.mkdir()
    (other / "README.md").write_text("not an export")
    with pytest.raises(PunaError, match="is no export"):
        export_run(run, other, force=True)
    assert (other / "README.md").read_text() == "not an export"


def test_a_full_disk_leaves_the_target_alone_and_the_next_attempt_continues(
    run, tmp_path, monkeypatch
):
    out, written = tmp_path / "out", []

    def failing(path, file, batches, schema):
        written.append(file.name)
        if len(written) == 3:
            next(iter(batches))
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, file, batches, schema)

    monkeypatch.setattr(publish, "write_file", failing)
    with pytest.raises(PunaError, match="no space is left"):
        export_run(run, out, shard_bytes=8_000)
    assert not out.exists()
    partial = sorted(path.name for path in (tmp_path / "out.partial" / "data").iterdir())
    assert partial == sorted(name.removeprefix("data/") for name in written[:2])
    first = written[:2]
    written[:] = [*"....."]
    export_run(run, out, shard_bytes=8_000)
    assert not set(first) & set(written)
    export_run(run, tmp_path / "whole", shard_bytes=8_000)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_a_damaged_file_of_a_stopped_export_is_written_again(run, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_describe", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "out", shard_bytes=8_000)
    monkeypatch.undo()
    next((tmp_path / "out.partial" / "data").glob("train-00001*")).write_bytes(b"cut")
    export_run(run, tmp_path / "out", shard_bytes=8_000)
    export_run(run, tmp_path / "whole", shard_bytes=8_000)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_the_card_tells_what_the_artifacts_tell(run, tmp_path):
    export_run(run, tmp_path / "out", name="My <b>corpus</b>")
    card = json.loads((tmp_path / "out" / "card.json").read_text(encoding="utf-8"))
    rows = kept_rows(run / "data.compose")
    assert card["counts"]["total"]["docs"] == len(rows)
    dropped = {(one["stage"], one["reason"]): one["docs"] for one in card["dropped"]}
    assert dropped["data.filter", "length.short"] == 2
    sampled = len(rejected_rows(run / "data.compose"))
    assert dropped["data.compose", "compose.sampled_out"] == sampled
    assert all(one["meaning"] for one in card["dropped"])
    unknown = sum(json.loads(row["metadata"]).get("licence") in (None, "unknown") for row in rows)
    assert card["licences"]["unknown_docs"] == unknown > 0
    assert any(f"({unknown:,})" in line for line in card["gaps"])
    assert "The stage data.lines was not run." in card["gaps"]
    assert card["filters"][0]["filters"][0]["settings"]["min"] > 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "other"
    assert header["configs"][0]["data_files"][0] == {"split": "train", "path": "data/train-*"}
    assert {one["name"]: one["num_examples"] for one in header["dataset_info"]["splits"]} == {
        split: sum(row["split"] == split for row in rows) for split in ("train", "heldout")
    }
    body = text.split("---\n", 2)[2]
    assert "<" not in body.replace("&lt;", "")
    assert re.search(r"(?<!\\)\]\(http", body) is None
    svg = (tmp_path / "out" / "composition.svg").read_text(encoding="utf-8")
    assert "<script" not in svg
    again = resolve(tomllib.loads((tmp_path / "out" / "recipe.toml").read_text("utf-8")))
    assert set(again.stage_configs()) == set(recipe(tmp_path).stage_configs())


def test_texts_from_outside_are_harmless_in_tables():
    assert cell(EVIL) == (
        "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\`x\\` \\[a\\](http\\://evil.example) "
        "\\!\\[i\\](x)"
    )
    assert cell("a\n| b |\x00\u202e") == "a \\| b \\|"
    assert len(cell("x" * 5000)) <= 400


def test_credentials_do_not_reach_the_card():
    given = {
        "paths": ["https://me:secret@host.example/a.jsonl?X-Signature=secret", "s3://bucket/a"],
        "storage_options": {"key": "secret"},
    }
    assert "secret" not in json.dumps(clean(given))
    assert clean(given)["paths"] == ["https://host.example/a.jsonl", "s3://bucket/a"]


def test_a_run_that_is_not_finished_is_refused(run, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    (other / "data.ingest").symlink_to(run / "data.ingest")
    with pytest.raises(PunaError, match=r"not to data\.split"):
        export_run(other, tmp_path / "out")
