"""The C++ kernels on CPU tensors: float32, bfloat16, float16, every divergence.

Interface and shapes are those of every backend (see :mod:`fused_kd.backends`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kd import extension
from fused_kd.options import KDOptions

extension.load()  # registers the implementations, if it can
_ops = torch.ops.fused_kd


def why_not(device_type: str | None = None) -> str | None:
    """None if this backend can run (on that device), else the reason."""
    if device_type not in (None, "cpu"):
        return f"the cpu backend runs on CPU tensors, not on {device_type}"
    return extension.why_not()


def _numbers(options: KDOptions) -> tuple[int, float, float, float, float]:
    return (
        options.divergence_code,
        options.temperature,
        options.beta,
        options.soft_factor,
        options.label_smoothing,
    )


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    options: KDOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """hard (N,), soft (N,), stats: one visit of each row (two for jsd and tvd)."""
    rows = (student, teacher, labels, w_hard, w_soft)
    return _ops.forward.default(*rows, *_numbers(options))  # type: ignore[no-any-return]


def forward_backward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    options: KDOptions,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hard, soft, stats and the gradient, each row read once from memory."""
    rows = (student, teacher, labels, w_hard, w_soft)
    if not inplace:
        return _ops.forward_backward.default(*rows, *_numbers(options))  # type: ignore[no-any-return]
    return *_ops.forward_backward_.default(*rows, *_numbers(options)), student


def backward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    stats: Tensor,
    options: KDOptions,
    inplace: bool,
) -> Tensor:
    """The gradient (B, S, V) from the statistics of an earlier forward."""
    rows = (student, teacher, labels, w_hard, w_soft)
    if not inplace:
        return _ops.backward.default(*rows, stats, *_numbers(options))  # type: ignore[no-any-return]
    _ops.backward_.default(*rows, stats, *_numbers(options))
    return student


def rescale(
    grad: Tensor,
    scale: Tensor,
    student: Tensor | None,
    teacher: Tensor,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    stats: Tensor,
    options: KDOptions,
) -> None:
    """Multiplies a gradient of forward_backward by ``scale``, in its own memory.

    A power of two is exact, and float32 loses half a unit to arithmetic that lost more; a 16-bit
    gradient would be rounded a second time: it is made anew unless the student is gone (in place).
    """
    exact = student is None or grad.dtype == torch.float32
    if not exact and type(scale) is Tensor:  # a fake tensor has no value to look at
        exact = math.frexp(float(scale))[0] in (0.5, 0.0)
    if exact:
        _ops.scale_.default(grad, scale)
        return
    # a weight of 0 stays 0 whatever the scale is, also an infinite one
    w_hard, w_soft = (
        None if w is None else torch.where(w != 0, w * scale, 0.0) for w in (w_hard, w_soft)
    )
    rows = (student, teacher, labels, w_hard, w_soft)
    _ops.backward_into.default(*rows, stats, *_numbers(options), grad)
