"""Whatever arrives or is cancelled when: a request gets what it gets alone, and no block leaks."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.lm.engine.engine import Engine
from puna.lm.engine.types import Request
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.model.sampling import Sampling

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other

CONFIG = LlamaConfig(
    vocab_size=61, dim=48, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=80, max_seq_len=300
)


def sharp() -> Llama:
    model = Llama(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
    return model


MODEL = sharp()


@st.composite
def requests(draw, request_id: str):
    source = random.Random(draw(st.integers(0, 2**31)))
    length = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65, 120, 250, 290]))
    return Request(
        request_id,
        [source.randrange(CONFIG.vocab_size) for _ in range(length)],
        Sampling(
            temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
            top_p=draw(st.sampled_from([0.8, 1.0])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
            seed=draw(st.integers(0, 99)),
            max_new_tokens=draw(st.integers(1, 12)),
        ),
        frozenset(draw(st.sets(st.integers(0, CONFIG.vocab_size - 1), max_size=2))),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        prompt_logprobs=draw(st.booleans()),
    )


@st.composite
def traffic(draw):
    """(step of arrival, step of cancellation or None, request) of each request, by arrival."""
    n = draw(st.integers(2, 7))
    arrivals = sorted(draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)))
    return [
        (arrival, draw(st.none() | st.none() | st.integers(0, 20)), draw(requests(str(number))))
        for number, arrival in enumerate(arrivals)
    ]


def play(engine: Engine, plan) -> tuple[dict[str, list], set[str]]:
    """Events by request, and the ids of those that were cancelled before they ended."""
    events = {request.request_id: [] for _, _, request in plan}
    step = 0
    while engine.has_work or any(arrival >= step for arrival, _, _ in plan):
        for arrival, cancelled, request in plan:
            if arrival == step:
                engine.submit(request)
            if cancelled is not None and arrival + cancelled == step:
                engine.cancel(request.request_id)
        for event in engine.step():
            events[event.request_id].append(event)
        stats = engine.stats
        assert stats.used_blocks <= stats.reserved_blocks <= stats.total_blocks
        step += 1
    for one in events.values():
        assert [event.finish is not None for event in one] == [False] * (len(one) - 1) + [True]
    assert engine.stats.used_blocks == engine.stats.reserved_blocks == 0
    gone = {name for name, one in events.items() if one[-1].finish == "cancelled"}
    return events, gone


@pytest.mark.parametrize("backend", ["auto", "torch"])
@settings(max_examples=25, deadline=None)
@given(traffic(), st.integers(1, 6), st.sampled_from([16, 48, 100, 512]))
def test_invariant_results_are_bitwise_those_of_the_request_alone(backend, plan, max_batch, chunk):
    def engine(size: int) -> Engine:
        return Engine(MODEL, max_batch=size, max_cache_tokens=1024, chunk_tokens=chunk,
                      batch_invariant=True, backend=backend)  # fmt: skip

    events, gone = play(engine(max_batch), plan)
    for _, _, request in plan:
        alone, _ = play(engine(1), [(0, None, request)])
        got, wanted = events[request.request_id], alone[request.request_id]
        if request.request_id in gone:
            assert got[:-1] == wanted[: len(got) - 1]
        else:
            assert got == wanted  # tokens, logprobs and those of the prompt, to the last bit


@pytest.mark.parametrize("backend", ["auto", "torch"])
@settings(max_examples=25, deadline=None)
@given(traffic(), st.integers(1, 6), st.sampled_from([1, 16, 50, 512]))
def test_packed_results_are_those_of_the_full_forward(backend, plan, max_batch, chunk):
    engine = Engine(MODEL, max_batch=max_batch, max_cache_tokens=1024, chunk_tokens=chunk,
                    batch_invariant=False, backend=backend)  # fmt: skip
    events, _ = play(engine, plan)
    for _, _, request in plan:
        own = events[request.request_id]
        ids = request.prompt_ids + [event.token for event in own if event.token is not None]
        with torch.inference_mode():
            logprobs = MODEL(torch.tensor([ids]))[0].log_softmax(-1)
        rated = [one for event in own for one in (event.prompt_logprobs or [])]
        rated = rated or [None] * len(request.prompt_ids)
        rated += [event.logprob for event in own if event.token is not None]
        assert len(rated) == len(ids)
        for place, one in enumerate(rated):
            if one is not None:
                assert one.id == ids[place]
                assert abs(one.logprob - logprobs[place - 1, ids[place]].item()) < 1e-4


def test_two_hundred_requests_leave_nothing_behind():
    source = random.Random(4)
    engine = Engine(MODEL, max_batch=9, max_cache_tokens=2000, chunk_tokens=100)
    waiting = [
        Request(
            str(i), [source.randrange(61) for _ in range(source.choice([3, 9, 40, 150, 280]))],
            Sampling(temperature=1.0, seed=i, max_new_tokens=source.randint(1, 25)),
            frozenset({i % 61}),
        )
        for i in range(200)
    ]  # fmt: skip
    ended, n_tokens = {}, 0
    names = [request.request_id for request in waiting]
    while waiting or engine.has_work:
        for _ in range(source.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop())
        if source.random() < 0.15:
            engine.cancel(source.choice(names))
        for event in engine.step():
            assert event.request_id not in ended
            n_tokens += event.token is not None
            if event.finish:
                ended[event.request_id] = event.finish
    stats = engine.stats
    assert len(ended) == 200
    assert stats.used_blocks == stats.reserved_blocks == stats.n_running == stats.n_waiting == 0
    assert sum(stats.finished_total.values()) == 200
    assert stats.generated_tokens_total == n_tokens
    assert {"stop", "length", "cancelled"} <= set(ended.values())
    with torch.inference_mode():
        assert sorted(engine.pool.take(stats.total_blocks)) == list(range(stats.total_blocks))
