"""The chunked cross entropy against PyTorch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puna.tokens.loader import NO_LABEL
from puna.train.loss import cross_entropy_sum

B, T, D, V = 3, 17, 8, 50


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=dtype) * 3
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :5] = NO_LABEL
    labels[2] = NO_LABEL
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden, weight, labels):
    logits = (hidden.double() @ weight.double().T).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LABEL, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
def test_equals_the_plain_loss_and_its_gradients(chunk):
    ours, theirs = inputs(), inputs()
    loss = cross_entropy_sum(*ours, chunk_tokens=chunk)
    expected = plain(*theirs)
    (loss / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("z_loss", [1e-4, 0.1])
def test_the_z_loss_and_its_gradients_are_those_of_plain_autograd(chunk, z_loss):
    ours, theirs = inputs(), inputs()
    loss = cross_entropy_sum(*ours, chunk_tokens=chunk, z_loss=z_loss)
    hidden, weight, labels = theirs
    log_z = (hidden.double() @ weight.double().T).logsumexp(-1)[labels != NO_LABEL]
    expected = plain(*theirs) + z_loss * log_z.square().sum()
    (loss / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_positions_without_a_label_have_no_gradient():
    hidden, weight, labels = inputs()
    cross_entropy_sum(hidden, weight, labels).backward()
    assert hidden.grad is not None
    assert not hidden.grad[labels == NO_LABEL].any()
    assert hidden.grad[labels != NO_LABEL].any(dim=-1).all()


def test_very_large_logits_do_not_overflow():
    hidden, weight, labels = inputs()
    loss = cross_entropy_sum(hidden * 1e4, weight * 1e2, labels)
    assert torch.isfinite(loss)


def test_bf16_products_stay_near_fp32():
    hidden, weight, labels = inputs()
    exact = cross_entropy_sum(hidden, weight, labels)
    rough = cross_entropy_sum(hidden, weight, labels, dtype=torch.bfloat16)
    rough.backward()
    # bf16 has 8 bits of mantissa: 0.4 % per operand.
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_batch_without_labels_is_zero():
    hidden, weight, labels = inputs()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, NO_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_gradients_are_computed_when_none_are_wanted():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, weight, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(hidden, weight, labels).item(), rel=1e-6)


def test_going_back_twice_scales_once():
    """As schedules do that compute the gradients of inputs and of weights apart."""
    hidden_BTD = torch.randn(2, 5, 8, requires_grad=True)
    weight_VD = torch.randn(11, 8, requires_grad=True)
    labels_BT = torch.randint(0, 11, (2, 5))
    loss = cross_entropy_sum(hidden_BTD, weight_VD, labels_BT) / 7
    (inputs,) = torch.autograd.grad(loss, [hidden_BTD], retain_graph=True)
    again, weights = torch.autograd.grad(loss, [hidden_BTD, weight_VD])
    assert torch.equal(inputs, again)
    plain = F.cross_entropy(
        (hidden_BTD @ weight_VD.T).flatten(0, 1), labels_BT.flatten(), reduction="sum"
    )
    torch.testing.assert_close(weights, torch.autograd.grad(plain / 7, [weight_VD])[0])
