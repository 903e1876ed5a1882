"""The operators of kd_metrics: every instruction set against float64, opcheck, and bad tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.backends import needs_cpu, threads
from support.logits import identical
from torch import Tensor

from fused_kd.backends import named, reference
from fused_kd.testing import make_inputs

pytestmark = needs_cpu

OPERATORS = ("measure", "measure_support")
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]
# exponentials in range; a peak; far out of range; -inf; finite masks; the temperatures that are
# powers of each other, and others
REGIMES = ["language_model", "confident", "range_400", "inf_columns", "finite_mask"]
TEMPERATURES = [2.0, 1.0, 4.0, 1.7, 0.6]
#: Entries: blocks, pairs of vectors and single ones; and more than threads share with few rows.
SIZES = [2048 + 64 + 5, 2 * 32768 + 2048 + 64]


def op(name: str) -> Any:
    return getattr(torch.ops.fused_kd, name).default


def temperature_of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def support_of(rows: int, size: int, k: int) -> Tensor:
    """Return distinct tokens (N, K), the last absent, and one with the largest id."""
    ids = torch.rand(rows, size).argsort(1)[:, :k].to(torch.int32)
    ids[:, 0] = torch.where((ids == size - 1).any(1), ids[:, 0], size - 1)
    ids[:, -1] = -1
    return ids


def compare(name: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(
        got[0].double(), want[0], rtol=3e-5, atol=3e-6, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
    assert torch.equal(got[1], want[1]), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_every_instruction_set(
    isa: str, dtypes: tuple[torch.dtype, torch.dtype], size: int
) -> None:
    for i, (regime, value) in enumerate(zip(REGIMES, TEMPERATURES, strict=True)):
        student, teacher, labels = make_inputs(regime, 3, size, *dtypes, seed=i)
        if regime == "finite_mask" and torch.float16 in dtypes:
            continue  # its masks are -inf there, as in inf_columns
        labels[0] = size  # outside
        weight, t = torch.ones(3), temperature_of(value)
        double = student[None].double(), teacher[None].double()
        for count in (1, 4):  # threads share rows
            with threads(count):
                got = named("cpu").measure(student[None], teacher[None], labels, weight, t)
                compare(regime, got, reference.measure(*double, labels, weight, t))
                ids = support_of(3, size, 9)
                got = named("cpu").measure_support(student[None], ids, labels, weight, t)
                compare(regime, got, reference.measure_support(double[0], ids, labels, weight, t))


def test_unusable_rows_and_ties(isa: str) -> None:
    student, teacher = torch.zeros(7, 2200), torch.zeros(7, 2200)
    student[:, [70, 2100]] = 2.0
    teacher[:, 2150:] = 1.0
    teacher[:, 5] = -math.inf
    student[0], student[1, 3], student[2, 2199] = -math.inf, math.nan, math.inf
    teacher[3], teacher[4, 2190] = -math.inf, math.nan
    student[5, 2199] = torch.finfo(torch.float32).min
    student[6] = torch.finfo(torch.float32).min
    labels = torch.tensor([0, 1, 2, 3, 70, 2150, 2199])
    t, weight = temperature_of(2.0), torch.ones(7)
    got = named("cpu").measure(student[None], teacher[None], labels, weight, t)
    want = reference.measure(student[None].double(), teacher[None].double(), labels, weight, t)
    student_ok, teacher_ok = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 1, 2, 5, 6])
    entropies = got[0][:, -4:]
    for rows, columns in ((student_ok, (0, 2)), (teacher_ok, (1, 3))):
        usable = torch.zeros(7, dtype=torch.bool).index_fill(0, rows, True)
        for column in columns:
            assert torch.equal(~entropies[:, column].isnan(), usable)
    torch.testing.assert_close(entropies.double(), want[0][:, -4:], equal_nan=True)
    torch.testing.assert_close(got[0][:, :2].double(), want[0][:, :2], equal_nan=True)
    both = torch.tensor([5, 6])
    torch.testing.assert_close(got[0][both].double(), want[0][both])
    assert got[1][student_ok, 0].tolist() == [70, 70, 70, 0]
    assert (got[1][teacher_ok, 1] == 2150).all()
    ids = torch.tensor([[2100, 70]] * 7, dtype=torch.int32)
    got = named("cpu").measure_support(student[None], ids, labels, weight, t)
    want = reference.measure_support(student[None].double(), ids, labels, weight, t)
    torch.testing.assert_close(got[0].double(), want[0], equal_nan=True)
    assert got[1][student_ok].tolist() == [70, 70, 70, 0]


def test_equal_rows_differ_by_exactly_nothing(isa: str) -> None:
    student, _, labels = make_inputs("language_model", 4, 5003)
    columns, _ = named("cpu").measure(
        student[None], student[None].clone(), labels, torch.ones(4), temperature_of(1.7)
    )
    assert (columns[:, 4:7] == 0).all()


def test_the_label_of_two_confident_models_keeps_its_digits(isa: str) -> None:
    student = torch.randn(4, 3000)
    teacher = student + 0.3 * torch.randn(4, 3000)
    student[:, 7] = teacher[:, 7] = 20.0  # p - q is below 1e-6 there
    arguments = torch.full((4,), 7), torch.ones(4), temperature_of(1.0)
    got, _ = named("cpu").measure(student[None], teacher[None], *arguments)
    want, _ = reference.measure(student[None].double(), teacher[None].double(), *arguments)
    torch.testing.assert_close(got[:, 6].double(), want[:, 6], rtol=1e-4, atol=0)


def test_bits_do_not_depend_on_other_rows_or_threads(isa: str) -> None:
    student, teacher, labels = make_inputs("language_model", 40, 40000)
    ids, t = support_of(40, 40000, 9), temperature_of(2.0)
    results = []
    for count in (1, 3):
        for rows in (slice(0, 40), slice(17, 19)):  # the rows of few are shared among threads
            with threads(count):
                s, weight = student[None, rows], torch.ones(40)[rows]
                a = op("measure")(s, teacher[None, rows], labels[rows], weight, t)
                b = op("measure_support")(s, ids[rows], labels[rows], weight, t)
            first = 17 if rows.start == 0 else 0
            results.append([x[first : first + 2] for x in (*a, *b)])
    for other in results[1:]:
        identical(other, results[0])


def arguments(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    student = torch.randn(2, 4, 5).to(dtype)[:, :-1]
    other = torch.randn(2, 3, 5) if name == "measure" else support_of(6, 5, 3)
    return [student, other, torch.randint(5, (6,)), torch.rand(6), temperature_of(2.0)]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            op(name), tuple(arguments(name, dtype)), test_utils=["test_schema", "test_faketensor"]
        )


@pytest.mark.parametrize("name", OPERATORS)
def test_no_rows_and_rows_without_weight(name: str) -> None:
    columns, largest = op(name)(
        torch.zeros(1, 0, 5),
        torch.zeros(1, 0, 5) if name == "measure" else torch.zeros(0, 3).int(),
        torch.zeros(0).long(),
        torch.zeros(0),
        temperature_of(1.0),
    )
    assert len(columns) == len(largest) == 0
    some = arguments(name)
    some[3][1] = 0.0
    kept = [0, 2, 3, 4, 5]
    full = op(name)(*some[:3], torch.ones(6), some[4])
    for mine, rows in zip(op(name)(*some), full, strict=True):
        assert torch.equal(mine[kept], rows[kept])


# position, value, message
WRONG: list[tuple[str, int, Any, str]] = [
    *((name, 0, torch.zeros(6, 5), r"student must be \(B, S, V\)") for name in OPERATORS),
    *((name, 0, torch.zeros(2, 3, 5).double(), "float32, bfloat16") for name in OPERATORS),
    *((name, 2, torch.zeros(5).long(), "labels must be contiguous with 6") for name in OPERATORS),
    *(
        (name, 2, torch.zeros(6).int(), "labels must be a CPU tensor of int64")
        for name in OPERATORS
    ),
    *((name, 3, torch.zeros(7), "weight must be contiguous with 6") for name in OPERATORS),
    *((name, 3, torch.zeros(6).half(), "weight must be a CPU tensor") for name in OPERATORS),
    *((name, 3, torch.zeros(6, device="meta"), "must be on one device") for name in OPERATORS),
    *((name, 4, temperature_of(0.0), "temperature must be positive") for name in OPERATORS),
    ("measure", 1, torch.zeros(2, 3, 4), "differ in dimension 2: 5 and 4"),
    ("measure", 1, torch.zeros(2, 5, 3).mT, "teacher must have last stride 1"),
    ("measure_support", 1, torch.zeros(6, 3).long(), "token_ids must be a contiguous CPU int32"),
    ("measure_support", 1, torch.zeros(5, 3).int(), r"int32 tensor \(6, 3\)"),
    ("measure_support", 1, torch.zeros(18).int(), r"token_ids must be \(N, K\)"),
]


@pytest.mark.parametrize(("name", "position", "value", "message"), WRONG, ids=lambda x: None)
def test_wrong_tensors_are_refused(name: str, position: int, value: Tensor, message: str) -> None:
    wrong = arguments(name)
    wrong[position] = value
    with pytest.raises(RuntimeError, match=message):
        op(name)(*wrong)
