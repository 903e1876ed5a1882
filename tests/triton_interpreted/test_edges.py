"""Memory, labels, weights and scales: what is read and written, and what is not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CONFIGURATIONS, V, configured, numbers, rows
from cases import dense as ops
from support.logits import identical
from torch import Tensor

from fused_kd.backends.triton import launch
from fused_kd.backends.triton.device import load_kernels
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import guarded

INF, NAN = math.inf, math.nan
TWO_PARTS = CONFIGURATIONS["two parts"]
SOFT = range(len(DIVERGENCES))  # every divergence by its number


def forward_backward(*arguments: object, **changes: object) -> tuple[Tensor, ...]:
    return ops.triton_forward_backward(*arguments, *numbers(**changes))


# ----------------------------------------------------------------------- what is read and written


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("divergence", [0, 2])  # one pass before the gradient, and two
def test_no_access_beyond_guard_pages(divergence: int, name: str) -> None:
    # A row that ends at a page boundary: a read behind it is a segmentation fault.
    student, teacher = (guarded(V, torch.bfloat16).view(1, 1, V) for _ in range(2))
    student.copy_(torch.randn(V))
    teacher.copy_(torch.randn(V))
    for label in (V - 1, V, -1, 2**40):
        weights = torch.ones(2, 1)
        with configured(**CONFIGURATIONS[name]):
            hard, soft, _, grad = forward_backward(
                student, teacher, torch.tensor([label]), *weights, divergence=divergence
            )
        inside = 0 <= label < V
        assert hard.isfinite().item() == grad.isfinite().all().item() == inside
        assert soft.isfinite().item()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_nothing_around_the_rows_is_read_or_written(name: str) -> None:
    margins = torch.full((2, 3, V + 10), NAN)
    student, teacher, *rest = rows(6)
    view, other = margins[..., 7 : 7 + V], margins.clone()[..., 2 : 2 + V]
    view.copy_(student.view(2, 3, V))
    other.copy_(teacher.view(2, 3, V))
    with configured(**CONFIGURATIONS[name]):
        expected = forward_backward(view.contiguous(), other.contiguous(), *rest)
        hard, soft, stats = ops.triton_forward_backward_(view, other, *rest, *numbers())
    identical((hard, soft, stats, view), expected)
    assert margins[..., :7].isnan().all()
    assert margins[..., 7 + V :].isnan().all()


def test_rows_at_two_strides() -> None:
    # Batches without their last rows: those, between the others, stay as they are.
    whole, other = torch.randn(2, 3, 4, V)
    student, teacher = whole[:, :-1], other[:, :-1]
    rest = rows(9)[2:]
    left_out = whole[:, -1].clone()
    with configured(**TWO_PARTS):
        expected = forward_backward(student.contiguous(), teacher.contiguous(), *rest)
        losses = ops.triton_forward_backward_(student, teacher, *rest, *numbers())
        ops.triton_scale_(student, torch.tensor(3.0))
    identical((*losses, student), (*expected[:3], 3.0 * expected[3]))
    assert torch.equal(whole[:, -1], left_out)


# one entry more than a multiple of what a program takes at a time
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gradient_in_other_memory(dtype: torch.dtype, name: str) -> None:
    # It is rounded once, from float32; nothing around it is written, and no logit.
    student, teacher, *rest = rows(3)
    before, margins = student.clone(), torch.full((1, 3, V + 9), NAN, dtype=dtype)
    grad = margins[..., 4 : 4 + V]
    with configured(**CONFIGURATIONS[name]):
        *losses, expected = forward_backward(student, teacher, *rest, smoothing=0.1)
        got = ops.triton_forward_backward_into(
            student, teacher, *rest, *numbers(smoothing=0.1), grad
        )
        identical(got, losses)
        assert torch.equal(grad, expected.to(dtype))
        # no power of two: made again, not rounded twice
        ops.triton_rescale_(
            student, teacher, *rest, got[2], *numbers(smoothing=0.1), torch.tensor(0.3), grad
        )
    scaled = expected * torch.tensor(0.3)
    if dtype != torch.float32:
        scaled = ops.triton_backward(
            student, teacher, rest[0], *(0.3 * w for w in rest[1:]), got[2], *numbers(smoothing=0.1)
        )
    torch.testing.assert_close(grad, scaled.to(dtype), rtol=0, atol=0)
    assert torch.equal(student, before)
    assert margins[..., :4].isnan().all()
    assert margins[..., 4 + V :].isnan().all()


def test_a_row_beyond_2_31_elements() -> None:
    # Memory between the two rows stays untouched, and so is no more than address space
    student, teacher, *rest = rows(2)
    far = torch.empty(2**31 + 4096, dtype=torch.float32).as_strided((1, 2, V), (0, 2**31, 1))
    far.copy_(student)
    with configured(**TWO_PARTS):
        expected = forward_backward(student, teacher, *rest, divergence=2)
        hard, soft, stats = ops.triton_forward_backward_(
            far, teacher, *rest, *numbers(divergence=2)
        )
    identical((hard, soft, stats, far), expected)


def test_rows_of_weight_0_are_not_read() -> None:
    student, teacher, labels, w_hard, w_soft = rows(4)
    student[0, 1], teacher[0, 1], labels[1] = NAN, NAN, -100
    w_hard[1] = w_soft[1] = 0
    with configured(**TWO_PARTS):
        hard, soft, stats, grad = forward_backward(student, teacher, labels, w_hard, w_soft)
    assert not any(x[1].any() for x in (hard, soft, stats, grad[0]))
    for x in (hard, soft, stats, grad):
        assert x.isfinite().all()


# ----------------------------------------------------------------------------- rows and terms


@pytest.mark.parametrize("divergence", SOFT)
def test_a_term_of_weight_0_in_one_row(divergence: int) -> None:
    # The row's other term has the value that it has alone, for any teacher.
    student, teacher, labels, w_hard, w_soft = rows(3)
    teacher[0, 0, 3], w_soft[0] = NAN, 0
    labels[2], w_hard[2] = -7, 0
    with configured(**TWO_PARTS):
        hard, soft, _, grad = forward_backward(
            student, teacher, labels, w_hard, w_soft, divergence=divergence
        )
        only_hard = forward_backward(student, teacher, labels, w_hard, None, divergence=divergence)
        only_soft = forward_backward(student, teacher, None, None, w_soft, divergence=divergence)
    assert soft[0] == hard[2] == 0
    torch.testing.assert_close(grad[0, 0], only_hard[3][0, 0])
    torch.testing.assert_close(grad[0, 2], only_soft[3][0, 2])
    assert hard[:2].equal(only_hard[0][:2])
    assert soft[1:].equal(only_soft[1][1:])


@pytest.mark.parametrize("divergence", SOFT)
def test_the_same_bits_alone_and_in_a_batch(divergence: int) -> None:
    student, teacher, *vectors = rows(5, dtype=torch.bfloat16)
    with configured(**TWO_PARTS):
        batch = forward_backward(student, teacher, *vectors, divergence=divergence)
        row_vectors = [x[2:3].clone() for x in vectors]
        alone = forward_backward(
            student[:, 2:3].clone(), teacher[:, 2:3].clone(), *row_vectors, divergence=divergence
        )
    for got, want in zip(alone[:3], batch[:3], strict=True):
        assert torch.equal(got[0], want[2])
    assert torch.equal(alone[3][0, 0], batch[3][0, 2])


# --------------------------------------------------------------------------- backward and scale


@pytest.mark.parametrize("divergence", SOFT)
def test_backward_makes_the_gradient_of_the_forward(divergence: int) -> None:
    student, teacher, *rest = rows(3, dtype=torch.bfloat16)
    arguments = numbers(divergence=divergence, smoothing=0.1)
    with configured(**TWO_PARTS):
        *_, stats, grad = ops.triton_forward_backward(student, teacher, *rest, *arguments)
        forward_stats = ops.triton_forward(student, teacher, *rest, *arguments)[2]
        again = ops.triton_backward(student, teacher, *rest, stats, *arguments)
        ops.triton_backward_(student, teacher, *rest, stats, *arguments)
    assert torch.equal(stats, forward_stats)
    assert torch.equal(grad, again)
    assert torch.equal(grad, student)


# nothing to do; exact; computed again if 16 bits would be rounded twice; 0; infinite
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0, 0.0, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescale(dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels, w_hard, w_soft = rows(3, dtype=dtype)
    w_hard[1] = w_soft[1] = 0
    factor = torch.tensor(scale)
    with configured(**TWO_PARTS):
        *_, stats, grad = forward_backward(student, teacher, labels, w_hard, w_soft)
        scaled = (torch.where(w != 0, w * factor, 0.0) for w in (w_hard, w_soft))
        anew = ops.triton_backward(student, teacher, labels, *scaled, stats, *numbers())
        before = grad.clone()
        ops.triton_rescale_(
            student, teacher, labels, w_hard, w_soft, stats, *numbers(), factor, grad
        )
    assert not grad[0, 1].any()
    if dtype == torch.bfloat16 and scale in (3.0, INF):
        torch.testing.assert_close(grad, anew, rtol=0, atol=0, equal_nan=True)
    else:
        assert torch.equal(grad, torch.where(before == 0, before, before * factor))


def test_few_programs_where_the_scale_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    # A launch that usually has nothing to do does not start a program for each part of each row.
    grids: dict[str, list[int]] = {"_kd_rows_kernel": [], "_kd_scale_kernel": []}
    loaded = load_kernels()

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            grids[self.name].append(*grid)
            return getattr(loaded, self.name)[grid]

    recording = SimpleNamespace(**{**vars(loaded), **{name: Recorded(name) for name in grids}})
    monkeypatch.setattr(launch, "load_kernels", lambda: recording)
    student, teacher, *rest = rows(7, dtype=torch.bfloat16)
    with configured(**TWO_PARTS):
        *_, stats, grad = forward_backward(student, teacher, *rest)
        expected = ops.triton_backward(
            student, teacher, rest[0], *(3.0 * w for w in rest[1:]), stats, *numbers()
        )
        ops.triton_rescale_(student, teacher, *rest, stats, *numbers(), torch.tensor(3.0), grad)
    # two launches of the forward, one of the backward; then the interpreter's one "multiprocessor"
    assert grids == {"_kd_rows_kernel": [14, 14, 14, 4], "_kd_scale_kernel": [4]}
    assert torch.equal(grad, expected)


def test_scale_of_a_view() -> None:
    padded = torch.randn(2, 3, V + 4).bfloat16()
    padded[0, 1, :9] = 0
    expected = padded.clone()
    view = padded[..., :V]
    expected[..., :V] = torch.where(view == 0, 0.0, view.float() * 3).bfloat16()
    ops.triton_scale_(view, torch.tensor(3.0))
    assert torch.equal(padded, expected)


# --------------------------------------------------------------------------------- operators


def test_opcheck() -> None:
    student, teacher, *rest = rows(2)
    stats = ops.triton_forward(student, teacher, *rest, *numbers())[2]
    grad, factor, which = torch.zeros_like(student), torch.tensor(2.0), ("test_schema",)
    which += ("test_faketensor", "test_autograd_registration")
    losses = (student, teacher, None, *rest, *numbers())
    gradients = (student, teacher, None, *rest, stats, *numbers())
    for name, arguments in {
        "forward": losses,
        "forward_backward": losses,
        "forward_backward_into": (*losses, grad),
        "forward_backward_": losses,
        "backward": gradients,
        "backward_": gradients,
        "rescale_": (*gradients, factor, grad),
        "scale_": (grad, factor),
    }.items():
        operator = getattr(torch.ops.fused_kd, f"triton_{name}").default
        torch.library.opcheck(operator, arguments, test_utils=which)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    student, teacher, *rest = rows(2)
    with pytest.raises(RuntimeError, match=r"teacher must be \(B, S, V\)"):
        ops.triton_forward(student, teacher[..., 1:], *rest, *numbers())
    with pytest.raises(RuntimeError, match="last stride 1"):
        ops.triton_forward(student[..., ::2], teacher[..., ::2], *rest, *numbers())
    with pytest.raises(RuntimeError, match=r"labels must be torch\.int64, one for each row"):
        ops.triton_forward(student, teacher, rest[0][:1], *rest[1:], *numbers())
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        ops.triton_forward(student.double(), teacher, *rest, *numbers())
    with pytest.raises(RuntimeError, match=r"got torch\.float32 for torch\.bfloat16"):
        ops.triton_forward_backward_into(
            student.bfloat16(), teacher, *rest, *numbers(), torch.empty_like(student)
        )


# ties at the first, at the second bit that is lost; carries into the exponent; infinities
@pytest.mark.parametrize("factor", [1 + 2.0**-8, 1 + 2.0**-9, 1.7, 1e30])
def test_bfloat16_is_rounded_to_nearest_even(factor: float) -> None:
    # Every bfloat16 number times a factor. The interpreter's own cast cuts off.
    #
    # But for subnormal ones, which the interpreter reads wrongly.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    patterns = torch.where(patterns.abs() < 2.0**-126, 0.0, patterns)
    got = patterns.clone().view(1, 64, 1024)
    ops.triton_scale_(got, torch.tensor(factor))
    expected = (patterns.float() * factor).bfloat16().view_as(got)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
