"""Schemas and fakes of the registered operators; the compiled module only implements them.

Calling ``torch.ops.fused_kd.*`` directly is not differentiable: :mod:`fused_kd.autograd` is what
differentiates. Shapes: student, teacher ``(B, S, V)`` with last stride 1 and N = B*S rows; labels,
w_hard, w_soft ``(N,)`` (None: that term is off; a weight of 0: off for that row); stats
``(N, STATS)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Floats per row that a forward leaves for its backward (csrc/cpu/rows.h).
STATS = 11

_ROWS = "Tensor teacher, Tensor? labels, Tensor? w_hard, Tensor? w_soft"
_NUMBERS = "int divergence, float temperature, float beta, float soft_factor, float label_smoothing"

_library = torch.library.Library("fused_kd", "DEF")
_library.define(f"forward(Tensor student, {_ROWS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"forward_backward(Tensor student, {_ROWS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"forward_backward_(Tensor(a!) student, {_ROWS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
)
_library.define(f"backward(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}) -> Tensor")
_library.define(f"backward_(Tensor(a!) student, {_ROWS}, Tensor stats, {_NUMBERS}) -> ()")
_library.define(
    f"backward_into(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}, Tensor(a!) grad) -> ()"
)
_library.define("scale_(Tensor(a!) grad, Tensor factor) -> ()")


def _check(student: Tensor, teacher: Tensor, *rest: object) -> None:
    # a call with a single meta tensor is answered here, wherever the others are
    devices = {str(x.device) for x in (student, teacher, *rest) if isinstance(x, Tensor)}
    torch._check(
        len(devices) == 1,
        lambda: f"all tensors must be on one device; got {' and '.join(sorted(devices))}",
    )
    torch._check(student.dim() == 3, lambda: f"student must be (B, S, V); got {student.dim()}-D")
    torch._check(teacher.dim() == 3, lambda: f"teacher must be (B, S, V); got {teacher.dim()}-D")


def _row_outputs(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = student.shape[0] * student.shape[1]
    hard = student.new_empty((n,), dtype=torch.float32)
    soft = student.new_empty((n,), dtype=torch.float32)
    return hard, soft, student.new_empty((n, STATS), dtype=torch.float32)


@torch.library.register_fake("fused_kd::forward")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return _row_outputs(student)


@torch.library.register_fake("fused_kd::forward_backward")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return *_row_outputs(student), student.new_empty(student.shape)


@torch.library.register_fake("fused_kd::forward_backward_")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return _row_outputs(student)


@torch.library.register_fake("fused_kd::backward")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return student.new_empty(student.shape)


@torch.library.register_fake("fused_kd::backward_")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)


@torch.library.register_fake("fused_kd::backward_into")
def _(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    torch._check(rest[-1].shape == student.shape, lambda: "grad must have the student's shape")


@torch.library.register_fake("fused_kd::scale_")
def _(grad, factor):  # type: ignore[no-untyped-def]
    torch._check(factor.numel() == 1, lambda: "factor must be one number")
