"""What we write around collectives has the gradients of one process, for permuted layouts too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from puna.model.attention import MaskPlan, document_mask, plan_attention
from puna.tokens.loader import NO_LABEL
from puna.train.loss import cross_entropy_sum
from puna.train.parallel.context import ContextPlan, ContextShare
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

B, T, N, K, D = 2, 32, 4, 2, 16


def permuted(x: Tensor) -> Tensor:
    """Same values, dimensions 1 and 2 swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inputs(heads: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(B, T, heads, D, generator=generator)


def documents() -> Tensor:
    doc_ids_BT = torch.zeros(B, T, dtype=torch.int32)
    doc_ids_BT[0, 5:], doc_ids_BT[0, 19:] = 1, 2
    doc_ids_BT[1, 16:], doc_ids_BT[1, 24:] = 3, 0  # an id may come again
    return doc_ids_BT


def context_gradients(has_documents: bool, is_permuted: bool) -> list[Tensor]:
    """Output and gradients of this rank's tokens."""
    share = ContextShare(dist.get_rank(), dist.get_world_size())
    plan = ContextPlan(
        share, dist.group.WORLD, T, torch.device("cpu"), documents() if has_documents else None
    )
    own = [share.take(inputs(heads, i)) for i, heads in enumerate((N, K, K))]
    own = [(permuted(x) if is_permuted else x).requires_grad_() for x in own]
    out = plan(*own)
    weight = share.take(inputs(N, 3))
    (out * (permuted(weight) if is_permuted else weight)).sum().backward()
    return [out.detach(), *(x.grad for x in own)]


@pytest.mark.parametrize("is_permuted", [False, True])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_attention_over_a_shared_row(n_ranks, has_documents, is_permuted):
    whole = [inputs(heads, i).requires_grad_() for i, heads in enumerate((N, K, K))]
    doc_ids = documents() if has_documents else None
    plan = plan_attention(T, torch.device("cpu"), doc_ids)
    if doc_ids is not None:
        plan = MaskPlan(document_mask(doc_ids))
    out = plan(*whole)
    (out * inputs(N, 3)).sum().backward()
    expected = [out.detach(), *(x.grad for x in whole)]
    results = run_ranks(n_ranks, context_gradients, has_documents, is_permuted)
    for rank, parts in enumerate(results):
        share = ContextShare(rank, n_ranks)
        for part, full in zip(parts, expected, strict=True):
            torch.testing.assert_close(part, share.take(full), rtol=1e-5, atol=1e-5)


def context_by_blocks(has_documents: bool) -> Tensor:
    """Output of this rank's tokens by flex attention, which has no gradient on a CPU."""
    share = ContextShare(dist.get_rank(), dist.get_world_size())
    plan = ContextPlan(
        share, dist.group.WORLD, T, torch.device("cpu"), documents() if has_documents else None,
        kind="blocks",
    )  # fmt: skip
    with torch.no_grad():
        return plan(*(share.take(inputs(heads, i)) for i, heads in enumerate((N, K, K))))


@pytest.mark.parametrize("has_documents", [False, True])
def test_blocks_over_a_shared_row_are_the_same(has_documents):
    doc_ids = documents() if has_documents else torch.zeros(B, T, dtype=torch.int32)
    expected = MaskPlan(document_mask(doc_ids))(*(inputs(n, i) for i, n in enumerate((N, K, K))))
    for rank, part in enumerate(run_ranks(2, context_by_blocks, has_documents)):
        torch.testing.assert_close(part, ContextShare(rank, 2).take(expected), rtol=1e-5, atol=1e-5)


def test_the_tokens_of_a_row_are_shared_out_evenly():
    """Every token once; every rank sees as many keys."""
    at_T = torch.arange(24)[None]
    for size in (1, 2, 3, 4):
        taken = [ContextShare(index, size).take(at_T)[0] for index in range(size)]
        assert sorted(torch.cat(taken).tolist()) == list(range(24))
        assert len({int(tokens.sum()) for tokens in taken}) == 1
        laid = torch.cat(taken).chunk(2 * size)
        if size > 1:
            order = ContextShare(0, size).order()
            assert torch.cat([laid[place] for place in order]).tolist() == list(range(24))


def head_and_states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight_VD = torch.randn(11, D, generator=generator)
    hidden_BTD = torch.randn(B, T, D, generator=generator)
    labels_BT = torch.randint(0, 11, (B, T), generator=generator)
    labels_BT[0, 3:9] = NO_LABEL
    return weight_VD, hidden_BTD, labels_BT


def shared_loss(z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the states (summed over ranks), gradient of this rank's rows."""
    weight_VD, hidden_BTD, labels_BT = head_and_states()
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    own = weight_VD.chunk(n_ranks)[rank].clone().requires_grad_()
    first = rank * -(-len(weight_VD) // n_ranks)
    hidden_BTD.requires_grad_()
    loss = cross_entropy_sum(
        hidden_BTD, own, labels_BT, chunk_tokens=7, group=dist.group.WORLD, first_id=first,
        z_loss=z_loss,
    )  # fmt: skip
    (3 * loss).backward()
    dist.all_reduce(hidden_BTD.grad)
    return loss.detach(), hidden_BTD.grad, own.grad


@pytest.mark.parametrize(("n_ranks", "z_loss"), [(2, 0.0), (3, 0.0), (3, 0.1)])
def test_loss_over_a_shared_vocabulary(n_ranks, z_loss):
    weight_VD, hidden_BTD, labels_BT = head_and_states()
    weight_VD.requires_grad_(), hidden_BTD.requires_grad_()
    logits = hidden_BTD @ weight_VD.T
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels_BT.flatten(), reduction="sum", ignore_index=NO_LABEL
    )
    expected = expected + z_loss * logits.logsumexp(-1)[labels_BT != NO_LABEL].square().sum()
    (3 * expected).backward()
    results = run_ranks(n_ranks, shared_loss, z_loss)
    for loss, grad_BTD, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad_BTD, hidden_BTD.grad, rtol=1e-5, atol=1e-5)
    rows = torch.cat([grad for _, _, grad in results])
    torch.testing.assert_close(rows, weight_VD.grad, rtol=1e-5, atol=1e-5)
