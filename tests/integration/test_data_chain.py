"""All data stages one after the other: every document is in exactly one place at the end."""

import json
import random

import pytest

from puna.core.recipe import resolve
from puna.core.run import run_recipe
from puna.data import (
    compose,
    decontaminate,
    dedup,
    filter,
    ingest,
    lines,
    safety,
    split,
    substrings,
)  # fmt: skip
from puna.data.chain import DATA_STAGES
from puna.data.flow import funnel
from puna.data.schema import document_id
from puna.data.testing import folder_bytes, kept_rows, rejected_rows
from puna.data.why import why

# importing them registers them
STAGES = (ingest, filter, safety, lines, dedup, substrings, decontaminate, split, compose)
WORDS = (  # noqa: SIM905
    "river stone walk green letter music garden window paper morning village answer question "
    "winter summer mountain bread silver golden simple history science number people language"
).split()
EXAMPLE = "which animal carries wool and grass across the high plain of the andes in the dry season"
FOOTER = "Copyright of the example site, all of its pages end with this very line."


def prose(rng, n_sentences):
    sentences = (" ".join(rng.choices(WORDS, k=12)) for _ in range(n_sentences))
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def documents():
    rng = random.Random(5)
    texts = {f"plain-{i:02d}": f"{prose(rng, 9)}\n{FOOTER}" for i in range(40)}
    texts["short"] = "Too short."
    texts["copy"] = texts["plain-07"]
    texts["near"] = texts["plain-08"].replace("The", "The", 1) + "\nOne more line at the end."
    texts["mail"] = f"{prose(rng, 9)}\nWrite to jane.doe@posteo.net about it.\n{FOOTER}"
    texts["leak"] = f"{prose(rng, 5)} {EXAMPLE}. {prose(rng, 5)}"
    return texts


def recipe(root, name, workers, **top):
    source = {"kind": "files", "name": "web", "paths": [str(root / "in" / "*.jsonl")],
              "id_field": "id"}  # fmt: skip
    quiz = {"name": "quiz", "paths": [str(root / "quiz.jsonl")], "fields": ["question"]}
    data = {
        "ingest": {"sources": [source], "shard_bytes": 20_000},
        "filter": {"default": {"profile": "none", "filters": ["length"]}}, "safety": {},
        "lines": {}, "dedup": {}, "substrings": {"min_bytes": 40},
        "decontaminate": {"sets": [quiz]}, "split": {},
        "compose": {"groups": [{"match": {"source": "web"}, "rate": 0.9}]},
    }  # fmt: skip
    return resolve({"name": name, "runs_dir": str(root), "workers": workers, "data": data, **top})


def write_inputs(folder):
    (folder / "in").mkdir()
    rows = [{"id": name, "text": text} for name, text in documents().items()]
    for number in range(3):
        lines_ = [json.dumps(row) + "\n" for row in rows[number::3]]
        (folder / "in" / f"{number}.jsonl").write_text("".join(lines_), encoding="utf-8")
    (folder / "quiz.jsonl").write_text(json.dumps({"question": EXAMPLE}) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    write_inputs(folder)
    run_recipe(recipe(folder, "one", 1))
    return folder


def test_every_document_is_in_exactly_one_place(root):
    found = funnel(root / "one")
    stages = [name for name in DATA_STAGES if name in found.stages]
    assert stages == found.stages
    assert len(stages) == len(STAGES)
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        row = found.total(stage)
        assert row.in_docs == row.kept_docs + row.rejected_docs
        if following:
            after = found.total(following)
            assert (after.in_docs, after.in_bytes) == (row.kept_docs, row.kept_bytes)
    ids = [row["id"] for row in kept_rows(root / "one" / stages[-1])]
    for stage in stages:
        if (root / "one" / stage / "rejected").is_dir():
            ids += [row["id"] for row in rejected_rows(root / "one" / stage)]
    assert sorted(ids) == sorted(document_id("web", name) for name in documents())


def test_documents_end_where_they_should(root):
    def fate(name):
        [one] = why(root / "one", document_id("web", name))
        return one

    assert fate("short").reason == "length.short"
    assert {fate("copy").reason, fate("plain-07").reason} == {None, "duplicate.exact"}
    assert fate("leak").reason == "decontaminate.match"
    assert fate("mail").outcome == "kept"
    texts = {row["path"]: row["text"] for row in kept_rows(root / "one" / "data.split")}
    assert "jane.doe" not in texts["mail"]
    assert "<EMAIL>" in texts["mail"]
    assert not any(FOOTER in text for text in texts.values())  # more than six documents had it


def test_the_result_does_not_depend_on_the_number_of_workers(root):
    run_recipe(recipe(root, "two", 2))
    for stage in funnel(root / "one").stages:
        for folder in ("documents", "rejected"):
            if (root / "one" / stage / folder).is_dir():
                one, two = (folder_bytes(root / run / stage / folder) for run in ("one", "two"))
                assert one == two, (stage, folder)


def test_a_second_run_does_nothing(root):
    assert len(run_recipe(recipe(root, "one", 1)).skipped) == len(STAGES)
