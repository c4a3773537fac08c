"""Two runs side by side, and one document through filters."""

import json

import pytest

from puna.cli.main import entry
from puna.core.errors import PunaError
from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import filter as filter_stage
from puna.data.diff import ABSENT, KEPT, compare_runs
from puna.data.schema import document_id
from puna.data.testing import make_documents
from puna.data.trial import try_filters

STAGES = (filter_stage,)  # importing it registers the stage
ROWS = [("web", f"{i}.txt", "word " * i) for i in range(1, 31)] + [("code", "c.py", "x = 1 " * 9)]
PROSE = "The menu of the day. We have that and this to be with you, of course.\n" * 9


def run_of(root, name, min_chars, rows=ROWS):
    documents = make_documents(root / f"{name}-in", rows, n_shards=2)
    filters = [{"name": "length", "settings": {"min": min_chars}},
               {"name": "lines", "settings": {"max": 140}}]  # fmt: skip
    raw = {
        "name": name, "runs_dir": str(root), "workers": 1,
        "inputs": {"data.filter.documents": str(documents.path)},
        "data": {"filter": {"default": {"profile": "none", "filters": filters}}},
    }  # fmt: skip
    run_recipe(resolve(raw))
    return root / name


def test_runs_differ_by_rule_and_count(tmp_path, capsys):
    loose, strict = run_of(tmp_path, "loose", 11), run_of(tmp_path, "strict", 51, ROWS[:-1])
    found = compare_runs(loose, strict)
    ways = {(change.before, change.after): change for change in found.changes}
    # 5 characters per word: 3 to 10 words are long enough for one run and too short for the other
    rejected = ways[KEPT, "data.filter: length.short"]
    assert rejected.n_docs == 8
    assert (document_id("web", "3.txt"), "3.txt") in rejected.samples or len(rejected.samples) == 5
    assert ways[KEPT, ABSENT].n_docs == 1  # the source that only one run read
    assert len(found.changes) == 2
    assert (found.n_first, found.n_second, found.n_same) == (31, 30, 22)
    with pytest.raises(SystemExit) as end:
        entry(["data", "diff", str(loose), str(strict), "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["n_same"] == 22
    same = compare_runs(loose, loose)
    assert (same.n_same, same.changes) == (31, [])


def test_runs_without_a_common_document_are_refused(tmp_path):
    first = run_of(tmp_path, "first", 1)
    second = run_of(tmp_path, "second", 1, [("other", "a.txt", "hello there")])
    with pytest.raises(PunaError, match="no document in common"):
        compare_runs(first, second)


def test_every_check_of_a_profile_is_made():
    trial = try_filters("gopher", "too short")
    assert {check.filter for check in trial.checks} == {"gopher_quality", "gopher_repetition"}
    assert len(trial.checks) > 20
    words = next(c for c in trial.checks if c.reason == "gopher_quality.gopher_short_doc")
    assert (words.value, words.threshold, words.failed) == (2, 50, True)
    assert trial.verdict is not None
    assert trial.verdict.failed


def test_a_filter_that_rewrites_shows_the_new_text(tmp_path, capsys):
    trial = try_filters("c4_quality", f"Home\n{PROSE}")
    assert trial.verdict is None
    assert trial.text == PROSE.strip()
    file = tmp_path / "a.txt"
    file.write_text(f"Home\n{PROSE}")
    with pytest.raises(SystemExit) as end:
        entry(["data", "try", "c4", "--file", str(file)])
    assert end.value.code == 0
    assert "rewritten to" in capsys.readouterr().out


def test_an_unknown_filter_is_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        entry(["data", "try", "gofer", "--text", "x"])
    assert end.value.code == 2
    assert "no filter and no profile 'gofer'" in capsys.readouterr().err
