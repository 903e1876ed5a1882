"""A top-k teacher in the Triton kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import CONFIGURATIONS, V, configured, numbers
from support.backends import formula_of
from support.logits import identical
from support.topk import PAIRS, with_topk
from torch import Tensor

from fused_kd import TopK
from fused_kd.backends import reference
from fused_kd.backends.triton import launch
from fused_kd.classes import NO_CLASS, Classes, classes_of
from fused_kd.divergences import TABLE
from fused_kd.testing import Inputs, assert_obeys_error_rule, guarded, make_inputs

ops = torch.ops.fused_kd
INF, NAN = math.inf, math.nan
DIVERGENCES = [divergence for tail, divergence in PAIRS if tail == "bucket"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The hard term's exponential is a power of the softened one (T = 1, 2), or a separate one.
TEMPERATURES = (1.0, 2.0, 1.7, 0.6)
ONE_PART, TWO_PARTS = CONFIGURATIONS["one part"], CONFIGURATIONS["two parts"]


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


def problem(n: int, seed: int, tail: str = "bucket") -> Problem:
    """Return random rows with five entries in the support, at T = 2; half of the labels in it."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, V, generator=generator) for _ in range(2))
    classes, _ = classes_of(TopK.from_logits(teacher, 5, 2.0)._replace(tail=tail), V, torch.float32)
    labels = torch.randint(V, (n,), generator=generator)
    labels[::2] = classes.token_ids[::2, 3]
    weights = torch.rand(2, n, generator=generator) + 0.5
    return Problem(student[None], classes.logits[None], classes.token_ids, labels, *weights)


def ours(x: Problem, divergence: str, smoothing: float = 0.0) -> Losses:
    options = numbers(divergence=list(TABLE).index(divergence), smoothing=smoothing)
    return Losses(*ops.triton_forward_backward(*x, *options))


def assert_as_reference(got: Losses, x: Problem, divergence: str, smoothing: float = 0.0) -> None:
    formula = formula_of(
        divergence=divergence, temperature=2.0, beta=0.3, label_smoothing=smoothing
    )
    classes = Classes(x.teacher.double(), x.token_ids)
    student, weights = x.student.double(), (x.w_hard, x.w_soft)
    want = reference.forward_backward(student, classes, x.labels, *weights, formula)
    for i in (0, 1, 3):
        expected = want[i].float()
        torch.testing.assert_close(got[i], expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# --------------------------------------------------------------------------------------- accuracy


# the number of tokens, dtype, configuration, temperature and terms change from case to case
@pytest.mark.parametrize(("tail", "divergence"), PAIRS)
def test_error_rule(tail: str, divergence: str) -> None:
    first = PAIRS.index((tail, divergence))
    for i in (first, first + 2):
        temperature = TEMPERATURES[i % 4]
        options: dict[str, Any] = {"label_smoothing": (0.0, 0.1)[i // 2 % 2], "beta": 0.3}
        if i % 5 == 0:
            options["hard_weight"] = 0.0
        inputs = make_inputs("language_model", 2, V, DTYPES[i % 3], seed=i)
        k = (5, 1, V, 0)[(i + i // 4) % 4]
        inputs = with_topk(inputs, max(k, tail == "sampled"), tail, temperature)
        assert isinstance(inputs.teacher, TopK)
        if k > 0:
            inputs.labels[0] = inputs.teacher.token_ids[0, 0]
        with configured(**CONFIGURATIONS[list(CONFIGURATIONS)[i // 2 % 3]]):
            assert_obeys_error_rule(
                inputs,
                torch.tensor([1.0, -0.7]),
                backend="triton",
                divergence=divergence,
                temperature=temperature,
                **options,
            )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_any_mass_of_the_tail(divergence: str) -> None:
    # It is a sum of its own on either side: 1e-12 and 1 - 1e-12 have all their digits. In the last
    # rows one part of the student's logits is below any exponential of the other.
    mass = torch.tensor([1e-12, 1.0, 1e-12, 1.0, 1e-4, 0.5], dtype=torch.float64)
    above = torch.tensor([30.0, -30.0, -30.0, 30.0, 200.0, -200.0])
    inputs = make_inputs("randn", 6, V)
    ids = torch.stack([torch.randperm(V)[:5] for _ in range(6)])
    student = inputs.student.scatter_add(1, ids, above[:, None].expand(-1, 5))
    rest = torch.where(mass == 1.0, math.log(1e-12), torch.log1p(-mass))
    logprobs = torch.randn(6, 5).double().log_softmax(1) + rest[:, None]
    for tail in ("bucket", "renormalize"):
        topk = TopK(ids, logprobs.float(), mass.log().float(), tail)
        with configured(**ONE_PART):
            assert_obeys_error_rule(
                Inputs(student, topk, inputs.labels), backend="triton", divergence=divergence
            )


# ------------------------------------------------------------------------------------ special rows


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_with_infinities(divergence: str) -> None:
    x = problem(12, 2)
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
        got = ours(x, divergence, smoothing)
    assert_as_reference(got, x, divergence, smoothing)
    assert got.soft.isnan().tolist() == [False] * 7 + [True] * 5


def test_rows_without_entries() -> None:
    # Their soft term and its gradient are exactly 0.
    x = problem(2, 3)._replace(w_hard=None)
    absent = torch.full((2, 2), -1, dtype=torch.int32)
    x = x._replace(teacher=torch.tensor([[[-INF, -INF, 0.0]] * 2]), token_ids=absent)
    empty = x._replace(teacher=x.teacher[..., 2:], token_ids=absent[:, :0])
    for case in (x, empty):
        for divergence in DIVERGENCES:
            with configured(**ONE_PART):
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
    x = problem(3, 4)
    x.labels[:] = torch.tensor([-1, V, 2**32 + int(x.token_ids[2, 0])])
    with configured(**TWO_PARTS):
        got = ours(x, "forward_kl")
    assert_as_reference(got, x, "forward_kl")
    assert got.hard.isnan().all()


# ------------------------------------------------------------------------------- ways and memory


# one pass over the classes, and two
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_every_operator_has_the_same_bits(divergence: str) -> None:
    x = problem(2, 5)
    x = x._replace(student=x.student.bfloat16())
    arguments = numbers(divergence=list(TABLE).index(divergence), smoothing=0.1)
    margins = torch.full((1, 2, V + 9), NAN, dtype=torch.bfloat16)
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
    x = problem(4, 6)
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
    x = problem(2, 7)
    for message, changes in {
        r"token_ids must be int32 \(N, K\)": {"token_ids": x.token_ids.long()},
        r"teacher must be \(B, S, K\+1\), float32": {"teacher": x.teacher.double()},
        r"and token_ids \(B·S, K\); got torch\.float32 \(1, 2, 5\)": {
            "teacher": x.teacher[..., 1:]
        },
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ours(x._replace(**changes), "forward_kl")
    with pytest.raises(RuntimeError, match="compares logits, which a TopK does not have"):
        ours(x, "mse")
