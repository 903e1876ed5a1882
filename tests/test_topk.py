"""A TopK as the teacher: golden numbers, tails, temperatures, absent entries, and every option."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import one_thread
from support.heads import make_heads
from support.logits import HARD, SOFT, TOLERANCE, gradient, identical, rows_and_gradient
from support.topk import PAIRS, with_topk
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fused_kd import Head, KDLoss, TopK, kd_loss
from fused_kd.backends import named, why_not
from fused_kd.classes import Classes
from fused_kd.options import Formula, KDOptions, temperature_tensor
from fused_kd.sides import TAILS
from fused_kd.testing import Inputs

INF = math.inf
#: Several blocks of 2048 entries, and a ragged end.
N, V, K = 6, 4113, 9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def make(
    tail: str = "bucket", dtype: torch.dtype = torch.float32, temperature: float = 1.0, k: int = K
) -> tuple[Tensor, TopK, Tensor]:
    """Return student logits (N, V), a TopK of as many rows, and labels; the first is ignored.

    Some labels are in the support, and some entries of it at the ends of blocks.
    """
    student, teacher = ((2 * torch.randn(N, V)).to(dtype) for _ in range(2))
    teacher[:, [0, 2047, 2048, V - 1]] += 8
    inputs = with_topk(Inputs(student, teacher, torch.randint(V, (N,))), k, tail, temperature)
    assert isinstance(inputs.teacher, TopK)
    inputs.labels[2:4] = torch.tensor([2048, V - 1])
    inputs.labels[0] = -100
    return student, inputs.teacher, inputs.labels


def exact(student: Tensor, topk: TopK, labels: Tensor | None, **keywords: Any) -> list[Tensor]:
    """Return rows and gradient by the reference in float64."""
    return [*rows_and_gradient(student.double(), topk, labels, **keywords)]


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    """Assert that rows and gradients in `dtype` agree with float64."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got[1].double(), want[1], **TOLERANCE[dtype])


# ---------------------------------------------------------------------------- golden numbers

Q, P = [0.5, 0.25, 0.15, 0.07, 0.03], [0.4, 0.3, 0.1, 0.15, 0.05]
#: Tail and divergence → the value and the gradient for q, p and the support {0, 1}.
GOLDEN: dict[tuple[str, str], tuple[float, list[float]]] = {
    ("bucket", "forward_kl"): (0.0204110, [-0.1, 0.05, 0.016667, 0.025, 0.008333]),
    ("bucket", "reverse_kl"): (0.0201355, [-0.097312, 0.048656, 0.016219, 0.024328, 0.008109]),
    ("renormalize", "forward_kl"): (0.0189956, [-0.095238, 0.095238, 0, 0, 0]),
    ("zero", "forward_kl"): (0.3756706, [-0.266667, -0.033333, 0.1, 0.15, 0.05]),
    # -(0.75 log 0.4 + 0.25 log 0.3), p - q̂
    ("sampled", "forward_kl"): (0.9882112, [-0.35, 0.05, 0.1, 0.15, 0.05]),
    # ½ (0.1 + 0.05 + 0.05), and its gradient by the formula of the classes
    # β = ½: m = [0.45, 0.275, 0.275]
    ("bucket", "jsd"): (0.0050594, [-0.024575, 0.012288, 0.004096, 0.006144, 0.002048]),
    ("bucket", "tvd"): (0.1, [-0.24, 0.12, 0.04, 0.06, 0.02]),
}


@pytest.mark.parametrize("pair", GOLDEN, ids="-".join)
def test_golden_numbers(pair: tuple[str, str], backend: str) -> None:
    tail, divergence = pair
    value, grad = GOLDEN[pair]
    q = torch.tensor([[0.75, 0.25]] if tail == "sampled" else [Q[:2]])
    topk = TopK(torch.tensor([[0, 1]]), q.log(), tail=tail)
    student = torch.tensor([P]).log()
    keywords: dict[str, Any] = {"divergence": divergence, "backend": backend, **SOFT}
    rows, by_student = rows_and_gradient(student, topk, **keywords)
    assert rows.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(by_student, torch.tensor([grad]), rtol=0, atol=1e-6)
    if tail == "bucket":  # the same with a tail that was measured
        rows, by_student = rows_and_gradient(
            student, topk._replace(tail_logprob=torch.tensor([0.25]).log()), **keywords
        )
        assert rows.item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(by_student, torch.tensor([grad]), rtol=0, atol=1e-6)


def test_golden_numbers_of_one_entry_and_of_the_dense_teacher(backend: str) -> None:
    topk = TopK(torch.tensor([[1]]), torch.tensor([[0.6]]).log())
    student = torch.tensor([[0.06, 0.9, 0.04]]).log()
    soft = kd_loss(student, topk, backend=backend, **SOFT)
    assert soft.item() == pytest.approx(0.311239, abs=1e-6)
    for divergence, value in (("forward_kl", 0.0581366), ("reverse_kl", 0.0647548)):
        keywords: dict[str, Any] = {"divergence": divergence, "backend": backend, **SOFT}
        whole = TopK.from_logits(torch.tensor([Q]).log(), 5)
        soft = kd_loss(torch.tensor([P]).log(), whole, **keywords)
        assert soft.item() == pytest.approx(value, abs=1e-6)


# -------------------------------------------------------------------------------- temperatures


def test_the_mass_of_a_tail_is_measured_at_a_temperature() -> None:
    topk = TopK.from_logits(torch.tensor([Q]).log(), 2, 2.0)
    assert topk.tail_logprob is not None
    assert topk.tail_logprob.exp().item() == pytest.approx(0.4060, abs=5e-5)
    assert topk.temperature == 2.0


@pytest.mark.parametrize(("tail", "divergence"), [x for x in PAIRS if x[0] in TAILS[1:3]])
def test_without_a_tail_the_loss_changes_the_temperature(
    tail: str, divergence: str, backend: str
) -> None:
    student, teacher = 2 * torch.randn(2, 3, 70)
    keywords: dict[str, Any] = {"temperature": 3.0, "divergence": divergence, **SOFT}
    measured = TopK.from_logits(teacher, 9, 3.0)._replace(tail=tail, tail_logprob=None)
    want = exact(student, measured, None, **keywords)
    for temperature, offset in ((1.0, 0.0), (0.7, 0.0), (3.0, 1e4), (1.0, -50.0)):
        other = TopK.from_logits(teacher.double() + offset, 9, temperature)
        logits = teacher.gather(1, other.token_ids) / temperature + offset
        served = other._replace(tail=tail, logprobs=logits)
        got = rows_and_gradient(student, served, backend=backend, **keywords)
        tolerance = {"rtol": 1e-5, "atol": 2e-6 + 2e-7 * abs(offset)}
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), y, **tolerance)


# ------------------------------------------------------------------- absent entries, empty rows


@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_without_entries_adds_nothing_and_its_rows_count(
    tail: str, backend: str, dtype: torch.dtype
) -> None:
    student, topk, labels = make(tail, dtype)
    empty = topk.logprobs.clone()
    empty[1:4] = -INF
    by_rows = topk._replace(logprobs=empty)
    if topk.tail_logprob is not None:
        by_rows.tail_logprob[1:4] = 0.0
    by_shape = topk._replace(
        token_ids=topk.token_ids[:, :0],
        logprobs=topk.logprobs[:, :0],
        tail_logprob=torch.zeros(N) if tail == "bucket" else None,
    )
    for teacher, rows in ((by_rows, slice(1, 4)), (by_shape, slice(None))):
        value, grad = rows_and_gradient(student, teacher, backend=backend, **SOFT)
        assert not value[rows].any()
        assert not grad[rows].any()
        both = rows_and_gradient(student, teacher, labels, backend=backend)
        hard = rows_and_gradient(
            student, None, labels, hard_weight=0.5, soft_weight=0.0, backend=backend
        )
        for x, y in zip(both, hard, strict=True):
            torch.testing.assert_close(x[rows], y[rows])
        mean = kd_loss(student, teacher, labels, backend=backend)
        torch.testing.assert_close(mean, both[0].sum() / (N - 1))


# ids as servers and caches pad with: beyond both integer types' and the vocabulary's ends
@pytest.mark.parametrize("odd", [-1, V, 2**31 - 1, -(2**31), -(2**62), 2**32 + 1])
def test_the_id_of_an_absent_entry_is_not_read(odd: int, backend: str) -> None:
    for tail in TAILS:
        student, topk, labels = make(tail, k=5)
        fewer = topk._replace(token_ids=topk.token_ids[:, :4], logprobs=topk.logprobs[:, :4])
        if tail == "sampled":
            fewer = fewer._replace(logprobs=torch.full((N, 4), 0.25).log())
        ids, logprobs = topk.token_ids.clone(), topk.logprobs.clone()
        ids[:, 0], ids[:, 1:] = odd, fewer.token_ids
        logprobs[:, 0], logprobs[:, 1:] = -INF, fewer.logprobs
        padded = topk._replace(token_ids=ids, logprobs=logprobs)
        keywords: dict[str, Any] = {"label_smoothing": 0.1, "backend": backend}
        got = rows_and_gradient(student, padded, labels, **keywords)
        want = rows_and_gradient(student, fewer, labels, **keywords)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_entries_does_not_matter(backend: str) -> None:
    for tail, divergence in PAIRS:
        student, topk, labels = make(tail)
        order = torch.randperm(K)
        mixed = topk._replace(token_ids=topk.token_ids[:, order], logprobs=topk.logprobs[:, order])
        keywords: dict[str, Any] = {"divergence": divergence, "backend": backend}
        got, want = (rows_and_gradient(student, t, labels, **keywords) for t in (mixed, topk))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_drawn_entries_may_repeat_and_give_the_cross_entropy(backend: str) -> None:
    student, topk, _ = make("sampled", k=50)
    assert (topk.token_ids.sort(1).values.diff(dim=1) == 0).any()
    for temperature in (1.0, 2.0):
        topk = topk._replace(temperature=temperature)
        keywords: dict[str, Any] = {"temperature": temperature, "backend": backend, **SOFT}
        value, grad = rows_and_gradient(student, topk, **keywords)
        log_p = (student.double() / temperature).log_softmax(1)
        want = -(topk.logprobs.double().exp() * log_p.gather(1, topk.token_ids)).sum(1)
        torch.testing.assert_close(value.double(), temperature**2 * want, rtol=1e-6, atol=0.0)
        counts = torch.zeros_like(log_p).scatter_add(
            1, topk.token_ids, topk.logprobs.double().exp()
        )
        torch.testing.assert_close(
            grad.double(), temperature * (log_p.exp() - counts), rtol=1e-5, atol=1e-7
        )
    keywords |= {"reduction": "sum", "return_parts": True, "hard_weight": 0.25}
    labels = torch.tensor([-100, 1, 2, 3, 4, 5])
    parts = kd_loss(student, topk, labels, **keywords)
    assert parts.soft.item() == pytest.approx(value[1:].sum().item(), rel=1e-6)
    assert parts.loss.item() == pytest.approx((0.25 * parts.hard + parts.soft).item(), rel=1e-6)


# --------------------------------------------------------------------------- dtypes and shapes


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_ids_and_log_probabilities(
    of: torch.dtype, index: torch.dtype, backend: str, dtype: torch.dtype
) -> None:
    student, topk, labels = make(dtype=dtype)
    topk = topk._replace(token_ids=topk.token_ids.to(index), logprobs=topk.logprobs.to(of))
    for tail_dtype in (torch.float32, torch.float64):
        teacher = topk._replace(tail_logprob=topk.tail_logprob.to(tail_dtype))
        got = rows_and_gradient(student, teacher, labels, backend=backend)
        assert (got[0].dtype, got[1].dtype) == (torch.float32, dtype)
        close(got, exact(student, teacher, labels), dtype)


def test_float64_runs_on_the_reference() -> None:
    student, topk, labels = make()
    double = topk.to(torch.float64)
    loss = kd_loss(student, double, labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, kd_loss(student.double(), topk, labels))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row": lambda x: x[1],
    "a slice of the sequence": lambda x: x.view(2, 3, V)[:, :-1],
    "batch and sequence exchanged": lambda x: x.view(2, 3, V).transpose(0, 1),
    "four dimensions": lambda x: x.view(1, 2, 3, 1, V),
    "no rows": lambda x: x[:0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_leading_shapes(view: str, backend: str) -> None:
    student, topk, labels = make()
    rows = VIEWS[view](torch.arange(N)[:, None].expand(N, V).contiguous())[..., 0]
    part, part_labels = topk.rows(rows), labels[rows]
    assert part.logprobs.shape == (*rows.shape, K)
    part = part._replace(token_ids=part.token_ids.repeat_interleave(2, -1)[..., ::2])  # strided
    leaf = student.clone().requires_grad_()
    got = kd_loss(VIEWS[view](leaf), part, part_labels, reduction="none", backend=backend)
    want = kd_loss(leaf, topk, labels, reduction="none", backend=backend)[rows]
    assert got.shape == rows.shape
    torch.testing.assert_close(got, want)
    upstream = torch.rand(got.shape)
    ours, theirs = (gradient(x, leaf, upstream, retain_graph=True) for x in (got, want))
    torch.testing.assert_close(ours, theirs)


def test_to_and_rows() -> None:
    topk = make()[1]
    half = topk.to(torch.float16)
    assert isinstance(half, TopK)
    assert [x.dtype for x in half[:3]] == [torch.int64, torch.float16, torch.float32]
    assert half[3:] == topk[3:]
    meta = topk.to("meta", non_blocking=True)
    assert [x.device.type for x in meta[:3]] == ["meta"] * 3
    assert topk._replace(tail_logprob=None).to("meta").tail_logprob is None
    one = topk.rows(slice(2, 3))
    assert [x.shape for x in one[:3]] == [(1, K), (1, K), (1,)]
    assert one[3:] == topk[3:]
    assert topk._replace(tail_logprob=None).rows(2).tail_logprob is None


def test_from_logits_is_exact_and_checks_its_arguments() -> None:
    logits = 3 * torch.randn(2, 3, 50, dtype=torch.float64)
    log_q = (logits / 2).log_softmax(-1)
    for k in (0, 1, 7, 50):
        topk = TopK.from_logits(logits, k, 2.0)
        assert torch.equal(topk.token_ids.sort().values, log_q.topk(k).indices.sort().values)
        torch.testing.assert_close(topk.logprobs, log_q.gather(-1, topk.token_ids))
        rest = log_q.scatter(-1, topk.token_ids, -INF).logsumexp(-1)
        torch.testing.assert_close(topk.tail_logprob, rest)
    single = TopK.from_logits(logits.bfloat16(), 3)
    assert (single.logprobs.dtype, single.tail_logprob.dtype) == (torch.float32, torch.float32)
    for k in (-1, 51):
        with pytest.raises(ValueError, match=rf"k must be in \[0, V\] = \[0, 50\]; got {k}"):
            TopK.from_logits(logits, k)
    with pytest.raises(ValueError, match="temperature must be positive and finite; got 0"):
        TopK.from_logits(logits, 3, 0)


def test_tensors_in_any_layout(backend: str) -> None:
    student, topk, _ = make()
    want = rows_and_gradient(student, topk, backend=backend, **SOFT)
    wide = [torch.cat([x, x], -1)[:, :K] for x in (topk.token_ids.int(), topk.logprobs)]
    assert topk.tail_logprob is not None
    tail = torch.stack([topk.tail_logprob] * 2, -1)[:, 0]
    got = rows_and_gradient(student, TopK(*wide, tail), backend=backend, **SOFT)
    identical(got, want)


# ------------------------------------------------------------------------ reductions and terms


@pytest.mark.parametrize(("tail", "divergence"), PAIRS)
def test_reductions_and_upstream_gradients(
    tail: str, divergence: str, backend: str, dtype: torch.dtype
) -> None:
    student, topk, labels = make(tail, dtype, 2.0)
    weight = torch.rand(N)
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "temperature": 2.0,
        "token_weight": weight,
        "label_smoothing": 0.1,
    }
    rows, by_rows = exact(student, topk, labels, **keywords)
    for reduction, items, divisor in (
        ("sum", None, 1.0),
        ("mean", None, weight[1:].double().sum().item()),
        ("mean", 7.0, 7.0),
    ):
        leaf = student.clone().requires_grad_()
        keywords |= {"reduction": reduction, "num_items": items}
        loss = kd_loss(leaf, topk, labels, backend=backend, **keywords)
        scale = 512.0 if dtype == torch.float16 else -0.3
        got = loss.detach(), gradient(scale * loss, leaf)
        close(got, (rows.sum() / divisor, scale / divisor * by_rows), dtype)


@pytest.mark.parametrize("tail", TAILS)
def test_parts_and_weights_of_the_terms(tail: str, backend: str) -> None:
    student, topk, labels = make(tail)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    parts = kd_loss(student, topk, labels, return_parts=True, **options)
    assert not parts.loss[0]
    soft = kd_loss(student, topk, labels, hard_weight=0, soft_weight=2.0, **options)
    hard = kd_loss(student, topk, labels, **HARD, **options)
    torch.testing.assert_close(parts.soft, soft / 2)
    torch.testing.assert_close(parts.hard, hard)
    torch.testing.assert_close(parts.loss, 0.5 * (hard + soft / 2))
    identical([hard], [kd_loss(student, None, labels, **HARD, **options)])


def test_a_second_backward_gives_the_same_gradient(backend: str, dtype: torch.dtype) -> None:
    student, topk, labels = make(dtype=dtype)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, topk, labels, backend=backend)
    first = gradient(loss, leaf, retain_graph=True)
    again = gradient(loss, leaf)
    torch.testing.assert_close(first, again)
    twice = gradient(kd_loss(leaf, topk, labels, backend=backend), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated"):
        twice.sum().backward()


@pytest.mark.parametrize(("tail", "divergence"), PAIRS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_in_place(
    tail: str, divergence: str, smoothing: float, backend: str, dtype: torch.dtype
) -> None:
    student, topk, labels = make(tail, dtype)
    keywords: dict[str, Any] = {"divergence": divergence, "label_smoothing": smoothing}
    keywords["backend"] = backend
    leaf = student.clone().requires_grad_()
    want = kd_loss(leaf, topk, labels, **keywords)
    by_leaf = gradient(0.3 * want, leaf)
    logits = leaf * 1.0
    loss = kd_loss(logits, topk, labels, inplace=True, **keywords)
    got = gradient(0.3 * loss, logits, retain_graph=True)
    assert got.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    rounding = {"rtol": 2 * TOLERANCE[dtype]["rtol"], "atol": 2.0**-24}  # 0.3 is a second one
    torch.testing.assert_close(got, by_leaf, **rounding)


def test_inputs_keep_their_bits(backend: str, dtype: torch.dtype) -> None:
    for tail in TAILS:
        student, topk, labels = make(tail, dtype)
        leaf, weight = student.requires_grad_(), torch.rand(N)
        inputs = [leaf.detach(), *topk[:2], labels, weight]
        inputs += [] if topk.tail_logprob is None else [topk.tail_logprob]
        before = [x.clone() for x in inputs]
        kd_loss(leaf, topk, labels, token_weight=weight, backend=backend).backward()
        identical(inputs, before)


# ------------------------------------------------------------------------------ student heads


@pytest.mark.parametrize(("tail", "divergence"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_in_several_chunks(
    tail: str, divergence: str, dtype: torch.dtype, backend: str
) -> None:
    heads = make_heads(13, 70, dtype)
    heads.labels[::4] = -100
    logits = torch.nn.functional.linear(*(x.detach().double() for x in heads.student))
    topk = with_topk(Inputs(logits, torch.randn(13, 70), heads.labels), 9, tail).teacher
    keywords: dict[str, Any] = {"divergence": divergence, "label_smoothing": 0.1}
    for reduction in ("mean", "none"):
        keywords["reduction"] = reduction
        rows = kd_loss(
            heads.student_side, topk, heads.labels, chunk_rows=4, backend=backend, **keywords
        )
        exact = [x.detach().double().requires_grad_() for x in heads.student]
        want = kd_loss(torch.nn.functional.linear(*exact), topk, heads.labels, **keywords)
        torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=1e-5)
        upstream = torch.rand(want.shape)
        got = torch.autograd.grad(rows, heads.student, upstream)
        for x, y in zip(got, torch.autograd.grad(want, exact, upstream.double()), strict=True):
            bound = 1e-5 if dtype == torch.float32 else 1e-2
            assert (x.double() - y).norm() <= bound * y.norm()


# -------------------------------------------------------------------------------- torch.compile

TWELVE = range(1, 13)
QUICK = "reference" if why_not("cpu", "cpu") else "cpu"  # if one backend is enough


def sides(level: str, n: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a student of n rows and 33 entries, and its tensors."""
    if level == "logits":
        student = torch.randn(n, 33, requires_grad=True)
        return student, (student,)
    head = Head(torch.randn(n, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True))
    return head, head[:2]


@pytest.mark.parametrize(
    ("level", "tail"),
    [
        ("logits", "bucket"),
        ("head", "sampled"),
        pytest.param("logits", "renormalize", marks=pytest.mark.slow),
        pytest.param("head", "bucket", marks=pytest.mark.slow),
    ],
)
def test_twelve_temperatures_compile_twice_at_most(level: str, tail: str) -> None:
    torch.compiler.reset()

    def loss(s: Any, topk: TopK, y: Tensor, temperature: float) -> Tensor:
        topk = topk._replace(temperature=temperature)
        return kd_loss(s, topk, y, temperature=temperature, backend=QUICK)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in TWELVE:
        student, leaves = sides(level, 2 + step)
        inputs = Inputs(student, torch.randn(2 + step, 33), torch.arange(2 + step))
        topk = with_topk(inputs, 5, tail, 0.5 + step / 2).teacher
        arguments = student, topk, inputs.labels, 0.5 + step / 2
        got, want = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(got, want)
        ours, theirs = (torch.autograd.grad(x, leaves) for x in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("tail", "backend"),
    [
        ("bucket", QUICK),
        ("sampled", QUICK),
        *(
            pytest.param(t, b, marks=pytest.mark.slow)
            for t in TAILS
            for b in dict.fromkeys((QUICK, "reference"))
        ),
    ],
)
def test_a_graph_has_the_same_numbers(tail: str, backend: str) -> None:
    torch.compiler.reset()
    student, topk, labels = make(tail)
    loss = KDLoss(backend=backend, reduction="none")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_()
    got, want = (f(leaf, topk, labels) for f in (compiled, loss))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(gradient(x.sum(), leaf) for x in (got, want)))


# ----------------------------------------- values that cannot be read, in a trace or on a GPU

ODD: dict[str, dict[str, float]] = {
    "an id far below": {"id": -(2**62)},
    "an id that wraps to 1": {"id": 2**32 + 1},
    "the id V": {"id": V},
    "an id above": {"id": V + 5},
    "a NaN": {"logprob": math.nan},
    "an infinity": {"logprob": INF},
    "a tail of NaN": {"tail": math.nan},
    "a tail of infinity": {"tail": INF},
    "a probability of 1 beside others": {"logprob": 0.0},
}


def with_odd_row(topk: TopK, row: int, odd: dict[str, float]) -> TopK:
    """Return a TopK with values replaced in the first entry, or the tail, of a row."""
    topk = topk._replace(**{f: x.clone() for f, x in zip(topk._fields[:3], topk[:3], strict=True)})
    if "id" in odd:
        topk.token_ids[row, 0] = int(odd["id"])
    if "logprob" in odd:
        topk.logprobs[row, 0] = odd["logprob"]
    if "tail" in odd:
        topk.tail_logprob[row] = odd["tail"]
    return topk


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the values of CPU tensors as unreadable as those of a GPU."""
    monkeypatch.setattr("fused_kd.checks.topk.may_read_values", lambda tensor: False)


def only_row_2_is_nan(rows: Tensor, by_student: Tensor, topk: TopK, student: Tensor) -> None:
    """Assert that losses and gradients of the others are those without row 2 of the soft term."""
    good = torch.arange(N) != 2
    assert rows.isnan().tolist() == (~good).tolist()
    assert by_student[2].isnan().all()
    others = rows_and_gradient(student.detach()[good], topk.rows(good), **SOFT)
    torch.testing.assert_close(rows[good], others[0])
    torch.testing.assert_close(by_student[good], others[1])


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", [*ODD, "an id twice", "a tail that 1 - sum cannot give"])
def test_an_invalid_row_is_nan_alone(case: str, backend: str) -> None:
    student, topk, _ = make()
    odd = ODD.get(case, {"id": int(topk.token_ids[2, 1])})
    if case.startswith("a tail that"):
        topk = topk._replace(logprobs=topk.logprobs - 1, tail_logprob=None)
        topk.logprobs[2] = -math.log(K) - 1e-4  # their sum is 0.9999
        odd = {}
    topk = with_odd_row(topk, 2, odd) if odd else topk
    result = rows_and_gradient(student, topk, backend=backend, **SOFT)
    only_row_2_is_nan(*result, topk, student)


@pytest.mark.usefixtures("unread")
def test_the_hard_term_of_an_invalid_row_is_exact(backend: str) -> None:
    student, topk, labels = make()
    twice = with_odd_row(topk, 2, {"id": int(topk.token_ids[2, 1])})
    want, got = (
        kd_loss(student, x, labels, return_parts=True, reduction="none", backend=backend)
        for x in (topk, twice)
    )
    identical([got.hard], [want.hard])
    assert got.soft.isnan().tolist() == [row == 2 for row in range(N)]


def test_an_invalid_id_in_a_trace() -> None:
    torch.compiler.reset()
    student, topk, _ = make()
    topk = with_odd_row(topk, 2, ODD["an id far below"])
    memory = torch.full((3, N, V), 7.0)
    leaf = memory[1].copy_(student).requires_grad_()
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    rows = compiled(leaf, topk, reduction="none", backend=QUICK, **SOFT)
    only_row_2_is_nan(rows.detach(), gradient(rows.sum(), leaf), topk, student)
    assert (memory[::2] == 7).all()
    identical([memory[1].detach()], [student])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_writes_nothing_outside_for_any_id(dtype: torch.dtype, fast: str) -> None:
    # operators may be called directly; the ids of kd_loss are in range
    memory = torch.full((3 * 70,), 7.0, dtype=dtype)
    student = memory[70:140].view(1, 1, 70)
    ids = torch.tensor([[3, -1, 70, 71, -70, 139, 2**31 - 1, -(2**31), 69]], dtype=torch.int32)
    logits = torch.zeros(1, 1, ids.shape[1] + 1)
    options = KDOptions(temperature=2.0)
    formula = Formula("forward_kl", temperature_tensor(options), 0.5, "t2", 0.0)
    weight = torch.ones(1)
    for inplace in (False, True):
        student.copy_(torch.randn(1, 1, 70))
        arguments = student, Classes(logits, ids), torch.zeros(1, dtype=torch.int64)
        result = named(fast).forward_backward(*arguments, weight, weight, formula, inplace)
        assert result[3].isfinite().all()
        assert (memory[:70] == 7).all()
        assert (memory[140:] == 7).all()
