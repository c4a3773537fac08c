"""Whatever shares a call of the compiled step, and however many threads run it: the same bits."""

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.lm.cpu.decoder import CpuDecoder
from puna.lm.engine.pool import KVPool
from puna.lm.quant import quantize_int8
from puna.model.config import LlamaConfig
from puna.model.llama import Llama

VOCABULARY = 41
SHAPES = [(64, 4, 2), (48, 3, 3), (80, 5, 1), (36, 2, 1)]  # dim, heads, key/value heads
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "int8": 1e-3}
MODELS: dict[tuple, Llama] = {}


def model_of(kind: str, shape: tuple[int, int, int], tied: bool) -> Llama:
    key = (kind, shape, tied)
    if key not in MODELS:
        dim, n_heads, n_kv_heads = shape
        config = LlamaConfig(
            vocab_size=VOCABULARY, dim=dim, n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads,
            ffn_dim=72, max_seq_len=2048, tie_embeddings=tied,
        )  # fmt: skip
        model = Llama(config, dtype=torch.bfloat16 if kind == "bfloat16" else None).eval()
        if kind == "int8":
            quantize_int8(model)
        MODELS[key] = model
    return MODELS[key]


def logits_of(
    model: Llama, prompts: list[list[int]], calls: list[list[tuple[int, int]]], n_threads: int,
    block_tokens: int, seed: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Logits of every token of every prompt; ``calls`` are lists of (prompt, tokens)."""
    decoder = CpuDecoder(model, n_threads)
    pool = KVPool(model.config, model.norm.weight.dtype, "cpu", 1 << 20, block_tokens)
    numbers = pool.take(sum(pool.blocks_for(len(prompt)) for prompt in prompts) + 5)
    random.Random(seed).shuffle(numbers)
    most = max(pool.blocks_for(len(prompt)) for prompt in prompts)
    blocks = []
    for prompt in prompts:
        own = [numbers.pop() for _ in range(pool.blocks_for(len(prompt)))]
        blocks.append(own + [0] * (most - len(own)))
    done = [0] * len(prompts)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for call in calls:
        tokens, positions, tables = [], [], []
        for which, n in call:
            tokens += prompts[which][done[which] : done[which] + n]
            positions += range(done[which], done[which] + n)
            tables += [blocks[which]] * n
            done[which] += n
        logits = decoder.forward(
            np.array(tokens), np.array(positions), np.array(tables, np.int32), pool
        )
        at = 0
        for which, n in call:
            found[which].append(logits[at : at + n])
            at += n
    return [torch.cat(parts) for parts in found]


@st.composite
def schedules(draw):
    """Prompts, and calls that compute them in ragged company."""
    source = random.Random(draw(st.integers(0, 2**31)))
    lengths = draw(st.lists(st.sampled_from([1, 2, 7, 17, 40, 600]), min_size=1, max_size=9))
    prompts = [[source.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
    left, calls = list(lengths), []
    while any(left):
        call = []
        for which in range(len(prompts)):
            n = min(left[which], source.choice([0, 1, 1, 2, 5, 64]))
            if n:
                call.append((which, n))
                left[which] -= n
        if call:
            calls.append(call)
    return prompts, calls


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.sampled_from(SHAPES),
    st.booleans(),
    schedules(),
    st.integers(1, 4),
    st.sampled_from([5, 16, 32]),
    st.integers(0, 99),
)
def test_rows_do_not_depend_on_each_other(
    kind, shape, tied, schedule, n_threads, block_tokens, seed
):
    model = model_of(kind, shape, tied)
    prompts, calls = schedule
    together = logits_of(model, prompts, calls, n_threads, block_tokens, seed)
    chosen = seed % len(prompts)
    prompt = prompts[chosen]
    alone = logits_of(model, [prompt], [[(0, 1)] for _ in prompt], 1, block_tokens, seed + 1)[0]
    assert torch.equal(together[chosen], alone)
    with torch.inference_mode():
        wide = model
        if kind == "bfloat16":
            wide = Llama(model.config)
            wide.load_state_dict(model.state_dict())
        want = wide(torch.tensor([prompt]))[0]
    torch.testing.assert_close(alone, want, atol=TOLERANCE[kind], rtol=0)
