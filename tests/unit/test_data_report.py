"""The page on a run's data: numbers that add up, documents beside thresholds, escaped texts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.cli.main import entry
from puna.core.artifact import write_record
from puna.core.errors import PunaError
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import filter as filter_stage
from puna.data import split as split_stage
from puna.data.dedup import stage as dedup_stage
from puna.data.engine.shards import write_shard
from puna.data.filters.batch import TextBatch
from puna.data.filters.profiles import PROFILES
from puna.data.lines import stage as lines_stage
from puna.data.report.cases import EXCERPT_CHARS, excerpt
from puna.data.report.collect import Settings, collect_data
from puna.data.report.columns import table_charts
from puna.data.report.histogram import histogram
from puna.data.report.marks import find_offending
from puna.data.report.sample import Lowest
from puna.data.safety import stage as safety_stage
from puna.data.schema import shard_name
from puna.data.testing import kept_rows, make_documents, rejected_rows
from puna.ui.report.data_page import collect_page, render_page
from tests.unit.html_page import Page

STAGES = (filter_stage, safety_stage, lines_stage, dedup_stage, split_stage)
EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"
SENTENCE = (
    "the puna is a high plain of the Andes that llamas and people have lived on, and with every "
    "winter it has to be crossed by those who trade wool for maize"
)
WORDS = SENTENCE.split()


def text_of(index: int, n_words: int) -> str:
    chance = np.random.default_rng(index)
    words = chance.choice(WORDS, n_words).tolist()
    lines = [" ".join(words[low : low + 12]) + "." for low in range(0, n_words, 12)]
    return f"Page {index}. " + "\n".join(lines)


def rows_of(n: int) -> list[tuple[str, str, str]]:
    rows = []
    for index in range(n):
        source = ("web", "wiki")[index % 3 == 0]
        rows.append((source, f"https://{source}.example.org/{index}", text_of(index, index % 90)))
    rows += [("web", "same/1", text_of(500, 80)), ("web", "same/2", text_of(500, 80))]
    rows += [("web", EVIL, f"{EVIL} {text_of(501, 70)}"), ("web", "evil-short", f"{EVIL} short")]
    rows += [("web", "menu", "Home\nShop\n" * 60), (EVIL, "x", text_of(502, 80))]
    return rows


def run_of(root: Path, name: str, rows: list[Any], data: dict[str, Any], n_shards: int = 2) -> Path:
    """Run data stages over made documents, which are another artifact than the run's."""
    documents = make_documents(root / f"{name}-in", rows, n_shards=n_shards)
    first = f"data.{next(iter(data))}.documents"
    raw = {"name": name, "runs_dir": str(root), "workers": 1,
           "inputs": {first: str(documents.path)}, "data": data}  # fmt: skip
    run_recipe(resolve(raw))
    return root / name


CHAIN = {
    "filter": {"default": {"profile": "prose", "override": {"length": {"min": 150}}}},
    "safety": {}, "lines": {}, "dedup": {}, "split": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("report"), "small", rows_of(240), CHAIN)


@pytest.fixture(scope="module")
def value(run_dir: Path) -> dict[str, Any]:
    return collect_page(run_dir, Settings())


def stage_of(value: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in value["stages"] if stage["stage"] == name)


def test_counts_are_those_of_the_run(run_dir: Path, value: dict[str, Any]) -> None:
    assert [stage["stage"] for stage in value["stages"]] == [f"data.{name}" for name in CHAIN]
    for stage in value["stages"]:
        kept = kept_rows(run_dir / stage["stage"])
        rejected = rejected_rows(run_dir / stage["stage"])
        total = stage["total"]
        assert total["conserved"]
        assert (total["kept_docs"], total["rejected_docs"]) == (len(kept), len(rejected))
        counted = {reason["reason"]: reason["docs"] for reason in stage["reasons"]}
        reasons = [row["reason"] for row in rejected]
        assert counted == {reason: reasons.count(reason) for reason in set(reasons)}
        assert all(reason["meaning"] for reason in stage["reasons"])
        assert stage["sample"]["docs"] == stage["sample"]["of"] == len(kept) + len(rejected)
    json.dumps(value, allow_nan=False)


def test_histograms_add_up_to_the_sample(value: dict[str, Any]) -> None:
    seen = 0
    for stage in value["stages"]:
        for signal in stage["signals"]:
            if signal["histogram"] is None:
                continue
            counts = signal["histogram"]["counts"]
            assert sum(map(sum, counts.values())) == signal["n"] <= stage["sample"]["docs"]
            edges = signal["histogram"]["edges"]
            assert edges == sorted(set(edges))
            assert all(len(part) == len(edges) - 1 for part in counts.values())
            for check in signal["checks"]:
                if check["thresholds"]:
                    sides = check["n_below"] + check["n_at"] + check["n_above"]
                    assert sides == signal["n"]
            seen += 1
    assert seen > 20
    words = next(
        one for one in stage_of(value, "data.filter")["signals"] if one["group"] == "words"
    )
    assert [check["reason"] for check in words["checks"]] == ["words.few", "words.many"]
    assert [check["fails"] for check in words["checks"]] == ["below", "above"]
    assert words["n"] == stage_of(value, "data.filter")["sample"]["docs"]


def test_measuring_anew_gives_the_verdicts_of_the_run(value: dict[str, Any]) -> None:
    sample = stage_of(value, "data.filter")["sample"]
    assert sample["same_verdict"] == sample["docs"]
    assert sample["texts_as_given"] is False  # the documents are of another folder
    assert stage_of(value, "data.safety")["sample"]["texts_as_given"]


def test_texts_that_filters_rewrite_are_measured_as_they_were_given(tmp_path: Path) -> None:
    rows = [(source, path, f"{text}\nread our privacy policy here") for source, path, text in
            rows_of(120)]  # fmt: skip
    made = run_of(tmp_path, "c4", rows, {"filter": {"default": {"profile": "c4"}}})
    found = collect_data(made, Settings())
    assert not found["corpus"]["before_as_given"]
    given = tmp_path / "c4-in"
    found = collect_data(made, Settings(documents=given))
    sample = stage_of(found, "data.filter")["sample"]
    assert sample["texts_as_given"]
    assert 0 < sample["kept"] < sample["docs"] == sample["same_verdict"]
    assert found["corpus"]["before"]["bytes"] == sum(len(text.encode()) for *_, text in rows)
    other = make_documents(tmp_path / "other", rows_of(3))
    with pytest.raises(PunaError, match="is not what a data stage of"):
        collect_data(made, Settings(documents=other.path))


def test_margins_are_the_nearest(run_dir: Path, value: dict[str, Any]) -> None:
    stage = stage_of(value, "data.filter")
    rejected = rejected_rows(run_dir / "data.filter")
    for reason in stage["reasons"]:
        rows = [row for row in rejected if row["reason"] == reason["reason"]]
        distances = sorted(abs(row["value"] - row["threshold"]) for row in rows)[:3]
        found = [abs(case["value"] - case["threshold"]) for case in reason["rejected"]]
        assert found == distances
        by_id = {row["id"]: row for row in rows}
        for case in reason["rejected"]:
            assert by_id[case["id"]]["value"] == case["value"]
            assert case["path"] == by_id[case["id"]]["path"]
    kept = kept_rows(run_dir / "data.filter")
    docs = TextBatch(pa.array([row["text"] for row in kept], pa.large_string()))
    length = next(one for one in PROFILES.get("prose").filters if type(one).__name__ == "Length")
    values = next(iter(length.judge(docs))).value
    signal = next(one for one in stage["signals"] if one["group"] == "length")
    shown = signal["checks"][0]["kept"]
    assert [case["value"] for case in shown] == sorted(values)[:3]
    ids = {row["id"]: value for row, value in zip(kept, values, strict=True)}
    assert all(ids[case["id"]] == case["value"] for case in shown)


def test_values_depend_on_documents_alone(tmp_path: Path) -> None:
    data = {"filter": CHAIN["filter"], "lines": {}}
    found = []
    for name, n_shards in (("one", 1), ("five", 5)):
        made = run_of(tmp_path / name, "run", rows_of(150), data, n_shards)
        value = collect_data(made, Settings(sample=60, margin=2, seed=3))
        found.append(json.loads(json.dumps(value).replace(str(made), "RUN")))
    assert found[0] == found[1]
    assert stage_of(found[0], "data.filter")["sample"]["docs"] == 60
    made = tmp_path / "one" / "run"
    other = collect_data(made, Settings(sample=60, margin=2, seed=4))
    assert other["stages"][0]["signals"] != found[0]["stages"][0]["signals"]


def test_page_escapes_what_documents_say(value: dict[str, Any]) -> None:
    evil = json.loads(json.dumps(value))
    for stage in evil["stages"]:
        for reason in stage["reasons"]:
            for case in reason["rejected"]:
                case["id"] = case["detail"] = EVIL  # ids of other engines may be anything
    html = render_page(evil)
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        target = attributes.get("href") or "#"
        assert target.startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_command_writes_page_and_numbers(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, page = tmp_path / "data.json", tmp_path / "page.html"
    arguments = ["data", "report", str(run_dir), "--out", str(page), "--json", str(numbers)]
    with pytest.raises(SystemExit) as end:
        entry([*arguments, "--sample", "50", "--margin", "0"])
    assert end.value.code == 0
    value = json.loads(numbers.read_text())
    assert value["sample"] == 50
    assert all(not reason["rejected"] for stage in value["stages"] for reason in stage["reasons"])
    assert page.read_text().startswith("<!doctype html>")
    assert str(page) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "page.html"]
    with pytest.raises(SystemExit) as end:
        entry(["data", "report", str(run_dir), "--out", str(tmp_path / "nowhere" / "page.html")])
    assert end.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from puna.cli.main import entry\n"
        "try: entry(['data', 'report', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'duckdb', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_runs_without_rejections_or_documents_or_stages(tmp_path: Path) -> None:
    rows = [("web", f"{i}", text_of(i, 60)) for i in range(20)]
    nothing = {"filter": {"default": {"profile": "none", "detect_language": False}}}
    made = run_of(tmp_path, "all-kept", rows, nothing)
    (made / "data.lines.partial").mkdir()
    value = collect_page(made, Settings())
    assert value["stages"][0]["reasons"] == []
    assert value["unfinished"] == ["data.lines"]
    html = render_page(value)
    assert "none rejected" in html
    assert "Not finished yet" in html
    bad = [("web", f"{i}", "x") for i in range(5)]
    value = collect_page(run_of(tmp_path, "none-kept", bad, {"filter": {}}), Settings())
    assert value["corpus"]["after"]["docs"] == 0
    assert value["corpus"]["after"]["mean_bytes"] is None
    assert "0 of 5 documents kept" in render_page(value)
    empty = tmp_path / "empty"
    make_documents(empty / "data.ingest", [])
    value = collect_page(empty, Settings())
    assert value["stages"][0]["sample"] is None
    assert "No document came" in render_page(value)
    with pytest.raises(PunaError, match="no finished data stage"):
        collect_page(tmp_path, Settings())
    with pytest.raises(PunaError, match="there is no run"):
        collect_page(tmp_path / "missing", Settings())


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    made = make_documents(tmp_path / "run" / "data.ingest", rows_of(30))
    shard = made.path / "documents" / shard_name(0)
    content = bytearray(shard.read_bytes())
    content[4:2000] = bytes(1996)
    shard.write_bytes(content)
    with pytest.raises(PunaError, match=r"part-00000.parquet: damaged"):
        collect_data(tmp_path / "run", Settings())


def test_scores_are_told_apart_by_their_scorers(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "data.quality"
    scores = np.arange(10) / 10
    rows = {
        "id": [f"{i:032x}" for i in range(10)], "source": ["a", "b"] * 5, "path": ["p"] * 10,
        "text": ["text"] * 10, "metadata": ["{}"] * 10, "n_bytes": [4] * 10,
        "good": scores, "bits": 3 - scores,
    }  # fmt: skip
    table = pa.table(rows)
    verdict = {"step": ["data.quality"] * 3, "reason": ["quality.low"] * 2 + ["quality.high"],
               "value": [0.0, 0.1, 2.8], "threshold": [0.2, 0.2, 2.75],
               "detail": ["good", "good", "bits"]}  # fmt: skip
    rejected = table.slice(0, 3)
    for name, column in verdict.items():
        rejected = rejected.append_column(name, pa.array(column))
    for place, part in (("documents", table.slice(3)), ("rejected", rejected)):
        (folder / place).mkdir(parents=True)
        write_shard(folder / place / shard_name(0), part)
    use = {"sources": [], "min": None, "max": None, "pareto_alpha": None}
    config = {"scorers": {"good": {**use, "min": 0.2}, "bits": {**use, "sources": ["a"]}}}
    summary = {"good": {"task": "binary", "share_thresholds": {}},
               "bits": {"task": "bits", "share_thresholds": {"a": 2.75}}}  # fmt: skip
    record = {"stage": "data.quality", "fingerprint": "f", "config": config, "inputs": {},
              "metrics": {"scorers": summary}}  # fmt: skip
    write_record(folder, record)
    value = collect_page(tmp_path / "run", Settings(margin=1))
    good, bits = stage_of(value, "data.quality")["signals"]
    count = {name: sum(part) for name, part in good["histogram"]["counts"].items()}
    assert count == {"kept": 7, "rejected_here": 2, "rejected_otherwise": 1}
    count = {name: sum(part) for name, part in bits["histogram"]["counts"].items()}
    assert count == {"kept": 7, "rejected_here": 1, "rejected_otherwise": 2}
    assert good["checks"][0]["kept"][0]["value"] == 0.3
    assert bits["checks"][0]["thresholds"] == [{"value": 2.75, "sources": ["a"]}]
    assert bits["checks"][0]["kept"][0]["value"] == 3 - 0.4  # of source a, the next that passes
    total = stage_of(value, "data.quality")["total"]  # counted, as the metrics have no flow
    assert (total["in_docs"], total["kept_docs"], total["conserved"]) == (10, 7, True)
    assert "data.quality" in render_page(value)


def test_lists_that_are_gone_are_told(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("maize\n")
    rows = [("web", f"{i}", text_of(i, 60)) for i in range(8)]
    made = run_of(tmp_path, "terms", rows, {"safety": {"toxic": {"files": [str(words)]}}})
    found = stage_of(collect_data(made, Settings()), "data.safety")
    assert [signal["group"] for signal in found["signals"]] == ["safety.nsfw", "safety.toxic"]
    words.unlink()
    found = stage_of(collect_data(made, Settings()), "data.safety")
    assert found["signals"] == []
    assert "words.txt" in found["notes"][0]


def test_corpus_before_and_after(run_dir: Path, value: dict[str, Any]) -> None:
    corpus = value["corpus"]
    before, after = corpus["before"], corpus["after"]
    assert before["docs"] == len(rows_of(240))
    assert before["bytes"] == sum(len(text.encode()) for _, _, text in rows_of(240))
    assert after["docs"] == len(kept_rows(run_dir / "data.split"))
    assert before["sample"]["copies"] >= 1  # the planted copy, and pages of no word
    assert after["sample"]["copies"] == 0
    hosts = {one["name"]: one["docs"] for one in before["domains"]}
    assert hosts == {"web.example.org": 160, "wiki.example.org": 80}
    lengths = corpus["lengths"]["counts"]
    assert sum(lengths["before"]) == before["docs"]
    assert sum(lengths["after"]) == after["docs"]


FLOATS = st.lists(
    st.floats(-1e9, 1e9) | st.floats(0, 1) | st.integers(0, 50).map(float) | st.just(np.nan),
    max_size=60,
)


@given(FLOATS, FLOATS, st.lists(st.floats(-1e6, 1e6), max_size=2))
def test_every_value_is_counted_once(
    kept: list[float], rejected: list[float], marks: list[float]
) -> None:
    groups = {"kept": np.array(kept, float), "rejected": np.array(rejected, float)}
    counted = histogram(groups, marks)
    for name, values in groups.items():
        n = int(np.isfinite(values).sum())
        assert (0 if counted is None else sum(counted["counts"][name])) == n
    if counted is not None:
        edges = np.array(counted["edges"])
        assert (np.diff(edges) > 0).all()
        assert all(edges[0] <= mark <= edges[-1] for mark in marks)


@given(st.lists(st.integers(0, 1000), max_size=80), st.integers(1, 9), st.integers(1, 20))
def test_lowest_is_the_head_of_the_order(keys: list[int], n: int, size: int) -> None:
    lowest = Lowest(n, ("key", "id"))
    rows = [{"key": key, "id": str(index)} for index, key in enumerate(keys)]
    for low in range(0, len(rows), size):
        lowest.add(pa.Table.from_pylist(rows[low : low + size]))
    table = lowest.table()
    found = [] if table is None else table.to_pylist()
    assert found == sorted(rows, key=lambda row: (row["key"], row["id"]))[:n]


@pytest.mark.parametrize(
    ("reason", "text", "detail", "marked"),
    [
        ("repetition.dup_line_share", "a b\nc\na b\nd", None, ["a b"]),
        ("gopher_repetition.top_2_gram", "x y z x y w x y", None, ["x y", "x y", "x y"]),
        ("gopher_repetition.duplicated_5_n_grams", "a b c d e f a b c d e", None, ["a b c d e"]),
        ("bullet_lines", "- a\nb\n* c", None, ["- a", "* c"]),
        ("symbols.hash", "one ## two", None, ["##"]),
        ("fineweb_quality.line_punct_ratio", "Ends.\nDoes not", None, ["Does not"]),
        ("safety.nsfw", "some Bad words", "2 terms: bad, worse", ["Bad"]),
        ("licence", "x Licensed under the y", None, ["Licensed under the"]),
        ("length.short", "short", None, []),
    ],
)
def test_offending_parts(reason: str, text: str, detail: str | None, marked: list[str]) -> None:
    assert [text[low:high] for low, high in find_offending(reason, text, detail)] == marked


def test_excerpts_show_the_part_and_no_personal_data() -> None:
    text = "word " * 200 + "### " + "word " * 200
    pieces = excerpt(text, "symbols.hash", None)
    assert [piece["text"] for piece in pieces if piece["mark"]] == ["###"]
    assert pieces[0]["text"] == "… "
    assert sum(len(piece["text"]) for piece in pieces) <= EXCERPT_CHARS + 4
    shown = "".join(
        p["text"] for p in excerpt("Write to jane.doe@acme.com now\x00", "words.few", None)
    )
    assert "jane" not in shown
    assert "<EMAIL>" in shown
    assert shown.endswith("\u2400")


def test_hits_are_drawn_per_method_with_the_thresholds_that_they_were_judged_by(
    tmp_path: Path,
) -> None:
    rows = {
        "coverage": [0.9, 0.4, 0.97, 0.8],
        "counts": [True, False, True, False],
        "method": ["ngrams", "ngrams", "embedding", "embedding"],
        "threshold": [0.5, 0.5, 0.95, 0.9],
    }
    pq.write_table(pa.table(rows), tmp_path / "hits.parquet")
    stage: Any = SimpleNamespace(artifact=SimpleNamespace(path=tmp_path, config={}))
    meaning, words = table_charts(stage)
    assert (meaning["reason"], meaning["thresholds"]) == ("decontaminate.meaning", [0.9, 0.95])
    assert (words["reason"], words["thresholds"]) == ("decontaminate.match", [0.5])
    for chart in (meaning, words):
        counts = chart["histogram"]["counts"]
        assert (sum(counts["rejected"]), sum(counts["kept"]), chart["n"]) == (1, 1, 2)
