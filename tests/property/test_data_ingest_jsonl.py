"""Properties: what is written as JSON Lines is read back; nothing is lost for any bytes."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.extract.normalise import normalise
from puna.data.extract.roff import extract_roff
from puna.data.ingest import IngestConfig, ingest_documents
from puna.data.readers.jsonl import Fields, read_jsonl
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.readers.warc import read_warc
from puna.data.sources.files import FilesConfig

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).filter(
    lambda text: normalise(text).strip()
)
COMPRESSIONS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def ingest(data: dict[str, bytes], **options):
    """Ingest files; return (texts by path, flow, quarantined entries)."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "in", Path(folder) / "out"
        root.mkdir()
        out.mkdir()
        for name, content in data.items():
            (root / name).write_bytes(content)
        cfg = IngestConfig(
            sources=(FilesConfig(name="x", paths=(f"{root}/*",)),), workers=1, **options
        )
        metrics = ingest_documents(cfg, {}, out, Ledger(None))
        texts: dict[str, str] = {}
        for shard in (out / "documents").iterdir():
            table = pq.read_table(shard, columns=["path", "text"])
            texts.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
        lines = (out / "quarantine.jsonl").read_bytes().split(b"\n")
        return texts, metrics["flow"]["x"], [json.loads(line) for line in lines if line]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(TEXTS, min_size=1, max_size=12),
    st.sampled_from(sorted(COMPRESSIONS)),
    st.booleans(),
    st.sampled_from([50, 300, 10**6]),
)
def test_texts_come_back(texts, suffix, ascii_only, shard_bytes):
    lines = "".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts)
    found, flow, bad = ingest(
        {f"a{suffix}": COMPRESSIONS[suffix](lines.encode())}, shard_bytes=shard_bytes
    )
    assert found == {f"a{suffix}#{i}": normalise(text) for i, text in enumerate(texts, 1)}
    assert (flow["in_docs"], flow["kept_docs"], bad) == (len(texts), len(texts), [])


LINE = st.one_of(
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    TEXTS.map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from(
        [b"", b"  ", b"{}", b"null", b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": 1}']
    ),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(LINE, max_size=15))
def test_every_line_is_kept_or_set_aside(lines):
    lines = [b'{"text": "one good line"}', *lines]
    records = [line for line in lines if line.strip()]
    found, flow, bad = ingest({"a.jsonl": b"\n".join(lines)})
    rejected = sum(entry["docs"] for entry in flow["rejected"].values())
    empty = flow["rejected"].get("empty", {"docs": 0})["docs"]
    assert flow["in_docs"] == len(records) == flow["kept_docs"] + rejected
    assert flow["kept_docs"] == len(found)
    assert len(bad) == rejected - empty
    assert sum(entry["n_bytes"] for entry in bad) <= sum(map(len, records))


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["txt", "jsonl", "parquet", "warc", "html", "md"]))
def test_no_bytes_break_a_reader(data, suffix):
    try:
        _, flow, _ = ingest({f"a.{suffix}": data, "b.txt": b"good"})
    except PunaError as error:
        raise AssertionError(f"one bad file stopped the ingest: {error}") from error
    assert flow["in_docs"] == flow["kept_docs"] + sum(
        entry["docs"] for entry in flow["rejected"].values()
    )


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50), st.integers(1, 60))
def test_jsonl_records_do_not_depend_on_chunks(data, size, limit):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    whole = list(read_jsonl([data], "a", Fields(), "text/plain", max_record_bytes=limit))
    assert whole == list(read_jsonl(chunks, "a", Fields(), "text/plain", max_record_bytes=limit))
    for record in whole:
        assert isinstance(record, BadRecord | RawRecord)
        assert record.offset is not None
        line = data[record.offset :].split(b"\n")[0]
        assert len(line) == record.n_bytes


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [b"WARC/1.0\r\n", b"Content-Length: 3\r\n", b"\r\n\r\n", b"WARC-Type: response\r\n"]
            ),
        ),
        max_size=12,
    ),
    st.integers(1, 50),
)
def test_warc_framing_ends_and_does_not_depend_on_chunks(pieces, size):
    data = b"".join(pieces)
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert list(read_warc([data], "a")) == list(read_warc(chunks, "a"))


ROFF = st.sampled_from(
    [".SH X", ".TP", ".IP a 2", ".nf", ".fi", ".if n \\{\\", ".\\}", ".ie t a", ".el b", ".TS",
     ".TE", "l l.", "a\tT{", "T}", ".de Z", "..", ".ig", ".ds s \\*s\\*s", "\\*s\\*(xy", "\\f",
     "\\(", "\\[", "word \\c", ".B", ".BR a \"b", ".Bl -bullet", ".It Fl x", ".El", ".Op Fl a Op",
     ".Nm", ".RS", ".RE", "\\h'", "\\N'9999999'", ".Oo", ".Oc", "", " x", "'", ".", ".while 1 x"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(ROFF, st.text(max_size=15)), max_size=25))
def test_any_roff_gives_text(lines):
    text = extract_roff("\n".join(lines))
    assert not text or text.endswith("\n")
    text.encode("utf-8", "surrogatepass")
