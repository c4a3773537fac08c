"""Inputs in depth: notebooks, archives, dataset folders, code trees, owners' terms, repair."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.extract import extract_record
from puna.data.extract.html import extract_html
from puna.data.extract.licences import is_licence_file, licence_of
from puna.data.extract.rights import directives
from puna.data.extract_config import ExtractConfig
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.readers.archives import MAX_DEPTH, read_archive
from puna.data.readers.compression import decompressed
from puna.data.readers.dataset_card import missing_shards, read_card, split_of
from puna.data.readers.files import format_of, read_file
from puna.data.readers.languages import language_of
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.readers.warc import read_warc
from puna.data.reasons import meaning_of
from puna.data.sources import list_source, open_source
from puna.data.sources.code_tree import CodeTreeConfig
from puna.data.sources.files import FilesConfig
from puna.data.sources.git_checkout import read_checkout, without_credentials
from puna.data.sources.hf_dataset import HfDatasetConfig


def run(out: Path, *sources, **options) -> dict:
    out.mkdir(exist_ok=True)
    cfg = IngestConfig(sources=sources, **{"workers": 1, **options})
    return ingest_documents(cfg, {}, out, Ledger(None))


def rows(out: Path) -> dict[str, dict]:
    tables = [pq.read_table(path) for path in sorted((out / "documents").iterdir())]
    return {row["path"]: row for row in pa.concat_tables(tables).to_pylist()}


def quarantine(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def files(name: str, *paths, **options) -> FilesConfig:
    return FilesConfig(name=name, paths=tuple(map(str, paths)), **options)


def read_all(config) -> list[RawRecord | BadRecord]:
    source = open_source(config)
    return [record for item in list_source(config) for record in source.read(item)]


# notebooks


def notebook(*cells: dict, **metadata) -> str:
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def code(source, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


NOTEBOOK = notebook(
    {"cell_type": "markdown", "source": ["# Title\n", "![plot](data:image/png;base64,AAAA)"]},
    code(
        ["x = 1\n", "x"],
        {"output_type": "execute_result", "data": {"text/plain": ["1"], "image/png": "AAAA"}},
        {"output_type": "stream", "name": "stdout", "text": "a" * 50},
    ),
    code(""),
    {"cell_type": "raw", "source": "raw text"},
    code("print('''\n```\n''')"),
    language_info={"name": "python"},
)


def read_notebook(text: str | bytes, **options) -> tuple[str, dict]:
    content = text.encode() if isinstance(text, str) else text
    record = RawRecord("a.ipynb", "application/x-ipynb+json", content, len(content))
    done = extract_record(record, ExtractConfig(**options))
    return done.text, done.metadata


def test_a_notebook_becomes_one_markdown_text():
    text, metadata = read_notebook(NOTEBOOK)
    assert text == (
        "# Title\nplot\n\n```python\nx = 1\nx\n```\n\nraw text\n\n"
        "````python\nprint('''\n```\n''')\n````\n"
    )
    assert metadata == {"language": "python"}


def test_a_notebook_as_a_script_with_outputs():
    text, _ = read_notebook(NOTEBOOK, notebook_code="percent", notebook_output_chars=10)
    assert text.startswith("# %% [markdown]\n# # Title\n# plot\n\n# %%\nx = 1\nx\n# Output:\n# 1\n")
    assert f"# {'a' * 8} ..." in text  # "1", a line end and eight more make ten
    assert "AAAA" not in text


def test_notebooks_of_version_3():
    cells = [
        {"cell_type": "heading", "level": 2, "source": "Head"},
        {"cell_type": "code", "input": "y"},
    ]
    text, _ = read_notebook(json.dumps({"worksheets": [{"cells": cells}], "nbformat": 3}))
    assert text == "## Head\n\n```python\ny\n```\n"


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        ('{"cells": [ü', "json", 11),
        ('{"é": 1, x}', "json", 10),
        ("[]", "schema", None),
        ('{"cells": 3}', "schema", None),
        ('{"cells": [3]}', "schema", None),
        ('{"cells": [{"cell_type": "code", "source": 3}]}', "schema", None),
        ("[" * 100_000, "json", None),
    ],
)
def test_broken_notebooks_are_set_aside_with_their_place(content, reason, offset):
    with pytest.raises(UnusableError) as caught:
        read_notebook(content)
    assert (caught.value.reason, caught.value.offset) == (reason, offset)


def test_the_offset_of_a_broken_notebook_reaches_the_quarantine(tmp_path):
    (tmp_path / "a.ipynb").write_text('{"cells": [,', encoding="utf-8")
    (tmp_path / "b.ipynb").write_text(NOTEBOOK, encoding="utf-8")
    metrics = run(tmp_path / "out", files("nb", tmp_path / "*.ipynb"))
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["path"], bad["reason"], bad["offset"]) == ("a.ipynb", "json", 11)
    assert metrics["flow"]["nb"]["in_docs"] == 2
    assert json.loads(rows(tmp_path / "out")["b.ipynb"]["metadata"]) == {"language": "python"}


# compression and archives


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
def test_xz_and_bzip2_of_several_streams_and_their_damage(compress):
    data = compress(b"one " * 1000) + compress(b"two")
    assert b"".join(decompressed(io.BytesIO(data))) == b"one " * 1000 + b"two"
    assert b"".join(decompressed(io.BytesIO(compress(b"")))) == b""
    with pytest.raises(UnusableError, match="corrupt"):
        list(decompressed(io.BytesIO(data[:-2])))
    damaged = bytearray(data)
    damaged[20] ^= 255
    with pytest.raises(UnusableError, match="corrupt"):
        list(decompressed(io.BytesIO(bytes(damaged))))


MEMBERS = {
    "./a.txt": b"a text",
    "d/" + "long" * 40 + "/ü.md": b"# Head\n",
    "d/r.jsonl": b'{"text": "one"}\n{bad\n{"text": "two"}\n',
    "../../etc/x.txt": b"traversal",
    "z.txt.gz": gzip.compress(b"packed"),
    "pic.png": b"\x89PNG",
}


def tar_of(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT, **options) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, **options) as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    return out.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


ARCHIVES = {
    "a.tar": tar_of(MEMBERS),
    "gnu.tar": tar_of(MEMBERS, tarfile.GNU_FORMAT),
    "a.tgz": gzip.compress(tar_of(MEMBERS)),
    "a.tar.zst": zstandard.compress(tar_of(MEMBERS)),
    "a.tar.xz": lzma.compress(tar_of(MEMBERS)),
    "a.tar.bz2": bz2.compress(tar_of(MEMBERS)),
    "a.zip": zip_of(MEMBERS),
}


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_archives_are_trees_of_files(name, tmp_path):
    (tmp_path / name).write_bytes(ARCHIVES[name])
    metrics = run(tmp_path / "out", files("x", tmp_path / name))
    found = rows(tmp_path / "out")
    inner = {path.removeprefix(f"{name}!/"): row["text"] for path, row in found.items()}
    assert inner == {
        "a.txt": "a text", "d/" + "long" * 40 + "/ü.md": "# Head\n", "d/r.jsonl#1": "one",
        "d/r.jsonl#3": "two", "../../etc/x.txt": "traversal", "z.txt.gz": "packed",
    }  # fmt: skip
    metadata = json.loads(found[f"{name}!/d/r.jsonl#3"]["metadata"])
    assert metadata == {"archive": name, "member": "d/r.jsonl"}
    assert {(bad["path"], bad["reason"]) for bad in quarantine(tmp_path / "out")} == {
        (f"{name}!/d/r.jsonl", "json"), (f"{name}!/pic.png", "format"),
    }  # fmt: skip
    assert metrics["flow"]["x"]["in_docs"] == 8


def members_of(data: bytes, name: str = "a.tar", limit: int = 1 << 20) -> tuple[list, list]:
    def read_member(file, path):
        format = format_of(path)
        return read_file(file, path, format) if format else iter(())

    kind = format_of(name) or ""
    records = list(
        read_archive(io.BytesIO(data), name, kind, read_member, max_member_bytes=lambda _: limit)
    )
    return (
        [record for record in records if isinstance(record, RawRecord)],
        [record for record in records if isinstance(record, BadRecord)],
    )


NUMBERED = {f"{i:02}.txt": bytes([65 + i]) * (300 * i + 1) for i in range(12)}
TAR = tar_of(NUMBERED)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, len(TAR) - 10_240))
def test_a_tar_that_was_cut_is_noticed_wherever_it_was_cut(cut):
    good, bad = members_of(TAR[:cut])
    assert [record.content for record in good] == list(NUMBERED.values())[: len(good)]
    whole, _ = members_of(TAR)
    if len(good) < len(whole):
        assert len(bad) == 1
        assert bad[0].reason == "corrupt-tar"
        assert bad[0].offset is not None
        assert bad[0].offset <= cut


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 0.98), kind=st.sampled_from(["a.tgz", "a.tar.zst", "a.tar.xz"]))
def test_compressed_tars_that_were_cut_are_noticed(share, kind):
    data = ARCHIVES[kind]
    _, bad = members_of(data[: int(share * len(data))], kind)
    assert any(record.reason.startswith(("corrupt-", "binary")) for record in bad)


def test_reading_goes_on_after_a_damaged_header():
    at = TAR.index(b"05.txt")
    damaged = bytearray(TAR)
    damaged[at] ^= 1
    good, bad = members_of(bytes(damaged))
    assert [record.path for record in good] == [
        f"a.tar!/{name}" for name in NUMBERED if name != "05.txt"
    ]
    assert [(record.reason, record.offset) for record in bad] == [("corrupt-tar", at)]


def test_joined_tars_are_read_to_their_end():
    good, bad = members_of(TAR + tar_of({"more.txt": b"more"}))
    assert len(good) == len(NUMBERED) + 1
    assert not bad


def test_large_members_are_set_aside_without_the_rest():
    for name, data in (("a.tar", TAR), ("a.zip", zip_of(NUMBERED))):
        good, bad = members_of(data, name, limit=2000)
        assert len(good) == 7
        assert {record.reason for record in bad} == {"too-large"}
        assert len(good) + len(bad) == len(NUMBERED)


def test_a_bomb_is_stopped(monkeypatch):
    monkeypatch.setattr("puna.data.readers.archives._BOMB_FREE_BYTES", 1 << 22)
    bomb = gzip.compress(tar_of({"zeros.txt": bytes(1 << 25)}))
    good, bad = members_of(bomb, "a.tgz", limit=1 << 26)
    assert not good
    assert [record.reason for record in bad] == ["bomb"]


def test_damaged_zips_are_set_aside():
    data = zip_of(NUMBERED)
    good, bad = members_of(data[:-50], "a.zip")
    assert not good
    assert [(record.reason, record.offset) for record in bad] == [("corrupt-zip", len(data) - 50)]
    damaged = bytearray(data)
    at = data.index(b"03.txt") + len("03.txt") + 2
    damaged[at] ^= 255
    good, bad = members_of(bytes(damaged), "a.zip")
    assert len(good) == len(NUMBERED) - 1
    assert [record.path for record in bad] == ["a.zip!/03.txt"]


def test_archives_inside_archives_and_chosen_members(tmp_path):
    (tmp_path / "o.zip").write_bytes(zip_of({"in.tar": TAR, "a/x.txt": b"x", "b/y.txt": b"y"}))
    run(tmp_path / "out", files("x", tmp_path / "o.zip"))
    assert len([path for path in rows(tmp_path / "out") if path.startswith("o.zip!/in.tar!/")]) > 3
    run(tmp_path / "two", files("x", tmp_path / "o.zip", members=("a/**",)))
    assert list(rows(tmp_path / "two")) == ["o.zip!/a/x.txt"]
    assert quarantine(tmp_path / "two") == []


def test_members_of_inner_archives_are_named_counted_and_chosen(tmp_path):
    inner = gzip.compress(tar_of({"d/a.jsonl": b'{"text": "one"}\nbad\n', "b.txt": b"two"}))
    (tmp_path / "o.zip").write_bytes(zip_of({"p/in.tar.gz": inner, "c.txt": b"three"}))
    metrics = run(tmp_path / "out", files("x", tmp_path / "o.zip"))
    found = rows(tmp_path / "out")
    assert {path: row["text"] for path, row in found.items()} == {
        "o.zip!/p/in.tar.gz!/d/a.jsonl#1": "one", "o.zip!/p/in.tar.gz!/b.txt": "two",
        "o.zip!/c.txt": "three",
    }  # fmt: skip
    metadata = json.loads(found["o.zip!/p/in.tar.gz!/b.txt"]["metadata"])
    assert metadata == {"archive": "o.zip", "member": "p/in.tar.gz!/b.txt"}
    assert [(b["path"], b["reason"]) for b in quarantine(tmp_path / "out")] == [
        ("o.zip!/p/in.tar.gz!/d/a.jsonl", "json")
    ]
    assert metrics["flow"]["x"]["in_docs"] == 4
    for pattern, wanted in (
        ("p/**", {"#1", "b.txt"}), ("p/in.tar.gz", {"#1", "b.txt"}), ("*.txt", {"c.txt"}),
        ("**!/*.txt", {"b.txt"}), ("**/*.txt", {"c.txt"}),
    ):  # fmt: skip
        name = f"out-{len(list(tmp_path.iterdir()))}"
        run(tmp_path / name, files("x", tmp_path / "o.zip", members=(pattern,)))
        assert {path[-2:] if "#" in path else path[-5:] for path in rows(tmp_path / name)} == wanted


def test_archives_too_deep_in_each_other_are_set_aside_with_their_place(tmp_path):
    data = b"deep"
    for depth in range(MAX_DEPTH + 1):
        data = zip_of({f"{depth}.{'txt' if not depth else 'zip'}": data, f"n{depth}.txt": b"n"})
    (tmp_path / "o.zip").write_bytes(data)
    run(tmp_path / "out", files("x", tmp_path / "o.zip"))
    inner = "!/".join(f"{depth}.zip" for depth in range(MAX_DEPTH, 0, -1))
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["path"], bad["reason"]) == (f"o.zip!/{inner}", "nested")
    assert len(rows(tmp_path / "out")) == MAX_DEPTH


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_bomb_of_nested_archives_is_stopped_and_the_rest_is_named(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("puna.data.readers.archives._BOMB_FREE_BYTES", 1 << 22)
    zeros = {f"{n}.txt": b"word " * (1 << 18) for n in range(40)}
    bomb = gzip.compress(tar_of(zeros)) if kind == "tgz" else zip_of(zeros)
    bombs = {f"{n}.{kind}": bomb for n in range(3)}
    outer = zip_of({"first.txt": b"good", **bombs, "last.txt": b"good"})
    (tmp_path / "o.zip").write_bytes(outer)
    run(tmp_path / "out", files("x", tmp_path / "o.zip"))
    told = quarantine(tmp_path / "out")
    assert {bad["reason"] for bad in told} == {"bomb"}
    assert "o.zip!/last.txt" in {bad["path"] for bad in told}
    n_rows = sum(row["n_bytes"] for row in rows(tmp_path / "out").values())
    assert 0 < n_rows <= max(1 << 22, 250 * len(outer))
    if kind == "zip":
        assert len(rows(tmp_path / "out")) + len(told) >= 40


def test_a_damaged_inner_archive_does_not_take_the_outer_along(tmp_path):
    inner = zip_of({"a.txt": b"a"})[:-30]
    (tmp_path / "o.tar").write_bytes(tar_of({"in.zip": inner, "b.txt": b"b"}))
    run(tmp_path / "out", files("x", tmp_path / "o.tar"))
    assert list(rows(tmp_path / "out")) == ["o.tar!/b.txt"]
    assert [(b["path"], b["reason"]) for b in quarantine(tmp_path / "out")] == [
        ("o.tar!/in.zip", "corrupt-zip")
    ]


# dataset folders

CARD = """---
license: [cc-by-4.0, mit]
language: en
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: small/train-*.parquet
  - split: test
    path: [small/test.jsonl]
- config_name: large
  data_files: large/*.jsonl
---
# A data set
"""


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "set"
    (folder / "small").mkdir(parents=True)
    (folder / "large").mkdir()
    (folder / ".git").mkdir()
    (folder / ".git" / "x.jsonl").write_text('{"text": "never"}\n')
    (folder / "README.md").write_text(CARD)
    for i in range(2):
        table = pa.table({"text": [f"row {i}"], "n": [i]})
        pq.write_table(table, folder / "small" / f"train-0000{i}-of-00002.parquet")
    (folder / "small" / "test.jsonl").write_text('{"text": "a test"}\n')
    (folder / "large" / "one.jsonl").write_text('{"text": "large"}\n')
    return folder


def test_a_dataset_folder_is_read_by_its_card(dataset, tmp_path):
    run(tmp_path / "out", HfDatasetConfig(name="s", path=str(dataset), metadata_fields=("n",)))
    found = rows(tmp_path / "out")
    assert sorted(found) == [
        "small/train-00000-of-00002.parquet#0", "small/train-00001-of-00002.parquet#0",
    ]  # fmt: skip
    assert json.loads(found["small/train-00001-of-00002.parquet#0"]["metadata"]) == {
        "config": "small", "licence": "cc-by-4.0, mit", "n": 1, "split": "train",
    }  # fmt: skip
    both = HfDatasetConfig(name="s", path=str(dataset), splits=("*",))
    assert {record.metadata["split"] for record in read_all(both)} == {"train", "test"}
    large = HfDatasetConfig(name="s", path=str(dataset), config="large")
    assert [record.content for record in read_all(large)] == ["large"]


def test_wrong_choices_of_a_dataset_are_named(dataset):
    with pytest.raises(PunaError, match=r"no configuration 'big'; known: small, large"):
        list_source(HfDatasetConfig(name="s", path=str(dataset), config="big"))
    with pytest.raises(PunaError, match=r"split 'dev' has no file; splits: test, train"):
        list_source(HfDatasetConfig(name="s", path=str(dataset), splits=("dev",)))
    with pytest.raises(PunaError, match="matches no file"):
        list_source(HfDatasetConfig(name="s", path=str(dataset / "nowhere")))
    (dataset / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PunaError, match=r"README.md: the YAML at its top is damaged"):
        list_source(HfDatasetConfig(name="s", path=str(dataset)))


def test_a_missing_shard_is_an_error(dataset):
    (dataset / "small" / "train-00001-of-00002.parquet").unlink()
    config = HfDatasetConfig(name="s", path=str(dataset))
    with pytest.raises(PunaError, match=r"small/train-00001-of-00002.parquet is missing"):
        list_source(config)
    assert len(list_source(config.model_copy(update={"allow_missing_shards": True}))) == 1


def test_a_pointer_of_git_lfs_is_no_data(dataset):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (dataset / "small" / "train-00001-of-00002.parquet").write_text(pointer)
    bad = [r for r in read_all(HfDatasetConfig(name="s", path=str(dataset))) if
           isinstance(r, BadRecord)]  # fmt: skip
    assert [record.reason for record in bad] == ["lfs-pointer"]


def test_a_dataset_without_a_card_goes_by_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.json").write_text('{"text": "t"}\n')
    (tmp_path / "data" / "validation.jsonl").write_text('{"text": "v"}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {"license": "MIT"}}')
    (record,) = read_all(HfDatasetConfig(name="s", path=str(tmp_path)))
    assert (record.content, record.metadata) == ("t", {"split": "train", "licence": "MIT"})


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/dev_sft-00000-of-00001.parquet", "validation"),
        ("data/random-00000-of-00001.parquet", "random"),
        ("test/part-1.parquet", "test"), ("my_eval.jsonl", "test"), ("x/contest.jsonl", "train"),
        ("valid.jsonl.gz", "validation"), ("anything.parquet", "train"),
    ],
)  # fmt: skip
def test_splits_by_name(path, split):
    assert split_of(path) == split


def test_shards_with_a_hash_are_one_family():
    assert missing_shards(["d/train-00000-of-00003-a1.parquet",
                           "d/train-00002-of-00003-b2.parquet"]) == [
        "d/train-00001-of-00003.parquet"
    ]  # fmt: skip


def test_forms_of_data_files():
    card = read_card(
        "---\nlicense: other\nlicense_name: own\nconfigs:\n- config_name: a\n  data_dir: d\n"
        "- config_name: b\n  data_dir: e\n  data_files: {train: x.jsonl, test: [y.jsonl]}\n---\n",
        "README.md",
    )
    assert card.configs == {
        "a": {"": ["d/**"]},
        "b": {"train": ["e/x.jsonl"], "test": ["e/y.jsonl"]},
    }
    assert (card.licence, card.default) == ("own", None)
    assert read_card("# no front matter", "README.md").configs == {}


# code trees

MIT = """MIT License. Copyright (c) someone

Permission is hereby granted, free of charge, to any person obtaining a copy of this software [...]
The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.
"""


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e.org"]
    return subprocess.run(
        [*command, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "repos" / "tool"
    (folder / "lib").mkdir(parents=True)
    (folder / "LICENSE").write_text(MIT)
    (folder / "main.py").write_text("print('e\u0301')\n")
    (folder / "lib" / "fast.rs").write_text("// SPDX-License-Identifier: Apache-2.0 OR MIT\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "remote", "add", "origin", "https://me:secret@example.org/tool.git")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_programs_of_a_checkout_know_their_origin(checkout, tmp_path):
    run(tmp_path / "out", CodeTreeConfig(name="c", paths=(f"{tmp_path}/repos",)))
    found = rows(tmp_path / "out")
    assert sorted(found) == ["tool/lib/fast.rs", "tool/main.py"]
    commit = git(checkout, "rev-parse", "HEAD")
    assert json.loads(found["tool/main.py"]["metadata"]) == {
        "language": "python", "repository": "https://example.org/tool.git", "commit": commit,
        "licence": "MIT",
    }  # fmt: skip
    assert found["tool/main.py"]["text"] == "print('e\u0301')\n"  # code is not normalised
    fast = json.loads(found["tool/lib/fast.rs"]["metadata"])
    assert (fast["language"], fast["licence"]) == ("rust", "Apache-2.0 OR MIT")


def test_commits_of_packed_refs_detached_heads_and_work_trees(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "pack-refs", "--all")
    assert read_checkout(str(checkout)).commit == commit
    git(checkout, "worktree", "add", "-q", str(tmp_path / "tree"))
    found = read_checkout(str(tmp_path / "tree"))
    assert (found.commit, found.remote) == (commit, "https://example.org/tool.git")
    git(checkout, "checkout", "-q", "--detach")
    assert read_checkout(str(checkout)).commit == commit
    assert read_checkout(str(tmp_path)) is None


@pytest.mark.parametrize("ending", ["tar.gz", "zip"])
def test_archives_of_git_keep_commit_and_licence(checkout, tmp_path, ending):
    git(checkout, "archive", "--prefix=tool-1/", "-o", str(tmp_path / f"t.{ending}"), "HEAD")
    records = read_all(CodeTreeConfig(name="c", paths=(f"{tmp_path}/t.{ending}",)))
    (main,) = [record for record in records if record.path.endswith("main.py")]
    assert main.path == f"t.{ending}!/tool-1/main.py"
    assert main.metadata["commit"] == git(checkout, "rev-parse", "HEAD")
    assert main.metadata["licence"] == "MIT"
    assert len(records) == 2
    chosen = CodeTreeConfig(name="c", paths=(f"{tmp_path}/t.{ending}",), languages=("rust",))
    assert [record.metadata["language"] for record in read_all(chosen)] == ["rust"]


def test_version_control_folders_are_left_out(checkout, tmp_path):
    (checkout / ".git" / "note.txt").write_text("never")
    (checkout / "note.txt").write_text("a note")
    config = files("x", checkout, include=("**/*.txt", "*.txt"))
    assert [item.path for item in list_source(config)] == ["note.txt"]


def test_licences_by_their_texts():
    bsd = ("Redistributions of source code must retain the above copyright notice\n"
           "Redistributions in binary form must reproduce the above")  # fmt: skip
    assert licence_of(MIT) == "MIT"
    assert licence_of(bsd) == "BSD-2-Clause"
    assert licence_of(bsd + " Neither the name of X may be used to endorse or promote products\n"
                      "derived from this software") == "BSD-3-Clause"  # fmt: skip
    assert licence_of("GNU GENERAL PUBLIC LICENSE\n  Version 2, June 1991\n" + MIT) == "GPL-2.0"
    assert licence_of((Path(__file__).parents[2] / "LICENSE").read_text()) == "Apache-2.0"
    assert licence_of("All rights reserved.") is None
    assert is_licence_file("LICENSE.txt")
    assert is_licence_file("COPYING.LESSER")
    assert not is_licence_file("licensing.py")
    assert without_credentials("git@example.org:a/b") == "git@example.org:a/b"


@pytest.mark.parametrize(
    ("path", "language"),
    [("a/b.c", "c"), ("x.PY", "python"), ("Makefile", "makefile"), ("CMakeLists.txt", "cmake"),
     ("a.png", None), (".py", None), ("README", None)],
)  # fmt: skip
def test_languages(path, language):
    assert language_of(path) == language


# owners' terms

PAGE = """<html><head><meta name="ROBOTS" content="noindex, NoAI"><meta name="dc.rights"
content="all mine"><link rel="license" href="https://creativecommons.org/licenses/by/4.0/"></head>
<body><p>A paragraph of the page that is to be read.</p></body></html>"""


def test_what_a_page_says_is_kept_and_can_be_a_reason(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.html").write_text("<p>Robots may have the licence to read this page.</p>")
    run(tmp_path / "out", files("x", tmp_path / "*.html"))
    assert json.loads(rows(tmp_path / "out")["a.html"]["metadata"]) == {
        "licence": "https://creativecommons.org/licenses/by/4.0/", "robots": "noindex, NoAI",
    }  # fmt: skip
    assert rows(tmp_path / "out")["b.html"]["metadata"] == "{}"
    terms = ExtractConfig(reject_robots=("noai",))
    metrics = run(tmp_path / "two", files("x", tmp_path / "*.html", extract=terms), strict=True)
    flow = metrics["flow"]["x"]
    assert flow["rejected"] == {"robots.noai": {"docs": 1, "bytes": len(PAGE)}}
    assert flow["in_docs"] == 2
    assert [(b["path"], b["reason"]) for b in quarantine(tmp_path / "two")] == [
        ("a.html", "robots.noai")
    ]
    assert meaning_of("robots.noai")


def warc(headers: str) -> bytes:
    body = b"<html><head><meta name=robots content=nofollow></head><p>Hello there.</p></html>"
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://e.org/\r\n"
        b"Content-Type: application/http; msgtype=response\r\n"
        + f"Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"
    )  # fmt: skip


def test_headers_of_a_crawl_are_kept():
    data = warc(
        "X-Robots-Tag: noai\r\nX-Robots-Tag: noimageai\r\ntdm-reservation: 1\r\n"
        'Link: <https://e.org/l>; rel="license"\r\n'
    )
    (record,) = read_warc([data], "a.warc")
    assert record.metadata == {
        "url": "http://e.org/", "robots": "noai, noimageai", "tdm_reservation": "1",
        "licence": "https://e.org/l",
    }  # fmt: skip
    done = extract_record(record, ExtractConfig(reject_robots=("tdm-reservation",)))
    assert done.metadata["robots"] == "noai, noimageai, nofollow"
    assert done.refused_by == "tdm-reservation"


@pytest.mark.parametrize(
    ("robots", "found"),
    [
        ("noai", {"noai"}), ("NoIndex,NOAI ", {"noindex", "noai"}),
        ("none", {"none", "noindex", "nofollow"}), ("googlebot: noai, noindex", set()),
        ("*: noai", {"noai"}), ("max-snippet: 3, noai", {"max-snippet: 3", "noai"}),
        (["noai"], {"noai"}), (3, set()), (None, set()),
    ],
)  # fmt: skip
def test_directives(robots, found):
    assert directives({"robots": robots}) == found


# HTML

BLOCKS = """<html><body><nav><ul><li><a href="/">Home</a></li></ul></nav><main><h1>Head</h1>
<p>A long paragraph of text stands here, with several words in it, so that it counts as text.</p>
<pre><b>def</b> f(x):
    if x:

        return 1
</pre>
<table><tr><th>name</th><th>value</th></tr><tr><td>a</td><td>two<br>lines</td></tr></table>
<ul><li>first point<ul><li>inner point</li></ul></li><li>second point</li></ul>
<p>Formulas <math><semantics><mi>x</mi><annotation encoding="application/x-tex">x^2</annotation>
</semantics></math>, <span class="MathJax">junk</span><script type="math/tex">a_b</script>,
<span class="katex"><span class="katex-mathml"><math><semantics><mi>E</mi><annotation
encoding="application/x-tex">E=mc^2</annotation></semantics></math></span><span class="katex-html"
aria-hidden="true">Emc2</span></span> and <img class="mwe-math-fallback-image-inline"
alt="{\\displaystyle \\frac{1}{2}}" src="x.png">.</p>
<p>Another paragraph of text that is long enough to be the main text of this page, with words.</p>
</main><footer>Copyright</footer></body></html>"""


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_blocks_survive_each_extractor(extractor):
    text, _ = extract_html(BLOCKS, ExtractConfig(extractor=extractor))
    assert "def f(x):\n    if x:\n\n        return 1\n" in text
    assert "| name | value |\n| a | two lines |" in text
    lines = [line.rstrip() for line in text.split("\n")]
    for point in ("first point", "inner point", "second point"):
        assert any(line.endswith(point) and line.lstrip()[:1] in "•-" for line in lines), point
    for formula in ("$x^2$", "$a_b$", "$E=mc^2$", "$\\frac{1}{2}$"):
        assert text.count(formula) == 1
    for junk in ("Home", "Copyright", "junk", "Emc2", "\u169b"):
        assert junk not in text


def test_long_menus_do_not_make_a_page_be_taken_whole():
    menu = "".join(f"<li><a href='/{i}'>an entry of the menu {i}</a></li>" for i in range(400))
    page = f"<html><body><div class='sidebar'><ul>{menu}</ul></div><main><p>{'Text. ' * 30}</p>"
    text, _ = extract_html(page)
    assert "Text." in text
    assert "entry" not in text


def test_layout_tables_stay_text():
    page = "<table><tr><td><h1>Head</h1><p>left</p></td><td><pre>x\n  y</pre></td></tr></table>"
    text, _ = extract_html(page)
    assert "|" not in text
    assert "x\n  y" in text


# repair


def test_wrong_decodings_are_repaired_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("Ein schÃ¶ner Tag, sagt “sie”. Fish &amp; chips ﬁrst\n")
    (tmp_path / "b.txt").write_text("Ein schöner Tag in São Paulo: «Ça va» – ½ €.\n")
    (tmp_path / "c.py").write_text("x = 'schÃ¶n'\n")
    source = files("x", tmp_path / "*.*", extract=ExtractConfig(repair=True))
    metrics = run(tmp_path / "out", source)
    found = rows(tmp_path / "out")
    assert found["a.txt"]["text"] == "Ein schöner Tag, sagt “sie”. Fish &amp; chips ﬁrst\n"
    assert json.loads(found["a.txt"]["metadata"]) == {"repaired": True}
    assert found["b.txt"]["text"].startswith("Ein schöner Tag in São")
    assert found["c.py"]["text"] == "x = 'schÃ¶n'\n"
    assert metrics["repaired"] == {"x": 1}


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [({"repair": True}, "ftfy", "puna[repair]"),
     ({"extractor": "trafilatura"}, "trafilatura", "puna[trafilatura]")],
)  # fmt: skip
def test_a_missing_package_is_named(options, package, extra, tmp_path, monkeypatch):
    import sys

    from puna.data.extract import repair, trafilatura_text

    monkeypatch.setitem(sys.modules, package, None)
    repair._ftfy.cache_clear()
    trafilatura_text._trafilatura.cache_clear()
    (tmp_path / "a.txt").write_text("a text")
    source = files("x", tmp_path / "a.txt", extract=ExtractConfig(**options))
    with pytest.raises(PunaError) as caught:
        run(tmp_path / "out", source)
    assert extra in str(caught.value.fix)


# the fault set: every document comes out or is accounted for

FAULTS = {
    "sound": (200, 0), "zst of two frames": (200, 0), "gzip of two members": (200, 0),
    "truncated gzip": (128, 1), "truncated zst": (0, None), "one broken line": (199, 1),
    "lone surrogate": (199, 1), "NUL byte after a line": (199, 1), "one line of Latin-1": (199, 1),
    "ids of two types": (200, 0), "equal ids": (100, 100), "flipped byte in Parquet": (150, 50),
    "truncated Parquet": (0, None),
}  # fmt: skip
"""Documents out and records reported; None where nothing comes out, which is an error."""


def test_no_document_of_the_fault_set_is_lost_silently(tmp_path):
    from bench_faults import TEXTS, read_puna, write_sets

    sets = write_sets(tmp_path)
    assert sets.keys() == FAULTS.keys()
    for name, (file, n_in) in sets.items():
        texts, n_reported, is_cut = read_puna(tmp_path / name, file)
        n_out, n_expected = FAULTS[name]
        assert set(texts) <= set(TEXTS), name
        assert len(texts) == n_out or (name == "truncated gzip" and 0 < len(texts) < n_in), name
        assert is_cut or len(texts) + n_reported == n_in, name
        assert n_expected is None or n_reported == n_expected, name
        assert is_cut == name.startswith("truncated"), name
