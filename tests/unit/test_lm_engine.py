"""The engine against the plain model: same tokens, same logprobs, exact bookkeeping of blocks."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from puna.core.errors import PunaError
from puna.lm.cpu.prefill import PAYS
from puna.lm.engine import memory
from puna.lm.engine.engine import Engine
from puna.lm.engine.paged import PagedAttention, Segment
from puna.lm.engine.pool import KVPool
from puna.lm.engine.types import Request
from puna.model.config import LinearScaling, LlamaConfig, RopeScaling
from puna.model.llama import Llama
from puna.model.sampling import Sampling

# fp32 sums in another order: the spread between published implementations is 5e-5
PARITY = 1e-4
CONFIG = LlamaConfig(
    vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=200
)
SCALED = RopeScaling(factor=8.0, original_max_seq_len=32)
BACKENDS = ["auto", "torch"]
INFERENCE = torch.inference_mode


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sharp(config: LlamaConfig) -> Llama:
    """Weights so large that the most likely token varies from place to place."""
    model = Llama(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return sharp(CONFIG)


def prompts(n: int, longest: int, seed: int = 0, vocab_size: int = 50) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(vocab_size) for _ in range(source.randint(1, longest))] for _ in range(n)
    ]


def run(engine: Engine, requests: list[Request]) -> dict[str, list]:
    """Events of each request, all submitted at once."""
    events: dict[str, list] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    for one in events.values():
        assert [event.finish is not None for event in one] == [False] * (len(one) - 1) + [True]
    return events


def ids_of(events: list) -> list[int]:
    return [event.token for event in events if event.token is not None]


def generate(model: Llama, prompt: list[int], sampling: Sampling, stop_ids=(), **options):
    events = run(Engine(model, **options), [Request("a", prompt, sampling, frozenset(stop_ids))])[
        "a"
    ]
    return ids_of(events), events[-1].finish


def greedy(n: int) -> Sampling:
    return Sampling(temperature=0, max_new_tokens=n)


@INFERENCE()
def reference(model: Llama, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_the_argmax_of_the_full_forward(model, backend):
    for prompt in prompts(3, 90):
        ids, finish = generate(model, prompt, greedy(40), backend=backend)
        assert ids == reference(model, prompt, 40)
        assert len(set(ids)) > 3
        assert finish == "length"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("invariant", [False, True])
def test_ragged_requests_together_equal_each_alone(model, backend, invariant):
    wanted = [reference(model, prompt, 20) for prompt in prompts(9, 150)]
    engine = Engine(model, max_batch=5, chunk_tokens=37, backend=backend, batch_invariant=invariant)
    requests = [Request(str(i), p, greedy(20)) for i, p in enumerate(prompts(9, 150))]
    assert [ids_of(one) for one in run(engine, requests).values()] == wanted
    assert engine.stats.used_blocks == engine.stats.reserved_blocks == 0
    assert engine.stats.prompt_tokens_total == sum(len(p) for p in prompts(9, 150))
    assert engine.stats.generated_tokens_total == 9 * 20
    assert engine.stats.finished_total["length"] == 9


CASES = {
    "mha": {"n_kv_heads": 4},
    "mqa-tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "scaled": {"rope_scaling": SCALED},
    "linear": {"rope_scaling": LinearScaling(factor=4.0)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_logprobs_of_text_and_prompt_are_those_of_the_full_forward(case, backend):
    model = sharp(CONFIG.model_copy(update=CASES[case]))
    prompt = [i * i % 47 for i in range(150)]
    request = Request("a", prompt, greedy(30), logprobs=3, prompt_logprobs=True)
    events = run(Engine(model, chunk_tokens=64, backend=backend), [request])["a"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + ids_of(events)]))[0].log_softmax(-1)
    rated = [*events[0].prompt_logprobs, *(event.logprob for event in events)]
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert rated[0] is None
    assert len(rated) == len(prompt) + 30
    for place, (id_, one) in enumerate(zip(prompt + ids_of(events), rated, strict=True)):
        if place:
            row = logprobs[place - 1]
            assert one.id == id_
            assert one.logprob == pytest.approx(row[id_].item(), abs=PARITY, rel=PARITY)
            assert [value for _, value in one.top] == pytest.approx(
                row.topk(3).values.tolist(), abs=PARITY, rel=PARITY
            )
            assert len(one.top) == 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 150, 512])
def test_prompts_in_chunks_equal_the_whole_forward(chunk):
    model = sharp(CONFIG.model_copy(update={"max_seq_len": 700}))
    prompt = [i * i % 47 for i in range(600)]
    ids, _ = generate(model, prompt, greedy(5), chunk_tokens=chunk, backend="torch")
    assert ids == reference(model, prompt, 5)


@pytest.mark.parametrize("segments", [[(0, 30)], [(40, 1), (9, 1), (5, 20), (0, 7), (130, 140)]])
def test_paged_attention_is_attention_over_each_request(segments):
    pool = KVPool(CONFIG, torch.float32, "cpu", 2000)
    generator = torch.Generator().manual_seed(0)
    rows, wanted, items = [], [], []
    with torch.inference_mode():
        for start, n in segments:
            blocks = pool.take(pool.blocks_for(start + n))
            q, k, v = (
                torch.randn(1, start + n, heads, 8, generator=generator) for heads in (4, 2, 2)
            )
            for position in range(start):
                block, slot = blocks[position // pool.block_tokens], position % pool.block_tokens
                pool.keys[1][block, slot], pool.values[1][block, slot] = (
                    k[0, position],
                    v[0, position],
                )
            rows.append([x[:, start:] for x in (q, k, v)])
            scores = torch.einsum("btnd,bsnd->bnts", q, k.repeat_interleave(2, 2)) / 8**0.5
            hidden = torch.ones(start + n, start + n, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out = torch.einsum("bnts,bsnd->btnd", weights, v.repeat_interleave(2, 2))
            wanted.append(out[:, start:])
            items.append(Segment(np.array(blocks, np.int32), start, n))
        plan = PagedAttention(pool, items)
        q, k, v = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
        got = plan(q, k, v, 1)
    torch.testing.assert_close(got, torch.cat(wanted, 1), rtol=1e-4, atol=1e-5)
    assert plan.positions_BT[0].tolist() == [p for s, n in segments for p in range(s, s + n)]
    taken = [block for item in items for block in item.blocks]
    assert not pool.keys[0][taken].any()  # another layer's


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("invariant", [False, True])
def test_bfloat16_stays_near_float32_with_the_same_weights(backend, invariant):
    model = Llama(CONFIG).eval().to(torch.bfloat16)
    engine = Engine(model, chunk_tokens=48, batch_invariant=invariant, backend=backend)
    asked = [
        Request(str(i), [(i + 3) * j % 47 for j in range(length)], greedy(8), logprobs=0)
        for i, length in enumerate((1, 20, 70, 150))
    ]
    events = run(engine, asked)
    assert engine.pool.keys[0].dtype == torch.bfloat16
    wide = Llama(CONFIG)
    wide.load_state_dict(model.state_dict())
    for request in asked:
        own = events[request.request_id]
        ids = request.prompt_ids + ids_of(own)
        with torch.inference_mode():
            logprobs = wide(torch.tensor([ids]))[0].log_softmax(-1)
        for place, event in enumerate(own, len(request.prompt_ids)):
            assert event.logprob.logprob == pytest.approx(
                logprobs[place - 1, event.token].item(), abs=0.06
            )


def test_bfloat16_prompts_of_any_length_are_computed_in_few_shapes():
    # oneDNN keeps a compiled kernel of 0.6 MiB for every number of rows that it meets
    model = Llama(CONFIG).eval().to(torch.bfloat16)
    engine = Engine(model, backend="torch")
    hidden, logits, rows = model.hidden, model.logits, set()
    model.hidden = lambda tokens, *a, **kw: rows.add(tokens.shape[1]) or hidden(tokens, *a, **kw)
    model.logits = lambda x: rows.add(len(x)) or logits(x)
    for first in range(1, 90, 11):
        lengths = range(first, first + 11)
        requests = [Request(f"{n}", [n % 47] * n, greedy(2)) for n in lengths]
        run(engine, requests)
        run(engine, [replace(requests[3], logprobs=0, prompt_logprobs=True)])
    assert len(rows) <= 6 + 512 // 32, rows


@pytest.mark.parametrize("invariant", [False, True])
def test_what_the_compiled_step_takes_depends_on_a_prompt_alone_where_bits_count(invariant):
    model = sharp(CONFIG)
    engine = Engine(model, batch_invariant=invariant, chunk_tokens=1000)
    forward = engine._forward
    assert Engine(model).batch_invariant
    assert Engine(model.to(torch.bfloat16)).batch_invariant == PAYS
    calls = []
    for name in ("_compiled", "_packed"):
        usual = getattr(forward, name)
        setattr(
            forward, name,
            lambda work, name=name, usual=usual: calls.append((name, len(work))) or usual(work),
        )  # fmt: skip
    model.to(torch.float32)
    run(engine, [Request(str(i), [i + 1] * 100, greedy(1)) for i in range(6)])
    # 600 tokens: more than the step is good for when they could be packed
    assert calls == ([("_compiled", 6)] if invariant else [("_packed", 6)])


def test_a_seed_repeats_whatever_runs_beside_it_and_another_differs(model):
    def text(seed: int, n_others: int) -> list[int]:
        others = [
            Request(f"other{i}", prompt, Sampling(temperature=1.0, seed=i, max_new_tokens=9 + i))
            for i, prompt in enumerate(prompts(n_others, 40, seed=8))
        ]
        own = Request("own", [5, 6], Sampling(temperature=1.5, seed=seed, max_new_tokens=30))
        return ids_of(run(Engine(model), [*others[:2], own, *others[2:]])["own"])

    assert text(1, 0) == text(1, 0) == text(1, 6)
    assert len({tuple(text(seed, 0)) for seed in range(8)}) > 4


def test_generation_neither_reads_nor_moves_the_global_generator(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate(model, [5], Sampling(max_new_tokens=5))
    assert torch.equal(torch.rand(3), expected)


def test_it_stops_before_any_stop_id(model):
    free, _ = generate(model, [1, 2, 3], greedy(20))
    stop = free[4]
    ids, finish = generate(model, [1, 2, 3], greedy(20), {stop, 49})
    assert (ids, finish) == (free[: free.index(stop)], "stop")


def test_a_request_may_end_without_any_token(model):
    [first], _ = generate(model, [1, 2, 3], greedy(1))
    request = Request("a", [1, 2, 3], greedy(5), frozenset({first}), 0, True)
    [event] = run(Engine(model), [request])["a"]
    assert (event.token, event.finish, event.logprob) == (None, "stop", None)
    assert len(event.prompt_logprobs) == 3


def test_it_ends_when_the_context_is_full(model):
    ids, finish = generate(model, [1] * 198, greedy(20))
    assert (len(ids), finish) == (3, "context")  # positions 198, 199 and one not fed back
    assert generate(model, [1] * 200, greedy(20))[1] == "context"
    assert generate(model, [1] * 198, greedy(3))[1] == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt has no tokens"),
        ([1] * 201, "prompt has 201 tokens, the model's context is 200"),
        ([1, 50], "token id 50 of the prompt is outside the model's vocabulary of 50"),
        ([-1], "token id -1"),
        ([1] * 100, "need 130 tokens of cache, the cache holds 128"),
    ],
)
def test_what_can_never_run_is_refused_at_once(model, prompt, message):
    engine = Engine(model, max_cache_tokens=130)
    with pytest.raises(PunaError, match=message):
        engine.submit(Request("a", prompt, greedy(31)))
    assert not engine.has_work
    engine.submit(Request("a", [1], greedy(2)))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.submit(Request("a", [1], greedy(2)))


def test_requests_wait_for_cache_and_for_a_place_in_order(model):
    engine = Engine(model, max_cache_tokens=128, max_batch=3)
    for i in range(6):
        engine.submit(Request(str(i), [i + 1] * 40, greedy(10)))  # 49 tokens: two blocks of four
    order = []
    while engine.has_work:
        order += [event.request_id for event in engine.step() if event.finish]
        assert engine.stats.n_running <= 2
        assert engine.stats.reserved_blocks <= engine.stats.total_blocks == 4
        assert engine.stats.used_blocks <= engine.stats.reserved_blocks
    assert order == list("012345")


def test_cancel_frees_the_blocks_at_once_and_is_told_once(model):
    engine = Engine(model, max_batch=2, chunk_tokens=32)
    for i in range(4):
        engine.submit(Request(str(i), [i + 1] * 60, greedy(50)))
    engine.step()  # 0 is in its prompt, the others wait
    engine.step()
    engine.step()
    used = engine.stats.used_blocks
    assert used > 2
    engine.cancel("0")  # decodes
    engine.cancel("3")  # waits
    engine.cancel("0")
    engine.cancel("nobody")
    assert engine.stats.used_blocks < used
    events = engine.step()
    assert [(e.request_id, e.token) for e in events if e.finish == "cancelled"] == [
        ("0", None), ("3", None),
    ]  # fmt: skip
    engine.submit(Request("0", [9] * 5, greedy(4)))  # the id is free again
    seen = {"0": [], "1": [], "2": []}
    for event in events:
        if event.token is not None:
            seen[event.request_id].append(event.token)
    while engine.has_work:
        for event in engine.step():
            if event.token is not None:
                seen[event.request_id].append(event.token)
    assert seen["0"] == reference(model, [9] * 5, 4)
    assert len(seen["2"]) == 50
    assert engine.stats.used_blocks == engine.stats.reserved_blocks == 0
    assert engine.stats.finished_total == {
        "stop": 0, "length": 3, "context": 0, "cancelled": 2, "error": 0,
    }  # fmt: skip


def test_growing_in_mid_run_changes_no_bit(model):
    def logprobs(n_others: int) -> tuple:
        engine = Engine(model, batch_invariant=True)
        engine.submit(Request("own", [3, 1, 4], greedy(60), logprobs=2))
        found, generations = [], set()
        for number in range(60):
            if number == 20:
                for i in range(n_others):
                    engine.submit(Request(f"o{i}", [i + 1] * 150, greedy(2)))
            found += [e.logprob for e in engine.step() if e.request_id == "own"]
            generations.add(engine.pool.generation)
        return found, generations

    alone, once = logprobs(0)
    beside, often = logprobs(12)
    assert len(once) == 1
    assert len(often) > 1
    assert alone == beside


def test_one_broken_request_fails_alone(model):
    broken = sharp(CONFIG)
    with torch.no_grad():
        broken.tok_embeddings.weight[13] = float("nan")
    for options in ({}, {"batch_invariant": True}, {"backend": "torch"}):
        engine = Engine(broken, max_cache_tokens=256, **options)
        bad = Request("bad", [1, 13, 2], greedy(5))
        worse = Request("worse", [13] * 40, greedy(5), logprobs=1, prompt_logprobs=True)
        good = Request("good", [1, 2, 3], greedy(12))
        events = run(engine, [bad, good, worse])
        assert ids_of(events["good"]) == reference(model, [1, 2, 3], 12)
        for name in ("bad", "worse"):
            [event] = events[name]
            assert (event.token, event.finish) == (None, "error")
            assert "not finite" in str(event.error)
        # The NaNs it left in the cache do not reach the next that gets its blocks.
        after = [Request(f"after{i}", [1, 2, 3 + i], greedy(3)) for i in range(5)]
        for i, one in enumerate(run(engine, after).values()):
            assert ids_of(one) == reference(model, [1, 2, 3 + i], 3)


def test_a_long_prompt_is_computed_in_bounded_memory():
    config = CONFIG.model_copy(update={"max_seq_len": 33_000, "n_layers": 1, "vocab_size": 4000})
    model = sharp(config)
    prompt = [i * i % 3989 for i in range(32_000)]
    shapes = []
    engine = Engine(model, chunk_tokens=512, backend="torch")
    hidden, logits = model.hidden, model.logits
    model.hidden = lambda tokens, *a, **kw: shapes.append(tokens.shape) or hidden(tokens, *a, **kw)
    model.logits = lambda x: shapes.append(x.shape) or logits(x)
    request = Request("a", prompt, greedy(2), logprobs=0, prompt_logprobs=True)
    events = run(engine, [request])["a"]
    assert len(events[0].prompt_logprobs) == len(prompt)
    assert max(shape[1] for shape in shapes if shape[0] == 1) <= 512  # tokens of a forward
    assert max(shape[0] for shape in shapes) <= 64  # rows of logits at once
    assert engine.stats.allocated_blocks * engine.stats.block_tokens < 1.6 * len(prompt)


def test_blocks_are_counted_exactly():
    pool = KVPool(CONFIG, torch.float32, "cpu", 200, block_tokens=8)
    assert (pool.max_blocks, pool.n_blocks, pool.n_bytes) == (25, 0, 0)
    first, second = pool.take(3), pool.take(18)
    assert pool.used_blocks == 21
    assert len({*first, *second}) == 21
    assert pool.n_bytes == pool.n_blocks * 2 * 2 * 8 * 2 * 8 * 4
    with pytest.raises(ValueError, match="5 more blocks than the 21 taken"):
        pool.take(5)
    pool.keys[1][first[1]] = float("nan")
    pool.give_back(first)
    with pytest.raises(ValueError, match="given back, but nobody has it"):
        pool.give_back([first[0]])
    assert pool.used_blocks == 18
    assert pool.take(0) == []
    again = pool.take(7)
    assert pool.used_blocks == pool.max_blocks == 25
    assert set(again) >= set(first)
    assert not any(tensor[again].any() for tensor in (*pool.keys, *pool.values))


def test_the_pool_starts_small_grows_geometrically_and_keeps_what_it_holds():
    pool = KVPool(CONFIG, torch.bfloat16, "cpu", 100_000)
    kept = pool.take(2)
    pool.values[0][kept[1]] = 7
    sizes = []
    for _ in range(400):
        pool.take(1)
        sizes.append(pool.n_blocks)
    assert sizes[0] < 40
    assert pool.generation == len(set(sizes)) < 12
    assert max(sizes) < 1.6 * 402
    assert (pool.values[0][kept[1]] == 7).all()
    assert pool.values[0].dtype == torch.bfloat16


def test_the_default_cache_is_half_the_free_memory_within_reason(monkeypatch):
    def tokens(free: int, max_batch: int = 4) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda _: free)
        return memory.default_cache_tokens(CONFIG, torch.float32, torch.device("cpu"), max_batch)

    token_bytes = 2 * 2 * 16 * 4
    assert tokens(600 * token_bytes) == 300
    assert tokens(0) == CONFIG.max_seq_len  # one request is never refused beforehand
    assert tokens(10**12) == 4 * CONFIG.max_seq_len
    monkeypatch.undo()
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_impossible_sizes_are_programming_errors(model):
    for option in ("max_batch", "max_cache_tokens", "chunk_tokens"):
        with pytest.raises(ValueError, match="at least 1"):
            Engine(model, **{option: 0})
