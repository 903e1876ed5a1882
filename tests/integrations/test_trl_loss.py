"""Compare generalized_jsd_loss with TRL's: numbers, views, memory, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from needs import need
from support.losses import refused
from torch import Tensor
from trl_training import BETAS, V

need("trl")
from trl.experimental.gkd import GKDTrainer  # noqa: E402

from fused_kd.integrations.trl import generalized_jsd_loss  # noqa: E402
from fused_kd.testing import cpu_peak  # noqa: E402


def logits(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(batch, length, V, requires_grad=True)
    labels = torch.randint(V - 2, (batch, length - 1))
    labels[0, :4] = -100
    labels[1] = -100
    return student, torch.randn(batch, length, V), labels


def check(student: Tensor, *views: Tensor, **options: Any) -> None:
    """Compare values and gradients by `student` of both losses, on views of logits."""
    results = []
    for loss in (generalized_jsd_loss, GKDTrainer.generalized_jsd_loss):
        value = loss(*views, **options)
        results.append((value, *torch.autograd.grad(value, student, retain_graph=True)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_same_numbers(beta: float, temperature: float) -> None:
    student, teacher, targets = logits()
    denominators = [("batchmean", None), ("mean", None), ("sum", None), ("sum", 5)]
    denominators += [("batchmean", torch.tensor(7))]
    slices = itertools.cycle((slice(0, -1), slice(1, None)))
    cases = zip(denominators, slices, strict=False)
    for ((reduction, items), part), labels in itertools.product(cases, (targets, None)):
        options = {"labels": labels, "beta": beta, "temperature": temperature}
        options |= {"reduction": reduction, "num_items_in_batch": items}
        check(student, student[:, part], teacher[:, part], **options)


def test_no_token_counts() -> None:
    student, teacher, labels = logits()
    for reduction in ("batchmean", "mean", "sum"):  # TRL's "mean" is NaN
        nothing = {"labels": torch.full_like(labels, -100), "reduction": reduction}
        loss = generalized_jsd_loss(student[:, :-1], teacher[:, :-1], **nothing)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].count_nonzero()


def test_views_that_are_no_slices() -> None:
    student, teacher, labels = logits()
    two = torch.cat([student, student])
    for s, t in (
        (student[:, :-1], teacher[:, 1:]),  # slices that differ
        (student[:, :-1], teacher[:, :-1].clone()),
        (two[:3, :-1], teacher[:, :-1]),
        (student.transpose(0, 1)[:-1].transpose(0, 1), teacher[:, :-1]),
        (student[:, ::2][:, :3].repeat(1, 2, 1), teacher[:, :-1]),
        (student[:, :-1, 1:-1], teacher[:, :-1, 2:]),
    ):
        check(student, s, t, labels=labels, beta=0.3)
    detached = student.detach()[:, :-1].requires_grad_()
    value = generalized_jsd_loss(detached, teacher[:, :-1], labels)
    assert torch.autograd.grad(value, detached)[0].count_nonzero()


@pytest.mark.parametrize(("inplace", "gradients"), [(False, 1), (True, 0)])
def test_a_slice_has_no_gradient_of_its_own(inplace: bool, gradients: int) -> None:
    shape = (2, 65, 4096)
    student = torch.randn(shape, requires_grad=True) * 1.0
    teacher, labels = torch.randn(shape), torch.randint(4096, (2, 64))

    def loss_and_gradient() -> object:
        loss = generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels, inplace=inplace)
        return torch.autograd.grad(loss, student)

    assert cpu_peak(loss_and_gradient).highest < (gradients + 0.1) * student.nbytes


def test_refusals() -> None:
    student, teacher, labels = logits()
    sides = student[:, :-1], teacher[:, :-1], labels
    message = r"reduction must be one of.*got 'none'"
    refused(ValueError, message, generalized_jsd_loss, *sides, reduction="none")
    message = r"^num_items_in_batch must be positive .*; got -1"
    refused(ValueError, message, generalized_jsd_loss, *sides, num_items_in_batch=-1)
