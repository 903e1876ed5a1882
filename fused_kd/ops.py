"""Schemas and fakes of the registered operators; backends only implement them.

Calling ``torch.ops.fused_kd.*`` directly is not differentiable: :mod:`fused_kd.autograd` is what
differentiates. Shapes: student, teacher ``(B, S, V)`` with last stride 1 and N = B*S rows; labels,
w_hard, w_soft ``(N,)`` (None: that term is off; a weight of 0: off for that row); stats
``(N, STATS)``.

Every operator exists once for the compiled kernels (CPU and CUDA) and once, with the prefix
``triton_``, for the Triton ones: two implementations cannot share the CUDA dispatch key.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Floats per row that a forward leaves for its backward (csrc/problem.h).
STATS = 11
#: Of the operators' names: the compiled kernels and the Triton ones.
PREFIXES = ("", "triton_")

_ROWS = "Tensor teacher, Tensor? labels, Tensor? w_hard, Tensor? w_soft"
# temperature: 0-d CPU float64; scale_t2: the divergence times T²
_NUMBERS = "int divergence, Tensor temperature, float beta, bool scale_t2, float label_smoothing"
_LOSSES = "Tensor, Tensor, Tensor"
_SCHEMAS = (
    # hard, soft, stats
    f"forward(Tensor student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES})",
    # and the gradient
    f"forward_backward(Tensor student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES}, Tensor)",
    # the gradient in other memory, of the student's dtype, or 16-bit for a float32 student
    f"forward_backward_into(Tensor student, {_ROWS}, {_NUMBERS}, Tensor(a!) grad) -> ({_LOSSES})",
    # the gradient over the student's memory
    f"forward_backward_(Tensor(a!) student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES})",
    f"backward(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}) -> Tensor",
    f"backward_(Tensor(a!) student, {_ROWS}, Tensor stats, {_NUMBERS}) -> ()",
    # grad, made with these weights, becomes scale * grad, rounded once
    f"rescale_(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}, Tensor scale, Tensor(a!) grad)"
    " -> ()",
    # the same where the student's logits are gone
    "scale_(Tensor(a!) grad, Tensor factor) -> ()",
)

# out (M, N) float32 = a (M, K) · b (K, N) + bias (N,), or += without one, in float32 sums: the same
# bits for a row for any M and number of threads. Each of a and b has its own dtype, and stride
# 1 in one dimension. The values of b, with round_a those of a too, are first rounded to round_to
# (float32: no rounding); a processor that multiplies pairs of bfloat16 then always rounds a's.
_PRODUCT = (
    "product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, ScalarType round_to, bool round_a, "
    "bool accumulate) -> ()"
)

library = torch.library.Library("fused_kd", "DEF")
for _prefix in PREFIXES:
    for _schema in _SCHEMAS:
        library.define(_prefix + _schema)
library.define(_PRODUCT)


def _check(student: Tensor, teacher: Tensor, *rest: object) -> None:
    # a call with a single meta tensor comes here, on whichever device the other tensors are;
    # the temperature, which alone is float64, is on the CPU
    tensors = [x for x in (student, teacher, *rest) if isinstance(x, Tensor)]
    devices = {str(x.device) for x in tensors if x.dtype != torch.float64}
    torch._check(
        all(x.device.type == "cpu" for x in tensors if x.dtype == torch.float64),
        lambda: "temperature must be on the CPU",
    )
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


def _fake_forward(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return _row_outputs(student)


def _fake_forward_backward(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return *_row_outputs(student), student.new_empty(student.shape)


def _fake_forward_backward_into(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    grad = rest[-1]
    torch._check(grad.shape == student.shape, lambda: "grad must have the student's shape")
    torch._check(
        grad.dtype == student.dtype or student.dtype == torch.float32,
        lambda: "grad must have the student's dtype, or 16 bits for a float32 student",
    )
    return _row_outputs(student)


def _fake_backward(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return student.new_empty(student.shape)


def _fake_backward_(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)


def _fake_rescale_(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    torch._check(rest[-1].shape == student.shape, lambda: "grad must have the student's shape")


def _fake_scale_(grad, factor):  # type: ignore[no-untyped-def]
    torch._check(factor.numel() == 1, lambda: "factor must be one number")


_FAKES = {
    "forward": _fake_forward,
    "forward_backward": _fake_forward_backward,
    "forward_backward_": _fake_forward,
    "forward_backward_into": _fake_forward_backward_into,
    "backward": _fake_backward,
    "backward_": _fake_backward_,
    "rescale_": _fake_rescale_,
    "scale_": _fake_scale_,
}
for _prefix in PREFIXES:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"fused_kd::{_prefix}{_name}", _fake)


@torch.library.register_fake("fused_kd::product_")
def _fake_product_(out, a, b, bias, *rest):  # type: ignore[no-untyped-def]
    torch._check(a.dim() == b.dim() == out.dim() == 2, lambda: "out, a and b must be matrices")
    torch._check(a.shape[1] == b.shape[0], lambda: "a has not as many columns as b rows")
    torch._check(out.shape[0] == a.shape[0], lambda: "out has not as many rows as a")
    torch._check(out.shape[1] == b.shape[1], lambda: "out has not as many columns as b")
