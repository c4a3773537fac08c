"""Properties of the model layer over random shapes, documents and probabilities."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.accounting import account
from puna.model.attention import document_lengths, document_mask, plan_attention
from puna.model.config import (
    LinearScaling,
    LlamaConfig,
    ModelConfig,
    RopeScaling,
    meta_ffn_dim,
)
from puna.model.formats.hf_config import config_from_hf, config_to_hf
from puna.model.names import parameter_shapes
from puna.model.rope import inverse_frequencies

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other


@st.composite
def configs(draw):
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    scaling = st.builds(
        RopeScaling,
        factor=st.floats(1, 64),
        low_freq_factor=st.floats(0.5, 2),
        high_freq_factor=st.floats(3, 8),
        original_max_seq_len=st.integers(1, 8192),
    )
    linear = st.builds(LinearScaling, factor=st.floats(1, 64))
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 90)),
        dim=n_heads * 2 * draw(st.integers(1, 8)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=draw(st.integers(1, 70)),
        max_seq_len=draw(st.integers(1, 131072)),
        rope_theta=draw(st.sampled_from([1e4, 1e5, 5e5])),
        rope_scaling=draw(st.none() | scaling | linear),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tie_embeddings=draw(st.booleans()),
    )


@given(configs())
@settings(max_examples=60, deadline=None)
def test_a_config_survives_json_hugging_face_and_a_recipe(config):
    assert LlamaConfig.model_validate_json(config.model_dump_json()) == config
    assert config_from_hf(config_to_hf(config)) == config
    assert ModelConfig(**config.model_dump()).resolve() == config


@given(configs())
@settings(max_examples=40, deadline=None)
def test_accounting_equals_the_module(config):
    sizes = [torch.Size(shape).numel() for shape in parameter_shapes(config).values()]
    assert account(config).n_params == sum(sizes)


@given(st.integers(1, 20_000), st.sampled_from([1, 32, 256, 1024, 4096]), st.floats(0.5, 2))
def test_the_ffn_rule_rounds_up_by_less_than_one_multiple(dim, multiple_of, multiplier):
    wanted = int(multiplier * int(8 * dim / 3))
    got = meta_ffn_dim(dim, multiple_of, multiplier)
    assert got % multiple_of == 0
    assert wanted <= got < wanted + multiple_of


# Uncompiled it is slow, which it says; here it is only compared.
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
documents = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@uncompiled
@given(st.lists(documents, min_size=1, max_size=3), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_plans_for_packed_documents_agree(rows, seed):
    width = max(sum(row) for row in rows)
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]
    ids = [[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in rows]
    doc_ids_BT = torch.tensor(ids, dtype=torch.int32)
    assert document_lengths(doc_ids_BT) == tuple(itertools.chain.from_iterable(rows))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(rows), width, n, 8, generator=generator) for n in (4, 2, 2))
    outputs = [
        plan_attention(width, q.device, doc_ids_BT, kind)(q, k, v)
        for kind in ("mask", "pieces", "blocks")
    ]
    scores = torch.einsum("btnd,bsnd->bnts", q, k.repeat_interleave(2, 2)) / 8**0.5
    weights = scores.masked_fill(~document_mask(doc_ids_BT), float("-inf")).softmax(-1)
    expected = torch.einsum("bnts,bsnd->btnd", weights, v.repeat_interleave(2, 2))
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@uncompiled
@given(st.integers(1, 1300), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_causal_plans_agree_at_any_length(n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n_tokens, n, 4, generator=generator) for n in (2, 1, 1))
    kinds = ("causal", "mask", "pieces", "blocks", "auto")
    outputs = [plan_attention(n_tokens, q.device, None, kind)(q, k, v) for kind in kinds]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


@given(configs())
def test_scaling_only_slows_rotations_and_keeps_their_order(config):
    plain = inverse_frequencies(config.model_copy(update={"rope_scaling": None}))
    scaled = inverse_frequencies(config)
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    assert torch.all(scaled <= plain * (1 + 1e-6))
    assert torch.all(scaled >= plain / factor * (1 - 1e-6))
    assert torch.all(scaled.diff() <= 0)
