"""kd_metrics: against float64 formulas written out here; kept rows, every kind of side, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import make_heads
from support.logits import DTYPES, make, pair
from support.topk import drawn
from torch import Tensor

from fused_kd import Head, KDMetrics, TopK, kd_loss, kd_metrics
from fused_kd.sides import TAILS
from fused_kd.testing import assert_no_worse, cpu_peak, make_inputs

N, V = 7, 301
TEMPERATURES = [1.0, 2.0, 3.7]
TAILS_OF_CLASSES = ["bucket", "renormalize", "zero"]
NAMES = KDMetrics._fields
OF_LABELS = ("hard", "accuracy", "hard_square", "product", "conflict")
OF_RESULTS = ("student_mass", "teacher_mass", "weight")


def plain(log_pi: Tensor, log_p: Tensor, log_q: Tensor, log_q_1: Tensor, y: Tensor) -> list[Tensor]:
    """Return soft / T², entropies, norms and product with p - q without T, of probabilities."""

    def entropy(x: Tensor) -> Tensor:
        return -torch.special.xlogy(x.exp(), x.exp()).sum(-1)

    hard = log_pi.exp() - F.one_hot(y, log_pi.shape[-1])
    soft = log_p.exp() - log_q.exp()
    kl = torch.where(log_q == -math.inf, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)
    squares = [hard.square().sum(-1), soft.square().sum(-1), (hard * soft).sum(-1)]
    return [kl, *(entropy(x) for x in (log_pi, log_q_1, log_p, log_q)), *squares]


def expected(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    dtype: torch.dtype = torch.float64,
) -> KDMetrics:
    """Return the metrics of dense logits by formulas in this dtype; every row is kept."""
    s, t = student.detach().to(dtype), teacher.to(dtype)
    log_pi, log_p = s.log_softmax(-1), (s / temperature).log_softmax(-1)
    log_q, log_q_1 = (t / temperature).log_softmax(-1), t.log_softmax(-1)
    kl, *entropies, hard, soft, product = plain(log_pi, log_p, log_q, log_q_1, labels)
    one = torch.ones_like(kl)
    return KDMetrics(
        F.cross_entropy(s, labels, reduction="none"),
        temperature**2 * kl,
        *entropies,
        (s.argmax(-1) == t.argmax(-1)).to(dtype),
        (s.argmax(-1) == labels).to(dtype),
        hard,
        temperature**2 * soft,
        temperature * product,
        (product < 0).double(),
        *(one, one, one),
    )


def near(got: KDMetrics, want: KDMetrics, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for name, mine, exact in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(
            mine.double(),
            exact.double(),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def is_repetition(backend: str, *parameters: object) -> bool:
    """Return True off the diagonal of dtypes, temperatures and tails, in a slow interpreter."""
    diagonal = zip(DTYPES, TEMPERATURES, TAILS_OF_CLASSES, strict=True)
    return backend == "triton" and not any(set(parameters) <= set(x) for x in diagonal)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of both models with some equal argmaxes, and labels, some the argmax."""
    student, noise = pair(N, V, scale=3.0)
    labels = torch.randint(V, (N,))
    labels[:3] = student[:3].to(dtype).argmax(1)
    return student.to(dtype), (student + 0.7 * noise).to(dtype), labels


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dense_sides(dtype: torch.dtype, temperature: float, backend: str) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 runs on the reference alone")
    if is_repetition(backend, dtype, temperature):
        pytest.skip("a slow interpreter")
    student, teacher, labels = inputs(dtype)
    got = kd_metrics(
        student.requires_grad_(), teacher, labels, temperature=temperature, backend=backend
    )
    exact = dtype == torch.float64
    near(got, expected(student, teacher, labels, temperature), *([1e-12] * 2 if exact else []))
    assert all(x.dtype == (dtype if exact else torch.float32) for x in got)
    assert not any(x.requires_grad for x in got)
    parts = kd_loss(
        student, teacher, labels, temperature=temperature, backend=backend, return_parts=True
    )
    torch.testing.assert_close(got.mean()[:2], (parts.hard, parts.soft), rtol=1e-5, atol=1e-6)


REGIMES = ["flat", "language_model", "confident", "opposed", "equal", "nearly_equal", "shifted"]


@pytest.mark.parametrize("regime", [*REGIMES, "huge", "range_400"])
def test_the_error_rule(regime: str, backend: str) -> None:
    for i, temperature in enumerate(TEMPERATURES):
        if backend == "triton" and i != len(regime) % 3:
            continue  # the interpreter is slow
        sides = make_inputs(regime, 12, V, DTYPES[i], seed=i)
        got = kd_metrics(*sides, temperature=temperature, backend=backend)
        truth = expected(*sides, temperature)
        eager = expected(*sides, temperature, torch.float32)
        z = sides.student.double()
        unit = 2**-23 * (1 + float((z.amax(1) - z.amin(1)).max()))
        factors = {"soft": temperature**2, "soft_square": temperature**2, "product": temperature}
        for name, mine, exact, other in zip(NAMES, got, truth, eager, strict=True):
            if name != "conflict":  # a sign
                try:
                    assert_no_worse(mine, exact, other.float(), 4 * unit * factors.get(name, 1.0))
                except AssertionError as error:
                    raise AssertionError(f"{name}, T = {temperature}: {error}") from None


def test_large_logits_cost_no_accuracy(backend: str) -> None:
    student, teacher, labels = inputs(torch.float64)
    student, teacher = (8 * student).round() / 8 + 1e4, (8 * teacher).round() / 8 - 1e4
    got = kd_metrics(student.float(), teacher.float(), labels, temperature=2.0, backend=backend)
    near(got, expected(student, teacher, labels, 2.0))
    topk = TopK.from_logits(teacher.float(), 12, 2.0)
    exact = kd_metrics(student, topk, labels, temperature=2.0, backend="reference")
    got = kd_metrics(student.float(), topk, labels, temperature=2.0, backend=backend)
    near(got, exact)


def test_norms_of_near_equal_rows_keep_their_digits(backend: str) -> None:
    # Σp² - 2Σpq + Σq² would leave nothing of these, and 1 - π_y little
    student = torch.zeros(1, V)
    student[0, 3] = 18.0
    teacher = student + 1e-3 * torch.randn(1, V)
    labels = torch.tensor([3])
    got = kd_metrics(student, teacher, labels, backend=backend)
    want = expected(student, teacher, labels, 1.0)
    assert 0 < want.hard_square.item() < 1e-10
    torch.testing.assert_close(got.hard_square.double(), want.hard_square, rtol=1e-4, atol=0)
    student, teacher = student / 100, teacher / 100
    got = kd_metrics(student, teacher, labels, backend=backend)
    want = expected(student, teacher, labels, 1.0)
    torch.testing.assert_close(got.soft_square.double(), want.soft_square, rtol=3e-2, atol=0)


@pytest.mark.parametrize("is_cpu", [True, False])  # a GPU computes all rows
def test_rows_that_are_left_out_are_zero(
    monkeypatch: pytest.MonkeyPatch, is_cpu: bool, backend: str
) -> None:
    monkeypatch.setattr("fused_kd.engines.selection._host_can_read", lambda x: is_cpu)
    student, teacher, labels = inputs()
    full = kd_metrics(student, teacher, labels, backend=backend)
    student[1], teacher[1], labels[1] = math.nan, math.nan, -1
    student[4] = math.nan
    weight = torch.rand(N) + 0.5
    weight[4] = 0.0
    keywords: dict[str, Any] = {"ignore_index": -1, "backend": backend}
    got = kd_metrics(student, teacher, labels, token_weight=weight, **keywords)
    kept = torch.tensor([0, 2, 3, 5, 6])
    for name, mine, all_rows in zip(NAMES, got, full, strict=True):
        want = torch.zeros(N)
        want[kept] = weight[kept] if name == "weight" else all_rows[kept]
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-7)
    mean = got.mean()
    for name, value, rows in zip(NAMES, mean, full, strict=True):
        total = weight[kept].sum()
        want = total if name == "weight" else (weight * rows)[kept].sum() / total
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    nothing = kd_metrics(student, teacher, torch.full((N,), -1), **keywords).mean()
    assert all(x.dim() == 0 and x.item() == 0 for x in nothing)


def test_the_mean_is_that_of_the_loss() -> None:
    student, teacher, labels = inputs()
    labels[2] = -100
    weight = torch.rand(N)
    for k in (None, 9):
        side = teacher if k is None else TopK.from_logits(teacher, k, 2.0)
        parts = kd_loss(
            student, side, labels, temperature=2.0, token_weight=weight, return_parts=True
        )
        mean = kd_metrics(student, side, labels, temperature=2.0, token_weight=weight).mean()
        torch.testing.assert_close(mean[:2], (parts.hard, parts.soft), rtol=1e-5, atol=1e-6)


def test_without_labels_their_fields_are_zero(backend: str) -> None:
    student, teacher, labels = inputs()
    got = kd_metrics(student, teacher, backend=backend)
    full = expected(student, teacher, labels, 1.0)
    zero = {name: torch.zeros(N) for name in OF_LABELS}
    near(got, full._replace(**zero))
    assert all((getattr(got, name) == 0).all() for name in OF_LABELS)


def test_leading_shapes_and_strides(backend: str) -> None:
    student, teacher, labels = make(2, 5)
    flat = kd_metrics(student.view(10, -1), teacher.view(10, -1), labels.view(10), backend=backend)
    got = kd_metrics(student.detach().mT.contiguous().mT, teacher, labels, backend=backend)
    for mine, rows in zip(got, flat, strict=True):
        assert mine.shape == labels.shape
        torch.testing.assert_close(mine.view(10), rows)
    one = kd_metrics(student[0, 0], teacher[0, 0], labels[0, 0], backend=backend)
    assert one.soft.shape == ()


@pytest.mark.parametrize("kind", ["logits", "heads", "topk"])
def test_no_rows(kind: str, backend: str) -> None:
    for shape in [(0,), (2, 0)]:
        sides: list[Any] = [torch.zeros(*shape, V), torch.zeros(*shape, V)]
        if kind == "heads":
            sides = [Head(torch.zeros(*shape, 4), torch.zeros(V, 4))] * 2
        elif kind == "topk":
            sides[1] = TopK.from_logits(sides[1], 3)
        got = kd_metrics(*sides, torch.zeros(shape, dtype=torch.int64), backend=backend)
        assert all(x.shape == shape for x in got)
        assert all(x.item() == 0 for x in got.mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_agree_with_their_logits(dtype: torch.dtype, backend: str) -> None:
    if is_repetition(backend, dtype, 1.0):
        pytest.skip("a slow interpreter")
    heads = make_heads(N, 131, dtype)
    labels = heads.labels.clone()
    labels[3] = -100
    scaled = heads.student_side._replace(scale=0.5)
    logits = [
        0.5 * F.linear(*(x.detach().double() for x in heads.student)),
        F.linear(*(x.double() for x in heads.teacher)),
    ]
    want = kd_metrics(*logits, labels, temperature=2.0, backend="reference")
    near(kd_metrics(scaled, heads.teacher_side, labels, temperature=2.0, backend=backend), want)
    mixed = kd_metrics(scaled, logits[1].float(), labels, temperature=2.0, backend=backend)
    near(mixed, want)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mixed = kd_metrics(
            logits[0].float(), heads.teacher_side, labels, temperature=2.0, backend=backend
        )
    near(mixed, want)


def classes_by_hand(
    student: Tensor, topk: TopK, labels: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Return metrics of a top-k teacher by float64 formulas on its classes; K < V."""
    s, k = student.double(), topk.logprobs.shape[-1]
    in_support = torch.zeros_like(s, dtype=torch.bool).scatter(1, topk.token_ids, True)

    def masses(log_p: Tensor) -> Tensor:
        tail = log_p.masked_fill(in_support, -math.inf).logsumexp(1, keepdim=True)
        return torch.cat([log_p.gather(1, topk.token_ids), tail], 1)

    pi, p = masses(s.log_softmax(1)), masses((s / temperature).log_softmax(1))
    q = topk.logprobs.double()
    tail = topk.tail_logprob
    assert tail is not None
    absent = torch.full((len(s), 1), -math.inf, dtype=torch.float64)
    q = torch.cat([q, tail.double()[:, None] if topk.tail == "bucket" else absent], 1)
    q = q.log_softmax(1)
    label = torch.cat([topk.token_ids == labels[:, None], torch.ones(len(s), 1) > 0], 1)
    label = label.int().argmax(1)
    compared, whole = p, pi
    if topk.tail == "renormalize":
        compared, whole = (torch.cat([x[:, :k].log_softmax(1), absent], 1) for x in (p, pi))
    unit = (q * temperature).log_softmax(1)
    kl, _, teacher_entropy, own, other, hard, soft, product = plain(pi, compared, q, unit, label)
    return {
        "hard": F.cross_entropy(s, labels, reduction="none"),
        "soft": temperature**2 * kl,
        "student_entropy": plain(whole, compared, q, unit, label)[1],
        "teacher_entropy": teacher_entropy
        if temperature == 1 or topk.tail != "bucket"
        else torch.full_like(kl, math.nan),
        "student_entropy_at_t": own,
        "teacher_entropy_at_t": other,
        "agreement": (s.argmax(1) == topk.token_ids[:, 0]).double(),
        "accuracy": (s.argmax(1) == labels).double(),
        "hard_square": hard,
        "soft_square": temperature**2 * soft,
        "product": temperature * product,
        "conflict": (product < 0).double(),
        "student_mass": p[:, :k].exp().sum(1),
        "teacher_mass": q[:, :k].exp().sum(1),
        "weight": torch.ones_like(kl),
    }


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS_OF_CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_topk_is_measured_by_its_classes(
    dtype: torch.dtype, tail: str, temperature: float, backend: str
) -> None:
    if is_repetition(backend, dtype, temperature, tail):
        pytest.skip("a slow interpreter")
    student, teacher, labels = inputs(dtype)
    topk = TopK.from_logits(teacher.float(), 12, temperature)._replace(tail=tail)
    labels[0], labels[1] = topk.token_ids[0, 3], teacher[1].argmin()  # inside, and outside
    got = kd_metrics(student, topk, labels, temperature=temperature, backend=backend)
    near(got, KDMetrics(**classes_by_hand(student, topk, labels, temperature)))


def test_a_sampled_teacher_is_measured_by_its_draws() -> None:
    student, teacher, labels = inputs()
    topk = drawn(teacher, 40, 2.0)
    counts = torch.zeros(N, V).scatter_add(1, topk.token_ids, topk.logprobs.exp())
    got = kd_metrics(student, topk, labels, temperature=2.0)
    dense = expected(student, 2 * counts.log(), labels, 2.0)
    for name in ("hard", "soft", "teacher_entropy_at_t", "accuracy"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(dense, name), rtol=1e-4, atol=1e-5
        )
    assert got.teacher_entropy.isnan().all()
    loss = kd_loss(student, topk, temperature=2.0, hard_weight=0, soft_weight=1, reduction="none")
    torch.testing.assert_close(got.soft + 4 * got.teacher_entropy_at_t, loss)


@pytest.mark.parametrize("tail", [x for x in TAILS if x != "sampled"])
def test_a_topk_of_the_whole_vocabulary_is_dense(tail: str, backend: str) -> None:
    if is_repetition(backend, tail, 1.0):
        pytest.skip("a slow interpreter")
    student, teacher, labels = inputs()
    topk = TopK.from_logits(teacher, V, 2.0)._replace(tail=tail)
    dense = expected(student, teacher, labels, 2.0)
    near(kd_metrics(student, topk, labels, temperature=2.0, backend=backend), dense)
    head = Head(torch.eye(N), student.t().contiguous())
    near(kd_metrics(head, topk, labels, temperature=2.0, backend=backend), dense)


def test_a_row_without_entries_compares_nothing(backend: str) -> None:
    student, _, labels = inputs()
    for k in (0, 3):
        logprobs = torch.full((N, k), -math.inf)
        absent = TopK(torch.zeros(N, k, dtype=torch.int64), logprobs, temperature=2.0)
        got = kd_metrics(student, absent, labels, temperature=2.0, backend=backend)
        for name in ("soft", "teacher_entropy", "agreement", "soft_square", "teacher_mass"):
            assert (getattr(got, name) == 0).all(), name
        assert got.hard.isfinite().all()


def test_entries_of_minus_infinity(backend: str) -> None:
    student, teacher, labels = inputs()
    padded = [F.pad(x, (0, 9), value=-math.inf) for x in (student, teacher)]
    got = kd_metrics(*padded, labels, temperature=2.0, backend=backend)
    near(got, expected(student, teacher, labels, 2.0))
    student[0, labels[0]] = -math.inf  # for the student alone
    teacher[1, labels[1]] = -math.inf  # for the teacher alone
    student[2] = -math.inf
    teacher[3, 5] = math.nan
    got = kd_metrics(student, teacher, labels, backend=backend)
    assert got.hard[0] == got.soft[0] == math.inf
    assert got.hard_square[0] > 1
    assert all(x[1].isfinite() for x in got)
    of_teacher = ("teacher_entropy", "teacher_entropy_at_t", *OF_RESULTS[1:])
    for name, x in zip(NAMES, got, strict=True):
        assert x[2].isnan() == (name not in of_teacher), name
    of_student = ("hard", "student_entropy", "student_entropy_at_t", "accuracy", "hard_square")
    for name, x in zip(NAMES, got, strict=True):
        assert x[3].isnan() == (name not in (*of_student, "student_mass", "weight")), name
    assert all(x[4:].isfinite().all() for x in got)


def test_of_equal_maxima_the_first_counts(backend: str) -> None:
    student, teacher = torch.zeros(2, V), torch.zeros(2, V)
    student[:, [7, 200]] = teacher[:, [7, 9]] = 3.0
    student[1, 4], labels = 3.0, torch.tensor([7, 7])
    topk = TopK(torch.tensor([[9, 7], [9, 7]]), torch.full((2, 2), -1.0), torch.full((2,), -3.0))
    for side in (teacher, topk):
        got = kd_metrics(student, side, labels, backend=backend)
        assert got.agreement.tolist() == got.accuracy.tolist() == [1, 0]


@pytest.mark.parametrize("tail", [None, "bucket", "renormalize"])
def test_in_a_compiled_function(tail: str | None) -> None:
    student, teacher, labels = inputs()
    labels[2] = -100
    side: Any = teacher
    if tail is not None:
        side = TopK.from_logits(teacher, 9, 2.0)._replace(tail=tail)

    def measured(student: Tensor, labels: Tensor) -> tuple[KDMetrics, KDMetrics]:
        metrics = kd_metrics(student, side, labels, temperature=2.0)
        return metrics, metrics.mean()

    got = torch.compile(measured, fullgraph=True, backend="aot_eager")(student, labels)
    for mine, want in zip(got, measured(student, labels), strict=True):
        near(mine, want)


@pytest.mark.parametrize("kind", ["logits", "heads", "topk"])
def test_nothing_of_the_size_of_the_logits_is_allocated(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("fused_kd.metrics._ENTRIES_ON_CPU", 2**14)
    rows, size = 64, 16384
    student, teacher = pair(rows, size)
    labels = torch.randint(size, (rows,))
    sides: list[Any] = [student, teacher]
    if kind == "heads":
        sides = [Head(torch.randn(rows, 8), torch.randn(size, 8)) for _ in range(2)]
    elif kind == "topk":
        sides[1] = TopK.from_logits(teacher, 8)
    fixed = 2 * 2**20  # of the products
    peak = cpu_peak(lambda: kd_metrics(*sides, labels, backend="reference"))
    assert peak.highest < fixed + student.nbytes // 4, peak


def test_bad_arguments_are_named() -> None:
    student, teacher, labels = inputs()
    for pattern, error, call in (
        ("temperature must be", ValueError, lambda: kd_metrics(student, teacher, temperature=0.0)),
        ("teacher must be", TypeError, lambda: kd_metrics(student, None)),  # type: ignore[arg-type]
        ("labels must be in", ValueError, lambda: kd_metrics(student, teacher, labels + V)),
        (
            "token_weight must",
            ValueError,
            lambda: kd_metrics(student, teacher, token_weight=-torch.ones(N)),
        ),
        ("same vocabulary", ValueError, lambda: kd_metrics(student, teacher[:, 1:])),
        ("backend must be", ValueError, lambda: kd_metrics(student, teacher, backend="best")),
    ):
        with pytest.raises(error, match=pattern):
            call()
