"""Crafted models for tests and demonstrations: each has one fault that is known exactly."""

from __future__ import annotations

import torch

from puna.model.config import LlamaConfig
from puna.model.llama import Llama

OVERFLOW_LAYER = 2
OVERFLOW_GATE = 255.889
"""silu(w1 x) of the crafted overflow; transformers issue 27179 prints it as 255.9."""
OVERFLOW_UP = 261.75
"""w3 x of the crafted overflow; the product is 66,979, float16 ends at 65,504."""
HUGE_WEIGHT = 70_000.0
_MASSIVE = 4096.0
"""Residual stream of channel 0: real Llamas have such channels, too."""


def small_config(vocab_size: int = 512) -> LlamaConfig:
    """Return the shape of the crafted models."""
    return LlamaConfig(
        vocab_size=vocab_size, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64,
        max_seq_len=128, rope_theta=10_000.0,
    )  # fmt: skip


@torch.no_grad()
def overflowing_llama(vocab_size: int = 512) -> Llama:
    """Return a float32 model whose weights fit float16, and whose activations do not.

    It overflows the way transformers issue 27179 describes: in one layer silu(w1 x) = 255.9 meets
    w3 x = 261.75, so the input of w2 is 66,979. In float32 and bfloat16 the model is sound (w2
    damps that channel); in float16 the product is infinite and every logit becomes NaN a layer
    later.

    How: channel 0 of the residual stream holds one large number that no layer writes to, so the
    normalised channel 0 is sqrt(dim) for every token, and one row of w1 and of w3 multiplies it.
    The norms amplify the other channels by as much as the large number shrinks them.

    Args:
        vocab_size: Rows of the embedding.
    """
    config = small_config(vocab_size)
    model = Llama(config)
    unit = config.dim**0.5
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(_MASSIVE / unit)
            weight[0] = 0.0
        elif name.endswith(("wo.weight", "w2.weight")):
            weight[0] = 0.0  # nothing writes to channel 0
    model.tok_embeddings.weight[:, 0] = _MASSIVE
    layer = f"layers.{OVERFLOW_LAYER}"
    model.get_parameter(f"{layer}.ffn_norm.weight")[0] = 1.0
    for matrix, value in (("w1", OVERFLOW_GATE), ("w3", OVERFLOW_UP)):
        weight = model.get_parameter(f"{layer}.feed_forward.{matrix}.weight")
        weight[:, 0] = 0.0
        weight[0] = 0.0
        weight[0, 0] = value / unit
    model.get_parameter(f"{layer}.feed_forward.w2.weight")[:, 0] *= 1e-4
    return model


@torch.no_grad()
def huge_weight_llama(vocab_size: int = 512) -> Llama:
    """Return a float32 model with a single weight beyond float16 and ordinary activations.

    The weight, ``layers.1.attention.wv.weight[3, 5]`` = 70,000, multiplies a channel that the norm
    before it sets to zero: only a look at the weights finds it. In float16 it is infinite, and
    infinity times zero is NaN.

    Args:
        vocab_size: Rows of the embedding.
    """
    model = Llama(small_config(vocab_size))
    model.get_parameter("layers.1.attention_norm.weight")[5] = 0.0
    model.get_parameter("layers.1.attention.wv.weight")[3, 5] = HUGE_WEIGHT
    return model
