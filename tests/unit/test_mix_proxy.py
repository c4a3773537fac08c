"""Proxy runs: the step against the trainer's model, exact counts, resuming, what is refused."""

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.mix.design import PlannedRun, design, run_key, to_csv
from puna.mix.proxy import train as proxy_train
from puna.mix.proxy.config import ProxyConfig
from puna.mix.proxy.corpus import make_loader
from puna.mix.proxy.manifest import manifest_of
from puna.mix.proxy.model import ProxyModel
from puna.mix.proxy.runs import make_runs, read_plan
from puna.mix.runs import read_runs
from puna.mix.sources import Manifest, Objective, Source, read_manifest
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.tokens.loader import NO_LABEL, Batch
from puna.tokens.shards import TokenShards
from puna.train.loss import cross_entropy_sum
from puna.train.optim import make_optimizer
from puna.train.optim_config import AdamWConfig
from tests.unit.token_shards import write_shards

SHAPE = LlamaConfig(
    vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=24,
    tie_embeddings=True,
)  # fmt: skip
PROXY = ProxyConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, seq_len=16, global_batch=4,
    tokens=16 * 4 * 10, heldout={"max_tokens": 400},
)  # fmt: skip


def rows(seed=0, n_rows=3, n_tokens=24, vocab_size=96):
    """Rows of three documents; the last position of a document has no label."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (n_rows, n_tokens))
    labels = rng.integers(0, vocab_size, (n_rows, n_tokens))
    doc_ids, positions = (np.zeros((n_rows, n_tokens), np.int32) for _ in range(2))
    for row in range(n_rows):
        cuts = [0, *sorted(rng.choice(np.arange(1, n_tokens), 2, replace=False)), n_tokens]
        for number, (start, end) in enumerate(pairwise(cuts)):
            doc_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            labels[row, end - 1] = NO_LABEL
    return Batch(tokens, labels, doc_ids, positions)


def plain_step(model, batch):
    """Loss summed, by the trainer's model and autograd."""
    hidden = model.hidden(
        torch.from_numpy(batch.tokens_BT), torch.from_numpy(batch.positions_BT).long(),
        torch.from_numpy(batch.doc_ids_BT).long(),
    )  # fmt: skip
    return cross_entropy_sum(hidden, model.output_weight, torch.from_numpy(batch.labels_BT))


def manifest(**proxy):
    sources = tuple(Source(name=n, unique_tokens=t) for n, t in (("a", 6000), ("b", 3000)))
    return Manifest(
        source=sources, objective=Objective(n_tokens=4000), proxy=PROXY.model_copy(update=proxy)
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three sources with words of their own; c is only measured."""
    rng = np.random.default_rng(0)
    words = {"a": (3, 40), "b": (30, 70), "c": (60, 90)}
    train, held = [40] * 150, [70] * 5

    def draw(source, size):
        return rng.integers(*words[source], size)

    splits = {"train": dict.fromkeys(words, train), "heldout": dict.fromkeys(words, held)}
    return str(write_shards(tmp_path_factory.mktemp("shards"), splits, 96, draw))


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 2), (4, 4), (2, 1)])
def test_the_gradient_is_that_of_the_trainers_model(n_heads, n_kv_heads):
    shape = SHAPE.model_copy(update={"n_heads": n_heads, "n_kv_heads": n_kv_heads})
    model, proxy = Llama(shape), ProxyModel(shape, 3, 24, AdamWConfig())
    model.init_weights(5)
    proxy.fill(5)
    batch = rows()
    loss = plain_step(model, batch)
    loss.backward()
    nats, n_labelled = proxy.forward_backward(batch)
    assert n_labelled == (batch.labels_BT >= 0).sum()
    assert nats == pytest.approx(loss.item(), rel=1e-5)
    own = proxy.gradients()
    own["tok_embeddings.weight"] = own["tok_embeddings.weight"].clone()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-4, atol=1e-4)
    assert proxy.evaluate(batch).sum() == pytest.approx(loss.item(), rel=1e-5)


def test_several_steps_are_those_of_the_trainers_optimiser():
    config = AdamWConfig(lr=3e-3)
    model, proxy = Llama(SHAPE), ProxyModel(SHAPE, 3, 24, config)
    model.init_weights(1)
    proxy.fill(1)
    optimizer = make_optimizer(config, model)
    for step in range(4):
        batch = rows(step)
        loss = plain_step(model, batch) / (batch.labels_BT >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert proxy.step(batch, 3e-3, 0.5) == pytest.approx(loss.item(), rel=1e-4)
    own = proxy.tensors()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name], parameter.detach(), rtol=2e-3, atol=2e-4)


def test_bfloat16_is_near_float32():
    exact, rough = (
        ProxyModel(SHAPE, 3, 24, AdamWConfig(), d) for d in (torch.float32, torch.bfloat16)
    )
    batch = rows()
    assert rough.forward_backward(batch)[0] == pytest.approx(
        exact.forward_backward(batch)[0], rel=3e-3
    )
    own, other = exact.gradients(), rough.gradients()
    for name, grad in own.items():
        assert (other[name] - grad).norm() < 0.06 * grad.norm(), name
    assert not torch.equal(own["norm.weight"], other["norm.weight"])


def test_every_step_has_the_tokens_of_the_mix(shards):
    shares = {"a": 0.62, "b": 0.38}
    loader = make_loader(TokenShards(shards), PROXY, shares, 3)
    drawn = {"a": 0, "b": 0}
    for step in range(PROXY.n_steps):
        batch = loader.batch(step, 0, 1)
        for number in batch.source_B:
            drawn[batch.sources[number]] += 1
        for name, share in shares.items():
            assert abs(drawn[name] - share * 4 * (step + 1)) < 1
    assert loader.rows_per_source(PROXY.n_steps) == drawn


def test_runs_are_made_once_and_the_table_can_be_fitted(shards, tmp_path, monkeypatch):
    known = manifest(tokens=64 * 60)
    planned = design(known, 10, n_held_out=3, proxy=known.proxy.content())
    made = make_runs(known, planned, shards, tmp_path, n_workers=1)
    assert made.n_new == len(planned) > 10
    table = read_runs([made.table])
    assert table.names == [one.key for one in planned]
    assert table.targets == ["a", "b", "c"]
    assert set(table.n_tokens_N) == {known.proxy.n_tokens}
    assert table.held_out_N.sum() == 3
    # A mix with more of a source knows that source better.
    assert np.corrcoef(table.shares_NK[:, 0], table.loss_TN[0])[0, 1] < -0.8
    assert np.corrcoef(table.shares_NK[:, 1], table.loss_TN[1])[0, 1] < -0.8
    first = made.results[0]
    assert sum(one["tokens"] for one in first["consumed"].values()) == 64 * 60

    text = made.table.read_text()
    lost = sorted((tmp_path / "results").iterdir())[2]
    before = lost.read_text()
    lost.unlink()
    again = make_runs(known, planned, shards, tmp_path, n_workers=1)
    assert again.n_new == 1
    assert made.table.read_text() == text  # same bits
    assert json.loads(before)["losses"] == json.loads(lost.read_text())["losses"]
    monkeypatch.setattr("puna.mix.proxy.runs.make_run", None)  # not called any more
    assert make_runs(known, planned, shards, tmp_path, n_workers=1).n_new == 0


def test_what_was_killed_goes_on(shards, tmp_path):
    """A kill -9 in the middle leaves whole results only, which are kept."""
    path = tmp_path / "mix.toml"
    path.write_text(
        manifest_of(shards, 4000, ["c"]) + "[proxy]\ndim = 16\nn_layers = 1\nn_heads = 2\n"
        "n_kv_heads = 1\nffn_dim = 32\nseq_len = 16\nglobal_batch = 4\ntokens = 640\n"
        "heldout = { max_tokens = 400 }\n"
    )
    known = read_manifest(path)
    planned = design(known, 10, n_held_out=2, proxy=known.proxy.content())
    (tmp_path / "plan.csv").write_text(to_csv(planned, known.names))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import puna.mix.proxy.runs as runs\n"
        "from puna.mix.sources import read_manifest\n"
        "real, n = runs.make_run, []\n"
        "def killed(job):\n"
        "    n.append(1)\n"
        "    if len(n) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(job)\n"
        "runs.make_run = killed\n"
        "known = read_manifest(Path('mix.toml'))\n"
        "runs.make_runs(known, runs.read_plan(Path('plan.csv'), known), sys.argv[1], Path('out'),"
        " n_workers=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, shards], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "out/results").glob("*.json"))) == 3
    made = make_runs(known, planned, shards, tmp_path / "out", n_workers=1)
    assert made.n_new == len(planned) - 3
    assert len(read_runs([made.table])) == len(planned)


def test_a_run_that_diverges_has_no_losses(shards, tmp_path, monkeypatch):
    known = manifest()
    planned = [PlannedRun(run_key({"a": 1.0}, 0, known.proxy.content()), "natural", {"a": 1.0}, 0)]
    proxy_train._lab.cache_clear()
    monkeypatch.setattr(ProxyModel, "step", lambda *_: float("nan"))
    made = make_runs(known, planned, shards, tmp_path, n_workers=1)
    assert made.results[0]["diverged"]
    (row,) = csv.DictReader(made.table.read_text().splitlines())
    assert row["loss.a"] == ""
    assert "no number" in made.notes[0]


def test_repetition_above_the_limit_is_said(shards, tmp_path):
    known = manifest(tokens=64 * 200)
    known = known.model_copy(update={"source": tuple(
        one.model_copy(update={"max_epochs": 0.5}) for one in known.source
    )})  # fmt: skip
    planned = [PlannedRun(run_key({"b": 1.0}, 0, known.proxy.content()), "corner", {"b": 1.0}, 0)]
    notes = make_runs(known, planned, shards, tmp_path, n_workers=1).notes
    assert "b was read" in notes[0]


def refused(call, *words):
    with pytest.raises(PunaError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.fix


def test_what_does_not_fit_together_is_refused(shards, tmp_path):
    known = manifest()
    planned = design(known, 10, n_held_out=0, proxy=known.proxy.content())
    plan = tmp_path / "plan.csv"
    plan.write_text(to_csv(planned, known.names))
    assert [one.key for one in read_plan(plan, known)] == [one.key for one in planned]
    other = manifest(tokens=1280)
    refused(lambda: make_runs(other, planned, shards, tmp_path), "other settings", "[proxy]")
    strange = known.model_copy(update={"source": (*known.source[:1],
                               Source(name="zebra", unique_tokens=5))})  # fmt: skip
    refused(lambda: make_runs(strange, planned, shards, tmp_path), "zebra", "no tokens")
    refused(lambda: read_plan(plan, strange), "mix.zebra")
    refused(lambda: read_plan(tmp_path / "none.csv", known), "no such file")
    lines = plan.read_text().splitlines()
    head, row = lines[0].split(","), lines[1].split(",")
    row[head.index("mix.a")] = "0.9999"
    plan.write_text(",".join(head) + "\n" + ",".join(row) + "\n")
    refused(lambda: read_plan(plan, known), "sum to")
    row[head.index("mix.a")] = "much"
    plan.write_text(",".join(head) + "\n" + ",".join(row) + "\n")
    refused(lambda: read_plan(plan, known), "'much'")
    long = manifest(heldout=PROXY.heldout.model_copy(update={"max_tokens": 64}))
    planned = design(long, 10, n_held_out=0, proxy=long.proxy.content())
    refused(lambda: make_runs(long, planned, shards, tmp_path, n_workers=1), "max_tokens", "64")
    refused(lambda: manifest_of(shards, 10.0, ["nobody"]), "nobody")


def test_a_broken_result_is_named(shards, tmp_path):
    known = manifest()
    planned = [PlannedRun(run_key({"a": 1.0}, 0, known.proxy.content()), "natural", {"a": 1.0}, 0)]
    make_runs(known, planned, shards, tmp_path, n_workers=1)
    (path,) = Path(tmp_path, "results").iterdir()
    path.write_text("{")
    refused(lambda: make_runs(known, planned, shards, tmp_path, n_workers=1), path.name)
