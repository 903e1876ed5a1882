"""The error rule: compare with float64, relative to the errors of the eager baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergences import TABLE
from ..functional import KDLossParts, kd_loss
from ..options import KDOptions
from ..sides import TopK
from .baseline import eager_kd_loss
from .inputs import Inputs
from .views import columns_of, compared, present_entries, reach_of


def assert_no_worse(got: Tensor, truth: Tensor, eager: Tensor, floor: float) -> None:
    """Assert that the error of `got` is at most about that of the baseline.

    The largest error may be 2 times the baseline's, the root mean square 1.25 times, plus slack.

    Args:
        got: the values to test.
        truth: the float64 values, same shape. Entries of `got` must be NaN, inf or -inf exactly
            if those of `truth` are, after rounding to got's dtype.
        eager: the baseline's values, same shape. Entries that are not finite are replaced by the
            truth rounded to got's dtype.
        floor: absolute slack, in case the baseline happens to be exact.

    Raises:
        AssertionError: An error exceeds its bound (the message gives both); shapes, or the entries
            that are NaN or infinite, differ; or `truth` is not float64.
    """
    assert got.shape == truth.shape == eager.shape, (got.shape, truth.shape, eager.shape)
    assert truth.dtype == torch.float64, truth.dtype
    expected = truth.to(got.dtype)  # a value beyond the dtype's range becomes infinite
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
    """The losses of the rows, and a weighted sum's gradient by the student's logits."""

    rows: Tensor  # (N,)
    grad: Tensor  # (N, V)


def evaluate(
    loss: Callable[..., Tensor | KDLossParts], inputs: Inputs, upstream: Tensor, **keywords: Any
) -> Result:
    """Return the rows of a loss, and the gradient of Σ upstream·row by the student's logits.

    Args:
        loss: kd_loss, or a function with its arguments.
        inputs: logits and labels; not modified.
        upstream: (N,), the weights of the rows in that sum.
        keywords: of the loss, without reduction and return_parts. The loss's errors are raised.
    """
    student = inputs.student.detach().clone().requires_grad_()
    rows = loss(student, inputs.teacher, inputs.labels, reduction="none", **keywords)
    assert isinstance(rows, Tensor)
    rows.backward(upstream.to(rows.dtype))  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return Result(rows.detach(), student.grad)


def truth_and_eager(inputs: Inputs, upstream: Tensor, **keywords: Any) -> tuple[Result, Result]:
    """Return the results of the float64 reference and of the eager baseline on the same inputs.

    Arguments as in :func:`evaluate`; the keywords are those that both losses have, except
    token_weight and num_items. The baseline has no rule for absent entries (-inf on both sides): a
    row with such entries is computed without them, unless its label is one.
    """
    double = inputs._replace(student=inputs.student.double())
    if isinstance(inputs.teacher, Tensor):  # a TopK's checks depend on its dtype
        double = double._replace(teacher=inputs.teacher.double())
    truth = evaluate(kd_loss, double, upstream, backend="reference", **keywords)
    eager = evaluate(eager_kd_loss, inputs, upstream, **keywords)
    for row, mask in enumerate(present_entries(inputs)):
        if mask.all() or not mask[inputs.labels[row]]:
            continue
        part = columns_of(inputs, row, mask)
        alone = evaluate(eager_kd_loss, part, upstream[row : row + 1], **keywords)
        eager.rows[row], eager.grad[row] = alone.rows[0], 0.0
        eager.grad[row, mask] = alone.grad[0]
    return truth, eager


class Conditioning(NamedTuple):
    """The errors of each row that no float32 arithmetic avoids; see :func:`conditioning`."""

    loss: Tensor  # (N,) of the row's loss
    grad: Tensor  # (N,) of an entry, and of the norm, of the row's gradient
    undetermined: Tensor  # (N,) error of a gradient's entry due to undetermined signs of "tvd"
    undetermined_norm: Tensor  # (N,) the same error in norm
    clear: Tensor  # (N, V) bool: entries whose sign is determined


def conditioning(
    inputs: Inputs, truth: Result, upstream: Tensor, options: KDOptions
) -> Conditioning:
    """Return the units of every row: eps32·(1 + max|z - m|) for a loss, eps32·‖g‖ for a gradient.

    `truth` is the result of :func:`evaluate` in float64, for `upstream` and the loss's `options`.
    Here z are the row's logits over their temperature and m their maximum. For a TopK they are
    those of its classes. Each term's unit is weighted like the term. Added are errors that no
    float32 arithmetic avoids:

    * for a loss, eps32 of its value ("mse" may be any number);
    * for a gradient, eps32 of the largest probability, since it is a difference of probabilities;
    * for a gradient that contains log(p/q), also eps32 of p·log(p/q), since p·(log(p/q) - D) is a
      difference of such products.
    """
    eps, temperature = torch.finfo(torch.float32).eps, options.temperature
    s = inputs.student.double()  # (N, V)
    sides = compared(inputs, temperature)
    reach = torch.maximum(reach_of(s), sides.reach)
    hard, soft = options.hard_weight, options.soft_weight * options.soft_factor
    value = truth.rows.abs().nan_to_num(0.0, 0.0)
    loss = eps * (hard * (1 + reach) + soft * (1 + reach / temperature) + value)
    p, q = ((x / temperature).softmax(1) for x in (sides.student, sides.teacher))
    upstream = upstream.double().abs()
    scale = upstream * soft / temperature * p.amax(1)
    grad = eps * truth.grad.double().nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    grad = grad + eps * (scale + upstream * hard * s.softmax(1).amax(1))
    if TABLE[options.divergence].has_logarithm:
        grad = grad + eps * scale * reach / temperature
    clear, undetermined = torch.ones_like(p, dtype=torch.bool), torch.zeros_like(reach)
    if TABLE[options.divergence].has_sign:
        bound = 8 * eps * (1 + reach[:, None] / temperature)
        clear = (p - q).abs() > bound * p.maximum(q)
        undetermined = scale * torch.where(clear, 0.0, p).sum(1)
    undetermined_norm = undetermined * p.norm(dim=1) / p.amax(1)
    return Conditioning(loss, grad, undetermined, undetermined_norm, clear)


def assert_obeys_error_rule(
    inputs: Inputs, upstream: Tensor | None = None, *, backend: str, **keywords: Any
) -> None:
    """Assert that a backend's loss and gradient obey the error rule, row by row.

    The error against float64 is compared with the eager baseline's by :func:`assert_no_worse`, with
    a slack of four units (:func:`conditioning`). For float32 inputs, loss and gradient must be
    within these four units of the truth regardless of the baseline. The gradient is compared entry
    by entry, in norm, and again at the label, whose entry is a small difference of probabilities.

    Args:
        inputs: logits (or a TopK) and labels on the CPU.
        upstream: (N,), the weights of the rows in the differentiated sum; None: ones.
        backend: the name of the backend to test.
        keywords: as in :func:`truth_and_eager`.

    Raises:
        AssertionError: An error exceeds its bound; the message gives both.
        RuntimeError: The backend cannot run.
    """
    upstream = torch.ones(len(inputs.labels)) if upstream is None else upstream
    got = evaluate(kd_loss, inputs, upstream, backend=backend, **keywords)
    truth, eager = truth_and_eager(inputs, upstream, **keywords)
    unit = conditioning(inputs, truth, upstream, KDOptions(**keywords))
    tiny = _smallest_step(got.grad.dtype)
    teacher = inputs.teacher
    single = inputs.student.dtype == torch.float32 and (
        isinstance(teacher, TopK) or teacher.dtype == torch.float32
    )
    for row, clear in enumerate(unit.clear):
        floor = 4 * unit.loss[row].item()
        this = slice(row, row + 1)
        assert_no_worse(got.rows[this], truth.rows[this], eager.rows[this], floor)
        if single:
            assert_no_worse(got.rows[this], truth.rows[this], truth.rows[this], floor)
        floor = 4 * unit.grad[row].item() + unit.undetermined[row].item() + tiny
        ours, exact, theirs = (x.grad[row][clear] for x in (got, truth, eager))
        assert_no_worse(ours, exact, theirs, floor)
        if single:
            assert_no_worse(ours, exact, exact, floor)
        label = clear & (torch.arange(len(clear)) == inputs.labels[row])
        ours, exact, theirs = (x.grad[row] for x in (got, truth, eager))
        _assert_no_worse_at_label(ours[label], exact[label], theirs[label], floor)
        floor += unit.undetermined_norm[row].item() + tiny * math.sqrt(len(clear))
        _assert_no_worse_in_norm(ours[clear], exact[clear], theirs[clear], floor)


def _assert_no_worse_at_label(got: Tensor, truth: Tensor, eager: Tensor, floor: float) -> None:
    """Assert that an error at the label is at most `floor` above its bound.

    That is 4 times the baseline's error or 2 steps of the dtype, the larger.
    """
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
    """Assert that the error's norm is at most `floor` above its bound.

    That is 1.25 times the baseline's norm or twice its worst entry, the larger.
    """
    expected = truth.to(got.dtype)
    keep = expected.isfinite()
    if not keep.any():
        return
    best = torch.where(eager.isfinite(), eager.double(), expected.double())
    error, allowed = ((x.double() - truth)[keep] for x in (got, best))
    bound = max(1.25 * allowed.norm().item(), 2 * allowed.abs().max().item()) + floor
    assert error.norm() <= bound, f"error in norm {error.norm():.3e} > {bound:.3e}"


def _smallest_step(dtype: torch.dtype) -> float:
    """Return the largest rounding error near zero.

    Subnormal results may be flushed to 0; in float16 it is half of the smallest subnormal.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps / 2 if dtype == torch.float16 else 1.0)
