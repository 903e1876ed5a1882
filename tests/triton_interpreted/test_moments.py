"""The kernels of `measure` and `measure_support`, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CONFIGURATIONS, DTYPES, V, configured
from support.logits import identical
from torch import Tensor

from fused_kd.backends import reference
from fused_kd.measures import Sums, Support
from fused_kd.testing import guarded

ops = torch.ops.fused_kd
INF, NAN = math.inf, math.nan
LOWEST = torch.finfo(torch.float32).min
#: Rows at multiples of 16 entries are read by vectors, and a tile holds 16.
ALIGNED = 48
#: Vectors of two entries; one entry for each lane.
CUTS = {name: CONFIGURATIONS[name] for name in ("one part", "four parts")}
ONE_PART = CUTS["one part"]
ENTROPIES = [i for i, name in enumerate(Sums._fields) if "entropy" in name]


def temperature(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def make_rows(*rows: Tensor | None, n: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a view (1, n, V) of rows that begin at multiples of 16 entries; NaN lies between."""
    memory = torch.full((1, n, ALIGNED), NAN).to(dtype)
    view = memory[..., :V]
    view.copy_((2 * torch.randn(1, n, V)).to(dtype))
    for i, row in enumerate(rows):
        if row is not None:
            view[0, i] = row.to(dtype)
    return view


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6, equal_nan=True)


# the exponential at temperature 1 is the one at T, its square, or a separate one
@pytest.mark.parametrize(
    ("t", "dtypes"), [*zip([2.0, 1.0, 0.6, 2.0], DTYPES, strict=True)], ids=str
)
@pytest.mark.parametrize("name", CUTS)
def test_both_sides(name: str, t: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (make_rows(dtype=dtype) for dtype in dtypes)
    student[0, 0, 44] = 9.0  # the label is the confident student's largest, and the last entry
    labels, weight = torch.tensor([44, 7, V, -1]), torch.tensor([1.0, 0.5, 2.0, NAN])
    arguments = labels, weight, temperature(t)
    with configured(**CUTS[name]):
        columns, largest = ops.triton_measure(student, teacher, *arguments)
    sides = student.double(), teacher.double()
    want, indices = reference.measure(*sides, *arguments)
    near(columns, want)
    identical([largest], [indices])
    assert (columns[2:, Sums._fields.index("at_label")] == 0).all()
    others = Sums._make(columns.unbind(1)).others
    exact = Sums._make(want.unbind(1)).others
    torch.testing.assert_close(others[0].double(), exact[0], rtol=1e-5, atol=0)  # not 1 - π_y


@pytest.mark.parametrize("name", CUTS)
def test_the_first_of_equal_entries(name: str) -> None:
    # of one lane and vector; of two lanes, the higher of which has the smaller index; of two tiles;
    # in the rest of the row; none is finite
    places = [[2, 3], [13, 17], [20, 41], [44, 43], range(V)]
    student, teacher = make_rows(n=5).clamp_(max=5.0), make_rows(n=5).clamp_(max=5.0)
    for i, at in enumerate(places):
        student[0, i, list(at)] = 6.0
        teacher[0, i, list(at)[1:]] = 6.0
    arguments = torch.tensor([0, 13, 41, 43, 1]), torch.ones(5), temperature(1.0)
    with configured(**CUTS[name]):
        _, largest = ops.triton_measure(student, teacher, *arguments)
        _, of_support = ops.triton_measure_support(student, torch.zeros(5, 1).int(), *arguments)
    assert largest[:, 0].tolist() == of_support.tolist() == [2, 13, 20, 43, 0]
    assert largest[:, 1].tolist() == [3, 17, 41, 43, 1]


def test_equal_rows_do_not_differ() -> None:
    rows = make_rows() * 5
    arguments = torch.tensor([0, 7, 44, -1]), torch.ones(4), temperature(2.0)
    with configured(**ONE_PART):
        columns, _ = ops.triton_measure(rows, rows.clone(), *arguments)
    sums = Sums._make(columns.unbind(1))
    for difference in (sums.soft, sums.differences, sums.products, sums.at_label):
        assert (difference == 0).all()


def test_infinities_and_masks() -> None:
    student, teacher = make_rows(n=7), make_rows(n=7)
    student[0, 0, 3], teacher[0, 1, 3] = NAN, INF
    student[0, 2], teacher[0, 3] = -INF, -INF
    student[0, 4, 7:30], teacher[0, 4, 11:40] = -INF, -INF
    student[0, 5, 9:], teacher[0, 5, 3:] = LOWEST, LOWEST
    student[0, 6], teacher[0, 6] = -1e4, 1e4
    student[0, 6, 1:3], teacher[0, 6, 2:4] = -9999.0, 10001.0
    arguments = torch.tensor([3, 3, 3, 3, 9, 11, 2]), torch.ones(7), temperature(2.0)
    want, indices = reference.measure(student.double(), teacher.double(), *arguments)
    ids = torch.tensor([[3, 8], [3, 8], [4, 2], [5, 6], [1, 2], [0, 1], [1, 9]], dtype=torch.int32)
    tails, first = reference.measure_support(student.double(), ids, *arguments)
    with configured(**ONE_PART):
        columns, largest = ops.triton_measure(student, teacher, *arguments)
        of_support, of_student = ops.triton_measure_support(student, ids, *arguments)
    near(columns[:, :2], want[:, :2])
    near(columns[:, ENTROPIES], want[:, ENTROPIES])
    near(columns[4:], want[4:])
    near(of_support, tails)
    # of a row without a number, any index that is inside
    identical([largest[4:], of_student[3:]], [indices[4:], first[3:]])
    assert ((largest >= 0) & (largest < V) & (of_student[:, None] < V)).all()


@pytest.mark.parametrize(("t", "dtype"), [(1.0, torch.float32), (2.0, torch.bfloat16)])
def test_a_support(t: float, dtype: torch.dtype) -> None:
    student = make_rows(dtype=dtype)
    student[0, 1] += 1000.0
    labels, weight = torch.tensor([0, 44, V, 7]), torch.ones(4)
    order = torch.arange(V, dtype=torch.int32)
    some = torch.where(order < 5, 3 * order, -1).expand(4, V).contiguous()
    some[3] = order  # nothing is outside
    some[2, 0], some[2, 1] = V, -7  # these count as absent
    for ids in (some, some[:, :0]):
        arguments = labels, weight, temperature(t)
        with configured(**ONE_PART):
            columns, largest = ops.triton_measure_support(student, ids, *arguments)
        ids = torch.where((ids >= 0) & (ids < V), ids, -1)
        want, indices = reference.measure_support(student.double(), ids, *arguments)
        near(columns, want)
        identical([largest], [indices])
        assert columns.shape == (4, len(Support._fields))
    assert (columns[:, 1:] >= 0).all()  # without a support
    with configured(**ONE_PART):
        columns, _ = ops.triton_measure_support(student, some, labels, weight, temperature(t))
    assert (columns[3, 1:] == -INF).all()


@pytest.mark.parametrize("name", CUTS)
def test_no_access_beyond_guard_pages(name: str) -> None:
    student, teacher = (guarded(V, torch.bfloat16).view(1, 1, V) for _ in range(2))
    student.copy_(torch.randn(V))
    teacher.copy_(torch.randn(V))
    ids = torch.tensor([[1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    for label in (V - 1, 2**40):
        arguments = torch.tensor([label]), torch.ones(1), temperature(2.0)
        with configured(**CUTS[name]):
            columns, _ = ops.triton_measure(student, teacher, *arguments)
            of_support, _ = ops.triton_measure_support(student, ids, *arguments)
        assert columns[:, 1:].isfinite().all()
        assert of_support[:, 1:].isfinite().all()


def test_rows_of_weight_zero_are_not_read() -> None:
    nothing = torch.full((1, 1, V), NAN)
    arguments = torch.tensor([2**40]), torch.zeros(1), temperature(2.0)
    for results in (
        ops.triton_measure(nothing, nothing, *arguments),
        ops.triton_measure_support(nothing, torch.zeros(1, 1).int(), *arguments),
    ):
        assert all((x == 0).all() for x in results)


def test_rows_at_two_strides() -> None:
    student, teacher = (make_rows().contiguous().view(2, 2, V) for _ in range(2))
    views = torch.full((2, 3, V), NAN), torch.full((2, 2, V + 5), NAN)
    views = views[0][:, 1:], views[1].transpose(0, 1)[..., 5:]
    for view, x in zip(views, (student, teacher), strict=True):
        view.copy_(x)
    arguments = torch.arange(4), torch.ones(4), temperature(2.0)
    want = ops.triton_measure(student, teacher, *arguments)
    identical(ops.triton_measure(*views, *arguments), want)
    ids = torch.arange(8, dtype=torch.int32).view(4, 2)
    tails = ops.triton_measure_support(student, ids, *arguments)
    identical(ops.triton_measure_support(views[0], ids, *arguments), tails)
    nothing = torch.zeros(0).long(), torch.ones(0), arguments[2]
    columns, largest = ops.triton_measure(student[:0], student[:0], *nothing)
    assert (columns.shape, largest.shape) == ((0, len(Sums._fields)), (0, 2))


def test_bad_arguments_are_named() -> None:
    rows, labels, weight, t = make_rows(), torch.zeros(4).long(), torch.ones(4), temperature(2.0)
    ids = torch.zeros(4, 2).int()
    for pattern, arguments in (
        ("weight must be torch.float32", (rows, rows, labels, weight.double(), t)),
        ("weight must be torch.float32, one for each row", (rows, rows, labels, weight[1:], t)),
        ("labels must be torch.int64, one", (rows, rows, labels[1:], weight, t)),
        ("teacher must be .B, S, V.", (rows, rows[..., 1:], labels, weight, t)),
        ("student must be float32, bfloat16", (rows.double(), rows, labels, weight, t)),
        ("last stride 1", (rows.mT, rows.mT, labels, torch.ones(V), t)),
    ):
        with pytest.raises(RuntimeError, match=pattern):
            ops.triton_measure(*arguments)
    for pattern, arguments in (
        ("weight must be", (rows, ids, labels, weight[1:], t)),
        ("token_ids must be int32", (rows, ids.long(), labels, weight, t)),
        ("token_ids .B.S, K.", (rows, ids[1:], labels, weight, t)),
        ("token_ids must be int32", (rows, ids[0], labels, weight, t)),
    ):
        with pytest.raises(RuntimeError, match=pattern):
            ops.triton_measure_support(*arguments)
