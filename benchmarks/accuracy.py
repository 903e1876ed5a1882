"""How far a method is from the float64 reference of what it computes."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.options import KDOptions
from fused_kd.testing import DTYPES, Result, conditioning, make_inputs, truth_and_eager

from .cases import Case
from .methods import Loss, Method
from .problems import Problem, loss_and_gradients


def errors(problem: Problem, method: Method, loss: Loss) -> dict[str, float | None]:
    """Return relative errors on a few rows: of the loss, and of the worst gradient in norm.

    Infinity: no number. None: not compared (it has no gradient, or its loss another constant).
    """
    student, teacher, labels = problem.few()
    double = student.to(torch.float64), teacher.to(torch.float64), labels
    reference = partial(kd_loss, backend="reference", **method.computes(problem.case))
    results = loss_and_gradients(loss, student, teacher, labels)
    exact = loss_and_gradients(reference, *double)
    value, *gradients = map(_distance, results, exact)
    parts = {"loss": value, "gradients": max(gradients, default=None)}
    return {part: error if part in method.compared else None for part, error in parts.items()}


def _distance(result: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to that of the exact value unless that is 0."""
    size = exact.norm()
    error = (result.double() - exact).norm() / torch.where(size > 0, size, 1.0)
    return float(error.nan_to_num(math.inf, math.inf))


def units(case: Case, key: str) -> dict[str, float]:
    """Return the worst errors of "kdloss" or "eager" (others: none) in units of the error rule.

    Over the rows whose exact loss and gradient are finite, with upstream gradients that are not 1.
    The units are those of ``fused_kd.testing.conditioning``, per row:

    * loss: eps32·(1 + max|z-m|) of each term, weighted as the term is, plus eps32 of the loss;
    * gradients, in norm: ‖g-g*‖ over eps32·‖g*‖, or for 16-bit logits over half a unit in the last
      place, (eps16/2)·‖g*‖, plus what float32 arithmetic costs the row at least;
    * element: the largest |g_v-g*_v| over the same with |g*_v| in the 16-bit term: 1 is what
      rounding to the dtype alone may cost.

    Entries of "tvd" whose sign is undetermined are left out; their effect on the others is added
    to the slack.
    """
    if case.device != "cpu" or key not in ("kdloss", "eager"):
        return {}
    inputs = make_inputs(case.regime, case.n, case.v, DTYPES[case.dtype])
    upstream = torch.linspace(0.6, 1.7, case.n)
    truth, result = truth_and_eager(inputs, upstream, **case.keywords)
    if key == "kdloss":  # the gradient of Σ upstream·row, as training takes it
        student = inputs.student.clone().requires_grad_()
        keywords = {"token_weight": upstream, "reduction": "sum", **case.keywords}
        kd_loss(student, inputs.teacher, inputs.labels, **keywords).backward()
        result = Result(kd_loss(*inputs, reduction="none", **case.keywords), student.grad)
    unit = conditioning(inputs, truth, upstream, KDOptions(**case.keywords))
    info = torch.finfo(result.grad.dtype)
    rounding = 0.0 if result.grad.dtype == torch.float32 else info.eps / 2
    exact = torch.where(unit.clear, truth.grad, 0.0)  # (N, V)
    error = torch.where(unit.clear, result.grad.double() - truth.grad, 0.0).abs()
    # undetermined signs, and the fixed step of subnormals of float16, are per entry: in norm they
    # count root-V times
    per_entry = unit.undetermined + info.smallest_normal * (info.eps / 2)  # (N,)
    in_norm = unit.grad + per_entry * case.v**0.5
    parts = {
        "loss": (result.rows.double() - truth.rows).abs() / unit.loss,
        "gradients": error.norm(dim=1) / (rounding * exact.norm(dim=1) + in_norm),
        "element": (error / (rounding * exact.abs() + (unit.grad + per_entry)[:, None])).amax(1),
    }
    finite = truth.rows.isfinite() & truth.grad.isfinite().all(1)
    return {part: float(rows[finite].max()) for part, rows in parts.items() if finite.any()}
