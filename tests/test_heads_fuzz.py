"""tvd of heads, fuzzed against float64 with values up to the largest of each dtype.

A product of hidden states and weights in float32 carries an error that its length and the sizes of
its terms bound. From it follow bounds for the loss and the gradients, in float64, without a second
implementation to compare with. If the bound leaves the softmax undetermined (logits of 1e30, for
example), or a sum of the product may overflow, only the range is checked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.logits import DTYPES
from torch import Tensor

from fused_kd import Head, kd_loss

EPS = torch.finfo(torch.float32).eps
LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).smallest_normal
#: Below this exponent e^x is 0 in float32, also with an error of 1/8.
VANISHES = -110.0
SCALES = ("unit", "unit", "unit", "small", "large", "any", "some_at_most", "all_at_most", "zero")


class Drawn(NamedTuple):
    """One case; each side is a list of hidden states, weight, and bias or None."""

    student: list[Tensor | None]
    teacher: list[Tensor | None]
    temperature: float
    chunk_rows: int
    upstream: Tensor  # (N,) float64, exact in float32


class Side(NamedTuple):
    """The softmax of one side in float64, and bounds of what float32 makes of it."""

    probability: Tensor  # (N, V)
    error: Tensor  # (N, 1) relative, the largest of a probability that is not 0 in float32
    is_open: Tensor  # (N,) bool: the softmax is undetermined by the bound
    may_overflow: Tensor  # (N,) bool


def _values(draw: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, generator=draw)
    largest = torch.finfo(dtype).max
    scale = SCALES[int(torch.randint(len(SCALES), (), generator=draw))]
    if scale == "small":
        x = x * 1e-3
    elif scale == "large":
        x = x * 30
    elif scale == "any":
        x = x.sign() * 10 ** (76 * torch.rand(*shape, generator=draw) - 38)
    elif scale == "some_at_most":
        x = torch.where(torch.rand(*shape, generator=draw) < 0.05, x.sign() * largest, x)
    elif scale == "all_at_most":
        x = x.sign() * largest
    elif scale == "zero":
        x = x * 0
    return x.clamp(-largest, largest).to(dtype)


def _draw(seed: int) -> Drawn:
    draw = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    dtype, rows = DTYPES[number(3)], 1 + number(6)
    vocabulary = 1 + number(4000 if number(8) == 0 else 40)
    has_bias = number(2) == 0
    sides: list[list[Tensor | None]] = []
    for _ in range(2):
        hidden = 1 + number(200 if number(8) == 0 else 9)
        shapes = ((rows, hidden), (vocabulary, hidden), (vocabulary,))
        side: list[Tensor | None] = [_values(draw, shape, dtype) for shape in shapes]
        sides.append(side if has_bias else [*side[:2], None])
    if number(4) == 0:  # the same models: every difference is exactly 0
        sides[1] = [None if x is None else x.clone() for x in sides[0]]
    upstream = (2 * torch.rand(rows, generator=draw) - 0.5).double()
    return Drawn(sides[0], sides[1], (0.5, 1.0, 2.0, 5.0)[number(4)], 1 + number(6), upstream)


def _side(tensors: list[Tensor | None], temperature: float) -> Side:
    hidden, weight, bias = (None if x is None else x.double() for x in tensors)
    assert hidden is not None
    assert weight is not None
    z = F.linear(hidden, weight, bias)
    terms = hidden.abs() @ weight.abs().t() + (0 if bias is None else bias.abs())
    below = (z - z.amax(1, keepdim=True)) / temperature
    error = EPS * ((hidden.shape[1] + 2) * terms / temperature - below)
    error = error + error.gather(1, z.argmax(1, keepdim=True))  # the maximum has one too
    error = torch.where(below + error > VANISHES, error, 0.0).amax(1, keepdim=True)
    is_open = error[:, 0] > 1 / 8
    return Side(
        below.softmax(1), 4 * error + 8 * EPS, is_open, (terms > LARGEST * (1 - 1e-6)).any(1)
    )


def _within(got: Tensor, exact: Tensor, error: Tensor, may_overflow: Tensor) -> bool:
    """Return True if `got` is `exact` up to `error` and its dtype's rounding and underflow.

    Entries that are, or may become, too large for the dtype are not compared.
    """
    limits = torch.finfo(got.dtype)
    allowed = error + limits.eps * exact.abs() + limits.smallest_normal
    is_near = (got.double() - exact).abs() <= allowed
    beyond = exact.abs() + allowed >= limits.max * 0.999  # infinite, or at least at the end
    return bool((is_near | beyond | may_overflow).all())


def _check(case: Drawn, backend: str) -> int:
    """Assert loss and gradients of a case; return the number of rows compared by value."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in case.student]
    _, weight, bias = leaves
    losses = kd_loss(
        Head(*leaves),
        Head(*case.teacher),
        hard_weight=0.0,
        soft_weight=1.0,
        divergence="tvd",
        temperature=case.temperature,
        reduction="none",
        chunk_rows=case.chunk_rows,
        backend=backend,
    )
    inputs = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(losses, inputs, case.upstream.float())

    s, t = (_side(side, case.temperature) for side in (case.student, case.teacher))
    wild, t2 = s.may_overflow | t.may_overflow, case.temperature**2
    in_range = (losses >= 0) & (losses <= t2 * (1 + 1e-5))
    assert (in_range | (wild & losses.isnan())).all(), losses
    closed = ~(s.is_open | t.is_open)
    p, q = s.probability, t.probability
    value = 0.5 * t2 * (p - q).abs().sum(1)
    error = torch.where(closed, 0.5 * t2 * (s.error + t.error)[:, 0], t2)
    assert _within(losses.detach(), value, error + EPS * t2, wild), "loss"

    # the gradient by the logits, and what may move each entry of it
    sign = (p - q).sign()
    scale = case.temperature * case.upstream[:, None]
    by_logits = 0.5 * scale * p * (sign - (p * sign).sum(1, keepdim=True))
    undetermined = (p - q).abs() <= s.error * p + t.error * q + 8 * EPS * p.maximum(q)
    flipped = 2 * torch.where(undetermined, p, 0.0)
    moved = 0.5 * (flipped + p * flipped.sum(1, keepdim=True) + p * (6 * s.error + 16 * EPS))
    moved = scale.abs() * (torch.where(closed[:, None], moved, 1.0) + 8 * TINY) + 2 * TINY
    # by the products: their own rounding, one of the operand to 16 bits
    x, w = (tensor.detach().double() for tensor in inputs[:2])
    assert x is not None
    largest, rounding = by_logits.abs() + moved, (p.shape[1] + len(p)) * EPS
    rounding += 2**-8 if weight.dtype == torch.bfloat16 else 0.0
    wild_row, wild_any = wild[:, None], wild.any()
    bound = largest @ w.abs()
    error = moved @ w.abs() + rounding * bound
    assert _within(gradients[0], by_logits @ w, error, wild_row | (bound > LARGEST / 2)), "hidden"
    bound = largest.t() @ x.abs()
    error = moved.t() @ x.abs() + rounding * bound
    exact = by_logits.t() @ x
    assert _within(gradients[1], exact, error, wild_any | (bound > LARGEST / 2)), "weight"
    if bias is not None:
        error = moved.sum(0) + rounding * largest.sum(0)
        assert _within(gradients[2], by_logits.sum(0), error, wild_any), "bias"
    return int((closed & ~wild).sum())


@pytest.mark.parametrize("cases", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_tvd_of_any_heads(cases: int, backend: str) -> None:
    compared = rows = 0
    for seed in range(cases):
        case = _draw(seed)
        compared += _check(case, backend)
        rows += len(case.upstream)
    assert compared > rows / 3  # or the bounds prove nothing


def test_logits_beyond_float32_follow_the_rules_of_infinite_logits(backend: str) -> None:
    # Products of finite numbers: +inf is NaN in its row, -inf is a probability of 0 or absent.
    up, down = 2.0**100, -(2.0**100)
    hidden = torch.tensor([[1.0, 0.0], [up, 0.0], [down, 0.0], [0.0, down]], requires_grad=True)
    weight = torch.tensor([[0.5, 0.0], [up, up], [0.0, 0.25]], requires_grad=True)
    teacher_hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, down]])
    head = torch.tensor([[0.25, 0.0], [0.125, up], [0.0, 0.5]])
    options = {"hard_weight": 0.0, "soft_weight": 1.0, "divergence": "tvd", "backend": backend}
    sides = Head(hidden, weight), Head(teacher_hidden, head)
    loss = kd_loss(*sides, reduction="none", chunk_rows=2, **options)
    with torch.no_grad():
        logits, teacher = hidden @ weight.t(), teacher_hidden @ head.t()
    assert logits[:, 1].tolist() == [up, math.inf, -math.inf, -math.inf]
    assert teacher[3].tolist() == [0.0, -math.inf, 0.5 * down]
    q = teacher[0].softmax(0)
    torch.testing.assert_close(loss[0].detach(), 1 - q[1])
    assert loss[1].isnan()
    torch.testing.assert_close(loss[2].detach(), 1 - q[2])  # the last is far above the first
    assert loss[3] == 0  # absent on both sides; the third is far below on both
    by_hidden, by_weight = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    assert by_hidden.isnan().any(1).tolist() == [False, True, False, False]
    assert by_weight.isnan().all()  # a sum over the rows
    labels = torch.tensor([0, -100, 0, 0])
    got = kd_loss(*sides, labels, chunk_rows=2, **options)
    for gradient in (got.detach(), *torch.autograd.grad(got, (hidden, weight))):
        assert gradient.isfinite().all()  # an ignored row leaks nothing
