"""The CUDA kernels of kd_metrics, run on the CPU as those of test_cuda_kernels.py.

Columns and indices are compared with the float64 specification. Rows are several groups for each
thread, or slices of a few groups (csrc/cuda/sizes.h).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from support.emulated_cuda import EmulatedCUDA
from support.logits import INF, NAN, shifted
from torch import Tensor

from fused_kd import TopK, kd_metrics
from fused_kd.backends import reference
from fused_kd.measures import Sums, Support

#: So one worker builds the library, which all of these tests use; "cuda" is the emulated backend.
pytestmark = [
    pytest.mark.xdist_group("the emulated CUDA library"),
    pytest.mark.usefixtures("cuda"),
]

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(SINGLE, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (BRAIN, SINGLE), (SINGLE, HALF)]
TEMPERATURES = [1.0, 2.0, 3.7]
LOWEST = torch.finfo(SINGLE).min
ENTROPIES = Sums._fields[-4:]


class Rows(NamedTuple):
    """What `measure` takes; with token_ids (N, K) in place of the teacher, `measure_support`."""

    student: Tensor  # (1, N, V)
    teacher: Tensor  # (1, N, V)
    labels: Tensor  # (N,)
    weight: Tensor  # (N,)
    temperature: Tensor


def make(
    vocabulary: int,
    temperature: float,
    dtypes: tuple[torch.dtype, torch.dtype] = (SINGLE, SINGLE),
    rows: int = 3,
) -> Rows:
    student = 3 * torch.randn(1, rows, vocabulary)
    teacher = student + torch.randn(student.shape)
    return Rows(
        student.to(dtypes[0]),
        teacher.to(dtypes[1]),
        torch.randint(vocabulary, (rows,)),
        torch.ones(rows),
        torch.tensor(temperature, dtype=torch.float64),
    )


def in_double(rows: Rows) -> Rows:
    teacher = rows.teacher.double() if rows.teacher.is_floating_point() else rows.teacher
    return rows._replace(student=rows.student.double(), teacher=teacher)


def near(got: Tensor, want: Tensor, name: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def check(cuda: EmulatedCUDA, rows: Rows, rtol: float = 5e-6, atol: float = 1e-6) -> Sums:
    """Assert that columns and indices are those of float64; return the columns."""
    columns, largest = cuda.measure(*rows)
    exact, truth = reference.measure(*in_double(rows))
    got, want = Sums._make(columns.unbind(1)), Sums._make(exact.unbind(1))
    # the other columns of a row that is NaN have no meaning
    student, teacher = want.student_entropy.isfinite(), want.teacher_entropy.isfinite()
    of_student = {"others", "squares"}
    of_both = {"differences", "products", "at_label"}
    for name, mine, true in zip(Sums._fields, got, want, strict=True):
        rule = torch.ones_like(student)
        if name in of_student | of_both:
            rule = student & teacher if name in of_both else student
        factor = rows.temperature.item() ** 2 if name == "soft" else 1.0
        near(mine[rule], true[rule], name, rtol, factor * atol)
    assert torch.equal(largest[student, 0], truth[student, 0])
    assert torch.equal(largest[teacher, 1], truth[teacher, 1])
    assert ((largest >= 0) & (largest < rows.student.shape[2])).all()
    return got


def check_support(cuda: EmulatedCUDA, rows: Rows) -> Support:
    columns, largest = cuda.measure_support(*rows)
    exact, truth = reference.measure_support(*in_double(rows))
    got, want = Support._make(columns.unbind(1)), Support._make(exact.unbind(1))
    for name, mine, true in zip(Support._fields, got, want, strict=True):
        near(mine, true, name, 5e-6, 2e-6)
    usable = ~want.tail.isnan()
    assert torch.equal(largest[usable], truth[usable])
    return got


# ----------------------------------------------------------------------------- a dense teacher


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sums(cuda: EmulatedCUDA, dtypes: tuple[torch.dtype, torch.dtype], temperature: float):
    # one element, a partial group, whole groups, several of each thread and a ragged end
    for vocabulary in (1, 7, 8, 504, 1203):
        check(cuda, make(vocabulary, temperature, dtypes))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_entries_that_are_absent_or_masked(cuda: EmulatedCUDA, temperature: float) -> None:
    rows = make(1203, temperature, rows=8)
    s, t = rows.student[0], rows.teacher[0]
    s[0, ::2] = t[0, ::2] = -INF
    s[1, :1100] = -INF
    t[2, :1100] = -INF
    s[3, ::3] = t[3, ::3] = t[4, 5:] = LOWEST
    s[5], t[5] = LOWEST, LOWEST
    s[6, :-1], t[6, 1:] = -INF, -INF  # one entry each, another one
    rows.labels[:2] = torch.tensor([0, 3])  # both -inf
    check(cuda, rows)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_labels_that_do_not_exist(cuda: EmulatedCUDA, temperature: float) -> None:
    rows = make(1203, temperature, rows=4)
    rows.labels[:] = torch.tensor([-100, 1203, 2**40, -(2**40)])
    got = check(cuda, rows)
    assert got.hard.isnan().all()
    assert (got.at_label == 0).all()


def test_rows_of_weight_0_are_not_written(cuda: EmulatedCUDA) -> None:
    rows = make(504, 2.0)
    columns, largest = cuda.measure(*rows)
    rows.weight[1] = 0.0
    got = cuda.measure(*rows)
    assert got[0][1].isnan().all()  # as the memory was before
    for mine, want in zip(got, (columns, largest), strict=True):
        assert torch.equal(mine[[0, 2]], want[[0, 2]])


def test_the_first_of_equal_entries_is_the_largest(cuda: EmulatedCUDA) -> None:
    rows = make(1203, 2.0, (BRAIN, BRAIN), rows=6)
    s, t = rows.student[0], rows.teacher[0]
    s[0], t[0] = 1.0, -2.0
    s[1, [7, 8, 600]] = t[1, [1202, 40, 41]] = 30.0  # neighbours in a group, in others
    s[2, [1202, 639, 127]] = t[2, [512, 513]] = 30.0  # of other threads, of other warps
    s[3, 0], t[3, 1202] = 30.0, 30.0
    s[4, ::2] = t[4, 1::2] = 30.0
    check(cuda, rows)


@pytest.mark.parametrize("odd", [INF, NAN])
@pytest.mark.parametrize("at", [0, 599, 1202])
def test_what_is_no_number_marks_its_side_alone(cuda: EmulatedCUDA, at: int, odd: float) -> None:
    rows = make(1203, 2.0, rows=5)
    rows.student[0, 1, at] = rows.teacher[0, 2, at] = odd
    rows.student[0, 3] = rows.teacher[0, 4] = -INF
    got = check(cuda, rows)
    for name in ENTROPIES:
        marked = {1, 3} if name.startswith("student") else {2, 4}
        assert set(getattr(got, name).isnan().nonzero().flatten().tolist()) == marked


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_large_logits_cost_no_accuracy(cuda: EmulatedCUDA, temperature: float) -> None:
    rows = make(1203, temperature)
    s, t = ((8 * x).round() / 8 for x in rows[:2])
    check(cuda, rows._replace(student=s + 1e4, teacher=t - 1e4))


# Every group is above the one before, so that all references rise. 10: exponentials at temperature
# 1 would overflow if their references were those of the losses.
@pytest.mark.parametrize("slope", [0.05, 0.4, -0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_references_that_rise(cuda: EmulatedCUDA, temperature: float, slope: float) -> None:
    rows = make(4099, temperature)
    ramp = slope * torch.arange(4099.0)
    rows = rows._replace(student=rows.student + ramp, teacher=rows.teacher + ramp.flip(0))
    check(cuda, rows, rtol=1e-4 if temperature > 1 else 2e-5)


def test_equal_rows_do_not_differ(cuda: EmulatedCUDA) -> None:
    for dtype in (SINGLE, BRAIN):
        for temperature in TEMPERATURES:
            rows = make(1203, temperature, (dtype, dtype))
            got = check(cuda, rows._replace(teacher=rows.student.clone()))
            for column in (got.differences, got.products, got.at_label):
                assert (column == 0).all()
            for side in ("entropy", "entropy_at_t"):
                assert torch.equal(getattr(got, f"student_{side}"), getattr(got, f"teacher_{side}"))


def test_near_equal_and_confident_rows_keep_their_digits(cuda: EmulatedCUDA) -> None:
    # Σp² - 2Σpq + Σq² would leave nothing of these; a probability near 1 costs the others nothing
    rows = make(1203, 1.0)
    student = rows.student / 100
    near_equal = rows._replace(student=student, teacher=student + 1e-4 * torch.randn(1, 3, 1203))
    got = check(cuda, near_equal, atol=1e-7)
    true = Sums._make(reference.measure(*in_double(near_equal))[0].unbind(1))
    assert (true.differences < 1e-10).all()
    near(got.differences, true.differences, "differences", 2e-2, 0)
    near(got.at_label, true.at_label, "at_label", 0.1, 0)
    student = rows.student.clone()
    student[0, torch.arange(3), rows.labels] = 30.0
    confident = rows._replace(student=student)
    got = check(cuda, confident)
    true = Sums._make(reference.measure(*in_double(confident))[0].unbind(1))
    assert (true.others < 1e-7).all()
    for name in ("others", "squares", "products"):
        near(getattr(got, name), getattr(true, name), name, 1e-5, 0)
    near(got.student_entropy, true.student_entropy, "student_entropy", 0, 1e-7)
    both = confident._replace(teacher=student + 1e-2 * torch.randn(student.shape))
    got = check(cuda, both)
    true = Sums._make(reference.measure(*in_double(both))[0].unbind(1))
    near(got.at_label, true.at_label, "at_label", 1e-3, 0)


def test_without_rows(cuda: EmulatedCUDA) -> None:
    rows = make(7, 2.0, rows=0)
    assert cuda.measure(*rows)[0].shape == (0, len(Sums._fields))


# ------------------------------------------------------------------------------ a top-k teacher


def with_support(rows: Rows, k: int) -> Rows:
    count, vocabulary = rows.student.shape[1:]
    ids = torch.stack([torch.randperm(vocabulary)[:k] for _ in range(count)]).to(torch.int32)
    return rows._replace(teacher=ids)


# one partial group, whole groups in one slice, several slices and a ragged end
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_tails(cuda: EmulatedCUDA, dtype: torch.dtype, temperature: float) -> None:
    for vocabulary, k in [(1, 0), (7, 1), (7, 7), (512, 5), (1203, 0), (1203, 90), (1203, 1203)]:
        got = check_support(cuda, with_support(make(vocabulary, temperature, (dtype,) * 2), k))
        assert (got.tail == -INF).all() == (k == vocabulary)


def test_ids_outside_the_vocabulary_are_absent(cuda: EmulatedCUDA) -> None:
    rows = with_support(make(1203, 2.0), 9)
    want = cuda.measure_support(*rows._replace(teacher=rows.teacher[:, :5].contiguous()))
    # 1203: the ragged group's entries that are missing
    rows.teacher[:, 5:] = torch.tensor([-1, 1203, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert all(map(torch.equal, cuda.measure_support(*rows), want))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_odd_rows_with_a_support(cuda: EmulatedCUDA, temperature: float) -> None:
    rows = with_support(make(1203, temperature, rows=11), 5)
    s, ids = rows.student[0], rows.teacher.long()
    s[0].scatter_(0, ids[0], 400.0)  # a tail that underflows next to the support
    top = s[1].gather(0, ids[1])
    s[1] = -INF
    s[1].scatter_(0, ids[1], top)  # nothing outside
    s[2].scatter_(0, ids[2], -INF)  # nothing inside
    s[3] = torch.where(torch.arange(1203) % 3 == 0, s[3], LOWEST)
    s[4] = -INF
    s[5, 7], s[6, 1202] = NAN, INF
    s[7].scatter_(0, ids[7, :1], NAN)
    s[8, :] = 1.0  # all equal
    rows.labels[8:10] = torch.tensor([-100, 1203])
    s[10] += torch.linspace(0, 300, 1203)  # rising references
    got = check_support(cuda, rows)
    assert got.tail.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert got.tail[1] == -INF
    assert got.hard.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9]
    rows.weight[3] = 0.0
    assert cuda.measure_support(*rows)[0][3].isnan().all()


# --------------------------------------------------------------------------------- kd_metrics


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_metrics(tail: str) -> None:
    rows = make(1203, 2.0, (BRAIN, BRAIN), rows=6)
    # rows in groups, none of them aligned
    student, teacher = (shifted(x.view(2, 3, -1), 3) for x in rows[:2])
    labels = rows.labels.view(2, 3)
    labels[1, 1] = -100
    for side in (teacher, TopK.from_logits(teacher, 9, 2.0)._replace(tail=tail)):
        got = kd_metrics(student, side, labels, temperature=2.0, backend="cuda")
        want = kd_metrics(student, side, labels, temperature=2.0, backend="reference")
        for name, mine, true in zip(got._fields, got, want, strict=True):
            near(mine, true.double(), name, 2e-5, 2e-6)
        assert not math.isnan(got.mean().soft)
