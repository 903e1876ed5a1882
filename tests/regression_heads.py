"""Regression cases of heads: chunks, biases, row weights, vocabularies that differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from head_helpers import Heads, Outcome, eager, make_heads, ours
from regression_helpers import close, grad, raises
from regression_registry import case
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.testing import eager_kd_loss


def exact(heads: Heads, upstream: Tensor | None = None, **keywords: Any) -> Outcome:
    """Return what torch composes in float64, and its gradients by autograd."""
    double = (x.detach().double() if x.is_floating_point() else x for x in heads)
    wide = Heads(*(x.requires_grad_(i < 3) for i, x in enumerate(double)))  # the student's
    return eager(wide, upstream, **keywords)


def same(got: Outcome, want: Outcome) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6)


@case("N-16", "torchtune#1865: chunked, then averaged over the chunks instead of the tokens")
def a_skewed_mask_in_chunks_of_any_height(backend: str) -> None:
    for first, last in ((2, 5), (0, 1), (3, 11)):  # all kept tokens lie together
        heads = make_heads(rows=11)
        labels = torch.full((11,), -100)
        labels[first:last] = heads.labels[first:last]
        heads = heads._replace(labels=labels)
        weight = torch.rand(11) + 0.1
        for options in ({}, {"token_weight": weight}, {"num_items": torch.tensor(7)}):
            want = exact(heads, temperature=2.0, **options)
            for height in range(1, 12):
                got = ours(heads, temperature=2.0, chunk_rows=height, backend=backend, **options)
                same(got, want)


@case("N-15", "verl#7200: normalised by micro-batch, also from hidden states")
def micro_batches_from_hidden_states(backend: str) -> None:
    heads = make_heads(rows=12)
    heads.labels[[0, 1, 2, 5, 6, 7, 8]] = -100  # 0, 2, 0 and 3 of each three
    want = exact(heads)
    weight = torch.zeros_like(heads.weight)
    total = torch.zeros(())
    for begin in range(0, 12, 3):
        rows = slice(begin, begin + 3)
        part = heads._replace(
            hidden=heads.hidden.detach()[rows].requires_grad_(),
            teacher_hidden=heads.teacher_hidden[rows],
            labels=heads.labels[rows],
        )
        got = ours(part, num_items=5, chunk_rows=2, backend=backend)
        total, weight = total + got.loss, weight + got.weight
        torch.testing.assert_close(got.hidden.double(), want.hidden[rows], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(total.double(), want.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.double(), want.weight, rtol=2e-5, atol=2e-6)


@case("CCE-52", "CCE#52, #53: the bias is added several times for the true class")
def a_bias_on_the_label_alone(backend: str) -> None:
    heads = make_heads(rows=5)
    labels = torch.full((5,), 7)
    labels[3] = 130  # in another block of the vocabulary, without a bias
    bias = torch.zeros(131)
    bias[7] = 9.0
    heads = heads._replace(labels=labels, bias=bias.requires_grad_())
    want = exact(heads, label_smoothing=0.1)
    for height in range(1, 6):
        same(ours(heads, chunk_rows=height, label_smoothing=0.1, backend=backend), want)


@case("R-23", "Liger#1298: a weight gradient cannot be mended after the sum over chunks")
def rows_have_their_own_weight_in_the_weight_gradient(backend: str) -> None:
    heads = make_heads(rows=9)
    heads.labels[0] = -100
    weight = torch.rand(9)
    weight[4] = 0.0
    upstream = torch.randn(9)
    want = exact(heads, upstream, token_weight=weight, reduction="none")
    assert want.weight.norm() > 0.1
    for height in (1, 2, 4, 9):
        options: dict[str, Any] = {"chunk_rows": height, "backend": backend}
        got = ours(heads, upstream, token_weight=weight, reduction="none", **options)
        same(got, want)
        assert torch.count_nonzero(got.hidden[[0, 4]]) == 0


@case("swift-align-vocab", "ms-swift _align_vocab: the larger side's logits fill the smaller one's")
def vocabularies_are_not_aligned_silently(backend: str) -> None:
    heads = make_heads(rows=6)
    padded = torch.cat([heads.teacher_weight, torch.randn(5, heads.teacher_weight.shape[1])])
    before = padded.clone()
    own, given = Head(heads.hidden, heads.weight), Head(heads.teacher_hidden, padded)
    options: dict[str, Any] = {"backend": backend}
    raises(
        ValueError,
        "V = 131 for the student and V = 136 for the teacher",
        lambda: kd_loss(own, given, heads.labels, **options),
    )
    student, teacher = (F.linear(side.hidden, side.weight) for side in (own, given))
    raises(
        ValueError,
        "V = 131 for the student and V = 136 for the teacher",
        lambda: kd_loss(student, teacher, heads.labels, **options),
    )
    # what the messages advise: a teacher without its padding, whose mass is renormalised
    want = eager_kd_loss(student, teacher[:, :131], heads.labels)
    shorter = given._replace(weight=padded[:131])
    sliced = kd_loss(own, shorter, heads.labels, **options)
    assert isinstance(sliced, Tensor)
    close(sliced, want)
    close(grad(sliced, heads.weight), grad(want, heads.weight))
    assert torch.equal(padded, before)
