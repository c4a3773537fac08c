"""Optimisers on one rank: Muon against PyTorch's and against the SVD, groups and their rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.train.muon import Muon, orthogonalise, step_scale
from puna.train.optim import make_optimizer, set_lr, state_tensors
from puna.train.optim_config import AdamWConfig, MuonConfig

MODEL = LlamaConfig(
    vocab_size=37, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=32
)


def trained(config, n_steps=3, lr=1e-2):
    """A model after some steps with gradients that a seed gives."""
    model = Llama(MODEL)
    optimizer = make_optimizer(config, model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_lr(optimizer, lr)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(("n_rows", "n_columns"), [(24, 16), (16, 24), (16, 16), (1, 8)])
def test_singular_values_become_about_one_and_the_vectors_stay(n_rows, n_columns):
    x = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x, 5, torch.float32)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ y @ vh.T
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 1e-4
    assert inner.diagonal().min() > 0.3
    assert inner.diagonal().max() < 1.3


@pytest.mark.parametrize(("scale", "theirs"), [("adam", "match_rms_adamw"), ("spectral", None)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon_and_adamw(scale, theirs, nesterov):
    config = MuonConfig(
        lr=1e-2, lr_adamw=1e-3, scale=scale, nesterov=nesterov, iterate_in="bf16", eps=1e-6
    )
    ours, optimizer = trained(config)
    assert isinstance(optimizer, Muon)
    model = Llama(MODEL)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    ends = [model.tok_embeddings.weight, model.output_weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    references = [
        torch.optim.Muon(matrices, lr=1e-2, nesterov=nesterov, adjust_lr_fn=theirs),
        torch.optim.AdamW(ends, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
        torch.optim.AdamW(norms, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for reference in references:
            reference.step()
    for (name, mine), other in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-7, msg=name)


def test_the_step_of_muon_is_as_large_as_adamws():
    """Moonlight's scale: the root mean square of a step is that of AdamW's, about 0.2 to 0.4."""
    update = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    step = orthogonalise(update, 5, torch.float32) * step_scale("adam", 512, 128)
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_matrices_are_decayed_and_norms_are_not():
    for config in (AdamWConfig(), MuonConfig(), AdamWConfig(decay_embedding=False)):
        model = Llama(MODEL)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(config, model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_lr(optimizer, 0.1)
        optimizer.step()
        for name, parameter in model.named_parameters():
            is_kept = parameter.ndim < 2 or (
                name == "tok_embeddings.weight" and not config.decay_embedding
            )
            expected = before[name] * (1.0 if is_kept else 1 - 0.1 * 0.1)
            torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_a_checkpoint_holds_the_momentum_of_matrices_and_both_means_of_all_else():
    model, optimizer = trained(MuonConfig())
    keys = set(state_tensors(model, optimizer))
    assert "optim.layers.1.feed_forward.w2.weight.momentum" in keys
    assert "optim.layers.1.feed_forward.w2.weight.exp_avg" not in keys
    for name in ("tok_embeddings.weight", "output.weight", "layers.0.ffn_norm.weight"):
        assert f"optim.{name}.exp_avg_sq" in keys


def test_the_groups_share_the_schedule_in_the_proportion_of_their_peaks():
    _, optimizer = trained(MuonConfig(lr=0.02, lr_adamw=1e-3), n_steps=0)
    set_lr(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 5e-4, 5e-4])


def test_a_model_without_layers_has_no_muon():
    optimizer = make_optimizer(MuonConfig(), nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW)
