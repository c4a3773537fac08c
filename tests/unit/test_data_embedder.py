"""Embedders: encoders of transformers, distillation, thresholds, the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.data.semantic.distil import DistilConfig, distil, sample_passages
from puna.data.semantic.embedder import digest_of, load_embedder
from puna.data.semantic.passages import Passages, mean_per_text, open_tokenizer, unit_rows
from puna.data.semantic.ridge import RIDGES, fit_table, shares_of
from puna.data.semantic.thresholds import false_positive_thresholds

N_WORDS = 80


def some_texts(n: int, n_words: int = 40) -> list[str]:
    rng = np.random.default_rng(n)
    return [" ".join(f"w{k}" for k in rng.integers(0, N_WORDS, n_words)) for _ in range(n)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{k}" for k in range(N_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(names[:4])
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    set_pooling(folder, "mean_tokens")
    return folder


def set_pooling(folder, name: str) -> None:
    settings = {f"pooling_mode_{key}": key == name for key in ("mean_tokens", "cls_token", "max")}
    settings |= {f"pooling_mode_{name}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def reference(folder, text: str, pooling: str) -> np.ndarray:
    model = BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([open_tokenizer(folder).encode(text).ids])
    with torch.inference_mode():
        states = model(input_ids=ids).last_hidden_state[0]
    state = states.mean(0) if pooling == "mean_tokens" else states[0]
    return unit_rows(state.numpy()[None])[0]


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_an_encoder_is_that_of_transformers_whatever_shares_its_batch(encoder, pooling):
    set_pooling(encoder, pooling)
    loaded = load_embedder(encoder, Passages(64, 1), "cpu")
    texts = ["w1 w2 w3", "w5", "", " ".join(f"w{k}" for k in range(30))]
    got = loaded.embed(texts)
    for text, row in zip(texts, got, strict=True):
        if text:
            np.testing.assert_allclose(row, reference(encoder, text, pooling), atol=1e-5)
    assert not got[2].any()
    set_pooling(encoder, "mean_tokens")


def test_a_document_is_the_mean_of_its_passages(encoder):
    loaded = load_embedder(encoder, Passages(12, 3), "cpu")  # 10 words and 2 special tokens
    words = [f"w{k}" for k in range(50)]
    parts = [" ".join(words[start : start + 10]) for start in (0, 10, 20)]
    vectors = np.stack([reference(encoder, part, "mean_tokens") for part in parts])
    expected = mean_per_text(vectors, np.zeros(3, np.int64), 1)[0]
    np.testing.assert_allclose(loaded.embed([" ".join(words)])[0], expected, atol=1e-5)
    assert loaded.passages.n_tokens == 12
    assert load_embedder(encoder, Passages(256, 1), "cpu").passages.n_tokens == 34


def test_strange_encoders_are_refused(encoder, tmp_path):
    set_pooling(encoder, "weightedmean_tokens")
    with pytest.raises(PunaError, match="pooling_mode_weightedmean_tokens is not known"):
        load_embedder(encoder, Passages(64, 1), "cpu")
    set_pooling(encoder, "mean_tokens")
    modules = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (encoder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PunaError, match=r"the module sentence_transformers\.models\.Dense"):
        load_embedder(encoder, Passages(64, 1), "cpu")
    (encoder / "modules.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(PunaError, match="holds no embedder"):
        load_embedder(tmp_path, Passages(64, 1), "cpu")


def test_leave_one_out_is_what_refitting_without_the_text_gives():
    rng = np.random.default_rng(0)
    passages = [rng.integers(0, 30, 8).tolist() for _ in range(25)]
    shares = shares_of(passages, np.ones(30))
    truth = rng.normal(size=(30, 4)).astype(np.float32)
    dense = np.zeros((25, 30), np.float32)
    for names, block in shares.blocks():
        dense[:, names] = block
    np.testing.assert_allclose(dense.sum(1), 1, rtol=1e-6)
    target = unit_rows(dense @ truth)
    start = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    fit = fit_table(start, shares, target)
    assert fit.ridge in RIDGES
    scale = ((dense @ start) * target).sum() / ((dense @ start) ** 2).sum()
    unit = fit.ridge * (dense**2).sum() / 25
    left_out = []
    for k in range(25):
        rest = np.arange(25) != k
        a, residual = dense[rest], (target - scale * dense @ start)[rest]
        dual = np.linalg.solve(a @ a.T + unit * np.eye(24), residual)
        left_out.append(dense[k] @ (scale * start + a.T @ dual))
    agreement = (unit_rows(np.array(left_out)) * target).sum(1).mean()
    assert fit.agreement_after == pytest.approx(agreement, abs=1e-3)
    assert fit.agreement_after > fit.agreement_before


def test_distilling_with_documents_comes_nearer_to_the_teacher(encoder, tmp_path):
    cfg = DistilConfig(dim=12, sample=150, count=150, passage_chars=100, device="cpu")
    texts, unseen = some_texts(200), some_texts(60, 25)
    record = distil(encoder, tmp_path / "fitted", cfg, texts)
    distil(encoder, tmp_path / "plain", cfg)
    assert record["fitted_to"] == 150
    assert record["digest"] == digest_of(tmp_path / "fitted") != digest_of(tmp_path / "plain")
    cut = Passages(30, 1)
    teacher = load_embedder(encoder, cut, "cpu").embed(unseen)

    def error(name: str) -> float:
        vectors = load_embedder(tmp_path / name, cut).embed(unseen)
        assert vectors.shape == (60, 12)
        return float(np.abs(vectors @ vectors.T - teacher @ teacher.T).mean())

    assert error("fitted") < error("plain")
    with pytest.raises(PunaError, match="exists already"):
        distil(encoder, tmp_path / "fitted", cfg)
    with pytest.raises(PunaError, match="static embedder already"):
        distil(tmp_path / "fitted", tmp_path / "new", cfg)


def test_passages_are_chosen_by_hash_whatever_the_order():
    cfg = DistilConfig(count=10, passage_chars=50)
    texts = some_texts(40)
    chosen = sample_passages(texts, cfg)
    assert len(chosen) == 10
    assert chosen == sample_passages(texts[::-1], cfg)
    assert all(any(part in text for text in texts) for part in chosen)


def test_thresholds_rise_as_false_positives_fall(encoder):
    found = false_positive_thresholds(
        load_embedder(encoder, Passages(30, 1), "cpu"), some_texts(40, 200), 40, 0
    )
    for row in found.values():
        assert row["median"] <= row["10.0% above"] <= row["1.0% above"] <= row["0.1% above"] <= 1.01
    assert set(found) == {"two documents", "halves of one document"}
    with pytest.raises(PunaError, match="too few"):
        false_positive_thresholds(load_embedder(encoder, Passages(30, 1), "cpu"), ["w1"], 40, 0)


def test_the_commands_make_and_examine_an_embedder(encoder, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some_texts(40, 200))
    (tmp_path / "docs.jsonl").write_text(lines)
    documents, out = str(tmp_path / "docs.jsonl"), str(tmp_path / "static")
    made = CliRunner().invoke(
        cli, ["data", "embedder", "distil", str(encoder), out, "dim=8", "device=cpu",
              "--documents", documents],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "84 tokens, 8 dimensions" in made.output
    assert "cosine with the encoder" in made.output
    told = CliRunner().invoke(cli, ["data", "embedder", "threshold", out, documents])
    assert told.exit_code == 0, told.output
    assert '"two documents"' in told.output
