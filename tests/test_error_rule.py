"""The error rule (docs/numerics.md): every backend against float64 truth and the eager baseline."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import one_thread
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import (
    REGIMES,
    Inputs,
    assert_no_worse,
    assert_obeys_error_rule,
    eager_kd_loss,
    make_inputs,
)

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# equal f32 and bf16 are read as stored; f16 and mixed dtypes are widened block by block
DTYPES = [(SINGLE, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (BRAIN, SINGLE)]
ALL_DTYPES = list(itertools.product((SINGLE, BRAIN, HALF), repeat=2))
# powers of the softened exponential serve the hard term at 1, 2 and 4; 3.7 has a separate
# one; 0.3 leaves the range of plain exponentials; at 50 rows are nearly flat
TEMPERATURES = [1.0, 2.0, 4.0, 3.7, 0.3, 50.0]
UPSTREAM = torch.tensor([1.0, -0.3, 2.0, 1e-3])


def short(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


def obey(
    backend: str,
    inputs: Inputs,
    divergence: str,
    temperature: float = 2.0,
    label_smoothing: float = 0.1,
) -> None:
    upstream = UPSTREAM[: len(inputs.labels)]
    if inputs.student.dtype == torch.float16:
        upstream = 1024 * upstream  # a loss scale, or the gradient is below float16's numbers
    with one_thread():
        assert_obeys_error_rule(
            inputs,
            upstream,
            backend=backend,
            divergence=divergence,
            temperature=temperature,
            label_smoothing=label_smoothing,
            beta=0.3,
        )


# one block and a tail of one: every regime reaches both
@pytest.mark.parametrize("dtypes", DTYPES, ids=short)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(
    regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype], fast: str
) -> None:
    obey(fast, make_inputs(regime, 3, 2049, *dtypes), divergence)


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=short)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_of_the_reference(
    regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    obey("reference", make_inputs(regime, 3, 101, *dtypes), divergence)


# V = 1; less than a vector; vectors and a tail; a block less one, exactly one, and one more; two
# blocks and a half, so that "inf_first" fills a whole first block
@pytest.mark.parametrize("vocabulary", [1, 3, 33, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("regime", ["language_model", "inf_first"])
def test_vocabularies(regime: str, divergence: str, vocabulary: int, fast: str) -> None:
    for dtypes in ((SINGLE, SINGLE), (BRAIN, BRAIN)):
        obey(fast, make_inputs(regime, 2, vocabulary, *dtypes), divergence)


# p and q differ by a third, so log(p/m) is small, and no hard term hides the error of its gradient;
# confident rows have π > 0.999 on both sides
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("kind", ["flat", "confident", "shifted"])
def test_jsd_near_agreement(kind: str, dtype: torch.dtype, fast: str) -> None:
    for vocabulary, beta in itertools.product((33, 1000), (0.1, 0.5, 0.9)):
        inputs = make_inputs(kind, 4, vocabulary, seed=vocabulary)
        shift = -2e4 if kind == "shifted" else 0.0
        noise = make_inputs("randn", 4, vocabulary, seed=1).student
        teacher = inputs.student + 0.3 * noise + shift
        near = Inputs(inputs.student.to(dtype), teacher.to(dtype), inputs.labels)
        assert_obeys_error_rule(
            near,
            backend=fast,
            divergence="jsd",
            beta=beta,
            hard_weight=0.0,
            soft_weight=1.0,
        )


# two segments, four segments: the partial sums are merged
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_real_vocabularies(divergence: str, vocabulary: int, fast: str) -> None:
    dtypes = (SINGLE, SINGLE) if vocabulary == 50257 else (BRAIN, BRAIN)
    for regime in ("language_model", "confident"):
        obey(fast, make_inputs(regime, 1, vocabulary, *dtypes), divergence)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperatures(divergence: str, temperature: float, fast: str) -> None:
    for regime, smoothing in (("language_model", 0.0), ("confident", 0.2), ("inf_columns", 0.1)):
        obey(fast, make_inputs(regime, 2, 515), divergence, temperature, smoothing)


# gradient in the forward, of each dtype, and (float16) in the backward
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_reductions(reduction: str, divergence: str, dtype: torch.dtype, fast: str) -> None:
    inputs = make_inputs("language_model", 6, 700, dtype)
    labels = inputs.labels.clone()
    labels[0] = -100

    def run(loss: object, student: Tensor, teacher: Tensor, **extra: str) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        value = loss(
            leaf,
            teacher,
            labels,
            reduction=reduction,
            divergence=divergence,
            temperature=2.0,
            **extra,
        )
        (-0.7 * value).backward()
        assert leaf.grad is not None
        return value.detach()[None], leaf.grad

    student, teacher = inputs.student, inputs.teacher
    got = run(kd_loss, student, teacher, backend=fast)
    truth = run(kd_loss, student.double(), teacher.double(), backend="reference")
    eager = run(eager_kd_loss, student, teacher)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    # four units of a loss whose logits reach 30 below their maximum
    eps = torch.finfo(SINGLE).eps
    rows = 6 if reduction == "sum" else 1
    assert_no_worse(got[0], truth[0], eager[0], 4 * eps * 30 * rows)
    assert torch.count_nonzero(got[1][0]) == 0
    for i in range(1, 6):
        floor = 4 * eps * truth[1][i].norm().item() + torch.finfo(dtype).smallest_normal
        if dtype == HALF:
            floor += 2.0**-25
        assert_no_worse(got[1][i], truth[1][i], eager[1][i], floor)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ALL_DTYPES, ids=short)
@pytest.mark.parametrize("regime", REGIMES)
def test_everything(
    regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype], fast: str
) -> None:
    for vocabulary, temperature in itertools.product(
        (1, 2, 15, 33, 2047, 2049, 4097, 6200, 33000), TEMPERATURES
    ):
        for smoothing in (0.0, 0.1):
            inputs = make_inputs(regime, 2, vocabulary, *dtypes, seed=vocabulary)
            obey(fast, inputs, divergence, temperature, smoothing)


# --------------------------------------------------------------------- values drawn at random

finite = st.floats(-1e4, 1e4, width=16)
extreme = st.sampled_from([-1e4, -300.0, -87.5, -1e-6, -0.0, 0.0, 88.75, 104.0, 1e4])


DTYPE = st.sampled_from([SINGLE, BRAIN, HALF])


@st.composite
def any_rows(draw: st.DrawFn) -> Inputs:
    vocabulary = draw(st.integers(1, 40))
    entry = st.one_of(finite, extreme)
    row = st.lists(entry, min_size=vocabulary, max_size=vocabulary)
    dtype, teacher_dtype = draw(DTYPE), draw(DTYPE)
    student, teacher = torch.tensor([draw(row)]), torch.tensor([draw(row)])
    label = torch.tensor([draw(st.integers(0, vocabulary - 1))])
    return Inputs(student.to(dtype), teacher.to(teacher_dtype), label)


ANY = given(
    inputs=any_rows(),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from(TEMPERATURES),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)


def examples(number: int) -> settings:
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


@examples(60)
@ANY
def test_any_values_obey_the_error_rule(fast: str, **drawn: Any) -> None:
    obey(fast, **drawn)


@pytest.mark.slow
@examples(3000)
@ANY
def test_any_values_obey_the_error_rule_at_length(fast: str, **drawn: Any) -> None:
    obey(fast, **drawn)
