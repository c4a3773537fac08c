"""Readers: every format, whole and damaged."""

from __future__ import annotations

import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from puna.core.errors import PunaError
from puna.data.readers.compression import decompressed, read_all
from puna.data.readers.files import format_of, read_file
from puna.data.readers.jsonl import Fields, read_jsonl
from puna.data.readers.parquet import read_parquet
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.readers.warc import read_warc

LINES = b"".join(b'{"text": "document %d"}\n' % i for i in range(2000))


def split(records):
    good = [record for record in records if isinstance(record, RawRecord)]
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert len(good) + len(bad) == len(records)
    return good, bad


def jsonl(data: bytes, **fields):
    return split(list(read_jsonl([data], "a.jsonl", Fields(**fields), "text/plain")))


def chunked(data: bytes, size: int):
    return [data[at : at + size] for at in range(0, len(data), size)]


# compression


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_members_and_frames_are_all_read(compress):
    joined = compress(b"one\n") + compress(b"two\n") + compress(b"") + compress(b"three\n")
    assert read_all(io.BytesIO(joined), 100) == b"one\ntwo\nthree\n"


def test_gzip_padding_is_legal_and_garbage_is_not():
    good = gzip.compress(b"text")
    assert read_all(io.BytesIO(good + bytes(100)), 100) == b"text"
    with pytest.raises(UnusableError, match="corrupt-gzip"):
        read_all(io.BytesIO(good + b"garbage"), 100)


def test_zstd_skippable_frames_are_skipped():
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    data = skippable + zstandard.compress(b"text") + skippable
    assert read_all(io.BytesIO(data), 100) == b"text"


@pytest.mark.parametrize(
    ("compress", "reason"),
    [(gzip.compress, "corrupt-gzip"), (zstandard.compress, "corrupt-zstd")],
    ids=["gzip", "zstd"],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
def test_truncation_is_noticed_at_every_cut(compress, reason, share):
    data = compress(LINES)
    cut = data[: max(5, int(len(data) * share))]
    with pytest.raises(UnusableError) as caught:
        read_all(io.BytesIO(cut), 10**9)
    assert caught.value.reason == reason


def test_flipped_bits_are_noticed():
    zipped = bytearray(gzip.compress(LINES, mtime=0))
    zipped[len(zipped) // 2] ^= 0x55
    with pytest.raises(UnusableError, match="corrupt-gzip"):
        read_all(io.BytesIO(bytes(zipped)), 10**9)
    framed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(LINES))
    framed[len(framed) // 2] ^= 0x55
    with pytest.raises(UnusableError, match="corrupt-zstd"):
        read_all(io.BytesIO(bytes(framed)), 10**9)


def test_a_bomb_is_stopped_at_the_limit():
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(UnusableError, match="too-large"):
        read_all(io.BytesIO(bomb), 1_000_000)


def test_content_before_the_damage_is_read():
    chunks = decompressed(io.BytesIO(gzip.compress(b"kept\n") + gzip.compress(LINES)[:-20]))
    read = next(chunks) + next(chunks)
    assert read.startswith(b'kept\n{"text": "document 0"}\n')
    with pytest.raises(UnusableError):
        list(chunks)


# JSON Lines


def test_jsonl_gives_texts_places_and_metadata():
    data = b'{"text": "a", "url": "u", "n": 1}\n\n  \n{"text": "b\\u2028c"}'
    good, bad = jsonl(data, metadata=("url", "absent"))
    assert not bad
    assert [(r.path, r.content, r.metadata) for r in good] == [
        ("a.jsonl#1", "a", {"url": "u"}),
        ("a.jsonl#4", "b\u2028c", {}),
    ]
    assert data[good[1].offset :].startswith(b'{"text": "b')


def test_jsonl_keeps_all_other_fields_on_request():
    good, _ = jsonl(b'{"text": "a", "x": [1], "id": 7}\n', metadata=("*",), id="id")
    assert good[0].path == "7"
    assert good[0].metadata == {"x": [1], "file": "a.jsonl#1"}


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b'{"text": "cut', "json", "Unterminated"),
        (b"[1, 2]", "schema", "not an object"),
        (b'{"body": "x"}', "schema", "'text' (text) is missing; fields here: body"),
        (b'{"text": null}', "schema", "null"),
        (b'{"text": 5}', "schema", "5"),
        (b'{"text": "x", "n": NaN}', "json", "NaN"),
        (b'{"text": "\xff\xfe"}', "encoding", "utf-8"),
        (b"[" * 100_000, "json", "recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", "json", "digits"),
    ],
)
def test_a_bad_line_is_set_aside_with_its_place(line, reason, words):
    data = b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n'
    good, bad = jsonl(data)
    assert [record.content for record in good] == ["before", "after"]
    assert [(b.path, b.record, b.offset, b.reason) for b in bad] == [("a.jsonl", 2, 19, reason)]
    assert words in bad[0].error


@pytest.mark.parametrize("value", [b"null", b"true", b"1.5", b'""', b"[]"])
def test_an_id_must_be_text_or_a_whole_number(value):
    good, bad = jsonl(b'{"text": "x", "id": ' + value + b"}\n", id="id")
    assert not good
    assert bad[0].reason == "schema"
    assert "'id'" in bad[0].error


@pytest.mark.parametrize("size", [1, 3, 7, 64, 10_000])
def test_chunk_borders_do_not_matter(size):
    data = b"\xef\xbb\xbf" + LINES[:500] + b'bad\n\n{"text": "last"}'
    whole = list(read_jsonl([data], "a", Fields(), "text/plain"))
    parts = list(read_jsonl(chunked(data, size), "a", Fields(), "text/plain"))
    assert parts == whole
    assert [record.reason for record in split(whole)[1]] == ["json"]  # the cut line


def test_a_huge_line_is_set_aside_without_holding_it():
    lines = b'{"text": "a"}\n' + b"x" * 5000 + b'\n{"text": "b"}\n' + b"y" * 3000
    records = list(
        read_jsonl(chunked(lines, 100), "a", Fields(), "text/plain", max_record_bytes=1000)
    )
    good, bad = split(records)
    assert [(r.content, r.record) for r in good] == [("a", 1), ("b", 3)]
    assert [(b.reason, b.record, b.n_bytes) for b in bad] == [
        ("too-large", 2, 5000),
        ("too-large", 4, 3000),
    ]


def test_a_truncated_file_keeps_the_lines_before_the_damage():
    data = gzip.compress(LINES)[:-30]
    good, bad = split(list(read_file(io.BytesIO(data), "a.jsonl.gz", "jsonl")))
    assert [b.reason for b in bad] == ["corrupt-gzip"]
    assert 0 < len(good) < 2000
    assert bad[0].record == len(good) + 1
    assert [r.content for r in good] == [f"document {i}" for i in range(len(good))]


def test_a_declared_encoding_is_used():
    line = '{"text": "Größe"}\n'.encode("latin-1")
    records = read_file(io.BytesIO(line), "a.jsonl", "jsonl", encoding="latin-1")
    assert [r.content for r in records] == ["Größe"]


# Parquet


def parquet_bytes(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def parquet(data: bytes, **fields):
    return split(list(read_parquet(io.BytesIO(data), "a.parquet", Fields(**fields), "text/plain")))


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_parquet_text_columns(kind):
    table = pa.table({"text": pa.array(["a", "ü"]).cast(kind), "n": [1.5, float("nan")]})
    good, bad = parquet(parquet_bytes(table), metadata=("n",))
    assert not bad
    assert [(r.path, r.content, r.metadata) for r in good] == [
        ("a.parquet#0", "a", {"n": 1.5}),
        ("a.parquet#1", "ü", {"n": "nan"}),
    ]


def test_parquet_bytes_and_invalid_utf8_are_left_to_decode():
    good, _ = parquet(parquet_bytes(pa.table({"text": [b"Gr\xf6\xdfe", b"x"]})))
    assert [r.content for r in good] == [b"Gr\xf6\xdfe", b"x"]
    buffers = [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff")]
    careless = pa.Array.from_buffers(pa.string(), 1, buffers)
    good, _ = parquet(parquet_bytes(pa.table({"text": careless})))
    assert good[0].content == b"\xff"


def test_parquet_nulls_and_bad_ids_are_set_aside():
    table = pa.table({"text": ["a", None, "c"], "id": ["x", "y", None]})
    good, bad = parquet(parquet_bytes(table), id="id")
    assert [r.path for r in good] == ["x"]
    assert [(b.record, b.reason) for b in bad] == [(1, "schema"), (2, "schema")]


def test_parquet_row_numbers_run_over_row_groups():
    table = pa.table({"text": [str(i) for i in range(10)]})
    good, _ = parquet(parquet_bytes(table, row_group_size=3))
    assert [(r.path, r.content) for r in good] == [(f"a.parquet#{i}", str(i)) for i in range(10)]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_parquet_is_one_bad_record(share):
    data = parquet_bytes(pa.table({"text": ["x" * 100] * 50}))
    good, bad = parquet(data[: int(len(data) * share)])
    assert not good
    assert [b.reason for b in bad] == ["corrupt-parquet"]


def test_a_damaged_row_group_does_not_take_the_others_along():
    table = pa.table({"text": [f"text number {i} " * 20 for i in range(300)]})
    data = bytearray(
        parquet_bytes(table, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    )
    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle] ^= 0xFF
    good, bad = parquet(bytes(data))
    assert [r.record for r in good] == [*range(100), *range(200, 300)]
    assert [(b.reason, b.record, b.n_records) for b in bad] == [("corrupt-parquet", 100, 100)]


def test_a_missing_or_wrong_column_is_a_users_error():
    data = parquet_bytes(pa.table({"body": ["a"], "n": [1]}))
    with pytest.raises(PunaError, match=r"a\.parquet: column 'text' is missing; columns: body, n"):
        parquet(data)
    with pytest.raises(PunaError, match="'n' holds int64, not text"):
        parquet(data, text="n")


# WARC


def warc_record(kind: str, block: bytes, content_type: str, url: str = "http://e.org/") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-04-18T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(body: bytes, *, status="200 OK", kind="text/html", extra="", url="http://e.org/"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}\r\n".encode()
    return warc_record("response", head + body, "application/http; msgtype=response", url)


def warc(data: bytes, size: int = 50):
    return split(list(read_warc(chunked(data, size), "a.warc")))


def test_warc_pages_and_bookkeeping():
    data = b"".join(
        (
            warc_record("warcinfo", b"software: x\r\n", "application/warc-fields"),
            warc_record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
            response(b"<p>one</p>", url="http://e.org/1"),
            warc_record("conversion", "zwei ü".encode(), "text/plain", "http://e.org/2"),
            response(b"\x89PNG", kind="image/png"),
            response(b"<p>gone</p>", status="404 Not Found"),
        )
    )
    good, bad = warc(data)
    assert [(r.path, r.media_type, r.content, r.metadata["url"]) for r in good] == [
        ("a.warc#3", "text/html", b"<p>one</p>", "http://e.org/1"),
        ("a.warc#4", "text/plain", "zwei ü".encode(), "http://e.org/2"),
    ]
    assert [(b.record, b.reason) for b in bad] == [(5, "media-type"), (6, "http-status")]


def test_warc_undoes_http_codings_and_reads_the_charset():
    zipped = gzip.compress(b"<p>zipped</p>")
    chunks = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    data = response(
        zipped, extra="Content-Encoding: gzip\r\n", kind="text/html; charset=iso-8859-1"
    ) + response(chunks, extra="Transfer-Encoding: chunked\r\n")
    good, _ = warc(data)
    assert [r.content for r in good] == [b"<p>zipped</p>", b"hello world"]
    assert good[0].encoding == "iso-8859-1"


def test_warc_damage_is_reported_and_reading_goes_on():
    records = [response(b"<p>%d</p>" % i) for i in range(4)]
    garbled = records[1].replace(b"Content-Length: ", b"Content-Length: x")
    data = records[0] + b"garbage\r\n\r\n" + garbled + records[2] + records[3][:-12]
    good, bad = warc(data)
    assert [r.content for r in good] == [b"<p>0</p>", b"<p>2</p>"]
    assert {b.reason for b in bad} == {"corrupt-warc"}
    assert data[bad[0].offset :].startswith(b"garbage")
    assert "ends inside" in bad[-1].error


def test_a_wrong_length_is_noticed():
    record = response(b"<p>text</p>")
    short = record.replace(b"Content-Length: ", b"Content-Length: 1")  # 1xx: reaches into the next
    good, bad = warc(short + response(b"<p>after</p>") * 3)
    assert bad[0].reason == "corrupt-warc"
    assert b"<p>after</p>" in [r.content for r in good]


def test_a_large_warc_record_is_set_aside():
    data = response(b"x" * 5000) + response(b"<p>small</p>")
    records = list(read_warc(chunked(data, 99), "a.warc", max_record_bytes=1000))
    good, bad = split(records)
    assert [r.content for r in good] == [b"<p>small</p>"]
    assert [b.reason for b in bad] == ["too-large"]


def test_truncated_warc_gz_keeps_the_records_before():
    data = b"".join(gzip.compress(response(b"<p>%d</p>" % i)) for i in range(5))[:-20]
    good, bad = split(list(read_file(io.BytesIO(data), "a.warc.gz", "warc")))
    assert len(good) == 4
    assert bad[-1].reason == "corrupt-gzip"


def test_no_warc_at_all():
    good, bad = warc(b"nothing of the kind")
    assert not good
    assert [b.reason for b in bad] == ["corrupt-warc"]
    assert warc(b"") == ([], [])


# whole files


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("a.jsonl.gz", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("x/a.parquet", "parquet"),
        ("CC.warc.gz", "warc"),
        ("README.md", "markdown"),
        ("a.HTM", "html"),
        ("man/man1/tar.1.gz", "roff"),
        ("man/de/man3/x.3ssl", "roff"),
        ("doc/x/NEWS.1", None),
        ("a.b.json", None),
        ("Makefile", None),
    ],
)
def test_formats_by_name(path, format):
    assert format_of(path) == format


def test_whole_files_are_one_record():
    good, bad = split(list(read_file(io.BytesIO(gzip.compress(b"text")), "a.txt.gz", "text")))
    assert [(r.path, r.content, r.n_bytes, r.media_type) for r in good] == [
        ("a.txt.gz", b"text", 4, "text/plain")
    ]
    good, bad = split(list(read_file(io.BytesIO(gzip.compress(b"text")[:-4]), "a.txt.gz", "text")))
    assert [b.reason for b in bad] == ["corrupt-gzip"]
