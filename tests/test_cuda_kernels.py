"""The CUDA kernels and their launchers, run on the CPU (tests/cuda_on_cpu), by the error rule.

Rows are divided as on a GPU but in smaller pieces (csrc/cuda/sizes.h): these short rows reach
several blocks, several chunks of a slice, ragged ends. Capability 80 takes the general kernel, 90
the one for clusters. The slow tests run the suite of every other backend on them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support.backends import formula_of
from support.emulated_cuda import EmulatedCUDA
from support.heads import make_heads, multiply_as_on_cuda
from support.logits import identical, rows_and_gradient, scalar_and_gradient, shifted, truth
from support.processes import passes, run_python
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.backends import reference
from fused_kd.divergences import DIVERGENCES
from fused_kd.engines import chunks
from fused_kd.testing import assert_obeys_error_rule, make_inputs

#: So one worker builds the library, which all of these tests use; "cuda" is the emulated backend.
pytestmark = [
    pytest.mark.xdist_group("the emulated CUDA library"),
    pytest.mark.usefixtures("cuda"),
]

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# the student's type is compiled in; the teacher's is, or is chosen at run time
DTYPES = [(SINGLE, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (BRAIN, SINGLE), (SINGLE, BRAIN)]
NAN, INF = float("nan"), float("inf")


def obey(regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype], **keywords) -> None:
    vocabulary = keywords.pop("vocabulary", 1203)
    inputs = make_inputs(regime, 2, vocabulary, *dtypes)
    scale = 1024.0 if dtypes[0] == HALF else 1.0
    keywords = {"temperature": 2.0, "label_smoothing": 0.1, "beta": 0.3, **keywords}
    upstream = scale * torch.tensor([1.0, -0.3])
    assert_obeys_error_rule(inputs, upstream, backend="cuda", divergence=divergence, **keywords)


# several blocks and a ragged end; sums with maxima that grow, infinities that fill the first blocks
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["language_model", "confident", "inf_first", "one_hot_teacher"])
def test_error_rule(regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    obey(regime, divergence, dtypes)


# one element, a partial group, whole groups in one block, whole and ragged ones in several
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 504, 2048, 4099])
def test_any_vocabulary(vocabulary: int, divergence: str) -> None:
    for dtypes in DTYPES[:2]:
        obey("language_model", divergence, dtypes, vocabulary=vocabulary)


# the hard term's exponential is the soft one's, its square, a separate one
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_temperature_and_smoothing(divergence: str, smoothing: float, temperature: float) -> None:
    for regime in ("language_model", "inf_columns"):
        keywords = {"temperature": temperature, "label_smoothing": smoothing}
        obey(regime, divergence, (BRAIN, BRAIN), **keywords)


@pytest.mark.parametrize("terms", [{"hard_weight": 0}, {"soft_weight": 0}], ids=str)
def test_one_term_alone(divergence: str, terms: dict[str, float]) -> None:
    for dtypes in DTYPES:
        obey("inf_columns", divergence, dtypes, **terms)


@pytest.mark.parametrize(("vocabulary", "in_a_cluster"), [(1203, True), (270_001, False)])
def test_which_kernel_these_tests_run(
    cuda: EmulatedCUDA, vocabulary: int, in_a_cluster: bool
) -> None:
    student, teacher, labels = make(vocabulary, BRAIN)
    rows = student[None], teacher[None], labels, torch.ones(3), torch.ones(3), formula_of()
    assert (cuda.workspace(*rows) == 0) == (in_a_cluster and cuda.capability == 90)


def test_a_row_too_long_for_a_cluster(cuda: EmulatedCUDA) -> None:
    obey("language_model", "forward_kl", (BRAIN, BRAIN), vocabulary=270_001)


#: Whole groups, about five for each thread.
SEVERAL_GROUPS = 40_000


# each group of a thread is further above its reference, the teacher's further below, or the reverse
# 0.04: exponentials are finite, but the reciprocals of sums times a small weight would underflow
@pytest.mark.parametrize("slope", [0.2, 0.04, -0.2])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_references_that_are_left_behind(divergence: str, temperature: float, slope: float) -> None:
    inputs = make_inputs("language_model", 2, SEVERAL_GROUPS, BRAIN, BRAIN)
    ramp = slope * torch.arange(float(SEVERAL_GROUPS))
    student, teacher = (inputs.student + ramp).to(BRAIN), (inputs.teacher - ramp).to(BRAIN)
    inputs = inputs._replace(student=student, teacher=teacher)
    keywords = {"temperature": temperature, "label_smoothing": 0.1, "beta": 0.3}
    upstream = torch.tensor([1e-3, -3e-4])
    assert_obeys_error_rule(inputs, upstream, backend="cuda", divergence=divergence, **keywords)


# the first groups of all threads are absent; only the references would differ
def test_mse_alone_after_absent_groups() -> None:
    student, teacher, labels = make(SEVERAL_GROUPS, SINGLE)
    student[:, :-16] = teacher[:, :-16] = -INF
    keywords = {"divergence": "mse", "hard_weight": 0.0}
    got = rows_and_gradient(student, teacher, labels, backend="cuda", **keywords)
    want = rows_and_gradient(student[:, -16:], teacher[:, -16:], labels % 16, **keywords)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got[1][:, -16:], want[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("odd", [INF, NAN])
@pytest.mark.parametrize("at", [0, 599, 1202])
def test_what_is_no_number_marks_its_row_alone(divergence: str, at: int, odd: float) -> None:
    student, teacher, labels = make(1203, BRAIN, rows=4)
    student[1, at] = odd
    teacher[2, at] = odd
    for hard_weight in (0.0, 0.5):
        keywords = {"divergence": divergence, "hard_weight": hard_weight, "temperature": 2.0}
        rows, gradient = rows_and_gradient(student, teacher, labels, backend="cuda", **keywords)
        marked = torch.tensor([False, True, True, False])
        assert torch.equal(rows.isnan(), marked)
        assert torch.equal(gradient.isnan().all(1), marked)
        assert torch.equal(gradient.isnan().any(1), marked)


# a confident row's cross-entropy is a small number, and never below 0
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_a_confident_row_has_no_negative_loss(temperature: float, offset: float) -> None:
    student, teacher, labels = make(1203, SINGLE, rows=16)
    student[torch.arange(16), labels] = torch.linspace(20.0, 90.0, 16)
    student += offset
    keywords = {"soft_weight": 0.0, "hard_weight": 1.0, "temperature": temperature}
    rows, _ = rows_and_gradient(student, teacher, labels, backend="cuda", **keywords)
    want = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
    assert (rows >= 0).all()
    unit = 2.0**-23 * (1 + (student.max(1).values - student.min(1).values).double())
    assert ((rows.double() - want).abs() <= 4 * unit).all()


def make(vocabulary: int, dtype: torch.dtype, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (3 * torch.randn(rows, vocabulary) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(vocabulary, (rows,))


LOWEST = torch.finfo(SINGLE).min


# a warp's first groups are all masked by the lowest number; its second groups are not
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_reference_that_rises_from_the_lowest_number(divergence: str) -> None:
    # A thread whose sum is 0 must not be rebased: the shift is infinite.
    student, teacher, _ = make(12288, SINGLE, rows=1)
    masked, other = (student, teacher) if divergence == "forward_kl" else (teacher, student)
    masked[:, :256] = LOWEST
    other[:, :256] = torch.where(torch.arange(256) // 8 % 2 == 0, 0.0, -12.0)
    keywords = {"divergence": divergence, "temperature": 0.1, "backend": "cuda"}
    rows, _ = rows_and_gradient(student, teacher, hard_weight=0.0, **keywords)
    assert (rows > 1e30).all()


def test_smoothing_over_the_lowest_number() -> None:
    # A thread without entries must not be rebased either.
    student, teacher, labels = make(12288, SINGLE, rows=1)
    for logits in (student, teacher):
        logits[:, :256] = LOWEST
        logits[:, 40:48] = logits[:, 552:560] = -INF  # all that one thread has
    labels[:] = 300
    keywords = {"label_smoothing": 0.1, "temperature": 1.0, "backend": "cuda"}
    rows, _ = rows_and_gradient(student, teacher, labels, **keywords)
    assert (rows > 1e30).all()


def test_bits_depend_on_the_row_alone(cuda: EmulatedCUDA, divergence: str) -> None:
    # not on the batch, nor on the order in which threads and blocks happen to run.
    inputs = make(1203, BRAIN, rows=4)
    keywords = {"backend": "cuda", "divergence": divergence}
    rows, gradient = rows_and_gradient(*inputs, **keywords)
    for seed in range(5):
        cuda.seed(seed)
        again = rows_and_gradient(*inputs, **keywords)
        assert torch.equal(again[0], rows)
        assert torch.equal(again[1], gradient)
    row, row_gradient = rows_and_gradient(*(x[2:3].clone() for x in inputs), **keywords)
    assert torch.equal(row, rows[2:3])
    assert torch.equal(row_gradient, gradient[2:3])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_that_take_one_anothers_place(cuda: EmulatedCUDA, divergence: str) -> None:
    # Rows share the records in memory; some have weight 0. Each has the bits that it has alone.
    student, teacher, labels = make(1203, SINGLE, rows=13)
    w = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5])
    formula = formula_of(divergence=divergence, temperature=2.0)
    for seed in range(5):
        cuda.seed(seed)
        rows = student[None], teacher[None], labels, w, w, formula
        hard, soft, stats, gradient = cuda.forward_backward(*rows)
        assert torch.equal(cuda.forward(*rows)[1], soft)
        for n in range(13):
            row = slice(n, n + 1)
            alone = student[None, row], teacher[None, row], labels[row], w[row], w[row], formula
            got = cuda.forward_backward(*alone)
            for mine, its in zip((hard, soft, stats, gradient[0]), got, strict=True):
                assert torch.equal(mine[row], its.view_as(mine[row])), n


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
@pytest.mark.parametrize("vocabulary", [520, 1203])
def test_any_alignment(vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher, labels = make(vocabulary, dtype)
    want = rows_and_gradient(student, teacher, labels, backend="cuda")
    for offset in range(9):
        for there in (0, offset):
            tensors = shifted(student, offset), shifted(teacher, there), labels
            for got, expected in zip(
                rows_and_gradient(*tensors, backend="cuda"), want, strict=True
            ):
                assert torch.equal(got, expected), (offset, there)
    logits = shifted(student, 3).requires_grad_() * 1.0
    kd_loss(logits, teacher, labels, backend="cuda", inplace=True, reduction="sum")
    torch.testing.assert_close(logits.detach(), want[1])


def test_a_row_beyond_2_to_the_31() -> None:
    vocabulary = 1203
    memory = torch.empty(2**31 + 4096, dtype=BRAIN)  # untouched but for two rows
    view = memory.as_strided((2, vocabulary), (2**31, 1))
    student, teacher, labels = make(vocabulary, BRAIN, rows=2)
    view.copy_(student)
    got = rows_and_gradient(view[None], teacher[None], labels[None], backend="cuda")
    want = rows_and_gradient(student[None], teacher[None], labels[None], backend="cuda")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_labels_outside_make_their_row_nan(cuda: EmulatedCUDA) -> None:
    student, teacher, _ = make(520, SINGLE, rows=5)
    labels = torch.tensor([0, 520, -1, 2**62, 519])
    weights = torch.full((5,), 0.5)
    rows = student[None], teacher[None], labels, weights, weights, formula_of()
    hard, soft, _, gradient = cuda.forward_backward(*rows)
    outside = torch.tensor([False, True, True, True, False])
    assert torch.equal(hard.isnan(), outside)
    assert not soft.isnan().any()
    assert torch.equal(gradient[0].isnan().all(1), outside)
    assert torch.equal(gradient[0].isnan().any(1), outside)


# a vocabulary of whole groups is copied in bulk: a student that stands in for a narrower teacher
@pytest.mark.parametrize("vocabulary", [1203, 1200])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_terms_that_are_off_for_a_row_are_not_read(
    cuda: EmulatedCUDA, divergence: str, smoothing: float, dtype: torch.dtype, vocabulary: int
) -> None:
    # Rows: both terms, hard alone (a NaN teacher), soft alone, neither (NaN everywhere).
    student, teacher, labels = make(vocabulary, SINGLE, rows=4)
    teacher = teacher.to(dtype)
    student[1, 5] = -INF  # present, if only the teacher's number says so
    student[1, 6] = teacher[1, 6] = -INF
    formula = formula_of(divergence=divergence, label_smoothing=smoothing, temperature=2.0)
    w_hard, w_soft = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.5, 0.0, 0.5, 0.0])
    labels[1] = 9
    clean = student[None], teacher[None], labels, w_hard, w_soft, formula
    want = reference.forward_backward(*(x.double() if i < 2 else x for i, x in enumerate(clean)))
    student[3], teacher[3] = NAN, NAN
    labels[3] = -100
    hard, soft, stats, gradient = cuda.forward_backward(*clean)
    torch.testing.assert_close(hard, want[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(soft, want[1].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, want[3].float(), rtol=1e-5, atol=1e-6)
    teacher[1] = torch.where(teacher[1] == -INF, teacher[1], NAN)
    again = cuda.forward_backward(*clean)
    assert torch.equal(again[3], gradient)
    assert torch.equal(cuda.backward(*clean[:5], stats, formula), gradient)


# exact by multiplication, computed again, nothing to do, not a number
@pytest.mark.parametrize("scale", [2.0, -0.25, 0.3, 1.0, 0.0, INF])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_rescale(cuda: EmulatedCUDA, dtype: torch.dtype, scale: float) -> None:
    # enough rows for blocks to take several
    student, teacher, labels = make(1203, dtype, rows=9)
    weights = torch.tensor([0.5, 0.0, 0.25] * 3)
    formula = formula_of(temperature=2.0)
    rows = student[None], teacher[None], labels, weights, weights
    *_, stats, gradient = cuda.forward_backward(*rows, formula)
    scaled, multiplied = gradient.clone(), gradient.clone()
    cuda.rescale(scaled, torch.tensor(scale), *rows, stats, formula)
    cuda.multiply(multiplied, torch.tensor(scale))
    assert torch.equal(scaled[0, 1], torch.zeros(1203, dtype=dtype))
    assert torch.equal(multiplied[0, 1], torch.zeros(1203, dtype=dtype))
    if scale == INF:
        assert not scaled[0, weights != 0].isfinite().any()
        return
    exact = reference.forward_backward(
        student[None].double(), teacher[None].double(), *rows[2:4], weights, formula
    )[3]
    half_unit = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(scaled.double(), scale * exact, rtol=half_unit, atol=1e-6)
    assert torch.equal(multiplied, (gradient.float() * scale).to(dtype))


def test_gradient_in_the_forward_is_that_of_the_backward() -> None:
    for divergence, dtype in itertools.product(DIVERGENCES, (SINGLE, BRAIN)):
        keywords = {"backend": "cuda", "divergence": divergence}
        student, teacher, labels = make(1203, dtype)
        labels[1] = -100
        _, now = scalar_and_gradient(student, teacher, labels, reduction="sum", **keywords)
        _, later = rows_and_gradient(student, teacher, labels, **keywords)
        assert torch.equal(now, later)
        _, exact = truth(student, teacher, labels, divergence=divergence)
        assert (now.double() - exact).norm() <= 0.01 * exact.norm()


# one partial group, whole groups in one block, several blocks and a ragged end, no cluster at all
@pytest.mark.parametrize(
    ("divergence", "vocabulary"),
    [*itertools.product(DIVERGENCES, (7, 504, 1203, 2048)), ("jsd", 270_001)],
)
def test_a_16_bit_gradient_of_float32_logits(
    cuda: EmulatedCUDA, divergence: str, vocabulary: int
) -> None:
    # The float32 one, rounded once, in rows of any stride; nothing else is written.
    keywords = {"temperature": 2.0, "beta": 0.3, "label_smoothing": 0.1}
    formula = formula_of(divergence=divergence, **keywords)
    student, teacher, labels = make(vocabulary, SINGLE, rows=5)
    student[1, ::3] = teacher[1, ::3] = -INF
    student[2, 0] = NAN
    w_hard, w_soft = torch.tensor([[0.5, 0.5, 0.5, 0.0, 0.0], [0.25, 0.5, 0.5, 0.5, 0.0]])
    pairs = [(BRAIN, SINGLE), (HALF, SINGLE), (BRAIN, BRAIN)]
    for dtype, teacher_dtype in pairs if vocabulary < 10_000 else pairs[:1]:
        rows = (student[None], teacher[None].to(teacher_dtype), labels, w_hard, w_soft, formula)
        *want, gradient = cuda.forward_backward(*rows)
        for padding in (0, 3):
            # rows that are too long end in the memory of the next, and the last behind all rows
            memory = torch.full((1, 10, 2 * vocabulary + padding), 7.0, dtype=dtype)
            out = memory[:, :5, :vocabulary]
            *got, into = cuda.forward_backward(*rows, out=out)
            assert into is out
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            expected = gradient.to(dtype)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            out.fill_(7)
            assert (memory == 7).all(), "something else was written"


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("vocabulary", [504, 1203])
def test_heads_are_rounded_in_the_row_kernel(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bits of a float32 gradient that a separate kernel rounds.
    multiply_as_on_cuda(monkeypatch)
    heads = make_heads(rows=21, vocabulary=vocabulary, dtype=dtype)

    def gradients() -> tuple[Tensor, ...]:
        student = Head(heads.hidden, heads.weight)
        loss = kd_loss(student, heads.teacher_side, heads.labels, backend="cuda")
        return torch.autograd.grad(loss, heads.student[:2])

    got = gradients()
    monkeypatch.setattr(chunks, "FIRST_PART", 1)  # all rows
    identical(got, gradients())


#: The emulator takes too long for a million rows, reads values on the host, and has no products of
#: 16-bit matrices in float32.
SUITE_KEYWORDS = "cuda and not million and not read_on_the_host and not heads_agree"
SUITE = ["edge_rules", "error_rule", "invariants", "shapes", "reductions", "inplace", "autograd"]
SUITE += ["topk", "topk_errors", "metrics"]


@pytest.mark.slow
def test_the_suite_of_every_backend(cuda: EmulatedCUDA) -> None:
    files = [f"tests/test_{name}.py" for name in SUITE]
    command = ["-m", "pytest", "-q", "-k", SUITE_KEYWORDS, "-p", "no:cacheprovider", *files]
    emulated = f"{cuda.capability}:{cuda.library}"
    assert " passed" in passes(run_python(*command, FUSED_KD_EMULATED_CUDA=emulated))
