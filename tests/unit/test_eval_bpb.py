"""Bits per byte against hand computations, the rule for long documents, and the stages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna.core.artifact import Artifact
from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.eval.bpb import BpbConfig, bits_per_byte
from puna.eval.likelihood import measure, untrained
from puna.eval.samples import SamplesConfig, write_samples
from puna.model.config import LlamaConfig
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.tokens import bpe
from puna.tokens.heldout import choose_documents
from puna.tokens.shards import TokenShards
from puna.tokens.tokenizer import Tokenizer
from puna.tokens.windows import document_windows

N_SPECIAL = 12
CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48,
    max_seq_len=64,
)  # fmt: skip
TEXTS = {
    "code": ["x = 1\n", "def f(x):\n    return x + 1\n" * 4, "pass", "import os\n"],
    "docs": ["Grüße, Welt!", "漢字" * 30],
}
PAIRS = [
    {
        "id": f"p{i}", "document_id": f"d{i}", "source": "reference", "split": "heldout",
        "messages": [
            {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f" é{i} "},
        ],
    }
    for i in range(3)
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer() -> Tokenizer:
    return Tokenizer(bpe.definition(bpe.train_ranks([], 256, 1), N_SPECIAL), bpe.tokenizer_config())


def sharp_model(seed: int = 0) -> Llama:
    model = untrained(CONFIG, seed, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


def uniform_model() -> Llama:
    model = untrained(CONFIG, 0, "cpu")
    with torch.no_grad():
        model.output_weight.zero_()
    return model


def artifact(folder: Path, stage: str, config: dict[str, Any] | None = None) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "fingerprint": "f", "content_hash": "c", "metrics": {}, "files": []}
    write_json(folder / "artifact.json", {**record, "config": config or {}})
    return Artifact(folder)


def write_shards(folder: Path, split: str = "heldout") -> None:
    encoder, counts = tokenizer(), {}
    for source, texts in TEXTS.items():
        place = folder / split / source
        place.mkdir(parents=True)
        documents = [encoder.encode(text, bos=True, eos=True) for text in texts]
        np.array([t for ids in documents for t in ids], np.uint16).tofile(place / "tokens.bin")
        np.save(place / "offsets.npy", np.cumsum([0, *map(len, documents)], dtype=np.int64))
        np.save(place / "ids.npy", np.array([f"{i:032d}" for i in range(len(texts))], "S32"))
        n_bytes = [len(text.encode()) for text in texts]
        np.save(place / "n_bytes.npy", np.array(n_bytes, np.int64))
        counts[source] = {"n_docs": len(texts), "n_bytes": sum(n_bytes),
                          "n_tokens": sum(map(len, documents))}  # fmt: skip
    index = {"dtype": "uint16", "vocab_size": CONFIG.vocab_size, "splits": {split: counts}}
    write_json(folder / "index.json", index)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("run")
    tokenizer().save(root / "tokens.train")
    write_shards(root / "tokens.encode")
    for stage, model in (("train.pretrain", sharp_model()), ("post.sft", uniform_model())):
        save_hf(root / stage / "model", CONFIG, model.state_dict())
        tokenizer().save(root / stage / "model")
    (root / "post.pairs").mkdir()
    lines = [json.dumps(pair) + "\n" for pair in PAIRS]
    (root / "post.pairs" / "pairs.jsonl").write_text("".join(lines))
    return {
        "tokens": artifact(root / "tokens.encode", "tokens.encode"),
        "tokenizer": artifact(root / "tokens.train", "tokens.train"),
        "model": artifact(root / "train.pretrain", "train.pretrain", {"seed": 7, "seq_len": 32}),
        "tuned": artifact(root / "post.sft", "post.sft"),
        "pairs": artifact(root / "post.pairs", "post.pairs"),
    }


def token_nats(model: Llama, context: list[int], target: int) -> float:
    """Negative log-likelihood of one token, from the plain forward of its context, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([context]))[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[target])


def document_nats(model: Llama, ids: list[int], seq_len: int, overlap: int) -> float:
    """The rule for long documents written another way: the context of each target, by index."""
    total, start, end = 0.0, 0, seq_len
    for target in range(1, len(ids)):
        if target > end:
            start, end = end - overlap, end - overlap + seq_len
        total += token_nats(model, ids[start:target], ids[target])
    return total


@pytest.mark.parametrize("rows_per_batch", [1, 3, 50])
def test_likelihood_is_the_sum_over_each_document_alone(rows_per_batch: int) -> None:
    model, encoder = sharp_model(), tokenizer()
    documents = [encoder.encode(text, bos=True, eos=True) for text in ("ab", "Hello", "x = 1\n")]
    pieces = [piece for ids in documents for piece in document_windows(np.array(ids), 16, 4)]
    found = measure(model, pieces, 16, rows_per_batch)
    expected = sum(document_nats(model, ids, 16, 4) for ids in documents)
    assert found.n_tokens == sum(len(ids) - 1 for ids in documents)
    assert found.nll_nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("seq_len", "overlap"), [(16, 0), (16, 4), (16, 15), (10, 3), (64, 16)])
def test_long_documents_follow_the_stated_rule(seq_len: int, overlap: int) -> None:
    model = sharp_model()
    ids = tokenizer().encode("The quick brown fox jumps over it.", bos=True, eos=True)
    pieces = list(document_windows(np.array(ids), seq_len, overlap))
    found = measure(model, pieces, seq_len, 2)
    assert found.n_tokens == len(ids) - 1
    assert found.nll_nats == pytest.approx(document_nats(model, ids, seq_len, overlap), rel=1e-5)


def test_uniform_model_needs_log2_of_the_vocabulary_per_token() -> None:
    ids = tokenizer().encode("Grüße" * 9, bos=True, eos=True)
    pieces = list(document_windows(np.array(ids), 16, 4))
    found = measure(uniform_model(), pieces, 16, 4)
    assert found.bits == pytest.approx(math.log2(CONFIG.vocab_size) * (len(ids) - 1), rel=1e-6)


def test_broken_model_is_explained() -> None:
    model = sharp_model()
    with torch.no_grad():
        model.output_weight[0, 0] = float("nan")
    with pytest.raises(PunaError, match="not finite"):
        measure(model, list(document_windows(np.arange(10), 16, 4)), 16, 4)


def run(inputs: dict[str, Artifact], out: Path, **config: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return bits_per_byte(BpbConfig(**config), inputs, out, Ledger(None))


def test_stage_measures_every_model_on_every_source(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    metrics = run(inputs, tmp_path)
    assert metrics["models"] == ["untrained", "pretrained", "fine-tuned"]
    rows = {row["source"]: row for row in metrics["rows"]}
    assert list(rows) == ["code", "docs", "all documents", "answers"]
    models = {"untrained": untrained(CONFIG, 7, "cpu"), "pretrained": sharp_model()}
    encoder, total_nats, total_bytes = tokenizer(), dict.fromkeys(models, 0.0), 0
    for source, texts in TEXTS.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        documents = [encoder.encode(text, bos=True, eos=True) for text in texts]
        n_tokens = sum(len(ids) - 1 for ids in documents)
        row = rows[source]
        assert (row["n_docs"], row["n_tokens"], row["n_bytes"]) == (len(texts), n_tokens, n_bytes)
        for name, model in models.items():
            nats = sum(document_nats(model, ids, 32, 8) for ids in documents)
            expected = nats / math.log(2) / n_bytes
            assert row["bits_per_byte"][name] == pytest.approx(expected, rel=1e-5)
            assert row["nats_per_token"][name] == pytest.approx(nats / n_tokens, rel=1e-5)
            total_nats[name] += nats
        uniform = math.log2(CONFIG.vocab_size) * n_tokens / n_bytes
        assert row["bits_per_byte"]["fine-tuned"] == pytest.approx(uniform, rel=1e-6)
        total_bytes += n_bytes
    total = metrics["total"]
    assert total == rows["all documents"]
    assert total["is_total"]
    for name, nats in total_nats.items():
        expected = nats / math.log(2) / total_bytes
        assert total["bits_per_byte"][name] == pytest.approx(expected, rel=1e-5)
    written = json.loads((tmp_path / "bpb.json").read_text())
    assert written["rows"] == metrics["rows"]


def test_answers_are_scored_without_the_questions(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    row = run(inputs, tmp_path, untrained=False)["rows"][-1]
    encoder, model, nats, n_tokens = tokenizer(), sharp_model(), 0.0, 0
    for pair in PAIRS:
        ids = encoder.encode_chat(pair["messages"][:1])
        for token in [*encoder.encode(pair["messages"][1]["content"].strip()), encoder.eot_id]:
            nats += token_nats(model, ids, token)
            ids.append(token)
            n_tokens += 1
    n_bytes = sum(len(f"é{i}".encode()) for i in range(3))
    assert (row["n_docs"], row["n_tokens"], row["n_bytes"]) == (3, n_tokens, n_bytes)
    expected = nats / math.log(2) / n_bytes
    assert row["bits_per_byte"]["pretrained"] == pytest.approx(expected, rel=1e-5)
    assert "untrained" not in row["bits_per_byte"]


def test_result_file_repeats_byte_for_byte(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(inputs, tmp_path / name, untrained=False)
    assert (tmp_path / "one" / "bpb.json").read_bytes() == (
        tmp_path / "two" / "bpb.json"
    ).read_bytes()


def test_documents_are_chosen_whole_within_the_limit(inputs: dict[str, Artifact]) -> None:
    shard = TokenShards(inputs["tokens"].path).open("heldout", "code")
    lengths = np.diff(shard.offsets)
    assert choose_documents(shard, int(lengths.sum()), 0) == list(range(len(lengths)))
    for seed in range(5):
        chosen = choose_documents(shard, 20, seed)
        assert chosen == choose_documents(shard, 20, seed)
        assert 0 < lengths[chosen].sum() <= 20
    assert len({tuple(choose_documents(shard, 14, seed)) for seed in range(20)}) > 1
    assert choose_documents(shard, 5, 0) == []


def test_limit_is_reported(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    metrics = run(inputs, tmp_path, max_tokens_per_source=20, untrained=False)
    code = metrics["rows"][0]
    assert code["n_docs"] + code["n_left_out"] == len(TEXTS["code"])
    assert code["n_tokens"] <= 20


def test_no_heldout_document_is_explained(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    write_shards(tmp_path / "tokens", split="train")
    wrong = {**inputs, "tokens": artifact(tmp_path / "tokens", "tokens.encode")}
    with pytest.raises(PunaError, match="no held-out document"):
        run(wrong, tmp_path)
    with pytest.raises(PunaError, match="no held-out document"):
        run(inputs, tmp_path, max_tokens_per_source=3)


def test_too_long_context_is_explained(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="beyond the model's context of 64"):
        run(inputs, tmp_path, seq_len=65)


def sample(inputs: dict[str, Artifact], out: Path, **config: Any) -> tuple[dict, list[dict]]:
    out.mkdir(exist_ok=True)
    metrics = write_samples(SamplesConfig(**config), inputs, out, Ledger(None))
    return metrics, json.loads((out / "samples.json").read_text())


def test_samples_of_both_models(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    config = {"sampling": {"max_new_tokens": 9}, "chat_sampling": {"max_new_tokens": 5}}
    metrics, samples = sample(inputs, tmp_path / "one", **config)
    assert [one["kind"] for one in samples] == ["completion"] * 3 + ["chat"] * 3
    assert [one["model"] for one in samples] == ["pretrained"] * 3 + ["fine-tuned"] * 3
    assert {one["prompt"] for one in samples[3:]} == {"0?", "1?", "2?"}
    for one in samples[3:]:
        assert one["messages"][0] == {"role": "user", "content": one["prompt"]}
        assert one["messages"][1]["content"] == one["completion"]
        assert one["reference"] == f" é{one['prompt'][0]} "
    assert all(one["n_tokens"] <= 9 for one in samples)
    assert metrics["n_samples"] == 6
    assert metrics["n_tokens"] == sum(one["n_tokens"] for one in samples)
    sample(inputs, tmp_path / "two", **config)
    assert (tmp_path / "one" / "samples.json").read_bytes() == (
        tmp_path / "two" / "samples.json"
    ).read_bytes()


def test_equal_prompts_give_different_texts(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    _, samples = sample(inputs, tmp_path, prompts=("a", "a"), n_questions=0)
    assert samples[0]["completion"] != samples[1]["completion"]


def test_samples_without_tuning_or_with_given_questions(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    short = {"sampling": {"max_new_tokens": 2}, "chat_sampling": {"max_new_tokens": 2}}
    _, samples = sample({"model": inputs["model"]}, tmp_path, prompts=("a",), **short)
    assert [one["kind"] for one in samples] == ["completion"]
    _, samples = sample(inputs, tmp_path, prompts=(), questions=("Why?",), **short)
    assert [one["prompt"] for one in samples] == ["Why?"]
    assert samples[0]["reference"] is None
