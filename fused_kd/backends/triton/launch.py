"""The operators ``triton_*`` and the launches of their kernels.

The kernels are in :mod:`.kernels`, which is imported with triton on first use.

With ``FUSED_KD_AUTOTUNE=1`` the first call of a kind (V, dtypes, divergence, device) times a few
configurations on some of its rows, and the process keeps the fastest. It is not the default,
because the bits of the results may then differ from one process to the next.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import ops

from .configuration import (
    LONGEST,
    MAX_PARTS,
    Configuration,
    Kind,
    candidates,
    configuration,
    registers,
)
from .device import can_wait, capability, kind, load_kernels, multiprocessors, why_not

#: Parts of rows whose sums are stored while programs wait for each other: 256 KiB, ten times the
#: number that an H100 runs at once.
RING_PARTS = 4096

#: Limit of the memory in which programs mark the support of a top-k teacher. A bfloat16 row of
#: 128256 takes 16 KiB, so that 4096 programs of a quarter each have their marks at once.
MARKED_BYTES = 2**24
#: Programs per multiprocessor of a launch whose work depends on a number on the device.
PROGRAMS = 4
#: Entries that a program of `_kd_scale_kernel` scales at a time.
SCALE_BLOCK = 4096


# ------------------------------------------------------------------------------------- launches


class _Numbers(NamedTuple):
    """The scalar options of an operator, as the kernels take them."""

    divergence: int
    temperature: float
    beta: float
    soft_factor: float  # c(T)
    label_smoothing: float


#: Number of arguments of an operator that these are.
_NUMBERS = 5


def _numbers_of(
    divergence: int, temperature: Tensor, beta: float, scale_t2: bool, label_smoothing: float
) -> _Numbers:
    """Return the scalar options of an operator's schema as the kernels take them."""
    t = temperature.item()
    return _Numbers(divergence, t, beta, t * t if scale_t2 else 1.0, label_smoothing)


@dataclass(frozen=True)
class _Call:
    """The arguments of an operator."""

    student: Tensor  # (B, S, V)
    teacher: Tensor  # (B, S, V), or (B, S, K+1) with token_ids
    token_ids: Tensor | None  # (N, K)
    labels: Tensor | None  # (N,)
    w_hard: Tensor | None  # (N,)
    w_soft: Tensor | None  # (N,)
    numbers: _Numbers

    @property
    def rows(self) -> int:
        return self.student.shape[0] * self.student.shape[1]

    @property
    def code(self) -> int:
        """Return the code of the divergence, or NONE if there is no soft term."""
        return load_kernels().NONE if self.w_soft is None else self.numbers.divergence

    @property
    def rule(self) -> Any:
        """Return the rule of the passes over a row."""
        loaded = load_kernels()
        return loaded.rule_of(self.code if self.token_ids is None else loaded.TAIL)

    @property
    def rows_read(self) -> list[Tensor]:
        """Return the logits (B, S, V) that the passes over a row read: of one side or both."""
        return [self.student, self.teacher] if self.token_ids is None else [self.student]

    @property
    def has_hard(self) -> bool:
        return self.w_hard is not None

    @property
    def smoothing(self) -> bool:
        return self.has_hard and self.numbers.label_smoothing > 0

    def first_rows(self, count: int) -> _Call:
        """Return the same call for at most `count` rows of the first batch."""
        token_ids, labels, w_hard, w_soft = (
            None if x is None else x[: min(count, self.student.shape[1])]
            for x in (self.token_ids, self.labels, self.w_hard, self.w_soft)
        )
        student, teacher = self.student[:1, :count], self.teacher[:1, :count]
        return _Call(student, teacher, token_ids, labels, w_hard, w_soft, self.numbers)


def _configuration(call: _Call) -> Configuration:
    student, teacher = call.student, None if call.token_ids is not None else call.teacher.dtype
    default = configuration(student.shape[2], student.dtype, teacher, kind(student.device))
    if os.environ.get("FUSED_KD_AUTOTUNE") != "1" or student.device.type == "cpu":
        return default
    key = (default, student.shape[2], student.dtype, teacher, call.code, student.device)
    if key not in _tuned:
        _tuned[key] = _fastest(call.first_rows(1024), default)
    return _tuned[key]


_tuned: dict[tuple[object, ...], Configuration] = {}


def _fastest(call: _Call, default: Configuration) -> Configuration:
    """Return the candidate configuration with the fastest forward_backward on this call."""
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

    gradient = torch.empty_like(call.student, memory_format=torch.contiguous_format)
    hard = gradient.new_empty((call.rows,), dtype=torch.float32)
    losses = (hard, torch.empty_like(hard), hard.new_empty((call.rows, ops.STATS)))

    def milliseconds(chosen: Configuration) -> float:
        steps = _steps(call, chosen)
        run = lambda: _launch(call, chosen, gradient, losses, steps)  # noqa: E731
        return float(triton.testing.do_bench(run, rep=20))

    times = {chosen: milliseconds(chosen) for chosen in candidates(default)}
    return min(times, key=times.__getitem__)


def _steps(call: _Call, chosen: Configuration) -> tuple[str, ...]:
    """Return the steps that compute the losses, and the gradient: a launch for each."""
    if chosen.parts == 1 or can_wait(call.student.device, chosen.parts):
        return ("ALL",)
    return ("FIRST", "SECOND", "LAST") if call.rule.two_passes else ("FIRST", "LAST")


def _launch(
    call: _Call,
    chosen: Configuration,
    gradient: Tensor | None,  # (B, S, V)
    losses: tuple[Tensor | None, Tensor | None, Tensor],  # hard, soft (N,), stats (N, STATS)
    steps: tuple[str, ...],
    scale: Tensor | None = None,  # 0-d
) -> None:
    """Launch the steps one after the other; in ("ALL",), programs wait for each other instead.

    Args:
        call: the arguments of the operator, checked, with at least one row.
        chosen: how a row is cut.
        gradient: overwritten; None: not wanted.
        losses: overwritten; ("BACKWARD",) reads the stats, and takes None for hard and soft.
        steps: of :func:`_steps`, or ("BACKWARD",).
        scale: for ("BACKWARD",): multiplies the weights; nothing is done if is_power_of_two.
    """
    loaded, student, teacher = load_kernels(), call.student, call.teacher
    n, vocabulary, numbers = call.rows, student.shape[2], call.numbers
    wait = steps == ("ALL",) and chosen.parts > 1
    partial = counters = inside = marks = k = words = None
    ring, programs = RING_PARTS // chosen.parts, n * chosen.parts
    if call.token_ids is not None:
        k = call.token_ids.shape[1]
        inside = torch.empty_like(call.token_ids, dtype=torch.float32)
        if steps != ("BACKWARD",):
            # a byte for each vector of a slice, for as many programs as fit
            words = 2 * -(-vocabulary // (8 * chosen.vector * chosen.parts))
            most = max(1, MARKED_BYTES // (4 * words))
            if wait:
                ring = max(1, min(RING_PARTS, 1 << (most.bit_length() - 1)) // chosen.parts)
                most = ring * chosen.parts
            else:
                programs = min(programs, most)
            marks = student.new_empty((min(programs, most), words), dtype=torch.int32)
    if chosen.parts > 1 and steps != ("BACKWARD",):
        shape = (min(n, ring) if wait else n, chosen.parts, loaded.PARTIAL.value)
        partial = student.new_empty(shape, dtype=torch.float32)
        if wait:
            counters = student.new_zeros((1 + 2 * n,), dtype=torch.int32)
    # the hard term's exponential is the softened one to this power
    power = numbers.temperature if call.rule.softmax else 1.0
    tensors = [x for x in (student, teacher, gradient) if x is not None]
    strides = [stride for x in (student, teacher, gradient) for stride in _row_strides(x)]
    aligned = _aligned([x for x in (*call.rows_read, gradient) if x is not None])
    if scale is not None:
        programs = min(programs, PROGRAMS * multiprocessors(student.device))
    for step in steps:
        loaded._kd_rows_kernel[(programs,)](
            *(student, teacher, gradient, call.labels, call.w_hard, call.w_soft, scale),
            *(*losses, partial, counters, call.token_ids, inside, marks),
            *(n, _rows_per_batch(tensors), vocabulary, k, words, *strides),
            math.log2(math.e) / power,
            power,
            *(numbers.temperature, numbers.beta, numbers.soft_factor),
            numbers.soft_factor / numbers.temperature,
            numbers.label_smoothing,
            D=call.code,
            HAS_HARD=call.has_hard,
            SMOOTHING=call.smoothing,
            STEP=getattr(loaded, step).value,
            WAIT=wait,
            PARTS=chosen.parts,
            RING=ring,
            LANES=chosen.lanes,
            VECTOR=chosen.vector,
            UNROLL=chosen.unroll,
            CUDA=capability(student.device),
            **_options(chosen, kind(student.device), call.rule, call.smoothing, aligned),
        )


#: Multiply-adds are written out in the kernels; the compiler's default for contraction has changed.
_EXACT = {"enable_fp_fusion": False}


def _options(
    chosen: Configuration, kind: Kind, rule: Any, smoothing: bool, aligned: bool
) -> dict[str, Any]:
    """Return the compiler's options for `_kd_rows_kernel`."""
    most = registers(kind, chosen.vector, bool(rule.logarithms), smoothing, aligned)
    options = {"num_warps": chosen.warps, **_EXACT}
    return options if most is None else {**options, "maxnreg": most}


def _aligned(tensors: list[Tensor]) -> bool:
    """Return True if Triton's specialization proves that rows begin at multiples of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:2])
        for x in tensors
    )


def _row_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _rows_per_batch(tensors: list[Tensor]) -> int:
    """Return S for the kernels: all rows if they have a single stride, so that none divides."""
    batches, rows = tensors[0].shape[:2]
    if all(batches == 1 or x.stride(0) == rows * x.stride(1) for x in tensors):
        return batches * rows
    return rows


def _check(call: _Call, gradient: Tensor | None, stats: Tensor) -> None:
    """Check everything that protects memory.

    Raises:
        RuntimeError: A device, shape, dtype or stride is wrong, or the kernels cannot run.
    """
    student, teacher, n = call.student, call.teacher, call.rows
    vocabulary = student.shape[-1]
    reason = why_not(student.device.type)
    if reason is not None:
        raise RuntimeError(f"the triton kernels cannot run: {reason}")
    dense = None if call.token_ids is not None else teacher
    for name, x in (("student", student), ("teacher", dense), ("gradient", gradient)):
        if x is None:
            continue
        if x.device != student.device or x.shape != student.shape or x.dim() != 3:
            raise RuntimeError(
                f"{name} must be (B, S, V), of the student's shape {tuple(student.shape)} and on "
                f"its device {student.device}; got {tuple(x.shape)} on {x.device}"
            )
        if x.shape[2] > 1 and x.stride(2) != 1:
            raise RuntimeError(f"{name} must have last stride 1; got {x.stride(2)}")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"{name} must be float32, bfloat16 or float16; got {x.dtype}")
    if not 0 < vocabulary <= LONGEST or n * MAX_PARTS >= 2**31:
        raise RuntimeError(
            f"logits must have 1 to {LONGEST} entries a row and fewer than {2**31 // MAX_PARTS} "
            f"rows for the triton kernels; got {n} rows of {vocabulary}: pass backend='reference'"
        )
    if gradient is not None and student.dtype not in (gradient.dtype, torch.float32):
        raise RuntimeError(
            "the gradient must have the student's dtype, or 16 bits for a float32 student; got "
            f"{gradient.dtype} for {student.dtype}"
        )
    if call.token_ids is not None:
        _check_classes(call)
    if call.w_hard is not None and call.labels is None:
        raise RuntimeError("a hard term needs labels: pass labels, or w_hard=None")
    for name, vector, dtype in (
        ("labels", call.labels, torch.int64),
        ("w_hard", call.w_hard, torch.float32),
        ("w_soft", call.w_soft, torch.float32),
    ):
        if vector is not None:
            _check_vector(name, vector, dtype, student)
    if stats.shape != (n, ops.STATS) or stats.dtype != torch.float32 or not stats.is_contiguous():
        raise RuntimeError(
            f"stats must be contiguous float32 ({n}, {ops.STATS}); got {stats.dtype} "
            f"{tuple(stats.shape)} with strides {stats.stride()}"
        )


def _check_vector(name: str, vector: Tensor, dtype: torch.dtype, student: Tensor) -> None:
    """Check a vector of one number for each row of the student. Raises as _check."""
    n = math.prod(student.shape[:2])
    if vector.dtype != dtype or vector.numel() != n:
        raise RuntimeError(
            f"{name} must be {dtype}, one for each row ({n}); got {vector.dtype} "
            f"{tuple(vector.shape)}"
        )
    if vector.device != student.device:
        raise RuntimeError(
            f"{name} must be on the logits' device, {student.device}; got {vector.device}"
        )


def _check_classes(call: _Call) -> None:
    """Check the teacher and the token ids of a TopK. Raises as _check."""
    student, teacher, ids = call.student, call.teacher, call.token_ids
    assert ids is not None
    if ids.device != student.device or ids.dtype != torch.int32 or ids.dim() != 2:
        raise RuntimeError(
            f"token_ids must be int32 (N, K) on the student's device, {student.device}; got "
            f"{ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
    fits = teacher.shape == (*student.shape[:2], ids.shape[1] + 1) and teacher.stride(2) == 1
    is_float = teacher.dtype == torch.float32 and teacher.device == student.device
    if ids.shape[0] != call.rows or not fits or not is_float:
        raise RuntimeError(
            "teacher must be (B, S, K+1), float32, with last stride 1 and on the student's device, "
            f"and token_ids (B·S, K); got {teacher.dtype} {tuple(teacher.shape)} on "
            f"{teacher.device} with strides {teacher.stride()}, and {tuple(ids.shape)}"
        )
    if not load_kernels().rule_of(call.code).softmax:
        raise RuntimeError(
            f"divergence {call.numbers.divergence} compares logits, which a TopK does not have"
        )


def _guard(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the tensor's device is the current one, for launches."""
    if x.device.type == "cpu":
        return nullcontext()
    return getattr(torch, x.device.type).device_of(x)  # type: ignore[no-any-return]


def _losses_of(call: _Call, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard, soft and stats; overwrite `gradient` unless it is None. Raises as _check."""
    n, student = call.rows, call.student
    hard = student.new_empty((n,), dtype=torch.float32)
    losses = (hard, torch.empty_like(hard), hard.new_empty((n, ops.STATS)))
    _check(call, gradient, losses[2])
    if n > 0:
        with _guard(student):
            chosen = _configuration(call)
            _launch(call, chosen, gradient, losses, _steps(call, chosen))
    return losses


def _gradient_of(
    call: _Call, gradient: Tensor, stats: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Overwrite `gradient` by the one for the call's w_hard and w_soft, and return it.

    With a `scale` both weights are multiplied by it. If is_power_of_two(scale), which includes 0,
    nothing is written: `_scale` must have multiplied the gradient before. Raises as _check.
    """
    _check(call, gradient, stats)
    if call.rows > 0:
        with _guard(gradient):
            _launch(call, _configuration(call), gradient, (None, None, stats), ("BACKWARD",), scale)
    return gradient


def _scale(gradient: Tensor, scale: Tensor, any_number: bool) -> None:
    """Multiply a gradient (B, S, V) by a 0-d scale in place.

    Unless `any_number`, only if is_power_of_two(scale), which includes 0; any other scale then
    leaves the gradient unchanged. Entries that are 0 stay 0, also if the scale is not finite.
    """
    b, s, vocabulary = gradient.shape
    if gradient.numel() == 0:
        return
    with _guard(gradient):
        blocks = b * s * -(-vocabulary // SCALE_BLOCK)
        programs = min(blocks, PROGRAMS * multiprocessors(gradient.device))
        load_kernels()._kd_scale_kernel[(programs,)](
            *(gradient, scale, b * s, _rows_per_batch([gradient]), vocabulary),
            *_row_strides(gradient),
            ANY=any_number,
            BLOCK=SCALE_BLOCK,
            **_EXACT,
            num_warps=8,
        )


# ------------------------------------------------------------------------------- the operators


def _call(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor | None,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    *numbers: Any,
) -> _Call:
    """Build the call from an operator's arguments; make vectors and token ids contiguous.

    Labels without w_hard are dropped, and a TopK without w_soft.
    """
    if w_soft is None and token_ids is not None:
        teacher, token_ids = student, None  # it is not read
    token_ids, labels, w_hard, w_soft = (
        None if x is None else x.contiguous() for x in (token_ids, labels, w_hard, w_soft)
    )
    labels = None if w_hard is None else labels
    return _Call(student, teacher, token_ids, labels, w_hard, w_soft, _numbers_of(*numbers))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _losses_of(_call(*arguments), None)


def _forward_backward(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = student.new_empty(student.shape)
    return *_losses_of(_call(student, *rest), gradient), gradient


def _forward_backward_into(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *losses, gradient = arguments
    return _losses_of(_call(*losses), gradient)


def _forward_backward_(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _losses_of(_call(student, *rest), student)


def _split(arguments: tuple[Any, ...]) -> tuple[_Call, Tensor, tuple[Any, ...]]:
    """Return the call, its stats, and the arguments after the scalar options."""
    rows, stats, rest = arguments[:6], arguments[6], arguments[7:]
    return _call(*rows, *rest[:_NUMBERS]), stats, rest[_NUMBERS:]


def _backward(*arguments: Any) -> Tensor:
    call, stats, _ = _split(arguments)
    return _gradient_of(call, call.student.new_empty(call.student.shape), stats)


def _backward_(*arguments: Any) -> None:
    call, stats, _ = _split(arguments)
    _gradient_of(call, call.student, stats)


def _rescale_(*arguments: Any) -> None:
    """Overwrite the gradient, the last argument, by `scale` times it, rounded once in all.

    A float32 gradient is multiplied. For any other both kernels are launched: each reads the scale
    on the device, and only one does the work, so that the host never synchronizes.
    """
    call, stats, (scale, gradient) = _split(arguments)
    _check(call, gradient, stats)
    _scale(gradient, scale, any_number=gradient.dtype == torch.float32)
    if gradient.dtype != torch.float32:
        _gradient_of(call, gradient, stats, scale)


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    reason = why_not(gradient.device.type)
    if reason is not None:
        raise RuntimeError(f"the triton kernels cannot run: {reason}")
    _scale(gradient, factor, any_number=True)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "forward_backward": _forward_backward,
    "forward_backward_into": _forward_backward_into,
    "forward_backward_": _forward_backward_,
    "backward": _backward,
    "backward_": _backward_,
    "rescale_": _rescale_,
    "scale_": _scale_,
}


def register(implementations: dict[str, Callable[..., Any]]) -> None:
    """Register implementations of operators, by their names without ``triton_``."""
    for name, implementation in implementations.items():
        torch.library.impl(f"fused_kd::triton_{name}", ("cpu", "cuda", "xpu"))(implementation)


register(_IMPLEMENTATIONS)
