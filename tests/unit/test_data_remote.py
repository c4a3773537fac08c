"""Sources over the network: web servers that break off, an S3 server, the Hub; all on this host."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.readers.records import RawRecord
from puna.data.sources import list_source, open_source
from puna.data.sources import remote as remote_module
from puna.data.sources.files import FilesConfig
from puna.data.sources.hf_dataset import HfDatasetConfig
from puna.data.sources.remote import open_remote
from tests.object_store import serve_s3

KNOWN = importlib.import_module("fsspec.registry")._registry
LINES = b"".join(json.dumps({"text": f"document {i} " + "x" * 90}).encode() + b"\n"
                 for i in range(20_000))  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.0)
    fsspec.config.conf.clear()


class Web:
    """A web server whose faults can be set: bytes after which it breaks off, status codes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.sizes = True
        self.break_after: int | None = None
        self.n_breaks = 10**9
        self.statuses: list[int] = []
        self.n_requests = 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, with_body: bool) -> None:
                web.n_requests += 1
                data = web.files.get(self.path)
                status = web.statuses.pop(0) if web.statuses else 200
                if data is None or status >= 400:
                    self.send_error(404 if data is None else status)
                    return
                start, end = 0, len(data)
                wanted = self.headers.get("Range")
                if wanted and web.ranges:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(end, int(last) + 1)
                    status = 206
                self.send_response(status)
                if web.sizes:
                    self.send_header("Content-Length", str(end - start))
                    self.send_header("ETag", f'"{hash(data)}"')
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                self.end_headers()
                if not with_body:
                    return
                body = data[start:end]
                if web.break_after is not None and len(body) > web.break_after and web.n_breaks > 0:
                    web.n_breaks -= 1
                    self.wfile.write(body[: web.break_after])
                    self.close_connection = True
                    return
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop, once."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def web():
    server = Web()
    yield server
    server.stop()


def texts_of(url, **options):
    config = FilesConfig(name="web", paths=(url,), **options)
    source = open_source(config)
    records = [record for item in list_source(config) for record in source.read(item)]
    assert all(isinstance(record, RawRecord) for record in records), records
    return [record.content for record in records]


EXPECTED = [json.loads(line)["text"] for line in LINES.splitlines()]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_transfers_that_break_off_are_taken_up_again(web, ranges, pack):
    web.ranges = ranges
    web.files["/a.jsonl"] = pack(LINES)
    web.break_after, web.n_breaks = len(web.files["/a.jsonl"]) // 3, 3
    assert texts_of(f"{web.url}/a.jsonl") == EXPECTED
    assert web.n_breaks < 3


def test_a_server_that_always_breaks_off_is_read_when_each_try_brings_bytes(web):
    web.files["/a.jsonl"] = LINES
    web.break_after = 100_000
    assert texts_of(f"{web.url}/a.jsonl") == EXPECTED


def test_a_transfer_without_progress_is_given_up_and_named(web):
    web.files["/a.jsonl"] = LINES
    web.break_after, web.ranges = 100_000, False
    with pytest.raises(PunaError, match=rf"/a\.jsonl: .*{remote_module.ATTEMPTS} attempts") as told:
        texts_of(f"{web.url}/a.jsonl")
    assert "what is finished is kept" in told.value.fix
    web.stop()
    with pytest.raises(PunaError, match=r"/a\.jsonl: .*attempts"):
        texts_of(f"{web.url}/a.jsonl")


def test_busy_servers_are_asked_again_and_refusals_are_not(web):
    web.files["/a.jsonl"] = b'{"text": "one"}\n'
    web.statuses = [503, 503, 200, 429]
    assert texts_of(f"{web.url}/a.jsonl") == ["one"]
    web.statuses, web.n_requests = [403] * 50, 0
    with pytest.raises(PunaError, match="403"):
        texts_of(f"{web.url}/a.jsonl")
    assert web.n_requests <= 2  # HEAD, then GET
    web.statuses = []
    with pytest.raises(PunaError, match="matches no file"):
        texts_of(f"{web.url}/none.jsonl")


@pytest.mark.parametrize("how", ["ranges", "no ranges", "no sizes"])
def test_formats_that_seek_can_be_read_from_any_server(web, how):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": EXPECTED}), out, compression="none")
    web.files["/a.parquet"] = out.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("in/a.jsonl", LINES)
    web.files["/a.zip"] = out.getvalue()
    web.ranges, web.sizes = how == "ranges", how != "no sizes"
    if web.sizes:
        web.break_after, web.n_breaks = 1_000_000, 2
    for name in ("a.parquet", "a.zip"):
        assert texts_of(f"{web.url}/{name}") == EXPECTED


def test_a_file_that_changes_while_it_is_read_is_noticed(web):
    web.files["/a.jsonl"] = LINES
    web.break_after, web.n_breaks = 2_000_000, 1
    with open_remote(f"{web.url}/a.jsonl", {}) as file:
        web.files["/a.jsonl"] = LINES.replace(b"x", b"y")
        with pytest.raises(PunaError, match="was changed while it was read"):
            file.read()


def test_a_page_of_links_is_a_folder_and_a_query_is_no_pattern(web):
    links = "".join(f'<a href="{name}">x</a>' for name in ("b.jsonl", "a.jsonl", "c.txt"))
    web.files["/in/"] = links.encode()
    for name in ("a", "b"):
        web.files[f"/in/{name}.jsonl"] = b'{"text": "%s"}\n' % name.encode()
    web.files["/in/c.txt"] = b"c"
    config = FilesConfig(name="web", paths=(f"{web.url}/in/",))
    assert [item.path for item in list_source(config)] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert texts_of(f"{web.url}/in/*.jsonl") == ["a", "b"]
    web.files["/get?name=a"] = b'{"text": "asked"}\n'
    assert texts_of(f"{web.url}/get?name=a", format="jsonl") == ["asked"]


def test_places_in_a_remote_file(web):
    web.files["/a"] = LINES
    for web.ranges in (True, False):
        with open_remote(f"{web.url}/a", {}) as file:
            assert file.read(10) == LINES[:10]
            assert file.seek(-5, io.SEEK_END) == len(LINES) - 5
            assert file.read() == LINES[-5:]
            assert file.seek(100) == 100 == file.tell()
            assert file.seek(50, io.SEEK_CUR) == 150
            assert file.read(3) == LINES[150:153]


# object stores


@pytest.fixture(scope="module")
def bucket():
    with serve_s3("crawl") as options:
        yield fsspec.filesystem("s3", **options), options


def test_a_bucket_is_listed_and_read_the_same_for_any_number_of_workers(bucket, tmp_path):
    fs, options = bucket
    for index in (2, 0, 1):
        part = LINES[: 110 * 100 * (index + 1)].rpartition(b"\n")[0] + b"\n"
        fs.pipe(f"crawl/in/{index}.jsonl.gz", gzip.compress(part, mtime=0))
    fs.pipe("crawl/in/_note.txt", b"not a hidden file")
    config = FilesConfig(name="s", paths=("s3://crawl/in/**",), storage_options=options)
    items = list_source(config)
    assert [item.path for item in items] == ["0.jsonl.gz", "1.jsonl.gz", "2.jsonl.gz", "_note.txt"]
    assert all(item.stamp for item in items)
    hashes = set()
    for workers in (1, 2):
        out = tmp_path / str(workers)
        out.mkdir()
        ingest_documents(
            IngestConfig(sources=(config,), workers=workers, shard_bytes=20_000),
            {},
            out,
            Ledger(None),
        )
        hashes.add(b"".join(p.read_bytes() for p in sorted((out / "documents").iterdir())))
        assert pq.read_table(out / "documents").num_rows > 500
    assert len(hashes) == 1
    with pytest.raises(PunaError, match="matches no file"):
        list_source(FilesConfig(name="s", paths=("s3://crawl/none/*",), storage_options=options))


def test_a_bucket_without_permission_is_named(bucket, monkeypatch):
    _, options = bucket
    fs_class = type(bucket[0])

    def refuse(*args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fs_class, "find", refuse)
    with pytest.raises(PunaError, match="s3://crawl/in"):
        list_source(FilesConfig(name="s", paths=("s3://crawl/in",), storage_options=options))


# the Hub


@pytest.fixture
def hub(monkeypatch):
    """A file system in memory in the place of the Hub's."""
    from fsspec.implementations.memory import MemoryFileSystem

    class FakeHub(MemoryFileSystem):
        protocol = "hf"
        store: dict = {}  # noqa: RUF012 - as fsspec has it
        pseudo_dirs: list = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix("hf://"))

    monkeypatch.setitem(KNOWN, "hf", FakeHub)
    return FakeHub()


def test_a_data_set_of_the_hub_is_read_by_its_card(hub):
    card = "---\nlicense: mit\nconfigs:\n- config_name: small\n  data_files: small/*.jsonl\n---\n"
    hub.pipe("/datasets/puna/herd/README.md", card.encode())
    hub.pipe("/datasets/puna/herd/small/b.jsonl", b'{"text": "two"}\n')
    hub.pipe("/datasets/puna/herd/small/a.jsonl", b'{"text": "one"}\n')
    hub.pipe("/datasets/puna/herd/large/c.jsonl", b'{"text": "three"}\n')
    config = HfDatasetConfig(name="h", path="hf://datasets/puna/herd", config="small")
    source = open_source(config)
    records = [record for item in list_source(config) for record in source.read(item)]
    assert [record.content for record in records] == ["one", "two"]
    assert records[0].metadata["licence"] == "mit"


def test_the_hub_without_a_connection_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    HfFileSystem.clear_instance_cache()
    with pytest.raises(PunaError, match="hf://datasets/puna/herd"):
        list_source(HfDatasetConfig(name="h", path="hf://datasets/puna/herd"))


# what is missing or forbidden


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs"), ("http://h/x", "aiohttp", "http"),
     ("hf://datasets/a/b", "huggingface_hub", "hf")],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(url, package, extra, monkeypatch):
    protocol = url.partition("://")[0]
    monkeypatch.delitem(KNOWN, protocol, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("fsspec.implementations.http",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(PunaError, match=f"needs the package {package}") as caught:
        texts_of(url)
    assert caught.value.fix == f"pip install 'puna[{extra}]'"


@pytest.mark.parametrize(
    "options",
    [{"secret": "x"}, {"key": "AK"}, {"token": "hf_x"},
     {"client_kwargs": {"headers": {"Authorization": "Bearer x"}}}],
)  # fmt: skip
def test_secrets_in_a_recipe_are_refused(options):
    with pytest.raises(ValidationError, match="is a secret") as caught:
        FilesConfig(name="a", paths=("s3://b",), storage_options=options)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    for fine in ({"anon": True}, {"token": "anon"}, {"client_kwargs": {"region_name": "x"}}):
        FilesConfig(name="a", paths=("s3://b",), storage_options=fine)
