"""Where documents ended, the funnel, and the commands that print them."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from puna.cli.data import data
from puna.core.artifact import write_record
from puna.core.errors import PunaError
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import dedup, filter, split
from puna.data.flow import Count, funnel
from puna.data.schema import document_id
from puna.data.testing import kept_rows, make_documents
from puna.data.why import why

STAGES = (filter, dedup, split)  # importing them registers the stages
PROSE = "the quick brown fox and the lazy dog walk to the river of gold with a friend"
ROWS = [
    ("docs", "a/long.txt", PROSE), ("docs", "a/copy.txt", f"{PROSE} "),
    ("docs", "b/short.txt", "x"), ("docs", "b/other.txt", PROSE[::-1]),
    ("code", "c.py", "def f(): return 1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("why")
    folder = root / "r" / "data.ingest"
    documents = make_documents(folder, ROWS, n_shards=2)
    entry = {"source": "docs", "path": "bad.jsonl", "record": 7, "offset": 90, "reason": "json",
             "error": "unexpected end", "n_records": 1, "n_bytes": 12}  # fmt: skip
    (folder / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    flow = {"docs": {"in_docs": 5, "in_bytes": 300, "kept_docs": 4, "kept_bytes": 233,
                     "rejected": {"quarantine.json": {"docs": 1, "bytes": 12}}}}  # fmt: skip
    record = {"stage": "data.ingest", "fingerprint": "f", "config": {}, "metrics": {"flow": flow}}
    write_record(folder, record)
    filters = [{"name": "length", "settings": {"min": 5}}]
    raw = {
        "name": "r", "runs_dir": str(root), "workers": 1,
        "inputs": {"data.filter.documents": str(documents.path)},
        "data": {
            "filter": {"default": {"profile": "none", "filters": filters}},
            "dedup": {"keep": "longest"},
            "split": {"budget_tokens": {"code": 1}, "bytes_per_token": 2.0, "heldout_fraction": 0},
        },
    }  # fmt: skip
    run_recipe(resolve(raw))
    ids = [row["id"] for row in kept_rows(root / "r" / "data.split") if row["source"] == "docs"]
    tokens = root / "r" / "tokens.encode" / "train" / "docs"
    tokens.mkdir(parents=True)
    np.save(tokens / "ids.npy", np.array(ids, "S32"))
    np.save(tokens / "offsets.npy", np.cumsum([0, *range(10, 10 + len(ids))]))
    return root / "r"


def test_a_kept_document_with_its_tokens(run_dir):
    (fate,) = why(run_dir, "b/other")
    assert (fate.outcome, fate.stage, fate.split) == ("kept", "data.split", "train")
    assert fate.cluster == fate.id == document_id("docs", "b/other.txt")
    assert fate.excerpt == PROSE[::-1]
    ids = np.load(run_dir / "tokens.encode" / "train" / "docs" / "ids.npy").tolist()
    position = ids.index(fate.id.encode())
    assert (fate.tokens.first_token, fate.tokens.n_tokens) == ([0, 10][position], 10 + position)


def test_a_rejected_document_with_value_and_threshold(run_dir):
    (fate,) = why(run_dir, document_id("docs", "b/short.txt"))
    assert (fate.outcome, fate.stage, fate.reason) == ("rejected", "data.filter", "length.short")
    assert (fate.value, fate.threshold, fate.excerpt) == (1.0, 5.0, "x")
    assert fate.meaning == "fewer characters than `min`"


def test_a_duplicate_names_what_was_kept(run_dir):
    (fate,) = why(run_dir, document_id("docs", "a/long.txt")[:10])
    assert (fate.outcome, fate.stage, fate.reason) == ("rejected", "data.dedup", "duplicate.exact")
    assert fate.detail == document_id("docs", "a/copy.txt")  # one byte longer
    assert fate.kept_path == "a/copy.txt"


def test_quarantined_input_by_path_and_by_the_id_it_would_have(run_dir):
    for query in ("bad.jsonl", document_id("docs", "bad.jsonl#7")):
        (fate,) = why(run_dir, query)
        assert (fate.outcome, fate.reason, fate.detail) == (
            "quarantined", "quarantine.json", "unexpected end",
        )  # fmt: skip


def test_several_matches_and_none(run_dir):
    fates = why(run_dir, ".txt")
    assert [fate.path for fate in fates] == [
        "a/copy.txt",
        "a/long.txt",
        "b/other.txt",
        "b/short.txt",
    ]
    assert {fate.outcome for fate in fates} == {"kept", "rejected"}
    with pytest.raises(PunaError, match=r"no document of .* 'nowhere'"):
        why(run_dir, "nowhere")


def test_every_document_is_in_exactly_one_place(run_dir):
    found = [fate.id for fate in why(run_dir, ".")]
    assert sorted(found) == sorted(
        [document_id(source, path) for source, path, _ in ROWS]
        + [document_id("docs", "bad.jsonl#7")]
    )


def test_an_unfinished_run_says_that_the_document_waits(run_dir, tmp_path):
    (tmp_path / "r").mkdir()
    for name in ("data.ingest", "data.filter"):
        (tmp_path / "r" / name).symlink_to(run_dir / name)
    (fate,) = why(tmp_path / "r", "c.py")
    assert (fate.outcome, fate.stage) == ("waiting", "data.filter")


def test_funnel_rows_and_totals(run_dir):
    found = funnel(run_dir)
    assert found.stages == ["data.ingest", "data.filter", "data.dedup", "data.split"]
    assert found.sources == ["code", "docs"]
    assert found.bytes_per_token == 2.0
    total = found.total("data.filter")
    assert (total.in_docs, total.kept_docs, total.rejected_docs) == (5, 4, 1)
    assert total.rejected == {"length.short": Count(1, 1)}
    for earlier, later in (("data.filter", "data.dedup"), ("data.dedup", "data.split")):
        assert found.total(earlier).kept_docs == found.total(later).in_docs
        assert found.total(earlier).kept_bytes == found.total(later).in_bytes
    assert found.tokens(100) == 50


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.ingest/quarantine.jsonl", "no json\n"),
        ("data.ingest/quarantine.jsonl", '{"a": 1}\n'),
        ("data.ingest/quarantine.jsonl", "[]\n"),
        ("tokens.encode/train/docs/ids.npy", ""),
        ("tokens.encode/train/docs/offsets.npy", "damaged"),
    ],
)
def test_damaged_files_are_named(run_dir, tmp_path, name, content):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / name).write_text(content)
    with pytest.raises(PunaError, match="damaged") as caught:
        why(copy, "b/other")
    assert str((copy / name).parent) in caught.value.message
    assert name.partition("/")[0] in caught.value.fix


def test_no_run_and_no_data(tmp_path):
    with pytest.raises(PunaError, match="there is no run in"):
        funnel(tmp_path / "nowhere")
    with pytest.raises(PunaError, match="holds no finished data stage"):
        why(tmp_path, "x")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["why", "b/short"],
            ["rejected", "length.short", "measured   1, threshold 5", "text       x"],
        ),
        (["why", "b/other"], ["kept", "split 'train'", "tokens.bin", "cluster"]),
        (["why", "a/long"], ["duplicate.exact", "kept doc   a/copy.txt"]),
        (["why", ".txt"], ["4 documents match", "a/copy.txt"]),
        (
            ["funnel", "--reasons"],
            ["data.split", "docs", "length.short", "fewer characters"],
        ),
    ],
)
def test_commands(run_dir, arguments, expected):
    result = CliRunner().invoke(data, [*arguments, "--run", str(run_dir)], catch_exceptions=False)
    assert result.exit_code == 0
    for text in expected:
        assert text in result.output
