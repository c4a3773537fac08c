"""The choice of the next token: frequencies, truncations, penalties, and transformers' order."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from puna.lm.engine.sample import Sampler, token_logprobs
from puna.model.sampling import Sampling


def draw(probabilities, n=400, **settings):
    row = np.log(np.array(probabilities, dtype=np.float32))
    return [Sampler(Sampling(seed=seed, **settings), [], len(row)).choose(row) for seed in range(n)]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"max_new_tokens": 0},
    ],
)
def test_impossible_sampling_is_refused(change):
    with pytest.raises(ValidationError):
        Sampling(**change)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = [0.1, 0.4, 0.3, 0.2]
    settings = {"temperature": 1.0}
    assert set(draw(probabilities, top_p=0.39, **settings)) == {1}
    assert set(draw(probabilities, top_p=0.41, **settings)) == {1, 2}
    assert set(draw(probabilities, top_p=0.95, **settings)) == {0, 1, 2, 3}
    assert set(draw(probabilities, top_p=1e-9, **settings)) == {1}


def test_top_k_keeps_k_and_goes_before_top_p():
    probabilities = [0.1, 0.4, 0.3, 0.2]
    assert set(draw(probabilities, top_k=2, top_p=1.0, temperature=1.0)) == {1, 2}
    # of the two that are left, 0.4 / 0.7 = 0.57 reaches 0.5 alone
    assert set(draw(probabilities, top_k=2, top_p=0.5, temperature=1.0)) == {1}
    assert set(draw(probabilities, top_k=9, top_p=1.0, temperature=1.0)) == {0, 1, 2, 3}


def test_min_p_is_relative_to_the_likeliest():
    probabilities = [0.1, 0.4, 0.3, 0.2]
    assert set(draw(probabilities, min_p=0.74, top_p=1.0, temperature=1.0)) == {1, 2}
    assert set(draw(probabilities, min_p=0.76, top_p=1.0, temperature=1.0)) == {1}
    assert set(draw(probabilities, min_p=1.0, top_p=1.0, temperature=1.0)) == {1}


def test_frequencies_follow_the_probabilities_and_the_temperature():
    probabilities = [0.5, 0.3, 0.2]
    drawn = draw(probabilities, n=4000, temperature=1.0, top_p=1.0)
    for token, probability in enumerate(probabilities):  # 4 standard deviations
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.032)
    cold = draw(probabilities, n=4000, temperature=0.5, top_p=1.0)
    assert cold.count(0) / 4000 == pytest.approx(0.25 / 0.38, abs=0.032)


def test_a_flat_vocabulary_is_drawn_from_as_a_whole():
    # 5000 tokens in 20 nats: the narrow ranges of candidates hold a part of the mass only
    logits = np.linspace(0, 0.5, 5000, dtype=np.float32)
    logits[::2] -= 20
    drawn = [
        Sampler(Sampling(seed=seed, temperature=20.0, top_p=1.0), [], 5000).choose(logits)
        for seed in range(800)
    ]
    even = sum(token % 2 == 0 for token in drawn) / 800
    assert even == pytest.approx(1 / (1 + math.e), abs=0.07)
    assert len(set(drawn)) > 700


def test_extreme_temperatures_stay_finite():
    row = np.array([3.0, -2.0, 3.5, 0.0], dtype=np.float32)
    for temperature in (1e-300, 1e-6):
        assert Sampler(Sampling(temperature=temperature), [], 4).choose(row) == 2
    hot = {Sampler(Sampling(temperature=1e30, top_p=1.0, seed=s), [], 4).choose(row)
           for s in range(60)}  # fmt: skip
    assert hot == {0, 1, 2, 3}


def test_greedy_draws_nothing_and_takes_the_first_of_equals():
    sampler = Sampler(Sampling(temperature=0), [], 4)
    assert sampler.is_argmax
    assert sampler.choose(np.array([0.0, 2.0, 2.0, 1.0], dtype=np.float32)) == 1


def test_repetition_penalty_counts_prompt_and_text():
    row = np.array([1.0, 0.9, -0.1, -0.2], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0], 4)
    assert not sampler.is_argmax
    assert [sampler.choose(row) for _ in range(4)] == [1, 0, 0, 0]
    negative = np.array([-1.0, -1.5, -9.0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0], 3)
    assert [sampler.choose(negative) for _ in range(2)] == [1, 0]
    assert negative.tolist() == [-1.0, -1.5, -9.0]


def test_presence_counts_once_and_frequency_every_time():
    row = np.array([1.0, 0.0, -0.9], dtype=np.float32)
    present = Sampler(Sampling(temperature=0, presence_penalty=0.5), [1], 3)
    assert [present.choose(row) for _ in range(4)] == [0, 0, 0, 0]
    frequent = Sampler(Sampling(temperature=0, frequency_penalty=0.4), [1], 3)
    assert [frequent.choose(row) for _ in range(5)] == [0, 0, 0, 1, 0]


def transformers_distribution(row, prompt, sampling):
    """Probabilities after transformers' own processors in the order of its generate."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    scores = steps(torch.tensor([prompt]), torch.from_numpy(row)[None])[0]
    return scores.double().softmax(-1).numpy()


def our_distribution(row, prompt, sampling, monkeypatch):
    """Probabilities recovered from where draws on a fine grid fall."""
    n = 4000
    shares = iter(((np.arange(n) + 0.5) / n).tolist())
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([next(shares)]))
    counts = np.zeros(len(row))
    for _ in range(n):
        counts[Sampler(sampling, prompt, len(row)).choose(row)] += 1
    return counts / n


def test_the_processors_of_generate_stand_in_the_order_assumed_here():
    import inspect

    from transformers import GenerationMixin

    source = inspect.getsource(GenerationMixin._get_logits_processor)
    names = ("RepetitionPenalty", "TemperatureLogits", "TopKLogits", "TopPLogits", "MinPLogits")
    places = [source.index(name) for name in names]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 1.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 12, "min_p": 0.2},
        {"temperature": 1.5, "top_p": 1.0, "min_p": 0.05},
        {"temperature": 2.5, "top_p": 0.97, "repetition_penalty": 1.7},
        {"temperature": 0.9, "top_p": 0.99, "top_k": 30, "min_p": 0.02, "repetition_penalty": 0.6},
    ],
)
def test_kept_set_and_probabilities_are_those_of_transformers(settings, monkeypatch):
    generator = np.random.default_rng(7)
    row = (generator.standard_normal(60) * 3).astype(np.float32)
    row[20:24] = row[10]  # ties are kept or cut together with the k-th by both
    prompt = generator.integers(0, 60, 15).tolist()
    sampling = Sampling(**settings)
    wanted = transformers_distribution(row, prompt, sampling)
    got = our_distribution(row, prompt, sampling, monkeypatch)
    likely = wanted > 1e-3  # below, the grid may miss a token
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(wanted))
    assert set(np.flatnonzero(likely)) <= set(np.flatnonzero(got))
    np.testing.assert_allclose(got, wanted, atol=6e-4)


def test_narrow_candidates_choose_as_the_whole_sorted_vocabulary(monkeypatch):
    generator = np.random.default_rng(1)
    for spread in (0.3, 2.0, 6.0):
        row = (generator.standard_normal(3000) * spread).astype(np.float32)
        for settings in ({"top_p": 1.0}, {"top_p": 0.9}, {"top_p": 1.0, "min_p": 1e-4},
                         {"top_k": 2500}, {"top_p": 0.9999}):  # fmt: skip
            sampling = [Sampling(temperature=1.0, seed=seed, **settings) for seed in range(40)]
            narrow = [Sampler(one, [], 3000).choose(row) for one in sampling]
            with monkeypatch.context() as patch:
                patch.setattr("puna.lm.engine.sample._WIDTHS", (math.inf,))
                whole = [Sampler(one, [], 3000).choose(row) for one in sampling]
            assert narrow == whole


def test_logprobs_are_the_log_softmax_with_the_likeliest_first():
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * 4
    ids = [3, 0, 32, 7, 7]
    wanted = logits.double().log_softmax(-1)
    for row, one in enumerate(token_logprobs(logits, ids, 4)):
        assert one.id == ids[row]
        assert one.logprob == pytest.approx(wanted[row, ids[row]].item(), abs=1e-5)
        best = wanted[row].topk(4)
        assert [id_ for id_, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert token_logprobs(logits, ids, 0)[0].top == ()
