"""CSV and TSV: every row is a document or is set aside with its place."""

from __future__ import annotations

import csv
import gzip
import io

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.readers.csv import read_csv
from puna.data.readers.files import format_of, read_file
from puna.data.readers.jsonl import Fields
from puna.data.readers.records import BadRecord, RawRecord, UnusableError
from puna.data.sources.files import FilesConfig


def rows(data: bytes | list[bytes], fields: Fields | None = None, **options):
    chunks = data if isinstance(data, list) else [data]
    found = list(read_csv(chunks, "a.csv", fields or Fields(), "text/plain", **options))
    good = [one for one in found if isinstance(one, RawRecord)]
    return good, [one for one in found if isinstance(one, BadRecord)]


def test_texts_places_ids_and_metadata():
    data = b'id,text,lang\r\n7,"a ""quoted"", text\r\nin two lines",en\r\n\r\n8,plain,\r\n'
    good, bad = rows(data, Fields("text", "id", ("*",)))
    assert bad == []
    assert [(one.path, one.content, one.record, one.offset) for one in good] == [
        ("7", 'a "quoted", text\r\nin two lines', 2, 14), ("8", "plain", 5, 57),
    ]  # fmt: skip
    assert good[0].metadata == {"lang": "en", "file": "a.csv#2"}
    assert data[good[1].offset :].startswith(b"8,plain")
    assert good[0].n_bytes == 57 - 14 - 1 - 2  # without its line end and the blank line


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b"1,two,three", "csv", "3 fields, the header has 2"),
        (b"1", "csv", "1 fields"),
        (b'1,"a"b', "csv", "quoting"),
        (b'1,"never closed', "csv", "quoting"),
        (b"1,a\rb", "csv", "quoting"),
        (b"1,caf\xe9", "encoding", "0xe9"),
        (b"1,a\0b", "nul", "line 3"),
        (b",no id", "schema", "id"),
    ],
)
def test_a_bad_row_is_set_aside_alone(line, reason, words):
    data = b"id,text\n0,good\n" + line + b"\n2,good\n3,good too\n"
    good, bad = rows(data, Fields("text", "id"))
    assert [one.path for one in good] == ["0", "2", "3"]
    (one,) = bad
    assert (one.reason, one.record, one.offset) == (reason, 3, 15)
    assert words in one.error
    assert one.n_bytes == len(line)


def test_fields_larger_than_the_limit_of_the_library():
    csv.field_size_limit(131_072)  # as it is when the process begins
    text = "x" * 300_000
    good, bad = rows(f"text\n{text}\n".encode())
    assert (len(good[0].content), bad) == (len(text), [])
    good, bad = rows(f"text\n{text}\nshort\n".encode(), max_record_bytes=1000)
    assert [one.content for one in good] == ["short"]
    assert [(one.reason, one.n_bytes) for one in bad] == [("too-large", len(text))]


def test_a_stray_quote_ends_at_the_limit_of_a_record():
    data = b'id,text\n1,"stray\n' + b"".join(b"%d,text\n" % i for i in range(2, 2000))
    good, bad = rows(data, max_record_bytes=500)
    assert len(good) == 1998
    assert [(one.record, one.reason) for one in bad] == [(2, "csv")]
    assert "not closed in 500 bytes" in bad[0].error


def test_without_quotes_they_are_text_and_other_delimiters():
    data = b'id\ttext\n1\t"Hello" she said\n2\t"\n'
    good, bad = rows(data, Fields("text", "id"), delimiter="\t", quotes=False)
    assert [one.content for one in good] == ['"Hello" she said', '"']
    assert bad == []
    good, _ = rows(b"id;text\n1;a, b\n", Fields("text", "id"), delimiter=";")
    assert good[0].content == "a, b"


@pytest.mark.parametrize(
    ("header", "reason", "words"),
    [
        (b"body,title", "schema", "columns (split at ','): body, title"),
        (b"text,text", "schema", "twice"),
        (b'"text', "csv", "quoting"),
        (b"te\xffxt,b", "encoding", "0xff"),
        ("text,b".encode("utf-16"), "encoding", "0xff"),
    ],
)
def test_a_header_that_does_not_help_sets_all_rows_aside(header, reason, words):
    good, bad = rows(header + b"\na,b\nc,d\n")
    assert good == []
    (one,) = bad
    assert (one.path, one.reason, one.record) == ("a.csv", reason, 1)
    assert words in one.error
    assert one.n_records == 2


def test_damage_of_the_file_is_one_more_record():
    def chunks():
        yield b"text\none\ntwo\nthr"
        raise UnusableError("corrupt-gzip", "cut")

    found = list(read_csv(chunks(), "a.csv", Fields(), "text/plain"))
    assert [one.content for one in found[:2]] == ["one", "two"]
    assert (found[2].reason, found[2].record, found[2].offset) == ("corrupt-gzip", 4, 13)

    def open_quote():
        yield b'text\n"one\ntwo\n'
        raise UnusableError("corrupt-gzip", "cut")

    found = list(read_csv(open_quote(), "a.csv", Fields(), "text/plain"))
    kinds = [one.content if isinstance(one, RawRecord) else one.reason for one in found]
    assert kinds == ["csv", "two", "corrupt-gzip"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.csv", bytes), ("a.tsv.gz", gzip.compress), ("A.CSV.zst", zstandard.compress)],
)
def test_names_and_compression(name, pack):
    format = format_of(name)
    delimiter = "\t" if "tsv" in name else ","
    data = pack(f"id{delimiter}text\n1{delimiter}one\n".encode())
    (record,) = read_file(io.BytesIO(data), name, format)
    assert (record.content, record.path) == ("one", f"{name}#2")


def test_a_delimiter_is_one_character():
    for wrong in ('"', "\n", ", "):
        with pytest.raises(ValueError, match="delimiter"):
            FilesConfig(name="a", paths=("a",), delimiter=wrong)


TEXTS = st.text(st.sampled_from('ab,"\r\n\t;é\u2028 '), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8), st.integers(1, 40))
def test_what_the_library_writes_is_read_for_any_chunks(table, size):
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text"])
    writer.writerows(table)
    data = out.getvalue().encode()
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    good, bad = rows(chunks, Fields("text", None, ("id",)))
    assert bad == []
    assert [(one.metadata["id"], one.content) for one in good] == table
    for one in good:
        assert data[one.offset : one.offset + 1] == b'"'


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_set_aside(data):
    good, bad = rows(b"text\n" + data, max_record_bytes=50)
    n_bytes = sum(one.n_bytes for one in (*good, *bad))
    ends = data.count(b"\n")
    assert len(data) - 2 * ends <= n_bytes + 2 * (ends + 1)
    assert n_bytes <= len(data)
    assert len({one.offset for one in (*good, *bad)}) == len(good) + len(bad)
