"""Instruction pairs: reasons are complete, nothing leaks, the result does not depend on order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.data.schema import DOCUMENTS_DIR, dump_metadata
from puna.post.pairs import PairsConfig, make_pairs, read_pairs
from puna.post.quality import Entry, judge

JOIN = {
    "name": "os.path.join",
    "signature": "(a, *p)",
    "summary": "Join two or more pathname components",
}


def document(doc_id: str, split: str, entries: list[Any], source: str = "reference") -> dict:
    metadata = dump_metadata({"kind": "docstring", "entries": entries})
    return {"id": doc_id, "source": source, "split": split, "metadata": metadata}


def artifact(folder: Path, documents: list[dict], n_shards: int = 1) -> Artifact:
    target = folder / DOCUMENTS_DIR
    target.mkdir(parents=True)
    for shard in range(n_shards):
        rows = documents[shard::n_shards]
        columns = {key: [row[key] for row in rows] for key in documents[0]}
        pq.write_table(pa.table(columns), target / f"part-{shard:05d}.parquet")
    record = {"stage": "data.split", "fingerprint": "f", "content_hash": "c", "metrics": {}}
    write_json(folder / "artifact.json", {**record, "config": {}, "files": []})
    return Artifact(folder)


def run(tmp_path: Path, documents: list[dict], n_shards: int = 1, **config: Any) -> tuple:
    name = f"in{len(list(tmp_path.iterdir()))}"
    source = artifact(tmp_path / name, documents, n_shards)
    out = tmp_path / f"{name}-out"
    out.mkdir()
    metrics = make_pairs(PairsConfig(**config), {"documents": source}, out, Ledger(None))
    text = (out / "pairs.jsonl").read_text(encoding="utf-8")
    return metrics, [json.loads(line) for line in text.splitlines()], out


def many(n: int, split: str = "train", start: int = 0) -> list[dict]:
    return [
        document(f"{i:032x}", split, [{
            "name": f"mod{i}.fun{i}", "signature": f"(x{i})",
            "summary": f"Compute the value number {i} of the {'odd' if i % 2 else 'even'} series.",
        }])
        for i in range(start, start + n)
    ]  # fmt: skip


def test_each_kind_asks_and_answers_from_the_entry(tmp_path: Path) -> None:
    metrics, pairs, _ = run(tmp_path, [document("d1", "train", [JOIN])], pairs_per_entry=4)
    by_kind = {pair["kind"]: pair["messages"] for pair in pairs}
    assert set(by_kind) == {"purpose", "call", "name", "dialogue"}
    assert by_kind["purpose"][1]["content"] == "Join two or more pathname components."
    assert by_kind["call"][1]["content"] == "`os.path.join(a, *p)`"
    assert by_kind["name"][1]["content"] == "`os.path.join`"
    assert "Join two or more" in by_kind["name"][0]["content"]
    assert [turn["role"] for turn in by_kind["dialogue"]] == ["user", "assistant"] * 2
    for pair in pairs:
        assert pair["document_id"] == "d1"
        assert pair["split"] == "train"
    assert metrics["by_split"] == {"train": 4, "heldout": 0}


@pytest.mark.parametrize(
    ("summary", "name", "reason"),
    [
        ("Join two or more pathname components", "os.path.join", None),
        ("Return the canonical path (symlinks resolved).", "os.path.realpath", None),
        ("Join paths", "os.path.join", "summary.too_short"),
        ("x" * 301, "os.path.join", "summary.too_short"),
        ("Join the paths " * 30, "os.path.join", "summary.too_long"),
        ("", "os.path.join", "summary.missing"),
        ("join(a, b) -> the joined path of both", "os.path.join", "summary.not_prose"),
        ("1.0 == 2.0 + 3.0 / 4.0 % a b c d e", "m.f", "summary.not_prose"),
        ("Return one of the following values:", "m.f", "summary.ends_badly"),
        ("Return the canonical path of the", "m.f", "summary.ends_badly"),
        ("Return the canonical path (with all", "m.f", "summary.ends_badly"),
        ("See the documentation of the class.", "m.f", "summary.self_referential"),
        (
            "Get the user name of this, and return it.",
            "m.get_user_name",
            "summary.self_referential",
        ),
        ("Join two or more pathname components", "os._path.join", "name.private"),
        ("Join two or more pathname components", "m.A.__init__", "name.private"),
    ],
)
def test_rules_name_their_reason(summary: str, name: str, reason: str | None) -> None:
    assert judge(Entry(name, "", summary), 20, 300) == reason


def test_reasons_are_complete(tmp_path: Path) -> None:
    documents = [
        *many(20),
        *many(5, "heldout", start=100),
        document("bad", "train", [{"name": 3}, "text", {"name": "a.b"}, {"name": "not a name"}]),
        document("short", "train", [{"name": "a.c", "summary": "Short."}]),
        document("same", "train", [
            {"name": f"s.f{i}", "summary": "Return the very same sentence each time."}
            for i in range(5)
        ]),
    ]  # fmt: skip
    metrics, pairs, _ = run(tmp_path, documents, max_pairs=17)
    for level in ("entries", "pairs"):
        counts = metrics[level]
        assert counts["in"] == counts["kept"] + sum(counts["rejected"].values())
    assert metrics["entries"]["rejected"] == {
        "entry.malformed": 3, "summary.missing": 1, "summary.repeated": 3, "summary.too_short": 1,
    }  # fmt: skip
    assert metrics["pairs"]["rejected"]["budget"] > 0
    assert len(pairs) == metrics["pairs"]["kept"] == 17
    assert sum(metrics["by_split"].values()) == sum(metrics["by_kind"].values()) == 17


def test_result_depends_on_content_only_not_on_order_or_shards(tmp_path: Path) -> None:
    documents = many(40) + many(10, "heldout", start=100)
    _, first, _ = run(tmp_path, documents, max_pairs=30)
    _, second, _ = run(tmp_path, documents[::-1], n_shards=3, max_pairs=30)
    assert first == second
    _, other, _ = run(tmp_path, documents, max_pairs=30, seed=1)
    assert first != other


def test_split_follows_the_document_and_nothing_leaks(tmp_path: Path) -> None:
    documents = [
        *many(10),
        document("h1", "heldout", [
            {"name": "other.fun", "summary": "Compute the value  number 3 of the odd series"},
            {"name": "mod4.fun4", "summary": "A summary that no train document has at all."},
            {"name": "clean.fun", "summary": "Another summary that stands nowhere else."},
        ]),
    ]  # fmt: skip
    metrics, pairs, out = run(tmp_path, documents, pairs_per_entry=1)
    assert metrics["entries"]["rejected"] == {"split.leak": 2}
    splits = {pair["document_id"]: pair["split"] for pair in pairs}
    assert splits.pop("h1") == "heldout"
    assert set(splits.values()) == {"train"}
    heldout = read_pairs(out / "pairs.jsonl", "heldout")
    assert [pair["document_id"] for pair in heldout] == ["h1"]
    assert "clean.fun" in json.dumps(heldout)


def test_identical_questions_are_asked_once(tmp_path: Path) -> None:
    twins = [
        document(f"t{i}", "train", [{"name": f"m.f{i}", "summary": "Do the same thing as before."}])
        for i in range(2)
    ]
    metrics, pairs, _ = run(tmp_path, twins, kinds=("name",))
    questions = [pair["messages"][0]["content"] for pair in pairs]
    assert len(questions) == len(set(questions))
    assert len(pairs) + metrics["pairs"]["rejected"].get("question.duplicate", 0) == 2


def test_other_sources_and_other_documents_are_ignored(tmp_path: Path) -> None:
    plain = document("p", "train", [])
    plain["metadata"] = dump_metadata({"language": "en"})
    metrics, pairs, _ = run(tmp_path, [document("d1", "train", [JOIN]), plain,
                                       document("c", "train", [JOIN], source="code")])  # fmt: skip
    assert {pair["document_id"] for pair in pairs} == {"d1"}
    assert metrics["entries"]["in"] == 1


def test_no_docstrings_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="reference has metadata of kind") as error:
        run(tmp_path, [document("c", "train", [JOIN], source="code")])
    assert error.value.fix


def test_only_heldout_pairs_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="none of 3 documented names"):
        run(tmp_path, many(3, "heldout"))


def test_damaged_pairs_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"split": "train", "messages": [1]}\n{broken\n')
    with pytest.raises(PunaError, match=r"pairs\.jsonl:2"):
        read_pairs(path, "train")
