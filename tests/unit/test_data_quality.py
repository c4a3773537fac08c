"""Quality classifiers: the fastText file and loop, the n-gram model, measures, stage, commands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.cli.main import entry
from puna.core.errors import PunaError
from puna.core.ledger import Ledger
from puna.data.engine import local
from puna.data.kernels.buffers import texts_from
from puna.data.quality import QualityConfig, calibrate, judge_quality, measure
from puna.data.quality.balance import draws, keep_probabilities
from puna.data.quality.classifier import load_classifier
from puna.data.quality.examples import Example, Fields, distinct, join_scores, read_place
from puna.data.quality.fasttext_model import load_fasttext
from puna.data.quality.fasttext_train import train_fasttext
from puna.data.quality.ngram import load_ngram, save_ngram, train_ngram
from puna.data.quality.prepare import prepare
from puna.data.quality.train import TrainConfig, divide, evaluate_on, train_classifier
from puna.data.reasons import meaning_of
from puna.data.testing import folder_bytes, kept_rows, make_documents, read_rows, rejected_rows

GOOD = ["the", "theory", "explains", "how", "energy", "moves", "through", "matter", "and", "why",
        "größe", "since", "careful", "measurements", "show", "that", "results"]  # fmt: skip
BAD = ["home", "login", "|", "next", "subscribe", "cookie", "2024-01-01", "404", "---", "click",
       "here", "</s>", "__label__positive", "menu", "more", "share", "层"]  # fmt: skip
FAST = {"dim": 8, "n_buckets": 2000, "min_count": 1, "n_resamples": 20}


def make_text(rng: random.Random, good_share: float, n: int = 40) -> str:
    words = [rng.choice(GOOD if rng.random() < good_share else BAD) for _ in range(n)]
    return " ".join(words[: n // 2]) + ".\n\n" + " ".join(words[n // 2 :]) + "\n"


def make_examples(n: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    items = []
    for index in range(n):
        is_good = index % 2 == 0
        share = rng.uniform(0.4, 1.0) if is_good else rng.uniform(0.0, 0.6)
        source = ("books" if is_good else "menus") + str(index % 3)
        label = "positive" if is_good else "negative"
        items.append(Example(f"d{index}", source, make_text(rng, share), label))
    return items


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "model"
    train_classifier(TrainConfig(**FAST), make_examples(600), out)
    return out


def probabilities(model_file: Path, preparation: str, texts: list[str]) -> tuple[dict, list[str]]:
    loaded = load_fasttext(model_file, preparation, 1 << 20)
    p = calibrate.softmax(loaded.raw(texts_from(texts)))
    lines = prepare(texts_from(texts), preparation, 1 << 20)
    strings = [bytes(lines.bytes_of(k)).decode() for k in range(len(lines))]
    return {label: p[:, k] for k, label in enumerate(loaded.labels)}, strings


def test_our_models_give_the_same_probabilities_in_the_library(model: Path) -> None:
    fasttext = pytest.importorskip("fasttext")
    library = fasttext.load_model(str(model / "model.bin"))
    texts = [item.text for item in make_examples(50, 1)] + ["", "unknown words only"]
    for preparation in ("words", "plain"):
        ours, lines = probabilities(model / "model.bin", preparation, texts)
        for index, line in enumerate(lines):
            labels, values = library.predict(line, k=2)
            for label, value in zip(labels, values, strict=True):
                # The library adds 1e-5 before it takes a logarithm.
                assert ours[label.removeprefix("__label__")][index] == pytest.approx(
                    value, abs=3e-5
                )


@pytest.mark.parametrize("options", [{"wordNgrams": 3}, {"minn": 2, "maxn": 4, "wordNgrams": 2}])
def test_models_of_the_library_give_the_same_probabilities_here(tmp_path: Path, options) -> None:
    fasttext = pytest.importorskip("fasttext")
    items = make_examples(200)
    lines = (f"__label__{item.label} {' '.join(item.text.split())}\n" for item in items)
    (tmp_path / "train.txt").write_text("".join(lines))
    # Ten threads: with fewer, the library leaves a part of its vectors uninitialised.
    trained = fasttext.train_supervised(
        str(tmp_path / "train.txt"), dim=10, bucket=1000, thread=10, verbose=0, **options
    )
    trained.save_model(str(tmp_path / "m.bin"))
    ours, prepared = probabilities(tmp_path / "m.bin", "plain", [item.text for item in items[:40]])
    for index, line in enumerate(prepared):
        for label, value in zip(*trained.predict(line, k=2), strict=True):
            assert ours[label.removeprefix("__label__")][index] == pytest.approx(value, abs=3e-5)


def test_training_gives_the_same_bytes_and_learns() -> None:
    items = make_examples(200)
    lines = prepare(texts_from([item.text for item in items]), "words", 1 << 20)
    targets = np.array([item.label == "positive" for item in items], np.int64)
    options = {"dim": 4, "epochs": 5, "lr": 0.5, "word_ngrams": 2, "min_count": 1,
               "n_buckets": 500}  # fmt: skip
    first, losses = train_fasttext(lines, targets, ["n", "p"], **options, seed=1)
    assert train_fasttext(lines, targets, ["n", "p"], **options, seed=1)[0] == first
    assert train_fasttext(lines, targets, ["n", "p"], **options, seed=2)[0] != first
    assert losses[-1] < 0.6 * losses[0]


def test_prepared_words_show_layout_and_hold_no_label() -> None:
    text = "Ärger In v2.15:\n\n__label__x ====== ab\t\r\nC</s>"
    line = bytes(prepare(texts_from([text]), "words", 1 << 20).bytes_of(0)).decode()
    assert line.split(" ") == [
        "Ärger", "in", "v0", ".", "0", ":", "\x1f\x1f", "__", "label", "__", "x", "===", "ab",
        "\x1f", "c", "<", "/", "s", ">", "",
    ]  # fmt: skip
    cut = bytes(prepare(texts_from(["aaaé"]), "plain", 4).bytes_of(0))
    assert cut == b"aaa"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.sampled_from(["words", "plain"]))
def test_preparation_is_per_text(texts: list[str], preparation: str) -> None:
    whole = prepare(texts_from(texts), preparation, 32)
    for index, text in enumerate(texts):
        alone = prepare(texts_from([text]), preparation, 32)
        assert bytes(whole.bytes_of(index)) == bytes(alone.bytes_of(0))
        bytes(whole.bytes_of(index)).decode()


@pytest.fixture(scope="module")
def language_model():
    rng = random.Random(0)
    texts = [make_text(rng, 1.0) for _ in range(60)]
    return train_ngram(texts_from(texts), order=5, max_bytes=1 << 20, min_count=2)


@settings(max_examples=20, deadline=None)
@given(
    context=st.one_of(st.binary(max_size=8), st.sampled_from([b"the th", b"energy m", b"\n\nw"]))
)
def test_ngram_probabilities_of_the_next_byte_add_up_to_one(language_model, context: bytes) -> None:
    from puna.data.kernels.buffers import Texts, fixed

    n = len(context)
    data = np.frombuffer(b"".join(context + bytes([b]) for b in range(256)) + context, np.uint8)
    offsets = np.concatenate([np.arange(257) * (n + 1), [257 * (n + 1) - 1]]).astype(np.int64)
    bits = language_model.raw(Texts(fixed(data), fixed(offsets)))[:, 0]
    before = bits[256] * n if n else 0.0
    assert (2.0 ** (before - bits[:256] * (n + 1))).sum() == pytest.approx(1.0, abs=1e-5)


def test_ngram_model_prefers_its_language_and_survives_its_file(language_model, tmp_path) -> None:
    rng = random.Random(9)
    texts = texts_from([make_text(rng, 1.0), make_text(rng, 0.0), "\x01\x02" * 30, ""])
    bits = language_model.raw(texts)[:, 0]
    assert bits[0] < 2.5 < bits[1] < bits[2]
    assert bits[3] == 8
    path = tmp_path / "ngram.bin"
    path.write_bytes(save_ngram(language_model))
    loaded = load_ngram(path, language_model.max_bytes)
    assert np.array_equal(loaded.raw(texts), language_model.raw(texts))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PunaError, match="not a readable n-gram model"):
        load_ngram(path, 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_ranking_measures_equal_their_definitions(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([float(score) for score, _ in rows])
    truth = np.array([is_positive for _, is_positive in rows])
    ranking = measure.Ranking(scores, truth)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[truth] for n in scores[~truth]]
    if pairs:
        assert ranking.auc() == pytest.approx(np.mean(pairs))
        repeats = np.array([k % 3 for k in range(len(rows))])
        again = measure.Ranking(np.repeat(scores, repeats), np.repeat(truth, repeats))
        assert ranking.auc(repeats.astype(float)) == pytest.approx(again.auc(), nan_ok=True)
        best = measure.best_threshold(scores, truth)
        accuracies = [((scores >= cut) == truth).mean() for cut in scores]
        assert ((scores >= best) == truth).mean() >= max(accuracies) - 1e-12
    if truth.any():
        precision = 0.0
        for cut in set(scores):
            is_kept = scores >= cut
            precision += (truth & (scores == cut)).sum() / truth.sum() * truth[is_kept].mean()
        assert ranking.average_precision() == pytest.approx(precision)


def test_a_share_is_no_document_too_much() -> None:
    scores = np.arange(100.0)
    assert 0.07 * 100 > 7
    assert (scores >= measure.threshold_of(scores, 0.07)).sum() == 7
    assert (scores <= measure.threshold_of(scores, 0.071, lower_is_better=True)).sum() == 8
    assert measure.threshold_of(scores, 1e-9) == 99


def test_calibration_finds_the_true_probabilities() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20000)
    truth = rng.random(20000) < calibrate.sigmoid(0.7 * margins - 1)
    fitted = calibrate.fit_platt(margins, truth)
    assert (fitted["slope"], fitted["offset"]) == pytest.approx((0.7, -1), abs=0.06)
    for method in (fitted, calibrate.fit_isotonic(margins, truth)):
        p = calibrate.calibrated(margins, method)
        assert measure.reliability(p, truth)["ece"] < 0.01
        assert (np.diff(p[np.argsort(margins)]) >= 0).all()
    assert measure.reliability(calibrate.sigmoid(margins), truth)["ece"] > 0.1
    logits = np.log(np.array([[0.8, 0.1, 0.1]] * 1000)) * 3
    targets = np.array([0] * 800 + [1] * 100 + [2] * 100)
    assert calibrate.fit_temperature(logits, targets)["temperature"] == pytest.approx(3, rel=1e-3)
    perfect = calibrate.fit_platt(np.array([-1.0, -2, 1, 2]), np.array([False, False, True, True]))
    assert 0 < perfect["slope"] < 100


def test_copies_stand_on_one_side_and_contradictions_go() -> None:
    items = make_examples(200)
    copies = [
        Example(f"c{k}", "copies", " " + item.text.replace("e", "E"), item.label)
        for k, item in enumerate(items[:50])
    ]
    liar = Example("liar", "copies", items[60].text, "negative")
    examples = distinct([*items, *copies, liar, Example("e", "copies", " \n", "positive")])
    assert examples.counts == {"read": 252, "empty": 1, "conflicts": 2, "duplicates": 50,
                               "used": 199}  # fmt: skip
    again = distinct([*copies, liar, *reversed(items)])
    assert again.keys.tolist() == examples.keys.tolist()
    parts = divide(TrainConfig(unseen_sources=("menus1",)), examples)
    rows = np.concatenate([parts.train, parts.calibration, parts.test, parts.unseen])
    assert sorted(rows.tolist()) == list(range(199))
    assert {examples.items[k].source for k in parts.unseen} == {"menus1"}
    with pytest.raises(PunaError, match="'nowhere', of which there is no text"):
        divide(TrainConfig(unseen_sources=("nowhere",)), examples)


def test_training_reports_honestly_and_does_not_depend_on_order(model: Path, tmp_path) -> None:
    record = json.loads((model / "classifier.json").read_text())
    again = train_classifier(TrainConfig(**FAST), make_examples(600)[::-1], tmp_path / "again")
    assert {**again, "code": 0} == {**record, "code": 0}
    report = record["metrics"]["test"]
    low, high = report["intervals_95"]["auc"]
    assert low < report["auc"] < high < 1
    assert report["auc"] > 0.9
    assert sum(report["confusion"].values()) == report["docs"] == record["data"]["parts"]["test"]
    assert report["calibration"]["ece"] < 0.15
    row = next(row for row in report["sources"] if row["source"] == "menus1")
    assert (row["positives"], row["false_negative_rate"]) == (0, None)
    assert row["kept_share"] == row["false_positive_rate"]
    other = evaluate_on(load_classifier(model), make_examples(400, 7), TrainConfig(**FAST))
    assert other["auc"] == pytest.approx(report["auc"], abs=0.05)
    with pytest.raises(PunaError, match="exists already"):
        train_classifier(TrainConfig(**FAST), make_examples(600), model)
    with pytest.raises(PunaError, match=r"only \d+ distinct \w+ texts"):
        train_classifier(TrainConfig(**FAST), make_examples(30), tmp_path / "few")
    (tmp_path / "again" / "model.bin").write_bytes(b"x")
    with pytest.raises(PunaError, match="not the file that"):
        load_classifier(tmp_path / "again")


def make_corpus(folder: Path, n_shards: int = 2):
    rng = random.Random(3)
    texts = [
        ("web" if k % 3 else "news", f"{k}.txt", make_text(rng, rng.random())) for k in range(120)
    ]
    return make_documents(folder, texts, n_shards=n_shards, stage="data.filter")


def run(tmp_path: Path, name: str, scorers: dict, *, n_shards: int = 2) -> tuple[Path, dict]:
    documents = make_corpus(tmp_path / f"{name}-in", n_shards)
    cfg = QualityConfig.model_validate({"scorers": scorers, "workers": 1})
    out = tmp_path / name
    out.mkdir()
    return out, judge_quality(cfg, {"documents": documents}, out, Ledger(None))


def test_threshold_drops_with_reason_value_and_threshold(model: Path, tmp_path) -> None:
    out, metrics = run(tmp_path, "min", {"quality": {"classifier": str(model), "min": 0.6}})
    kept, rejected = kept_rows(out), rejected_rows(out)
    assert len(kept) + len(rejected) == metrics["in_docs"] == 120
    assert len(kept) > 20 < len(rejected)
    assert all(row["quality"] >= 0.6 for row in kept)
    for row in rejected:
        assert (row["reason"], row["detail"], row["threshold"]) == ("quality.low", "quality", 0.6)
        assert row["value"] == row["quality"] < 0.6
    assert meaning_of("quality.low")
    texts = texts_from([row["text"] for row in kept])
    expected = load_classifier(model).score(texts)[0]
    assert [row["quality"] for row in kept] == expected.tolist()
    assert not (out / ".work").exists()


@pytest.mark.parametrize("options", [{}, {"per_source": True}, {"share_of": "bytes"}])
def test_share_is_exact_and_independent_of_shards(model: Path, tmp_path, options) -> None:
    scorers = {"quality": {"classifier": str(model), "keep_share": 0.25, **options}}
    out, metrics = run(tmp_path, "one", scorers, n_shards=1)
    other, again = run(tmp_path, "three", scorers, n_shards=3)
    kept = kept_rows(out)
    assert sorted(row["id"] for row in kept_rows(other)) == [row["id"] for row in kept]
    thresholds = metrics["scorers"]["quality"]["share_thresholds"]
    assert thresholds == again["scorers"]["quality"]["share_thresholds"]
    if options.get("per_source"):
        assert sorted(row["source"] for row in kept) == ["news"] * 10 + ["web"] * 20
    elif options:
        total = sum(row["n_bytes"] for row in [*kept, *rejected_rows(out)])
        sizes = [row["n_bytes"] for row in sorted(kept, key=lambda row: -row["quality"])]
        assert sum(sizes[:-1]) < 0.25 * total <= sum(sizes)
    else:
        assert len(kept) == 30
        worst = min(row["quality"] for row in kept)
        assert thresholds[""] == worst > max(row["value"] for row in rejected_rows(out))


def test_worker_processes_write_the_same_bytes(model: Path, tmp_path, monkeypatch) -> None:
    documents = make_corpus(tmp_path / "in")
    use = {"classifier": str(model), "keep_share": 0.4, "pareto_alpha": 2.0}
    found = []
    for workers, small in ((1, 1 << 30), (2, 0)):
        monkeypatch.setattr(local, "SMALL_INPUT_BYTES", small)
        cfg = QualityConfig.model_validate({"scorers": {"quality": use}, "workers": workers})
        out = tmp_path / str(workers)
        out.mkdir()
        judge_quality(cfg, {"documents": documents}, out, Ledger(None))
        found.append(folder_bytes(out))
    assert found[0] == found[1]
    assert {Path(name).parts[0] for name in found[0]} == {"documents", "rejected", "manifest.json"}


def test_pareto_sampling_keeps_by_the_draw_of_the_id(model: Path, tmp_path) -> None:
    scorers = {"quality": {"classifier": str(model), "pareto_alpha": 3.0}}
    out, _ = run(tmp_path, "pareto", scorers)
    rows = [*kept_rows(out), *rejected_rows(out)]
    u = dict(
        zip([r["id"] for r in rows], draws([r["id"] for r in rows], "quality", 0), strict=True)
    )
    kept = {row["id"] for row in kept_rows(out)}
    for row in rows:
        drawn = (1 - u[row["id"]]) ** (-1 / 3) - 1
        assert (row["id"] in kept) == (drawn > 1 - row["quality"])
    for row in rejected_rows(out):
        assert row["reason"] == "quality.sampled"
        assert row["value"] <= row["threshold"]
    many = draws([f"{k:032x}" for k in range(20000)], "quality", 0)
    lomax = (1 - many) ** (-1 / 3) - 1
    assert (lomax > 0.5).mean() == pytest.approx(1.5**-3, abs=0.01)
    assert not np.array_equal(many[:10], draws([f"{k:032x}" for k in range(10)], "quality", 1))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 1000), min_size=2),
    st.lists(st.floats(0.01, 1), min_size=5, max_size=5),
)
def test_keep_probabilities_reach_the_shares(amounts: dict[str, int], weights: list[float]) -> None:
    named = sorted(amounts)[:-1]
    shares = {name: weights[k] / (sum(weights) + 1) for k, name in enumerate(named)}
    found = keep_probabilities(amounts, shares)
    assert max(found.values()) == 1
    left = {name: found[name] * amounts[name] for name in amounts}
    for name, share in shares.items():
        assert left[name] / sum(left.values()) == pytest.approx(share)


def test_domains_are_named_and_balanced(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = {"law": ["court", "judge", "appeal"], "food": ["bread", "soup", "salt"]}

    def text(domain: str) -> str:
        return " ".join(rng.choice(words[domain] + GOOD) for _ in range(40))

    items = [Example(f"{d}{k}", "s", text(d), d) for d in words for k in range(100)]
    record = train_classifier(TrainConfig(**FAST), items, tmp_path / "domains")
    assert (record["task"], record["labels"]) == ("labels", ["food", "law"])
    assert record["metrics"]["test"]["macro_f1"] > 0.95
    texts = [
        ("web", f"{d}{k}", text(d)) for d, n in (("law", 400), ("food", 100)) for k in range(n)
    ]
    documents = make_documents(tmp_path / "in", texts)
    out = tmp_path / "out"
    out.mkdir()
    use = {"classifier": str(tmp_path / "domains"), "shares": {"law": 0.5}}
    cfg = QualityConfig.model_validate({"scorers": {"domain": use}})
    metrics = judge_quality(cfg, {"documents": documents}, out, Ledger(None))
    kept = [row["domain"] for row in kept_rows(out)]
    assert kept.count("law") == pytest.approx(100, abs=30)
    assert 95 <= kept.count("food") <= 105
    assert metrics["scorers"]["domain"]["keep_probabilities"]["food"] == 1
    for row in rejected_rows(out):
        assert (row["reason"], row["domain"]) == ("domain.balance", "law")
        assert row["value"] >= row["threshold"]
    bad = {"scorers": {"domain": {"classifier": str(tmp_path / "domains"), "min": 0.5}}}
    cfg = QualityConfig.model_validate(bad)
    with pytest.raises(PunaError, match=r"min does not suit .* \(task labels\)"):
        judge_quality(cfg, {"documents": documents}, out, Ledger(None))


def test_bits_per_byte_drop_the_unexpected(tmp_path: Path) -> None:
    items = [item for item in make_examples(300) if item.label == "positive"]
    record = train_classifier(TrainConfig(kind="ngram", order=4), items, tmp_path / "lm")
    assert record["task"] == "bits"
    scorers = {"bits_per_byte": {"classifier": str(tmp_path / "lm"), "keep_share": 0.5}}
    out, _ = run(tmp_path, "bits", scorers)
    highest = max(row["bits_per_byte"] for row in kept_rows(out))
    assert len(kept_rows(out)) == 60
    for row in rejected_rows(out):
        assert (row["reason"], row["threshold"]) == ("quality.high", highest)
        assert row["value"] > highest


def test_a_student_learns_grades_that_are_joined_by_id(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts, lines = [], []
    for k in range(500):
        grade = k % 6
        texts.append(("web", f"{k}.txt", make_text(rng, grade / 5, 60)))
    documents = make_documents(tmp_path / "docs", texts)
    for row in read_rows(documents.path / "documents"):
        grade = int(row["path"].removesuffix(".txt")) % 6
        lines.append(json.dumps({"id": row["id"], "score": grade}) + "\n")
    (tmp_path / "grades.jsonl").write_text("".join(lines))
    items = list(join_scores(str(tmp_path / "grades.jsonl"), [str(documents.path)], Fields()))
    record = train_classifier(TrainConfig(**FAST), items, tmp_path / "student")
    report = record["metrics"]["test"]
    assert record["task"] == "score"
    assert report["pearson"] > 0.85 < report["spearman"]
    assert report["mean_absolute_error"] < 0.9
    assert report["f1"] > 0.75
    (tmp_path / "more.jsonl").write_text('{"id": "nowhere", "score": 1}\n')
    with pytest.raises(PunaError, match="'nowhere'"):
        list(join_scores(str(tmp_path / "more.jsonl"), [str(documents.path)], Fields()))
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "score": "high"}\n')
    with pytest.raises(PunaError, match=r"bad\.jsonl#1: field 'score' \(score\) is 'high'"):
        list(read_place(str(tmp_path / "bad.jsonl"), Fields(), rated="score"))


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.999), byte=st.integers(0, 255))
def test_damaged_models_are_refused(damaged: tuple[bytes, Path], share: float, byte: int) -> None:
    content, path = damaged
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PunaError):
        load_fasttext(path, "words", 100)
    path.write_bytes(bytes([byte]) * 300)
    with pytest.raises(PunaError):
        load_fasttext(path, "words", 100)


@pytest.fixture(scope="module")
def damaged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    return (model / "model.bin").read_bytes(), tmp_path_factory.mktemp("damaged") / "model.bin"


def test_a_damaged_record_is_refused(model: Path, tmp_path: Path) -> None:
    record = json.loads((model / "classifier.json").read_text())
    for text, words in (
        ("{", "is damaged"),
        (json.dumps({k: v for k, v in record.items() if k != "calibration"}), "calibration"),
        (json.dumps({**record, "schema_version": 99}), "schema version 99"),
    ):
        (tmp_path / "classifier.json").write_text(text)
        with pytest.raises(PunaError, match=words):
            load_classifier(tmp_path)


def test_stage_names_what_is_wrong_with_a_classifier(model: Path, tmp_path: Path) -> None:
    for use, words in (
        ({"classifier": "nowhere"}, "nowhere holds no classifier"),
        ({"classifier": str(model), "digest": "0"}, "has the digest"),
        ({"classifier": str(model), "shares": {"a": 1}}, "shares does not suit"),
        ({"classifier": str(model / "model.bin")}, "has the labels negative and positive"),
    ):
        with pytest.raises(PunaError, match=words):
            run(tmp_path, f"case{abs(hash(words))}", {"quality": use})
    with pytest.raises(PunaError, match="a column 'text' already"):
        run(tmp_path, "taken", {"text": {"classifier": str(model)}})
    use = {"classifier": str(model / "model.bin"), "positive": "positive", "min": 0.5}
    out, _ = run(tmp_path, "file", {"quality": use})
    assert rejected_rows(out)
    with pytest.raises(ValueError, match="no column name"):
        QualityConfig.model_validate({"scorers": {"A b": {"classifier": "x"}}})


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        entry(["data", "classifier", *arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_commands_train_evaluate_and_apply(tmp_path: Path, capsys) -> None:
    items = make_examples(400)
    for label in ("positive", "negative"):
        lines = [
            json.dumps({"text": i.text, "source": i.source}) for i in items if i.label == label
        ]
        (tmp_path / f"{label}.jsonl").write_text("\n".join(lines))
    places = [f"--{label}={tmp_path / label}.jsonl" for label in ("positive", "negative")]
    folder = str(tmp_path / "model")
    settings_of_test = [f"{key}={value}" for key, value in FAST.items()]
    code, out, err = call(capsys, "train", folder, *settings_of_test, *places)
    assert code == 0, err
    assert "auc" in out
    assert "books1" in out
    code, out, _ = call(capsys, "evaluate", folder, *places, "n_resamples=5", "--json")
    assert json.loads(out)["auc"] > 0.9
    scores = tmp_path / "scores.parquet"
    place = str(tmp_path / "positive.jsonl")
    code, out, _ = call(capsys, "apply", folder, place, f"--out={scores}", "--keep-share=0.5")
    threshold = float(out.rpartition("min = ")[2])
    values = pq.read_table(scores)["score"].to_numpy()
    assert (values >= threshold).sum() == 100
    for arguments, words in (
        (["train", folder + "2", *places, "lrr=1"], "did you mean 'lr'"),
        (["train", folder + "2"], "no examples are given"),
        (["train", folder + "2", f"--positive={tmp_path}/none.jsonl"], "matches no file"),
        (["train", folder + "2", "--label=x"], "NAME=PLACE"),
        (["apply", str(tmp_path), place], "holds no classifier"),
        (["apply", folder, place, "--out=x.csv"], "neither .jsonl nor .parquet"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 2, err
        assert words in err
        assert "Traceback" not in err
