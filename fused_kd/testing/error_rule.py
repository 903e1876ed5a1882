"""The error rule: float64 truth, an eager baseline, and slack in stated units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import KDLossParts, kd_loss
from ..options import KDOptions
from .baseline import eager_kd_loss
from .inputs import Inputs


def assert_no_worse(got: Tensor, truth: Tensor, eager: Tensor, floor: float) -> None:
    """The error of `got` is at most the baseline's plus slack; not-finite entries agree.

    Args:
        got: what is tested.
        truth: float64, same shape.
        eager: the baseline's; where it is not finite, the truth rounded to got's dtype stands in.
        floor: absolute slack, for places where the baseline happens to be exact.

    Raises:
        AssertionError: names what differs.
    """
    assert got.shape == truth.shape == eager.shape, (got.shape, truth.shape, eager.shape)
    assert truth.dtype == torch.float64, truth.dtype
    expected = truth.to(got.dtype)  # what is beyond its numbers is infinite
    for name in ("isnan", "isposinf", "isneginf"):
        assert torch.equal(getattr(got, name)(), getattr(expected, name)()), f"{name} differs"
    keep = expected.isfinite()
    if not keep.any():
        return
    best = torch.where(eager.isfinite(), eager.double(), expected.double())
    error, allowed = ((x.double() - truth)[keep].abs() for x in (got, best))
    worst, bound = error.max().item(), 2.0 * allowed.max().item() + floor
    assert worst <= bound, f"worst error {worst:.3e} > {bound:.3e} (2x eager + {floor:.1e})"
    spread = error.square().mean().sqrt().item()
    bound = 1.25 * allowed.square().mean().sqrt().item() + floor
    assert spread <= bound, f"rms error {spread:.3e} > {bound:.3e} (1.25x eager + {floor:.1e})"


class Result(NamedTuple):
    """Losses of the rows and the gradient of their weighted sum."""

    rows: Tensor  # (N,)
    grad: Tensor  # (N, V)


def evaluate(
    loss: Callable[..., Tensor | KDLossParts], inputs: Inputs, upstream: Tensor, **keywords: Any
) -> Result:
    """Rows of `loss` (called with reduction="none") and the gradient of Σ upstream·row."""
    student = inputs.student.detach().clone().requires_grad_()
    rows = loss(student, inputs.teacher, inputs.labels, reduction="none", **keywords)
    assert isinstance(rows, Tensor)
    rows.backward(upstream.to(rows.dtype))  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return Result(rows.detach(), student.grad)


def truth_and_eager(inputs: Inputs, upstream: Tensor, **keywords: Any) -> tuple[Result, Result]:
    """The float64 reference and the eager baseline on the same inputs.

    The baseline does not know absent entries: it is given each row without them.
    """
    double = Inputs(inputs.student.double(), inputs.teacher.double(), inputs.labels)
    truth = evaluate(kd_loss, double, upstream, backend="reference", **keywords)
    eager = evaluate(eager_kd_loss, inputs, upstream, **keywords)
    present = (inputs.student != -math.inf) | (inputs.teacher != -math.inf)
    for row, here in enumerate(present):
        if here.all() or not here[inputs.labels[row]]:
            continue
        label = here[: int(inputs.labels[row])].sum()[None]
        part = Inputs(inputs.student[row, here][None], inputs.teacher[row, here][None], label)
        alone = evaluate(eager_kd_loss, part, upstream[row : row + 1], **keywords)
        eager.rows[row], eager.grad[row] = alone.rows[0], 0.0
        eager.grad[row, here] = alone.grad[0]
    return truth, eager


class Conditioning(NamedTuple):
    """What float32 arithmetic may cost a row, however it is done, in the units of DESIGN."""

    loss: Tensor  # (N,) one unit of the row's loss
    grad: Tensor  # (N,) one unit of the row's gradient
    lottery: Tensor  # (N,) what undecidable signs of "tvd" may move an entry of the gradient by
    lottery_norm: Tensor  # (N,) what they may move the row's gradient by, in norm
    clear: Tensor  # (N, V) bool: entries whose sign is not such a lottery


def conditioning(
    inputs: Inputs, truth: Result, upstream: Tensor, options: KDOptions
) -> Conditioning:
    """Units of every row: eps32·(1 + max|z - m|) for a loss, eps32·‖g‖ for a gradient.

    Each term's unit is weighted as the term is. To them is added what no float32 arithmetic avoids:
    for a loss, eps32 of its value ("mse" may be any number); for a gradient, eps32 of
    the largest probability, since it is a difference of probabilities, and for those that contain
    log(p/q), eps32 of p·log(p/q), since p·(log(p/q) - D) is a difference of such.
    """
    eps, temperature = torch.finfo(torch.float32).eps, options.temperature
    s, t = inputs.student.double(), inputs.teacher.double()  # (N, V)
    below = torch.cat([x.amax(1, keepdim=True) - x for x in (s, t)], 1)
    reach = torch.where(below.isfinite(), below, 0.0).amax(1)
    hard, soft = options.hard_weight, options.soft_weight * options.soft_factor
    value = truth.rows.abs().nan_to_num(0.0, 0.0)
    loss = eps * (hard * (1 + reach) + soft * (1 + reach / temperature) + value)
    p, q = (s / temperature).softmax(1), (t / temperature).softmax(1)
    upstream = upstream.double().abs()
    scale = upstream * soft / temperature * p.amax(1)
    grad = eps * truth.grad.double().nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    grad = grad + eps * (scale + upstream * hard * s.softmax(1).amax(1))
    if options.divergence in ("reverse_kl", "jsd"):
        grad = grad + eps * scale * reach / temperature
    clear, lottery = torch.ones_like(p, dtype=torch.bool), torch.zeros_like(reach)
    if options.divergence == "tvd":
        bound = 8 * eps * (1 + reach[:, None] / temperature)
        clear = (p - q).abs() > bound * p.maximum(q)
        lottery = scale * torch.where(clear, 0.0, p).sum(1)
    lottery_norm = lottery * p.norm(dim=1) / p.amax(1)
    return Conditioning(loss, grad, lottery, lottery_norm, clear)


def assert_obeys_error_rule(
    inputs: Inputs, upstream: Tensor | None = None, *, backend: str, **keywords: Any
) -> None:
    """A backend against float64 truth and the eager baseline, loss and gradient, row by row.

    The slack is four units (:func:`conditioning`). For float32 inputs, loss and gradient must be
    within them of the truth whatever the baseline does. The gradient is compared entry by entry, in
    norm, and once more at the label, where a small difference of probabilities is at stake.
    """
    upstream = torch.ones(len(inputs.labels)) if upstream is None else upstream
    got = evaluate(kd_loss, inputs, upstream, backend=backend, **keywords)
    truth, eager = truth_and_eager(inputs, upstream, **keywords)
    unit = conditioning(inputs, truth, upstream, KDOptions(**keywords))
    tiny = _smallest_step(got.grad.dtype)
    single = inputs.student.dtype == inputs.teacher.dtype == torch.float32
    for row, clear in enumerate(unit.clear):
        floor = 4 * unit.loss[row].item()
        one = slice(row, row + 1)
        assert_no_worse(got.rows[one], truth.rows[one], eager.rows[one], floor)
        if single:
            assert_no_worse(got.rows[one], truth.rows[one], truth.rows[one], floor)
        floor = 4 * unit.grad[row].item() + unit.lottery[row].item() + tiny
        ours, exact, theirs = (x.grad[row][clear] for x in (got, truth, eager))
        assert_no_worse(ours, exact, theirs, floor)
        if single:
            assert_no_worse(ours, exact, exact, floor)
        label = clear & (torch.arange(len(clear)) == inputs.labels[row])
        ours, exact, theirs = (x.grad[row] for x in (got, truth, eager))
        _assert_no_worse_at_label(ours[label], exact[label], theirs[label], floor)
        floor += unit.lottery_norm[row].item() + tiny * math.sqrt(len(clear))
        _assert_no_worse_in_norm(ours[clear], exact[clear], theirs[clear], floor)


def _assert_no_worse_at_label(got: Tensor, truth: Tensor, eager: Tensor, floor: float) -> None:
    """At most four times the baseline's error there, or two steps of the dtype."""
    for g, x, e in zip(got.double(), truth, eager.double(), strict=True):
        if not x.to(got.dtype).isfinite():
            continue
        allowed = 2 * torch.finfo(got.dtype).eps * abs(x)
        if e.isfinite():
            allowed = max(allowed, 4 * abs(e - x))
        assert abs(g - x) <= allowed + floor, (
            f"error at the label {abs(g - x):.3e} > {allowed + floor:.3e} for a gradient of {x:.3e}"
        )


def _assert_no_worse_in_norm(got: Tensor, truth: Tensor, eager: Tensor, floor: float) -> None:
    """The norm of the error: 1.25 times the baseline's (or twice its worst entry) plus slack."""
    expected = truth.to(got.dtype)
    keep = expected.isfinite()
    if not keep.any():
        return
    best = torch.where(eager.isfinite(), eager.double(), expected.double())
    error, allowed = ((x.double() - truth)[keep] for x in (got, best))
    bound = max(1.25 * allowed.norm().item(), 2 * allowed.abs().max().item()) + floor
    assert error.norm() <= bound, f"error in norm {error.norm():.3e} > {bound:.3e}"


def _smallest_step(dtype: torch.dtype) -> float:
    """What rounding near zero may cost: a flushed subnormal; in float16, half of the smallest."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps / 2 if dtype == torch.float16 else 1.0)
