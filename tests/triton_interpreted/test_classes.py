"""A top-k teacher in the Triton kernels, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import CONFIGURATIONS, V, configured, numbers
from support.backends import formula_of
from support.logits import identical
from torch import Tensor

from fused_kd import TopK
from fused_kd.backends import reference
from fused_kd.backends.triton import launch
from fused_kd.classes import NO_CLASS, Classes, classes_of
from fused_kd.divergences import TABLE
from fused_kd.testing import guarded

ops = torch.ops.fused_kd
INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
DIVERGENCES = [name for name, entry in TABLE.items() if not entry.of_logits]
TAILS = ("bucket", "renormalize", "zero")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (1.0, 2.0, 1.7, 0.6)
TWO_PARTS = CONFIGURATIONS["two parts"]


class Problem(NamedTuple):
    """The tensors of an operator, for N rows."""

    student: Tensor  # (1, N, V)
    teacher: Tensor  # (1, N, K+1)
    token_ids: Tensor  # (N, K)
    labels: Tensor  # (N,)
    w_hard: Tensor | None  # (N,)
    w_soft: Tensor  # (N,)


class Losses(NamedTuple):
    """The results of forward_backward."""

    hard: Tensor
    soft: Tensor
    stats: Tensor
    grad: Tensor  # (1, N, V)


def problem(n: int, k: int, seed: int, tail: str = "bucket", temperature: float = 2.0) -> Problem:
    """Return random rows, whose support is in no order; half of the labels are in it, if k > 0."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, V, generator=generator) for _ in range(2))
    topk = TopK.from_logits(teacher, k, temperature)._replace(tail=tail)
    order = torch.randperm(k, generator=generator)
    topk = topk._replace(token_ids=topk.token_ids[:, order], logprobs=topk.logprobs[:, order])
    classes, _ = classes_of(topk, V, torch.float32)
    labels = torch.randint(V, (n,), generator=generator)
    if k > 0:
        labels[::2] = topk.token_ids[::2, 0]
    weights = torch.rand(2, n, generator=generator) + 0.5
    return Problem(student[None], classes.logits[None], classes.token_ids, labels, *weights)


def ours(x: Problem, divergence: str, **options: Any) -> Losses:
    code = list(TABLE).index(divergence)
    return Losses(*ops.triton_forward_backward(*x, *numbers(divergence=code, **options)))


def truth(x: Problem, divergence: str, temperature: float = 2.0, smoothing: float = 0.0) -> Losses:
    formula = formula_of(
        divergence=divergence, temperature=temperature, beta=0.3, label_smoothing=smoothing
    )
    classes = Classes(x.teacher.double(), x.token_ids)
    w_hard = None if x.w_hard is None else x.w_hard.double()
    rows = (x.student.double(), classes, x.labels, w_hard, x.w_soft.double())
    return Losses(*reference.forward_backward(*rows, formula))


def class_logits(x: Problem, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each row the present classes' logits of student and teacher, in float64."""
    for s, t, ids in zip(x.student[0].double(), x.teacher[0].double(), x.token_ids, strict=True):
        inside = ids[ids >= 0].long()
        outside = torch.ones(V, dtype=torch.bool).index_fill(0, inside, False)
        z = torch.cat([s[inside], temperature * (s[outside] / temperature).logsumexp(0)[None]])
        t = torch.cat([t[:-1][ids >= 0], t[-1:]])
        present = (t != NO_CLASS) & ((z != -INF) | (t != -INF))
        yield z[present], t[present]


def assert_accurate(
    got: Losses, x: Problem, divergence: str, temperature: float = 2.0, smoothing: float = 0.0
) -> None:
    """Assert that losses and gradient are within four units of the truth, and as finite.

    The units are those of :func:`fused_kd.testing.error_rule.conditioning`, of the classes. A
    gradient of 16 bits may also be off by its rounding.
    """
    want = truth(x, divergence, temperature, smoothing)
    hard, soft, _, grad = got
    for ours, exact in ((hard, want.hard), (soft, want.soft), (grad, want.grad)):
        for name in ("isnan", "isposinf", "isneginf"):
            assert torch.equal(getattr(ours, name)(), getattr(exact, name)()), name
    for n, (z, t) in enumerate(class_logits(x, temperature)):
        w_hard = 0.0 if x.w_hard is None else x.w_hard[n].item()
        w_soft, s = x.w_soft[n].item() * temperature, x.student[0, n].double()
        below = torch.cat([y.amax() - y for y in (z, t, s)]) if len(z) else s.amax() - s
        reach = below[below.isfinite()].amax().item() if below.isfinite().any() else 0.0
        largest = (z / temperature).softmax(0).amax().item() if len(z) else 0.0
        if want.hard[n].isfinite():
            error = abs(hard[n].double() - want.hard[n]).item()
            assert error <= 4 * EPS * (1 + reach + abs(want.hard[n].item()))
        if want.soft[n].isfinite():
            error = abs(soft[n].double() - want.soft[n]).item()
            unit = EPS * (temperature**2 * (1 + reach / temperature) + abs(want.soft[n].item()))
            assert error <= 4 * unit, (n, error, unit)
        exact = want.grad[0, n]
        if exact.isnan().any():
            assert exact.isnan().all()
            continue
        relative = 1 + (reach / temperature if TABLE[divergence].has_logarithm else 0.0)
        scale = w_soft * largest * relative + w_hard * s.softmax(0).amax().item()
        floor = 4 * EPS * (exact.norm().item() + scale)
        info = torch.finfo(grad.dtype)
        rounding = (info.eps / 2 if grad.dtype != torch.float32 else 0.0) * exact.abs()
        tiny = info.smallest_normal * (info.eps if grad.dtype == torch.float16 else 1.0)
        error = (grad[0, n].double() - exact).abs()
        assert (error <= floor + rounding + tiny).all(), (n, (error - rounding).max().item(), floor)


# --------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_accuracy(divergence: str, tail: str) -> None:
    # The number of tokens, dtype, configuration, temperature and terms change from case to case.
    if tail == "zero" and TABLE[divergence].needs_mass:
        pytest.skip("infinite: test_rows_with_infinities")
    first = 3 * DIVERGENCES.index(divergence) + TAILS.index(tail)
    for i in (first, first + 2):
        temperature, smoothing = TEMPERATURES[i % 4], (0.0, 0.1)[i // 2 % 2]
        x = problem(2, (5, 1, V, 0)[i % 4], i, tail, temperature)
        x = x._replace(student=x.student.to(DTYPES[i % 3]))
        if i % 5 == 0:
            x = x._replace(w_hard=None)
        with configured(**CONFIGURATIONS[list(CONFIGURATIONS)[i // 2 % 3]]):
            got = ours(x, divergence, temperature=temperature, smoothing=smoothing)
        assert got.grad.dtype == x.student.dtype
        assert_accurate(got, x, divergence, temperature, smoothing)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_any_mass_of_the_tail(divergence: str) -> None:
    # It is a sum of its own on either side: 1e-12 and 1 - 1e-12 have all their digits.
    mass = torch.tensor([1e-12, 1.0, 1e-12, 1.0, 1e-4, 0.5], dtype=torch.float64)
    x = problem(6, 5, 1)
    student, inside = x.student[0], x.token_ids.long()
    # by so much the student's support is above its tail; beyond any exponential in the last two
    above = torch.tensor([60.0, -60.0, -60.0, 60.0, 400.0, -400.0])
    student.scatter_add_(1, inside, above[:, None].expand(-1, 5))
    support = (x.teacher[0, :, :-1].double() / 2).log_softmax(-1)
    rest = torch.where(mass == 1.0, math.log(1e-12), torch.log1p(-mass))
    x.teacher[0] = torch.cat([support + rest[:, None], mass.log()[:, None]], 1) * 2
    with configured(**CONFIGURATIONS["one part"]):
        assert_accurate(ours(x, divergence), x, divergence)
        # if it is no class, its logits are above those of every class in some rows
        x.teacher[..., -1] = NO_CLASS
        assert_accurate(ours(x, divergence), x, divergence)


# ------------------------------------------------------------------------------------ special rows


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_with_infinities(divergence: str) -> None:
    x = problem(12, 5, 2)
    student, teacher, ids = x.student[0], x.teacher[0], x.token_ids
    outside = torch.ones(12, V, dtype=torch.bool).scatter(1, ids.long(), False)
    at = [int(row.nonzero()[0]) for row in outside]
    student[0, at[0]] = student[1, ids[1, 2]] = -INF  # one entry of the student
    teacher[2, 1], ids[2, 1] = -INF, -1  # an absent entry
    student[3, outside[3]] = -INF  # the student has no tail, the teacher has
    student[4, outside[4]], teacher[4, -1] = -INF, -INF  # nor has the teacher
    teacher[5, -1] = -INF  # the teacher has no tail, the student has
    student[6, ids[6].long()] = -INF  # nothing but the tail, which is a class or is none
    student[7, ids[7].long()], teacher[7, -1] = -INF, NO_CLASS
    student[8, at[8]] = student[9, at[9]] = NAN
    teacher[9, -1] = NO_CLASS  # a NaN that is in no class
    student[10, ids[10, 0]] = INF
    teacher[11] = NAN
    smoothing = (0.0, 0.1)[DIVERGENCES.index(divergence) % 2]
    with configured(**TWO_PARTS):
        got = ours(x, divergence, smoothing=smoothing)
    assert_accurate(got, x, divergence, smoothing=smoothing)
    assert got.soft.isnan().tolist() == [False] * 7 + [True] * 5


def test_rows_without_entries() -> None:
    # Their soft term and its gradient are exactly 0.
    x = problem(2, 2, 3, tail="renormalize")._replace(w_hard=None)
    absent = torch.full((2, 2), -1, dtype=torch.int32)
    x = x._replace(teacher=torch.tensor([[[-INF, -INF, 0.0]] * 2]), token_ids=absent)
    empty = x._replace(teacher=x.teacher[..., 2:], token_ids=absent[:, :0])
    for case in (x, empty):
        for divergence in DIVERGENCES:
            with configured(**CONFIGURATIONS["one part"]):
                got = ours(case, divergence)
            assert not got.soft.any()
            assert not got.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_sides_if_every_token_is_in_the_support(divergence: str) -> None:
    student = torch.randn(1, 2, V).bfloat16()
    ids = torch.arange(V, dtype=torch.int32).expand(2, V)
    teacher = torch.nn.functional.pad(student.float(), (0, 1), value=NO_CLASS)
    with configured(**TWO_PARTS):
        _, soft, _, grad = ours(
            Problem(student, teacher, ids, torch.zeros(2), None, torch.ones(2)), divergence
        )
    assert not soft.any()
    assert not grad.any()


def test_a_label_beyond_the_row_spoils_the_hard_term() -> None:
    x = problem(3, 5, 4)
    x.labels[:] = torch.tensor([-1, V, 2**32 + int(x.token_ids[2, 0])])
    with configured(**TWO_PARTS):
        got = ours(x, "forward_kl")
    assert_accurate(got, x, "forward_kl")
    assert got.hard.isnan().all()


# ------------------------------------------------------------------------------- ways and memory


# one pass over the classes, and two
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_every_operator_has_the_same_bits(divergence: str) -> None:
    x = problem(3, 5, 5)
    x = x._replace(student=x.student.bfloat16())
    arguments = numbers(divergence=list(TABLE).index(divergence), smoothing=0.1)
    margins = torch.full((1, 3, V + 9), NAN, dtype=torch.bfloat16)
    view, other = margins[..., 4 : 4 + V], torch.empty_like(x.student)
    view.copy_(x.student)
    with configured(**TWO_PARTS):
        *losses, grad = ops.triton_forward_backward(*x, *arguments)
        identical(ops.triton_forward(*x, *arguments), losses)
        identical(ops.triton_forward_backward_into(*x, *arguments, other), losses)
        identical(ops.triton_forward_backward_(view, *x[1:], *arguments), losses)
        stats = losses[2]
        again = ops.triton_backward(*x, stats, *arguments)
        over = x.student.clone()
        ops.triton_backward_(over, *x[1:], stats, *arguments)
        identical((other, view, again, over), (grad,) * 4)
        # no power of two: computed again, not rounded twice
        ops.triton_rescale_(*x, stats, *arguments, torch.tensor(3.0), other)
        weights = (3 * x.w_hard, 3 * x.w_soft)
        assert torch.equal(other, ops.triton_backward(*x[:4], *weights, stats, *arguments))
    assert margins[..., :4].isnan().all()
    assert margins[..., 4 + V :].isnan().all()


@pytest.mark.parametrize("name", ["one part", "two parts"])
def test_programs_share_the_memory_for_marks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One program processes all rows. The scratch memory is not zero before.
    x = problem(4, 5, 6)
    x.w_hard[1] = x.w_soft[1] = x.w_soft[2] = 0
    x.student[0, 1] = x.teacher[0, 1:3] = NAN
    with configured(**CONFIGURATIONS[name]):
        expected = ours(x, "jsd")
        alone = Problem(*(y[:, 3:] for y in x[:2]), *(y[3:].clone() for y in x[2:]))
        identical(ours(alone, "jsd"), (*(y[3:] for y in expected[:3]), expected.grad[:, 3:]))
        monkeypatch.setattr(launch, "MARKED_BYTES", 1)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
        try:
            torch.testing.assert_close(ours(x, "jsd"), expected, rtol=0, atol=0, equal_nan=True)
        finally:
            torch.use_deterministic_algorithms(False)
    assert not any(y[1].any() for y in (*expected[:3], expected.grad[0]))
    assert all(y.isfinite().all() for y in (*expected[:2], expected.grad))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_beyond_the_row_are_absent(name: str) -> None:
    # A row that ends at a page boundary: an access behind it is a segmentation fault.
    student, grad = (guarded(V, torch.bfloat16).view(1, 1, V) for _ in range(2))
    student.copy_(torch.randn(V))
    weights = torch.ones(2, 1)
    results = []
    for absent in ([V, 2**30, -(2**31)], [-1, -1, -1]):
        ids = torch.tensor([[V - 1, *absent, 0]], dtype=torch.int32)
        teacher = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
        x = Problem(student, teacher, ids, torch.zeros(1).long(), *weights)
        with configured(**CONFIGURATIONS[name]):
            results.append((*ops.triton_forward_backward_into(*x, *numbers(), grad), grad.clone()))
    identical(*results)
    assert all(y.isfinite().all() for y in results[0])


def test_what_does_not_fit_is_refused() -> None:
    x = problem(2, 3, 7)
    for message, changes in {
        r"token_ids must be int32 \(N, K\)": {"token_ids": x.token_ids.long()},
        r"teacher must be \(B, S, K\+1\), float32": {"teacher": x.teacher.double()},
        r"and token_ids \(B·S, K\); got torch\.float32 \(1, 2, 3\)": {
            "teacher": x.teacher[..., 1:]
        },
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ours(x._replace(**changes), "forward_kl")
    with pytest.raises(RuntimeError, match="compares logits, which a TopK does not have"):
        ours(x, "mse")
