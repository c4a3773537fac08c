"""Heads, lexical features, embedded and fine-tuned classifiers, raters, students."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from puna.cli.main import entry
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.kernels.buffers import texts_from
from puna.data.quality import QualityConfig, judge_quality
from puna.data.quality.classifier import load_classifier
from puna.data.quality.distil import distil_classifier
from puna.data.quality.examples import Example, Fields, distinct, read_place
from puna.data.quality.fit import grade_shares
from puna.data.quality.heads import fit_ridge, fit_softmax, lbfgs
from puna.data.quality.lexical import FEATURES, lexical_features
from puna.data.quality.raters import agreement, merge_ratings
from puna.data.quality.settings import TrainConfig
from puna.data.quality.train import divide, train_classifier
from puna.data.testing import kept_rows, make_documents

TOPICS = {"law": "court judge statute appeal clause", "science": "atom energy proof cell orbit",
          "sport": "goal team match score league"}  # fmt: skip
COMMON = ["the", "of", "and", "is", "in", "to", "a", "with", "for", "on"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COMMON, *" ".join(TOPICS.values()).split()]
FAST = {"dim": 8, "n_buckets": 500, "min_count": 1, "n_resamples": 10}


def write_tokenizer(folder: Path, *, special: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with weights by chance."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(config).save_pretrained(str(folder))
    write_tokenizer(folder, special=True)
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    table = np.random.default_rng(0).normal(size=(len(WORDS), 24)).astype(np.float32)
    save_file({"embeddings": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    write_tokenizer(folder, special=False)
    return folder


def text_on(rng: random.Random, topic: str, share: float = 0.5) -> str:
    words = TOPICS[topic].split()
    return " ".join(rng.choice(words if rng.random() < share else COMMON) for _ in range(20))


def topic_examples(n: int, seed: int = 0) -> list[Example]:
    rng, names = random.Random(seed), list(TOPICS)
    return [Example(f"{seed}.{k}", f"s{k % 2}", text_on(rng, names[k % 3]), names[k % 3])
            for k in range(n)]  # fmt: skip


def graded(n: int, seed: int = 0) -> list[Example]:
    """The share of words on science, times five, is the grade."""
    rng = random.Random(seed)
    items = []
    for k in range(n):
        share = rng.random()
        text = text_on(rng, "science", share)
        score = 5 * sum(word not in COMMON for word in text.split()) / 20
        items.append(Example(f"g{seed}.{k}", "web", text, "", score))
    return items


def good_and_bad(n: int, seed: int = 0) -> list[Example]:
    names = {"science": "positive", "sport": "negative"}
    items = topic_examples(3 * n // 2, seed)
    return [replace(item, label=names[item.label]) for item in items if item.label in names]


# ---- heads


def test_softmax_recovers_the_shares_of_labels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, [1, 10, 0.1, 1, 1], size=(4000, 5)).astype(np.float32)
    true = rng.normal(size=(3, 5)) / [1, 10, 0.1, 1, 1]
    e = np.exp((x - 3) @ true.T)
    shares = e / e.sum(1, keepdims=True)
    head, penalty = fit_softmax(x, shares, np.ones(len(x)))
    out = np.exp(head(x))
    assert penalty == 1e-4
    assert np.abs(out / out.sum(1, keepdims=True) - shares).max() < 0.02


def test_rounding_noise_of_a_dead_dimension_is_not_learnt_from() -> None:
    """Encoders have such dimensions; a weight of 1e5 on one would blow up when they are tuned."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 3)).astype(np.float32)
    x[:, 1] = 5e-9 * np.sign(x[:, 0])
    shares = np.eye(2)[(x[:, 0] > 0).astype(int)]
    softmax, ridge = fit_softmax(x, shares, np.ones(400))[0], fit_ridge(x, x[:, 0], np.ones(400))[0]
    assert np.abs(softmax.weights[:, 1]).max() < np.abs(softmax.weights[:, 0]).max() < 1e4
    assert np.abs(ridge.weights[:, 1]).max() < 1


def test_ridge_chooses_a_strong_penalty_for_noise_and_a_weak_one_for_a_line() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 80)).astype(np.float32)
    ones = np.ones(len(x))
    head, penalty = fit_ridge(x, x[:, 0] * 2.0 + 1, ones)
    assert (penalty, np.abs(head(x)[:, 0] - x[:, 0] * 2 - 1).max() < 0.01) == (1e-4, True)
    assert fit_ridge(x, rng.normal(size=200), ones)[1] >= 0.1


def test_ridge_leaves_one_out_as_refitting_does() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 3)).astype(np.float32), rng.normal(size=30)
    weights = rng.uniform(0.5, 2, 30)
    doubled = fit_ridge(np.repeat(x, 2, 0), np.repeat(y, 2), np.repeat(weights, 2))[0]
    once = fit_ridge(x, y, weights)[0]
    assert np.allclose(once(x), doubled(x), atol=0.2)
    heavy = fit_ridge(x, y, np.where(np.arange(30) == 4, 1e4, 1.0))[0]
    assert abs(heavy(x)[4, 0] - y[4]) < abs(once(x)[4, 0] - y[4]) + 1e-6


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_lbfgs_finds_the_minimum_of_a_quadratic(wanted: list[float]) -> None:
    target, scale = np.array(wanted), 10.0 ** np.arange(len(wanted)) / 100
    found = lbfgs(
        lambda w: (float((scale * (w - target) ** 2).sum()), 2 * scale * (w - target)),
        np.zeros(len(wanted)), tolerance=1e-7,
    )  # fmt: skip
    assert np.allclose(found, target, atol=1e-3)


@given(st.lists(st.floats(-1, 6), min_size=1, max_size=20))
def test_grades_are_divided_so_that_their_mean_is_the_score(scores: list[float]) -> None:
    shares = grade_shares(np.array(scores), ("0", "2", "3", "5"))
    assert np.allclose(shares.sum(1), 1)
    assert ((shares > 0).sum(1) <= 2).all()
    assert np.allclose(shares @ [0, 2, 3, 5], np.clip(scores, 0, 5))


# ---- lexical features


def test_lexical_features_tell_code_formulas_and_steps() -> None:
    texts = [
        "def f(x):\n    return x == my_value\n\n$ ls -l\nprint(f(3));\n",
        "Suppose $x$ is even. Then \\frac{x}{2} is whole, therefore α ≤ β; see printf(3) for it.\n",
        "This is a plain sentence, which has a dozen or so common words.\n",
        "",
    ]
    rows = [dict(zip(FEATURES, row.tolist(), strict=True))
            for row in lexical_features(texts_from(texts), 1000)]  # fmt: skip
    code, maths, plain, empty = rows
    assert code["code_lines"] == 1
    assert plain["code_lines"] == maths["code_lines"] == 0
    assert code["identifiers"] > 0 == plain["identifiers"] == maths["identifiers"]
    assert maths["latex"] > 0 == plain["latex"]
    assert maths["steps"] == pytest.approx(np.sqrt(3 / 16))  # suppose, then, therefore
    assert maths["maths"] == pytest.approx(np.sqrt(3 / 16))  # α ≤ β
    assert plain["sentences"] == 1
    assert set(empty.values()) == {0}


@given(st.lists(st.text(max_size=60), max_size=5), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_lexical_features_are_per_text_and_finite(texts: list[str], max_bytes: int) -> None:
    together = lexical_features(texts_from(texts), max_bytes)
    assert np.isfinite(together).all()
    for text, row in zip(texts, together, strict=True):
        assert (lexical_features(texts_from([text]), max_bytes)[0] == row).all()


# ---- raters


def rating(text: str, score: float = float("nan"), label: str = "", weight: float = 1) -> Example:
    return Example("r", "s", text, label, score, weight)


def test_ratings_are_merged_and_ties_are_conflicts() -> None:
    items = [rating("a", 1), rating("a", 4, weight=2), rating("b", 2)]
    merged = {item.text: item.score for item in distinct(items, several_raters=True).items}
    assert merged == {"a": 3.0, "b": 2.0}
    assert [item.text for item in distinct(items).items] == ["b"]
    labels = [rating("a", label="x"), rating("a", label="y")]
    assert merge_ratings(labels) is None
    assert distinct(labels, several_raters=True).counts["conflicts"] == 2
    voted = merge_ratings([*labels, rating("a", label="y")])
    assert voted is not None
    assert voted.label == "y"


def test_alpha_is_krippendorffs() -> None:
    # counted by hand: one pair of three disagrees; of 6 ratings 3 are x, 3 are y
    labels = [[rating("a", label=x) for x in pair] for pair in ("xx", "yy", "xy")]
    report = agreement(labels)
    observed, expected = 2 / 6, (36 - 9 - 9) / 30
    assert report["alpha"] == pytest.approx(1 - observed / expected)
    assert (report["texts"], report["ratings"]) == (3, 6)
    assert report["same_label"] == pytest.approx(2 / 3)
    scores = [[rating("a", s) for s in pair] for pair in ((1, 2), (4, 4))]
    values = [1, 2, 4, 4]
    expected = sum((a - b) ** 2 for a in values for b in values) / 12
    assert agreement(scores)["alpha"] == pytest.approx(1 - (2 / 4) / expected)
    assert agreement([[rating("a", 1), rating("a", 1)]])["alpha"] is None


def test_labelled_records_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "a", "domain": "law", "weight": 2}\n{"text": "b", "domain": 3}\n')
    fields = Fields(label="domain")
    read = list(read_place(str(path), fields, rated="label"))
    assert [(item.label, item.weight) for item in read] == [("law", 2.0), ("3", 1.0)]
    for record, message in (
        ('{"text": "a"}', "field 'domain'.*missing"),
        ('{"text": "a", "domain": "two words"}', "'two words'"),
        ('{"text": "a", "domain": "x", "weight": 0}', "weight"),
    ):
        path.write_text(record + "\n")
        with pytest.raises(PunaError, match=message):
            list(read_place(str(path), fields, rated="label"))


# ---- classifiers over embeddings


def test_a_head_over_an_embedder_tells_domains_and_its_folder_can_move(static, tmp_path) -> None:
    cfg = TrainConfig(kind="embedding", embedder=str(static), lexical=True)
    record = train_classifier(cfg, topic_examples(300), tmp_path / "m")
    report = record["metrics"]["test"]
    assert report["accuracy"] > 0.9
    assert report["confusion"]["columns"] == ["law", "science", "sport"]
    assert {row["label"] for row in report["labels"] if row["precision"] > 0.8} == set(TOPICS)
    (tmp_path / "m").rename(tmp_path / "moved")
    judged = load_classifier(tmp_path / "moved")
    names, scores = judged.score(texts_from(["court judge appeal", "team goal"]))
    assert names == ["law", "sport"]
    assert (scores > 0.4).all()
    shutil.copytree(tmp_path / "moved", tmp_path / "damaged")
    table = tmp_path / "damaged" / "embedder" / "model.safetensors"
    save_file({"embeddings": np.ones((len(WORDS), 24), np.float32)}, table)
    with pytest.raises(PunaError, match="not the embedder"):
        load_classifier(tmp_path / "damaged")


def test_a_domain_column_comes_from_a_head_in_the_stage(static, tmp_path) -> None:
    cfg = TrainConfig(kind="embedding", embedder=str(static))
    train_classifier(cfg, topic_examples(300), tmp_path / "m")
    rng = random.Random(5)
    texts = [("web", f"{name}{k}", text_on(rng, name)) for k in range(4) for name in TOPICS]
    documents = make_documents(tmp_path / "in", texts, n_shards=2)
    (tmp_path / "out").mkdir()
    quality = QualityConfig(workers=1, scorers={"domain": {"classifier": str(tmp_path / "m")}})
    judge_quality(quality, {"documents": documents}, tmp_path / "out", Ledger(None))
    rows = kept_rows(tmp_path / "out")
    assert len(rows) == 12
    assert all(row["path"].startswith(row["domain"]) and row["domain_score"] > 0 for row in rows)


def test_fine_tuning_is_never_worse_on_held_out_texts_and_repeats_itself(encoder, tmp_path) -> None:
    # no linear function of the words: a frozen encoder's head cannot learn it
    items = [replace(item, score=abs(2 * item.score - 5)) for item in graded(400)]
    common: dict[str, Any] = {"embedder": str(encoder), "passages": 1, "keep_from": 2.5}
    frozen = train_classifier(TrainConfig(kind="embedding", **common), items, tmp_path / "frozen")
    tuned_cfg = TrainConfig(
        kind="transformer", tune_epochs=12, tune_lr=3e-3, head_lr=1e-2, patience=50, **common
    )
    tuned = train_classifier(tuned_cfg, items, tmp_path / "a")
    again = train_classifier(tuned_cfg, items, tmp_path / "b")
    losses = tuned["held_out_losses"]
    assert tuned["best_step"] > 0
    assert min(losses) < 0.6 * losses[0]
    assert (tuned["model_hash"], losses) == (again["model_hash"], again["held_out_losses"])
    assert tuned["parameters"]["embedder"] == again["parameters"]["embedder"]
    first, last = (r["metrics"]["test"]["mean_absolute_error"] for r in (frozen, tuned))
    assert last < first
    assert load_classifier(tmp_path / "a").task == "score"


def test_the_first_head_has_not_seen_the_held_out_texts(encoder, tmp_path) -> None:
    """Labels by chance: only a head that has seen them can be better than chance."""
    rng = random.Random(3)
    items = [replace(item, label=rng.choice(["positive", "negative"])) for item in graded(400)]
    items = [replace(item, score=float("nan")) for item in items]
    cfg = TrainConfig(
        kind="transformer", embedder=str(encoder), tune_epochs=1, tune_lr=1e-9, head_lr=1e-9,
        n_resamples=0,
    )  # fmt: skip
    seen: dict[str, Any] = {}
    for name in ("given", "swapped"):
        record = train_classifier(cfg, items, tmp_path / name)
        seen[name] = record["held_out_losses"][0]
        parts = divide(cfg, distinct(items))
        held = distinct(items).items
        chosen = {held[k].text for k in parts.train[: len(parts.train) // 10]}
        swap = {"positive": "negative", "negative": "positive"}
        items = [replace(item, label=swap[item.label]) if item.text in chosen else item
                 for item in items]  # fmt: skip
    # a fitted label would lower both losses; an unseen one that lowers one raises the other
    assert sum(seen.values()) / 2 >= 0.69


def test_training_stops_early_at_the_best_state(encoder, tmp_path) -> None:
    cfg = TrainConfig(
        kind="transformer", embedder=str(encoder), tune_epochs=50, tune_lr=0.5, head_lr=0.5,
        patience=2, evaluations=1, n_resamples=0,
    )  # fmt: skip
    record = train_classifier(cfg, good_and_bad(200), tmp_path / "m")
    losses = record["held_out_losses"]
    assert len(losses) < 51
    per_pass = record["steps"] // (len(losses) - 1)
    assert losses[record["best_step"] // per_pass] == min(losses)


def test_embedders_that_do_not_fit_are_refused(static, tmp_path) -> None:
    with pytest.raises(ValueError, match="needs an embedder"):
        TrainConfig(kind="embedding")
    with pytest.raises(ValueError, match="takes no embedder"):
        TrainConfig(embedder="x")
    cfg = TrainConfig(kind="transformer", embedder=str(static))
    with pytest.raises(PunaError, match="is not fine-tuned"):
        train_classifier(cfg, good_and_bad(200), tmp_path / "m")


@pytest.mark.parametrize("items", [topic_examples(150), graded(150)])
def test_a_language_model_learns_neither_labels_nor_scores(items, tmp_path) -> None:
    with pytest.raises(PunaError, match="kind=ngram learns from positives"):
        train_classifier(TrainConfig(kind="ngram"), items, tmp_path / "m")


# ---- students


@pytest.mark.parametrize("make", [good_and_bad, topic_examples, graded])
def test_a_student_agrees_with_its_teacher(make, static, tmp_path) -> None:
    labelled = make(400)
    cfg = TrainConfig(kind="embedding", embedder=str(static), n_resamples=0)
    train_classifier(cfg, labelled[:300], tmp_path / "teacher")
    teacher = load_classifier(tmp_path / "teacher")
    texts = [replace(item, label="no matter", id=f"u{k}") for k, item in enumerate(make(900, 1))]
    student = TrainConfig(kind="fasttext", **FAST)
    record = distil_classifier(
        student, teacher, [*texts, *labelled[300:]], tmp_path / "student", labelled[300:]
    )
    found = record["teacher"]
    assert found["texts"] == {"given": len(texts) + len(labelled[300:]), "taught": len(texts)}
    assert record["task"] == teacher.task
    assert found["agreement"].get("spearman", found["agreement"].get("same_label")) > 0.8
    reports = found["reports"]
    if teacher.task == "binary":
        assert reports["student"]["auc"] > reports["teacher"]["auc"] - 0.05
        assert found["agreement"]["mean_absolute_difference"] < 0.15
    written = json.loads((tmp_path / "student" / "classifier.json").read_text())
    assert written["teacher"]["digest"] == teacher.digest


def test_commands_train_a_domain_classifier_and_distil_it(static, tmp_path, capsys) -> None:
    path = tmp_path / "l.jsonl"
    rows = [{"text": item.text, "domain": item.label} for item in topic_examples(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = ["--labelled", str(path), "--label-field", "domain"]
    teacher, student = str(tmp_path / "t"), str(tmp_path / "s")
    common = ["data", "classifier"]
    options = ["kind=embedding", f"embedder={static}"]
    assert run([*common, "train", teacher, *options, *shown]) == 0
    assert "true / predicted" in capsys.readouterr().out
    more = [{"text": item.text} for item in topic_examples(600, 2)]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    fast = [f"{key}={value}" for key, value in FAST.items()]
    assert run([*common, "distil", teacher, student, "--texts", str(tmp_path / "u.jsonl"),
                *fast, *shown]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "same_label" in out
    assert "student, on the labelled texts" in out
    assert run([*common, "distil", teacher, student + "2"]) == 2
    assert "give --texts" in capsys.readouterr().err


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        entry(arguments)
    return int(stopped.value.code or 0)
