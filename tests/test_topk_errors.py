"""The accuracy of a TopK: the error rule for any tail mass, and what the mathematics promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import one_thread
from support.logits import SOFT, rows_and_gradient, soft
from support.topk import PAIRS, with_topk
from torch import Tensor

from fused_kd import TopK, kd_loss
from fused_kd.testing import (
    DTYPES,
    REGIMES,
    Inputs,
    assert_obeys_error_rule,
    eager_kd_loss,
    make_inputs,
)
from fused_kd.testing.views import compared

INF = math.inf
EPS = torch.finfo(torch.float32).eps
UPSTREAM = torch.tensor([1.0, -0.3, 2.0])
#: Those that a bucket's tail goes with: all divergences of probabilities.
DIVERGENCES = [divergence for tail, divergence in PAIRS if tail == "bucket"]
of_probabilities = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Any:
    """Return a tail and a divergence that a loss takes together."""
    return request.param


def obey(backend: str, inputs: Inputs, divergence: str, **keywords: Any) -> None:
    upstream = UPSTREAM[: len(inputs.labels)]
    if inputs.student.dtype == torch.float16:
        upstream = 1024 * upstream  # a loss scale, or the gradient is below float16's numbers
    keywords = {"label_smoothing": 0.1, "beta": 0.3, **keywords}
    assert_obeys_error_rule(inputs, upstream, backend=backend, divergence=divergence, **keywords)


# ---------------------------------------------------------------------------- the error rule


# one block and a tail of one
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime: str, pair: tuple[str, str], fast: str) -> None:
    tail, divergence = pair
    inputs = with_topk(make_inputs(regime, 2, 2049), 17, tail, 2.0)
    obey(fast, inputs, divergence, temperature=2.0)


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_of_the_reference(regime: str) -> None:
    inputs = make_inputs(regime, 2, 101)
    for tail, divergence in PAIRS:
        obey("reference", with_topk(inputs, 17, tail, 2.0), divergence, temperature=2.0)


@pytest.mark.parametrize("temperature", [1.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, temperature: float, pair: tuple[str, str], fast: str) -> None:
    tail, divergence = pair
    inputs = make_inputs("inf_columns", 2, 2049, dtype)
    obey(fast, with_topk(inputs, 17, tail, temperature), divergence, temperature=temperature)


# K from nothing to everything
@pytest.mark.parametrize(("vocabulary", "k"), [(1, 0), (1, 1), (7, 0), (33, 32), (64, 64)])
def test_any_k(vocabulary: int, k: int, pair: tuple[str, str], backend: str) -> None:
    tail, divergence = pair
    if tail == "sampled":
        k = max(k, 1)
    inputs = make_inputs("language_model", 2, vocabulary)
    obey(backend, with_topk(inputs, k, tail), divergence)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_everything(regime: str, pair: tuple[str, str], fast: str) -> None:
    tail, divergence = pair
    for dtype in DTYPES.values():
        for temperature in (1.0, 2.0, 4.0, 3.7, 0.3, 50.0):
            for vocabulary, k in ((15, 3), (515, 64), (6200, 300)):
                inputs = make_inputs(regime, 3, vocabulary, dtype, seed=vocabulary)
                inputs = with_topk(inputs, k, tail, temperature)
                obey(fast, inputs, divergence, temperature=temperature)


# ------------------------------------------------- the student's tail is summed, never 1 - P

MASSES = [1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12]


def with_mass_outside(mass: float, rows: int = 2, vocabulary: int = 515, k: int = 16) -> Inputs:
    """Return inputs whose student has this mass outside the support; the teacher has less.

    The teacher's odds are lower by a factor of e.
    """
    draw = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randperm(vocabulary, generator=draw)[:k] for _ in range(rows)])
    student = torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64)
    odds = torch.full((rows,), math.log(mass) - math.log1p(-mass), dtype=torch.float64)
    inside, outside = student.gather(1, ids), student.scatter(1, ids, -INF).logsumexp(1)
    student.scatter_(1, ids, inside + (outside - odds - inside.logsumexp(1))[:, None])
    tail, support = (torch.nn.functional.logsigmoid(x) for x in (odds - 1, 1 - odds))
    logprobs = torch.randn(rows, k, generator=draw).double().log_softmax(1) + support[:, None]
    topk = TopK(ids, logprobs.float(), tail.float())
    return Inputs(student.float(), topk, torch.randint(vocabulary, (rows,), generator=draw))


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize(("tail", "divergence"), [x for x in PAIRS if x[0] != "sampled"])
def test_the_error_rule_for_any_tail_mass(
    mass: float, tail: str, divergence: str, backend: str
) -> None:
    inputs = with_mass_outside(mass)
    assert isinstance(inputs.teacher, TopK)
    inputs = inputs._replace(teacher=inputs.teacher._replace(tail=tail))
    obey(backend, inputs, divergence)
    if tail == "bucket":
        obey(backend, inputs._replace(student=inputs.student.bfloat16()), divergence)


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return rows and gradient of forward_kl by the reference in float64."""
    student = inputs.student.double()
    return rows_and_gradient(student, inputs.teacher, **SOFT, backend="reference")


@pytest.mark.parametrize("mass", MASSES)
def test_every_entry_is_accurate_for_any_tail_mass(mass: float, backend: str) -> None:
    inputs = with_mass_outside(mass)
    _, got = rows_and_gradient(inputs.student, inputs.teacher, **SOFT, backend=backend)
    student, teacher, reach = compared(inputs, 1.0)
    larger = torch.maximum(student.softmax(1), teacher.softmax(1))  # of which it is a difference
    error = (got.double() - exact(inputs)[1]).abs() / larger
    assert (error <= 4 * EPS * (1 + reach[:, None])).all()


def by_difference(student: Tensor, topk: TopK) -> Tensor:
    """Return forward_kl of every row, (N,), with a student's tail of 1 - P in float32."""
    assert topk.tail_logprob is not None
    log_p = student.log_softmax(1).gather(1, topk.token_ids)
    tail = (1 - log_p.exp().sum(1)).log()
    log_p = torch.cat([log_p, tail[:, None]], 1)
    log_q = torch.cat([topk.logprobs, topk.tail_logprob[:, None]], 1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


# docs/numerics.md has these errors
@pytest.mark.parametrize(("mass", "lost"), [(1e-3, 1e-5), (1e-6, 1e-2), (1e-8, 0.1), (1e-12, 0.1)])
def test_one_minus_p_would_lose_the_gradient_of_the_tail(
    mass: float, lost: float, backend: str
) -> None:
    inputs = with_mass_outside(mass)
    assert isinstance(inputs.teacher, TopK)
    leaf = inputs.student.clone().requires_grad_()
    naive = torch.autograd.grad(by_difference(leaf, inputs.teacher).sum(), leaf)[0]
    _, got = rows_and_gradient(inputs.student, inputs.teacher, **SOFT, backend=backend)
    outside = torch.ones_like(got, dtype=torch.bool).scatter(1, inputs.teacher.token_ids, False)
    want = exact(inputs)[1][outside]
    error, ours = ((x[outside].double() - want).norm() / want.norm() for x in (naive, got))
    assert ours < 4e-6
    assert not error < lost  # it may be NaN


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_larger_logit_outside_costs_no_digits_in_the_support(
    divergence: str, backend: str
) -> None:
    inputs = with_topk(make_inputs("randn", 2, 65), 5, "renormalize")
    assert isinstance(inputs.teacher, TopK)
    outside = torch.ones(2, 65, dtype=torch.bool).scatter(1, inputs.teacher.token_ids, False)
    keywords: dict[str, Any] = {"divergence": divergence, "backend": backend, **SOFT}
    want = rows_and_gradient(inputs.student, inputs.teacher, **keywords)
    student = torch.where(outside, 1e4, inputs.student)
    got = rows_and_gradient(student, inputs.teacher, **keywords)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------ what must hold


@of_probabilities
def test_all_of_the_vocabulary_is_the_dense_teacher(divergence: str, backend: str) -> None:
    inputs = make_inputs("language_model", 3, 65)
    assert isinstance(inputs.teacher, Tensor)
    keywords = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    want = rows_and_gradient(*inputs, **keywords)
    topk = TopK.from_logits(inputs.teacher, 65, 2.0)
    assert (topk.tail_logprob == -INF).all()
    for tail in ("bucket", "renormalize"):
        for tail_logprob in (topk.tail_logprob, None):
            teacher = topk._replace(tail=tail, tail_logprob=tail_logprob)
            got = rows_and_gradient(inputs.student, teacher, inputs.labels, **keywords)
            for ours, dense in zip(got, want, strict=True):
                torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


few = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@few
@given(
    divergence=st.sampled_from(DIVERGENCES),
    vocabulary=st.integers(1, 40),
    share=st.floats(0, 1),
    scale=st.sampled_from([1e-3, 1.0, 3.0, 30.0, 1e3]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 2**20),
)
def test_a_bucket_is_never_above_the_dense_divergence(
    backend: str,
    divergence: str,
    vocabulary: int,
    share: float,
    scale: float,
    temperature: float,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, vocabulary, generator=draw) for _ in range(2))
    # any support, not the largest entries only
    order = torch.randn(2, vocabulary, generator=draw).argsort(1)
    ids = order[:, : round(share * vocabulary)]
    log_q = (teacher.double() / temperature).log_softmax(1)
    tail = log_q.scatter(1, ids, -INF).logsumexp(1)
    topk = TopK(ids, log_q.gather(1, ids), tail, temperature=temperature)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "beta": 0.3}
    dense = soft(student.double(), teacher.double(), **keywords)
    rounding = 1e-12 * (1 + dense.nan_to_num(0.0, 0.0))
    exact = soft(student.double(), topk, **keywords)
    assert (exact <= dense + rounding).all()
    assert (exact >= -rounding).all()
    reach = 1 + 8 * scale / temperature
    rounding = 8 * EPS * temperature**2 * reach + 8 * EPS * dense.nan_to_num(0.0, 0.0)
    single = soft(student, topk.to(torch.float32), backend=backend, **keywords)
    assert (single <= dense + rounding).all()
    assert (single >= -rounding).all()


# float16 log-probabilities have masses whose sum with an exact tail is not 1
@of_probabilities
def test_no_divergence_is_negative_at_the_teacher_in_float16(divergence: str, backend: str) -> None:
    student = 3 * torch.randn(64, 515)
    topk = TopK.from_logits(student, 64)
    topk = topk._replace(logprobs=topk.logprobs.half())
    assert topk.tail_logprob is not None
    mass = topk.logprobs.double().exp().sum(1) + topk.tail_logprob.double().exp()
    assert (mass - 1).min() < -1e-5  # forward_kl without a division by it
    assert (soft(student.double(), topk, divergence=divergence) > 0).all()
    assert (soft(student, topk, divergence=divergence, backend=backend) >= -2 * EPS).all()


@pytest.mark.parametrize("depth", [150.0, 1e4])
def test_gradients_are_finite_if_the_support_underflows(
    depth: float, pair: tuple[str, str], backend: str
) -> None:
    tail, divergence = pair
    inputs = with_topk(make_inputs("randn", 2, 65), 5, tail)
    assert isinstance(inputs.teacher, TopK)
    ids = inputs.teacher.token_ids
    student = inputs.student.scatter_add(1, ids, torch.full(ids.shape, -depth))
    inputs = inputs._replace(student=student)
    rows, grad = rows_and_gradient(*inputs, divergence=divergence, backend=backend)
    assert rows.isfinite().all()
    assert grad.isfinite().all()
    assert (grad != 0).any()
    obey(backend, inputs, divergence)


@pytest.mark.parametrize("k", [0, 3, 7])
def test_gradcheck(k: int, pair: tuple[str, str]) -> None:
    tail, divergence = pair
    teacher = torch.randn(4, 7, dtype=torch.float64)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    inputs = with_topk(Inputs(student, teacher, torch.tensor([1, -100, 3, 6])), max(k, 1), tail)
    topk = inputs.teacher
    assert isinstance(topk, TopK)
    if k == 0:
        topk = topk._replace(token_ids=topk.token_ids[:, :0], logprobs=topk.logprobs[:, :0])

    def loss(s: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"divergence": divergence, "label_smoothing": 0.1, "beta": 0.3}
        return kd_loss(s, topk, inputs.labels, reduction="none", **keywords)

    assert torch.autograd.gradcheck(loss, student)


@of_probabilities
def test_the_baseline_is_the_same_loss(divergence: str) -> None:
    teacher = torch.randn(4, 9, dtype=torch.float64)
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 3, 6])
    for tail in (tail for tail, name in PAIRS if name == divergence):
        topk = with_topk(Inputs(student, teacher, labels), 4, tail).teacher
        assert isinstance(topk, TopK)
        topk.logprobs[0] = -INF  # no entries; one absent
        if tail != "sampled":
            topk.logprobs[2, 1] = -INF
        keywords: dict[str, Any] = {"divergence": divergence, "reduction": "sum"}
        for loss in (kd_loss, eager_kd_loss):
            loss(student, topk, labels, **keywords)
        ours, theirs = (f(student, topk, labels, **keywords) for f in (kd_loss, eager_kd_loss))
        torch.testing.assert_close(ours, theirs)
        got, want = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
        torch.testing.assert_close(got, want)
