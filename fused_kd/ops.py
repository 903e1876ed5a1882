"""Schemas and fakes of the registered operators; the backends implement them.

Calling ``torch.ops.fused_kd.*`` directly is not differentiable; :mod:`fused_kd.autograd` makes the
loss so. Shapes: student, teacher ``(B, S, V)`` with last stride 1 and N = B*S rows; labels, w_hard,
w_soft ``(N,)`` (None: the term is off; a weight of 0: off in that row). With token_ids ``(N, K)``,
int32, the teacher ``(B, S, K+1)``, float32, are the logits of :class:`fused_kd.classes.Classes`.
Results: the unweighted losses hard and soft ``(N,)``, and stats ``(N, STATS)`` for a backward.

Every operator exists once for the compiled kernels (CPU and CUDA) and once, with the prefix
``triton_``, for the Triton ones: two implementations cannot share the CUDA dispatch key.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Number of floats per row that a forward stores for its backward (csrc/kd_math.h).
STATS = 11
#: Columns of `measure`: hard, soft (with the factor T²), those of :class:`fused_kd.measures.Sums`.
MEASURES = 11
#: Prefixes of the operators' names: for the compiled kernels, for the Triton kernels.
PREFIXES = ("", "triton_")

_ROWS = "Tensor teacher, Tensor? token_ids, Tensor? labels, Tensor? w_hard, Tensor? w_soft"
# temperature: 0-d CPU float64; scale_t2: the divergence times T²
_NUMBERS = "int divergence, Tensor temperature, float beta, bool scale_t2, float label_smoothing"
_LOSSES = "Tensor, Tensor, Tensor"
_SCHEMAS = (
    # hard, soft, stats
    f"forward(Tensor student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES})",
    # hard, soft, stats, the gradient
    f"forward_backward(Tensor student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES}, Tensor)",
    # the gradient into `grad`, of the student's dtype, or 16-bit for a float32 student
    f"forward_backward_into(Tensor student, {_ROWS}, {_NUMBERS}, Tensor(a!) grad) -> ({_LOSSES})",
    # the gradient over the student's logits
    f"forward_backward_(Tensor(a!) student, {_ROWS}, {_NUMBERS}) -> ({_LOSSES})",
    f"backward(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}) -> Tensor",
    f"backward_(Tensor(a!) student, {_ROWS}, Tensor stats, {_NUMBERS}) -> ()",
    # overwrites grad, a gradient for these weights, by scale * grad, rounded once
    f"rescale_(Tensor student, {_ROWS}, Tensor stats, {_NUMBERS}, Tensor scale, Tensor(a!) grad)"
    " -> ()",
    # the same by multiplication, without the student's logits
    "scale_(Tensor(a!) grad, Tensor factor) -> ()",
    # (N, MEASURES) and the largest entries' indices (N, 2), of student and teacher, int64; without
    # meaning for rows of weight (N,) 0
    "measure(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor temperature)"
    " -> (Tensor, Tensor)",
    # for a teacher of which token_ids (N, K) is the support: (N, 3) hard, and the logits of all
    # other tokens together at T and at 1, relative to the row's largest; and its index (N,)
    "measure_support(Tensor student, Tensor token_ids, Tensor labels, Tensor weight, "
    "Tensor temperature) -> (Tensor, Tensor)",
)

# out (M, N) float32 = a (M, K) · b (K, N) + bias (N,), or out += a · b if accumulate; float32 sums.
# A row of out has the same bits for any M and number of threads. a and b may differ in dtype; each
# has stride 1 in one dimension. The values of b, and of a if round_a, are first rounded to round_to
# (float32: no rounding); a processor that multiplies pairs of bfloat16 then rounds a in any case.
_PRODUCT = (
    "product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, ScalarType round_to, bool round_a, "
    "bool accumulate) -> ()"
)

# The classes of a TopK (N, K): float32 logits (N, K+1), int32 out_ids (N, K), on the CPU. Returns
# False, and the outputs are of no use, if a value must be refused, see fused_kd/checks/topk.py.
# tail: of all rows, without a tail_logprob (N,). slack: probabilities may add up to 1 + slack.
_CLASSES = (
    "classes_(Tensor(a!) logits, Tensor(b!) out_ids, Tensor token_ids, Tensor logprobs, "
    "Tensor? tail_logprob, float tail, int vocabulary, float temperature, float slack) -> bool"
)

library = torch.library.Library("fused_kd", "DEF")
for _prefix in PREFIXES:
    for _schema in _SCHEMAS:
        library.define(_prefix + _schema)
library.define(_PRODUCT)
library.define(_CLASSES)


def _check(student: Tensor, teacher: Tensor, *rest: object) -> None:
    # a fake runs if any tensor is on the meta device, so the devices are compared here; the
    # temperature, the only float64 tensor, is on the CPU
    tensors = [x for x in (student, teacher, *rest) if isinstance(x, Tensor)]
    devices = {str(x.device) for x in tensors if x.dtype != torch.float64}
    doubles = {x.device.type for x in tensors if x.dtype == torch.float64}
    torch._check(
        doubles <= {"cpu"},
        lambda: f"temperature must be on the CPU; got float64 on {' and '.join(sorted(doubles))}",
    )
    torch._check(
        len(devices) == 1,
        lambda: f"all tensors must be on one device; got {' and '.join(sorted(devices))}",
    )
    torch._check(student.dim() == 3, lambda: f"student must be (B, S, V); got {student.dim()}-D")
    torch._check(teacher.dim() == 3, lambda: f"teacher must be (B, S, V); got {teacher.dim()}-D")


def _check_shape(grad: Tensor, student: Tensor) -> None:
    torch._check(
        grad.shape == student.shape,
        lambda: (
            f"grad must have the student's shape, {tuple(student.shape)}; got {tuple(grad.shape)}"
        ),
    )


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
    _check_shape(grad, student)
    torch._check(
        grad.dtype == student.dtype or student.dtype == torch.float32,
        lambda: (
            "grad must have the student's dtype, or 16 bits for a float32 student; got "
            f"{grad.dtype} for {student.dtype}"
        ),
    )
    return _row_outputs(student)


def _fake_backward(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    return student.new_empty(student.shape)


def _fake_backward_(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)


def _fake_rescale_(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    _check_shape(rest[-1], student)


def _fake_scale_(grad, factor):  # type: ignore[no-untyped-def]
    torch._check(
        factor.numel() == 1, lambda: f"factor must have one entry; got shape {tuple(factor.shape)}"
    )


def _fake_measure(student, teacher, *rest):  # type: ignore[no-untyped-def]
    _check(student, teacher, *rest)
    n = student.shape[0] * student.shape[1]
    sums = student.new_empty((n, MEASURES), dtype=torch.float32)
    return sums, student.new_empty((n, 2), dtype=torch.int64)


def _fake_measure_support(student, token_ids, *rest):  # type: ignore[no-untyped-def]
    _check(student, student, token_ids, *rest)
    n = student.shape[0] * student.shape[1]
    sums = student.new_empty((n, 3), dtype=torch.float32)
    return sums, student.new_empty((n,), dtype=torch.int64)


_FAKES = {
    "forward": _fake_forward,
    "forward_backward": _fake_forward_backward,
    "forward_backward_": _fake_forward,
    "forward_backward_into": _fake_forward_backward_into,
    "backward": _fake_backward,
    "backward_": _fake_backward_,
    "rescale_": _fake_rescale_,
    "scale_": _fake_scale_,
    "measure": _fake_measure,
    "measure_support": _fake_measure_support,
}
for _prefix in PREFIXES:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"fused_kd::{_prefix}{_name}", _fake)


@torch.library.register_fake("fused_kd::product_")
def _fake_product_(out, a, b, bias, *rest):  # type: ignore[no-untyped-def]
    def message() -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, a, b))
        return f"out (M, N), a (M, K) and b (K, N) must be matrices that fit; got {shapes}"

    torch._check(a.dim() == b.dim() == out.dim() == 2, message)
    torch._check(a.shape[1] == b.shape[0], message)
    torch._check(out.shape[0] == a.shape[0], message)
    torch._check(out.shape[1] == b.shape[1], message)
