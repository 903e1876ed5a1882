"""Regression cases about numbers: NaN and infinity, index overflow, dtypes, alignment, memory."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fast import rows_and_gradient, scalar_and_gradient, truth
from helpers import DTYPES
from regression_registry import case
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.backends import cpu
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import Inputs, assert_obeys_error_rule, make_inputs

INF, NAN = math.inf, math.nan
BLOCK = 2048
SOFT: dict[str, Any] = {"hard_weight": 0, "soft_weight": 1}


def compare(student: Tensor, teacher: Tensor, labels: Tensor, backend: str, **options: Any) -> None:
    """Rows and gradient equal the float64 reference's, infinities and NaNs included."""
    got = rows_and_gradient(student, teacher, labels, backend=backend, **options)
    want = truth(student, teacher, labels, **options)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[student.dtype]
    for a, b in zip(got, want, strict=True):
        r = 1e-5 if a is got[0] else rtol
        torch.testing.assert_close(a, b.to(a.dtype), rtol=r, atol=2**-22, equal_nan=True)


def pair(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(scale * torch.randn(*shape)).to(dtype) for _ in range(2)]


# -------------------------------------------------------------------------- NaN and infinity


@case("R-01", "flash-attention#1930: NaN, the first tile is -inf throughout")
def late_finite_logit(backend: str) -> None:
    one = torch.full((1, 100_000), -INF)
    one[0, 50_000] = 1.5
    for divergence in DIVERGENCES:
        compare(one, one.clone(), torch.tensor([50_000]), backend, divergence=divergence)
        for dtype in DTYPES:
            inputs = make_inputs("inf_first", 2, 3 * BLOCK, dtype)
            compare(*inputs, backend, divergence=divergence)


@case("R-02", "flashinfer#1178: one thread, or one vector lane, sees only -inf")
def infinite_runs_of_a_blocks_length(backend: str) -> None:
    for vocabulary in (2, 3, 7, 9, 17, 31, 63):
        student, teacher = pair(2, vocabulary)
        student[:, :-1] = teacher[:, :-1] = -INF
        labels = torch.full((2,), vocabulary - 1)
        compare(student, teacher, labels, backend, divergence="jsd")
        compare(student, teacher, labels, backend)
    for start in (0, BLOCK, 2 * BLOCK):
        student, teacher = pair(2, 3 * BLOCK + 5)
        student[:, start : start + BLOCK] = teacher[:, start : start + BLOCK] = -INF
        compare(student, teacher, torch.full((2,), 3 * BLOCK), backend)


@case("R-03", "Liger, fla: exp(t)*(t - y) is 0*(-inf) at t = -inf")
def minus_infinity_in_either(backend: str) -> None:
    for divergence in DIVERGENCES:
        for student_row, teacher_row in ((0, 1), (1, 0), (0, 0)):
            student, teacher = pair(2, 40)
            student[student_row, 3] = teacher[teacher_row, 3] = -INF
            compare(student, teacher, torch.tensor([5, 7]), backend, divergence=divergence)


@case("R-04", "ModelCenter#14, optax#898: a padded vocabulary column of -inf")
def padded_vocabulary(backend: str) -> None:
    for divergence in DIVERGENCES:
        options: dict[str, Any] = {"divergence": divergence, "label_smoothing": 0.1}
        student, teacher = pair(3, 50)
        labels = torch.tensor([0, 20, 49])
        plain = scalar_and_gradient(student, teacher, labels, backend=backend, **options)
        wide = [F.pad(x, (0, 14), value=-INF) for x in (student, teacher)]
        got = scalar_and_gradient(*wide, labels, backend=backend, **options)
        torch.testing.assert_close(got[0], plain[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1][:, :50], plain[1], rtol=1e-5, atol=1e-8)
        assert torch.count_nonzero(got[1][:, 50:]) == 0


@case("R-05", "Liger#769: JSD NaN, a mixture underflows to 0")
def jsd_of_opposed_peaks(backend: str) -> None:
    for beta in (0.1, 0.5, 0.9):
        for dtype in DTYPES:
            inputs = make_inputs("opposed", 4, 300, dtype)
            rows, gradient = rows_and_gradient(
                *inputs, divergence="jsd", beta=beta, backend=backend, **SOFT
            )
            entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
            torch.testing.assert_close(rows, torch.full((4,), entropy), rtol=1e-5, atol=0)
            assert gradient.isfinite().all()


@case("R-06", "trl#5594: loss finite through nan_to_num, backward NaN")
def gradients_are_finite_too(backend: str) -> None:
    for divergence in ("forward_kl", "jsd", "tvd"):
        for regime in ("one_hot_teacher", "inf_columns", "opposed", "huge"):
            inputs = make_inputs(regime, 3, 200)
            rows, gradient = rows_and_gradient(*inputs, divergence=divergence, backend=backend)
            assert rows.isfinite().all()
            assert gradient.isfinite().all()


@case("R-07", "ms-swift#8436: a -inf pad position enters the loss")
def ignored_rows_leak_nothing(backend: str) -> None:
    for bad in (-INF, INF, NAN):
        student, teacher = pair(4, 60)
        labels = torch.tensor([-100, 3, -100, 5])
        want = scalar_and_gradient(student, teacher, labels, backend=backend)
        student[0] = student[2, 7] = teacher[0, 3] = teacher[2] = bad
        got = scalar_and_gradient(student, teacher, labels, backend=backend)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert torch.count_nonzero(got[1][[0, 2]]) == 0


@case("R-08", "flash-attention: elements past the length are not masked")
def the_memory_behind_a_row_is_poison(backend: str) -> None:
    for vocabulary in (1, 129, BLOCK - 1, BLOCK + 1):
        for dtype in DTYPES:
            base = [torch.full((3, vocabulary + 40), NAN, dtype=dtype) for _ in range(2)]
            views = [x[:, 7 : 7 + vocabulary] for x in base]
            for view, values in zip(views, pair(3, vocabulary, dtype=dtype), strict=True):
                view.copy_(values)
            labels = torch.arange(3) % vocabulary
            for divergence in DIVERGENCES:
                compare(*views, labels, backend, divergence=divergence)


@case("R-09", "CCE#59: a sentinel label meets a padded column of the last tile")
def ignored_labels_and_tails(backend: str) -> None:
    for ignore_index in (-100, BLOCK + 5, 2 * BLOCK, -1):  # in the tail's padding, too
        student, teacher = pair(3, BLOCK + 3)
        labels = torch.tensor([ignore_index, BLOCK + 2, ignore_index])
        got = scalar_and_gradient(
            student, teacher, labels, ignore_index=ignore_index, backend=backend
        )
        kept = scalar_and_gradient(student[1:2], teacher[1:2], labels[1:2], backend=backend)
        assert torch.equal(got[0], kept[0])
        assert torch.equal(got[1][1:2], kept[1])


@case("R-10", "CCE#55: negative loss, the true logit and the normaliser round differently")
def confident_losses_are_not_negative(backend: str) -> None:
    for dtype in DTYPES:
        for temperature in (1.0, 2.0, 3.7):
            for bonus in (10.0, 17.3, 25.0, 60.0, 1e4):
                student, teacher = pair(64, 500, scale=3.0, dtype=dtype)
                labels = torch.arange(64) * 7
                student[torch.arange(64), labels] += bonus
                rows, _ = rows_and_gradient(
                    student,
                    teacher,
                    labels,
                    hard_weight=1,
                    soft_weight=1e-30,
                    temperature=temperature,
                    backend=backend,
                )
                assert (rows >= 0).all()


@case("R-11", "Paddle#21165: log 0 where logits spread widely")
def logits_over_a_range_of_400(backend: str) -> None:
    for divergence in DIVERGENCES:
        inputs = make_inputs("range_400", 3, 900)
        assert_obeys_error_rule(inputs, backend=backend, divergence=divergence, label_smoothing=0.1)


# ---------------------------------------------------------------------------- index overflow


class Place(torch.autograd.Function):
    """Puts a small leaf into a view of huge memory; the view is then no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, view: Tensor) -> Tensor:
        return view.detach().copy_(leaf)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.clone(), None


@case("R-12", "triton#1058, flash-attention#714: row * stride in 32 bits")
@case("R-14", "pytorch#85005: illegal access where N*V exceeds 2^31")
def rows_at_an_offset_of_2_to_the_31(backend: str) -> None:
    """4 GiB of address space, of which two rows are touched."""
    vocabulary = 2100
    buffers = [torch.empty(2**31 + 4096, dtype=torch.bfloat16) for _ in range(2)]
    views = [x.as_strided((2, vocabulary), (2**31, 1)) for x in buffers]
    student, teacher = pair(2, vocabulary, dtype=torch.bfloat16)
    views[1].copy_(teacher)
    labels = torch.tensor([5, vocabulary - 1])
    want = scalar_and_gradient(student, teacher, labels, backend=backend)
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        placed = Place.apply(leaf, views[0])
        loss = kd_loss(placed, views[1], labels, inplace=inplace, backend=backend)
        assert isinstance(loss, Tensor)
        assert torch.equal(loss.detach(), want[0])
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], want[1])


@case("R-16", "apex#1568, TE#60: int for sizes and row offsets")
def no_int_holds_a_size_or_an_offset(backend: str) -> None:
    narrow = re.compile(
        r"\b(?:int|unsigned|long|u?int32_t)\s+(?:\w*(?:stride|numel|row|offset)\w*|[NV])\s*[;,)=]"
    )
    source = Path(__file__).parents[1] / "csrc"
    files = [f for f in source.rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 5
    assert narrow.search("int row_stride = 3;")  # it can fail
    for file in files:
        for line in file.read_text().splitlines():
            assert not narrow.search(line), (file.name, line)


@case("R-17", "pytorch#191565: a huge tensor of stride 0")
def huge_views_of_stride_0(backend: str) -> None:
    student, teacher = pair(1, 300)
    labels = torch.tensor([7]).expand(500)
    want = scalar_and_gradient(student, teacher, labels[:1], backend=backend)
    wide = [x.expand(500, 300) for x in (student, teacher)]
    got = rows_and_gradient(*wide, labels, backend=backend)
    assert torch.equal(got[0], want[0].expand(500))
    constant = torch.zeros(1).expand(70_000)  # stride 0 over the vocabulary
    rows, gradient = rows_and_gradient(constant, constant, torch.tensor(3), backend=backend)
    torch.testing.assert_close(rows, torch.tensor(0.5 * math.log(70_000)))
    assert gradient.shape == (70_000,)
    if backend == "cpu":  # the operator itself refuses, instead of reading 2^31 entries
        huge = torch.empty_strided((1, 1, 2**31 - 1), (0, 0, 0))
        options = (0, torch.ones((), dtype=torch.float64), 0.5, True, 0.0)
        try:
            torch.ops.fused_kd.forward(huge, huge, None, None, torch.ones(1), *options)
        except RuntimeError as error:
            assert "stride" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a last stride of 0 was accepted")


# ------------------------------------------------------------- dtypes, precision, alignment


@case("R-25", "Liger#1329: true-class gradient rounded to bf16 before 1/N is taken away")
def true_class_gradient_of_confident_rows(backend: str) -> None:
    for dtype in DTYPES:
        for bonus in (10.0, 13.0, 16.0):  # p = 0.9, 0.99, 0.999
            student, teacher = pair(4, 2049, scale=0.5, dtype=dtype)
            labels = torch.arange(4) * 100
            student[torch.arange(4), labels] += bonus
            teacher[torch.arange(4), labels] += bonus
            inputs = Inputs(student, teacher, labels)
            upstream = torch.full((4,), 256.0 if dtype == torch.float16 else 1 / 4)
            assert_obeys_error_rule(inputs, upstream, backend=backend, temperature=2.0)


@case("R-48", "Liger CE: the row's loss is kept in the logits' dtype, then summed")
def losses_are_float32(backend: str) -> None:
    for dtype in DTYPES:
        for reduction in ("none", "mean", "sum"):
            student, teacher = pair(300, 40, dtype=dtype)
            labels = torch.arange(300) % 40
            options: dict[str, Any] = {"reduction": reduction, "temperature": 2.0}
            got = kd_loss(student, teacher, labels, backend=backend, **options)
            want = kd_loss(student.double(), teacher.double(), labels, **options)
            assert isinstance(got, Tensor)
            assert isinstance(want, Tensor)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@case("R-49", "pytorch#55657: a naive float32 sum over many rows")
def a_mean_over_many_rows(backend: str) -> None:
    count = 2**24 if backend != "reference" else 2**18
    student, teacher = torch.tensor([[0.1, 0.7]]), torch.tensor([[0.3, -0.4]])
    one = kd_loss(student.double(), teacher.double(), **SOFT)
    many = [x.expand(count, 2) for x in (student, teacher)]
    got = kd_loss(*many, backend=backend, **SOFT)
    assert isinstance(got, Tensor)
    assert isinstance(one, Tensor)
    torch.testing.assert_close(got.double(), one, rtol=1e-6, atol=0)


@case("R-52", "flash-attention bedf8774: labels off their alignment are read wrong")
def labels_and_logits_at_every_offset(backend: str) -> None:
    labels = torch.randint(40, (40,))
    flat = torch.randn(2, 4 * 40 + 20)
    for offset in range(18):
        student, teacher = (x[offset : offset + 160].view(4, 40) for x in flat)
        compare(student, teacher, labels[offset : offset + 4], backend)
    compare(student, teacher, labels[1:8:2], backend)  # every other label


@case("R-53", "apex#725: vector loads need aligned rows")
def odd_rows(backend: str) -> None:
    for dtype in DTYPES:
        for offset, stride, vocabulary in ((1, 37, 33), (3, 2051, 2049), (5, 131, 131)):
            flat = [torch.randn(8000).to(dtype) for _ in range(2)]
            views = [x.as_strided((3, vocabulary), (stride, 1), offset) for x in flat]
            compare(*views, torch.tensor([0, 1, vocabulary - 1]), backend)


GUARDED = """
import sys, torch
from fused_kd.backends import cpu, reference
from fused_kd.options import Formula, KDOptions, temperature_tensor
from fused_kd.testing import guarded
backend = cpu if sys.argv[1] == "cpu" else reference
torch.set_num_threads(1)
one, temperature = torch.ones(1), temperature_tensor(KDOptions(temperature=2.0))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocabulary in (1, 7, 33, 2047, 2049):
        for side in ("after", "before"):
            rows = [guarded(vocabulary, dtype, side).view(1, 1, vocabulary) for _ in range(2)]
            labels = torch.tensor([vocabulary - 1])
            for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd", "mse"):
                for x in rows:
                    x.normal_()
                formula = Formula(divergence, temperature, 0.5, "t2", 0.1)
                data = (*rows, labels, one, one)
                stats = backend.forward(*data, formula)[2]
                backend.backward(*data, stats, formula, False)
                backend.forward_backward(*data, formula, True)  # writes over the student
                assert rows[0].isfinite().all()
print("done")
"""
OVERREAD = """
import ctypes, torch
from fused_kd.testing import guarded
ctypes.string_at(guarded(7, torch.float32).data_ptr(), 32)
"""


@case("R-63", "pytorch#194799: softmax kernels read past small buffers")
def guard_pages(backend: str) -> None:
    """A row that ends, or begins, at a page nobody may touch."""
    run = [sys.executable, "-c", OVERREAD]
    assert subprocess.run(run, capture_output=True, check=False).returncode == -11  # it can fail
    run = [sys.executable, "-c", GUARDED, backend]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


@case("R-63", "pytorch#194801: shapes that do not fit each other are checked nowhere")
def operators_check_their_shapes(backend: str) -> None:
    if backend != "cpu" or cpu.why_not() is not None:
        return
    ok, one = torch.zeros(1, 2, 9), torch.ones(2)
    labels = torch.zeros(2, dtype=torch.long)
    temperature = torch.ones((), dtype=torch.float64)
    options = (0, temperature, 0.5, True, 0.0)
    bad: list[tuple[Any, ...]] = [
        (ok, torch.zeros(1, 2, 8), labels, one, one),
        (ok, torch.zeros(1, 1, 9), labels, one, one),
        (ok, ok, labels[:1], one, one),
        (ok, ok, labels, one[:1], one),
        (ok, ok, labels, one, one[:1]),
        (ok, ok, labels.int(), one, one),
        (ok, ok, None, one, one),
        (ok[0], ok[0], labels, one, one),
    ]
    torch.ops.fused_kd.forward(ok, ok, labels, one, one, *options)
    calls = [(*arguments, *options) for arguments in bad]
    for wrong in (temperature.float(), temperature.expand(2), 0 * temperature, -temperature):
        calls.append((ok, ok, labels, one, one, 0, wrong, *options[2:]))
    for call in calls:
        try:
            torch.ops.fused_kd.forward(*call)
        except RuntimeError:
            continue
        raise AssertionError([tuple(x.shape) if isinstance(x, Tensor) else x for x in call])


@case("R-65", "Liger#259: wrong beyond one block, behind a comparator that hid NaN")
def more_than_one_block(backend: str) -> None:
    """The comparator's own tests are in test_testing.py."""
    for divergence in DIVERGENCES:
        for vocabulary in (BLOCK + 1, 3 * BLOCK + 7):
            inputs = make_inputs("language_model", 2, vocabulary)
            assert_obeys_error_rule(inputs, backend=backend, divergence=divergence)
