"""Forwards of many tokens on a CPU: PyTorch's products, and what lies between them compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.lm.cpu.between import BetweenProducts
from puna.lm.engine.paged import PagedAttention, Segment
from puna.lm.engine.pool import KVPool
from puna.lm.quant import quantize_int8
from puna.model.config import LlamaConfig
from puna.model.llama import Llama

# Sizes that are no multiple of a vector.
CONFIG = LlamaConfig(
    vocab_size=61, dim=40, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=54, max_seq_len=256
)
LENGTHS, N_PADDING = (37, 1, 50), 8


def states_of(model: Llama, hidden) -> Tensor:
    """Run three requests packed in a row; return their tokens' states."""
    torch.manual_seed(1)
    pool = KVPool(CONFIG, model.norm.weight.dtype, "cpu", 1024)
    segments = [Segment(np.array(pool.take(4), np.int32), 0, n) for n in LENGTHS]
    plan = PagedAttention(pool, segments, N_PADDING)
    tokens_BT = torch.randint(0, CONFIG.vocab_size, (1, sum(LENGTHS) + N_PADDING))
    with torch.inference_mode():
        return hidden(tokens_BT, plan)[: sum(LENGTHS)].float()


def own(model: Llama) -> Tensor:
    return states_of(model, lambda ids, plan: model.hidden(ids, plan.positions_BT, plan=plan)[0])


def between(model: Llama, n_threads: int = 2) -> Tensor:
    return states_of(model, BetweenProducts(model, n_threads).hidden)


@pytest.mark.parametrize("quantised", [False, True])
def test_in_float32_it_is_the_models_own_forward(quantised: bool) -> None:
    model = Llama(CONFIG)
    if quantised:
        quantize_int8(model)
    torch.testing.assert_close(between(model), own(model), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_nearer_to_float32_than_the_models_own_forward() -> None:
    model = Llama(CONFIG).bfloat16()
    exact = own(Llama(CONFIG).bfloat16().float())
    ours, models = ((states - exact).norm() for states in (between(model), own(model)))
    assert ours < models < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    model = Llama(CONFIG, dtype=dtype)
    assert torch.equal(between(model, 1), between(model, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    model = Llama(CONFIG, dtype=dtype)
    with torch.no_grad():
        model.layers[1].get_submodule("ffn_norm").weight[3] = torch.nan
    assert between(model).isnan().all()
