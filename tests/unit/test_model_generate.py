"""Generation: greedy equals the full forward, stop set, limits, seeds, and what sampling keeps."""

import pytest
import torch
from pydantic import ValidationError

from puna.core.errors import PunaError
from puna.model.config import LlamaConfig
from puna.model.generate import Sampling, generate, next_tokens
from puna.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=40
)
GREEDY = Sampling(temperature=0, max_new_tokens=20)


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # sharp enough that the most likely token varies
    yield model
    torch.set_num_threads(before)


def test_greedy_is_the_argmax_of_the_full_forward(model):
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, [1, 2, 3], GREEDY)) == ids[3:]
    assert len(set(ids[3:])) > 3


def test_a_seed_repeats_and_another_differs(model):
    def text(seed):
        return list(generate(model, [5], Sampling(temperature=1.5, seed=seed, max_new_tokens=30)))

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(8)}) > 4


def test_generation_neither_reads_nor_moves_the_global_generator(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(generate(model, [5], Sampling(max_new_tokens=5)))
    assert torch.equal(torch.rand(3), expected)


def test_it_stops_before_any_stop_id(model):
    free = list(generate(model, [1, 2, 3], GREEDY))
    stop = free[4]
    assert list(generate(model, [1, 2, 3], GREEDY, {stop, 49})) == free[: free.index(stop)]


def test_it_streams(model, monkeypatch):
    calls = []
    hidden = Llama.hidden
    monkeypatch.setattr(
        Llama, "hidden", lambda self, x, **kw: calls.append(x.shape) or hidden(self, x, **kw)
    )
    stream = generate(model, [1, 2, 3], GREEDY)
    next(stream)
    assert calls == [(1, 3)]
    next(stream)
    assert calls == [(1, 3), (1, 1)]
    assert not torch.is_inference_mode_enabled()


def test_it_ends_when_the_context_is_full(model):
    prompt = [1] * 38
    assert len(list(generate(model, prompt, GREEDY))) == 3  # positions 38, 39 and one not fed back
    assert len(list(generate(model, [1] * 40, GREEDY))) == 1
    assert len(list(generate(model, [1], Sampling(max_new_tokens=2)))) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt has no tokens"),
        ([1] * 41, "prompt has 41 tokens, the model's context is 40"),
        ([1, 50], "token id 50 of the prompt is outside the model's vocabulary of 50"),
        ([-1], "token id -1"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_computed(model, prompt, message):
    with pytest.raises(PunaError, match=message):
        generate(model, prompt, GREEDY)


def test_a_broken_model_is_one_clear_error():
    model = Llama(CONFIG)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(PunaError, match="not finite"):
        list(generate(model, [1], GREEDY))


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_impossible_sampling_is_refused(change):
    with pytest.raises(ValidationError):
        Sampling(**change)


def draw(logits, n=400, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    rows = torch.tensor(logits).log().expand(n, -1)
    return next_tokens(rows, Sampling(**settings), generators).tolist()


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


def test_frequencies_follow_the_probabilities_and_the_temperature():
    probabilities = [0.5, 0.3, 0.2]
    drawn = draw(probabilities, n=4000, temperature=1.0, top_p=1.0)
    for token, probability in enumerate(probabilities):  # 4 standard deviations
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.032)
    cold = draw(probabilities, n=4000, temperature=0.5, top_p=1.0)
    assert cold.count(0) / 4000 == pytest.approx(0.25 / 0.38, abs=0.032)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_p=0.9)

    def fresh(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = next_tokens(logits, sampling, fresh(1, 2, 3)).tolist()
    alone = [next_tokens(logits[i : i + 1], sampling, fresh(i + 1)).item() for i in range(3)]
    assert together == alone
