"""The report's section on the composition equals what the stage wrote."""

import pytest

from puna.core.artifact import Artifact, write_record
from puna.core.ledger import Ledger
from puna.data.compose import ComposeConfig, compose_documents
from puna.data.testing import kept_rows, make_documents
from puna.ui.report.collect import collect
from puna.ui.report.collect.composition import MAX_GROUPS
from puna.ui.report.render import render
from tests.unit.html_page import Page


def composed(tmp_path, sources, **values):
    """Documents of the sources, 30 of 100 bytes each, every fifth held out."""
    texts = [(source, f"{source}{i}", "x" * 100) for source in sources for i in range(30)]
    extra = {"split": ["heldout" if i % 5 == 0 else "train" for i in range(len(texts))]}
    documents = make_documents(tmp_path / "in", texts, n_shards=2, stage="data.split", extra=extra)
    out = tmp_path / "data.compose"
    out.mkdir()
    cfg = ComposeConfig(workers=1, bytes_per_token=1.0, **values)
    metrics = compose_documents(cfg, {"documents": documents}, out, Ledger(None))
    write_record(out, {"stage": "data.compose", "fingerprint": "f", "config": {}, "inputs": {},
                       "started_at": 1.0, "ended_at": 2.0, "seconds": 1.0, "resumed": False,
                       "metrics": metrics, "identity": {}, "seed": 0})  # fmt: skip
    value = collect({"compose": Artifact(out)}, None, title="", max_reasons=3)
    return kept_rows(out), value, Page(render(value))


def test_before_and_after_of_every_source(tmp_path):
    groups = [{"match": {"source": "web"}, "rate": 0.25}, {"match": {"source": "code"},
                                                            "repeat": 2.5}]  # fmt: skip
    rows, value, page = composed(tmp_path, ["web", "code", "books"], groups=groups)
    section = value["composition"]
    train = [row for row in rows if row["split"] == "train"]
    for group in section["groups"]:
        mine = [row for row in train if row["source"] == group["name"]]
        assert (group["in_docs"], group["in_tokens"]) == (24, 2400)
        assert group["docs"] == len(mine)
        assert group["tokens"] == 100 * sum(row["repeat"] for row in mine)
        assert group["epochs"] == group["tokens"] / 2400
        assert group["in_share"] == pytest.approx(1 / 3)
    assert [group["name"] for group in section["groups"]] == ["code", "books", "web"]
    assert sum(group["share"] for group in section["groups"]) == pytest.approx(1)
    assert {row["name"] for row in section["rules"]} == {"source=web", "source=code"}
    assert "composition" in page.sections()
    assert "#composition" in page.attributes("href")
    text = " ".join(page.text)
    assert "rate 0.25" in text
    assert "repeat 2.5" in text
    assert value["data"]["steps"][-1]["label"] == "composed"
    assert "compose.sampled_out" in text


def test_many_groups_are_summed_up_and_unreached_shares_are_said(tmp_path):
    names = [f"s{i:02}" for i in range(MAX_GROUPS + 3)]
    rule = {"match": {"source": "s00"}, "share": 0.9}
    _, value, page = composed(tmp_path, names, groups=[rule], max_epochs=1.5)
    section = value["composition"]
    assert len(section["groups"]) == MAX_GROUPS + 1
    assert section["groups"][-1]["name"] == "3 more"
    for key in ("in_docs", "docs", "in_tokens", "tokens"):
        assert sum(group[key] for group in section["groups"]) == section["total"][key]
    assert len(section["unreached"]) >= 1
    assert "Not reached: source=s00" in " ".join(page.text)
