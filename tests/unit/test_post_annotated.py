"""Conversations of an annotation desk as the pairs of a run."""

import json

import pytest

from puna.cli.common import load_stages
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.core.plan import plan_steps
from puna.core.recipe import resolve
from puna.post.annotate.settings import SPLITS as DESK_SPLITS
from puna.post.annotated import AnnotatedConfig, take_annotated
from puna.post.pairs import PAIRS_FILE, SPLITS, read_pairs


def example(key, split="train", **changes):
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": f"b {key}"}]
    told = {"author": f"a-{key}", "rounds": 2}
    return {"id": key, "document_id": key, "source": "desk", "split": split, "kind": "write",
            "messages": turns, "provenance": told, **changes}  # fmt: skip


def run(tmp_path, *examples):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in examples))
    return take_annotated(AnnotatedConfig(files=(str(path),)), {}, tmp_path, Ledger(None))


def test_conversations_keep_who_wrote_them(tmp_path):
    made = run(tmp_path, example("2"), example("1"), example("3", "heldout"), example("1"))
    pairs = read_pairs(tmp_path / PAIRS_FILE, "train")
    assert [pair["id"] for pair in pairs] == ["1", "2"]
    assert pairs[0]["provenance"] == {"author": "a-1", "rounds": 2}
    assert made["pairs"] == {"in": 4, "kept": 3, "rejected": {"id.repeated": 1}}
    assert made["by_split"] == {"train": 2, "heldout": 1}
    assert (made["authors"], made["by_rounds"]) == (3, {"2": 3})
    assert DESK_SPLITS == SPLITS


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (example("1", messages=[]), "no exported conversation"),
        (example("1", messages=[{"role": "user", "content": "a?"}]), "speaks last"),
        (example("1", split="test"), "'test'|test is not"),
        (example("1", id=3), "'id'"),
        (example("1", split="heldout"), "none of 1"),
    ],
)
def test_what_cannot_be_trained_on_is_told(tmp_path, bad, words):
    with pytest.raises(PunaError, match=words):
        run(tmp_path, bad)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(PunaError, match=r"none\.jsonl"):
        take_annotated(AnnotatedConfig(files=("none.jsonl",)), {}, tmp_path, Ledger(None))


def test_fine_tuning_takes_them_in_place_of_pairs(tmp_path):
    load_stages()
    raw = {
        "name": "r",
        "data": {"ingest": {"sources": [{"kind": "files", "name": "a", "paths": ["."]}]},
                 "split": {}},
        "tokens": {"train": {}, "encode": {}},
        "train": {"pretrain": {"steps": 1}},
        "post": {"annotated": {"files": ["sft.jsonl"]}, "sft": {}},
    }  # fmt: skip
    steps = plan_steps(resolve(raw))
    assert steps["post.sft"].sources["pairs"] == "post.annotated"
