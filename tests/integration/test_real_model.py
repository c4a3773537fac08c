"""The real model, SmolLM2-135M, against transformers and Meta's reference code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import smollm2_path, transformers_greedy, transformers_model

import puna
from puna.core.ledger import LEDGER_FILE, read_events
from puna.lm.engine.engine import Engine
from puna.lm.engine.types import Request
from puna.model.sampling import Sampling
from puna.tokens.lineage import step_lineage
from puna.tokens.megatron import write_megatron

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_model")]
N_NEW = 256
PROMPT = "Once upon a time, in a land far away,"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# Runs in a process of its own: the reference sets global state of torch.distributed.
META = """
import json, sys, torch
from peers import meta_greedy, meta_model
folder, ids, n_new, out = sys.argv[1:]
params = json.load(open(folder + "/params.json"))
state = torch.load(folder + "/consolidated.00.pth", weights_only=True)
model = meta_model(params, state, max_seq_len=512)
ids = json.loads(ids)
new = meta_greedy(model, ids, int(n_new))
with torch.inference_mode():
    logits_TV = model(torch.tensor([ids + new]), 0)[0]
torch.save({"new": torch.tensor(new), "logits": logits_TV}, out)
"""


@pytest.fixture(scope="module")
def ours() -> puna.LanguageModel:
    return puna.load(smollm2_path())


@pytest.fixture(scope="module")
def prompt_ids(ours: puna.LanguageModel) -> list[int]:
    return ours.tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def greedy(ours: puna.LanguageModel, prompt_ids: list[int]) -> list[int]:
    engine = Engine(ours.model)
    engine.submit(Request("a", prompt_ids, Sampling(temperature=0.0, max_new_tokens=N_NEW)))
    new: list[int] = []
    while engine.has_work:
        new += [event.token for event in engine.step() if event.token is not None]
    return new


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_logits_and_greedy_continuation_are_those_of_transformers(ours, prompt_ids, greedy):
    peer = transformers_model(smollm2_path())
    assert greedy == transformers_greedy(peer, prompt_ids, N_NEW)
    ids = prompt_ids + greedy
    with torch.inference_mode():
        logits_TV = peer(torch.tensor([ids])).logits[0]
    assert (ours.logits(ids) - logits_TV).abs().max() <= 1e-4


@pytest.mark.exhaustive
def test_metas_code_runs_the_written_folder_to_the_same_text(ours, prompt_ids, greedy, tmp_path):
    folder, out = tmp_path / "meta", tmp_path / "out.pt"
    convert = [sys.executable, "-m", "puna.cli.main", "model", "convert", str(smollm2_path()),
               str(folder), "--to", "meta", "--dtype", "float32"]  # fmt: skip
    subprocess.run(convert, check=True, capture_output=True)
    run = [sys.executable, "-W", "ignore", "-c", META, str(folder), json.dumps(prompt_ids),
           str(N_NEW), str(out)]  # fmt: skip
    subprocess.run(run, check=True, capture_output=True, cwd=BENCHMARKS)
    found = torch.load(out, weights_only=True)
    assert found["new"].tolist() == greedy
    assert (ours.logits(prompt_ids + greedy) - found["logits"]).abs().max() <= 1e-4


def test_quantised_model_says_nearly_the_same(ours, prompt_ids, greedy):
    ids = prompt_ids + greedy
    light = puna.load(smollm2_path(), quantize="int8")
    exact_TV = ours.logits(ids).log_softmax(-1)
    light_TV = light.logits(ids).log_softmax(-1)
    divergence_T = (exact_TV.exp() * (exact_TV - light_TV)).sum(-1)
    assert divergence_T.mean() < 0.01
    agree_T = exact_TV.argmax(-1) == light_TV.argmax(-1)
    assert agree_T.float().mean() > 0.95


def test_continued_training_begins_at_the_loss_of_the_engine(ours, tmp_path):
    """The first step's loss, fp32, over the text that the engine is asked about."""
    text = " ".join(PROMPT for _ in range(12))
    ids = [*ours.tokenizer.encode(text, bos=True), ours.tokenizer.eos_id]
    seq_len = 64
    write_megatron(tmp_path / "text", np.dtype(np.uint16), [np.array(ids)], np.array([len(ids)]))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "continued"
runs_dir = "{tmp_path}/runs"
[tokens.import]
tokenizer = "{smollm2_path()}"
sources = [{{ name = "text", path = "{tmp_path}/text" }}]
[train.pretrain]
init = "{smollm2_path()}"
steps = 1
seq_len = {seq_len}
global_batch = 1
precision = "fp32"
""")
    run = [sys.executable, "-m", "puna.cli.main", "run", str(recipe)]
    subprocess.run(run, check=True, capture_output=True)
    folder = tmp_path / "runs" / "continued"
    (step,) = read_events(folder / LEDGER_FILE, "train.step")
    (row,) = step_lineage(folder, 0)
    start, end = row["segments"][0]["tokens"]
    assert (start, end) == (0, seq_len)  # of one document: the engine sees the same context
    logits_TV = ours.logits(ids[:seq_len])
    expected = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[1 : seq_len + 1]))
    assert step["loss"] == pytest.approx(expected.item(), rel=1e-4)
