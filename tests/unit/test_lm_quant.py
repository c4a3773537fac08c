"""int8 weights: how exact, tied once, in bounded memory, like the plain model."""

import copy

import pytest
import torch

from puna.lm import quant
from puna.lm.cpu.decoder import is_supported
from puna.lm.quant import Int8Embedding, Int8Linear, quantize_int8, quantize_rows
from puna.model.config import LlamaConfig
from puna.model.llama import Llama


def config(**changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=60, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64,
        **changes,
    )  # fmt: skip


def dequantised(model: Llama) -> Llama:
    """The plain model whose weights are the rounded ones."""
    plain = Llama(model.config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            weight = module.weight
            if isinstance(module, (Int8Linear, Int8Embedding)):
                weight = weight.float() * module.scales.unsqueeze(1)
            parameter.copy_(weight)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_within_half_a_step(dtype):
    weight = (torch.randn(20, 33) * torch.logspace(-6, 6, 20).unsqueeze(1)).to(dtype)
    weight[3] = 0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert scales[3] == 0
    assert values.abs().amax(dim=1)[scales > 0].eq(127).all()
    error = (values.double() * scales.double().unsqueeze(1) - weight.double()).abs()
    assert (error <= 0.5001 * scales.double().unsqueeze(1)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_show(value):
    weight = torch.randn(3, 8)
    weight[1, 2] = value
    values, scales = quantize_rows(weight)
    found = (values.float() * scales.unsqueeze(1)).isfinite().all(dim=1)
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_rounded_weights(tied):
    model = Llama(config(tie_embeddings=tied))
    before = model(torch.arange(24).view(2, 12))
    quantize_int8(model)
    with torch.inference_mode():
        got = model(torch.arange(24).view(2, 12))
        want = dequantised(model)(torch.arange(24).view(2, 12))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert 0 < (got - before).abs().max() < 0.1


def test_every_matrix_is_stored_in_a_byte_per_value_and_a_tied_one_once():
    model = Llama(config(tie_embeddings=True))
    n_values = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    quantize_int8(model)
    assert [name for name, p in model.named_parameters() if p.ndim == 2] == []
    stored = [b for b in model.buffers() if b.dtype == torch.int8]
    assert sum(b.numel() for b in stored) == n_values
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_quantising_again_changes_nothing():
    model = Llama(config())
    quantize_int8(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_int8(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_large_matrices_are_widened_in_parts(monkeypatch):
    model = Llama(config())
    quantize_int8(model)
    ids = torch.arange(10).view(1, 10)
    with torch.inference_mode():
        whole = model(ids)
        widened = []
        linear = torch.nn.functional.linear
        monkeypatch.setattr(quant, "_WIDENED_VALUES", 700)
        monkeypatch.setattr(
            quant.F, "linear", lambda x, w: (widened.append(w.numel()), linear(x, w))[1]
        )
        parts = model(ids)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert max(widened) <= 700
    assert len(widened) > 100


def test_a_bfloat16_model_computes_in_bfloat16():
    model = Llama(config(), dtype=torch.bfloat16)
    quantize_int8(model)
    assert model.tok_embeddings(torch.tensor([1])).dtype == torch.bfloat16
    assert model.hidden(torch.arange(5).view(1, 5)).dtype == torch.bfloat16


def test_scales_that_were_rounded_are_not_read_as_float32():
    model = Llama(config())
    quantize_int8(model)
    assert is_supported(copy.deepcopy(model))
    assert not is_supported(model.bfloat16())
