"""torch.compile(fullgraph=True): the same numbers, forward and backward, also with a changing N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.heads import make_heads
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_kd import Head, KDLoss, KDLossParts, kd_loss
from fused_kd.backends import why_not
from fused_kd.integrations import liger
from fused_kd.options import BACKENDS
from fused_kd.sides import Side

V, H = 33, 8


QUICK = "reference" if why_not("cpu", "cpu") else "cpu"  # if one backend is enough


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def make(n: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (n,))
    labels[0] = -100
    return torch.randn(n, V, requires_grad=True), torch.randn(n, V), labels


def same(
    compiled: Any, eager: Any, arguments: Any, by: Any, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Assert that both functions agree in loss, parts, and gradients with respect to `by`."""
    ours, theirs = compiled(*arguments), eager(*arguments)
    if isinstance(theirs, KDLossParts):
        torch.testing.assert_close(tuple(ours), tuple(theirs))
        ours, theirs = ours.loss, theirs.loss
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(theirs.shape)
    got, want = (torch.autograd.grad(x, by, upstream) for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# every branch of a trace: reductions, weights, no labels, terms that are off
CASES: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "divergence": "jsd", "temperature": 2.0},
    {"reduction": "sum", "hard_weight": 0.0},
    {"soft_weight": 0.0, "label_smoothing": 0.1},
    {"return_parts": True, "divergence": "mse"},
    {"inplace": True},
    {"num_items": 5},
    {"num_items": torch.tensor(5)},
    {"token_weight": torch.tensor([1.0, 2.0, 0.0, 1.0])},
    {"labels": None, "hard_weight": 0.0},
]


SOME = [
    pytest.param(case, name, id=f"{name}-{list(case)}", marks=marks)
    for name in BACKENDS
    for i, case in enumerate(CASES)
    for marks in [[] if name == QUICK or i < 2 else [pytest.mark.slow]]
    if why_not(name, "cpu") is None
]


@pytest.mark.parametrize(("keywords", "backend"), SOME)
def test_the_function_traces_without_a_break(keywords: dict[str, Any], backend: str) -> None:
    def loss(s: Tensor, t: Tensor, y: Tensor) -> Any:
        return kd_loss(s * 1.0, t, **{"labels": y, "backend": backend, **keywords})

    inputs = make(4)
    same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, inputs, inputs[:1])


# gradients made in the forward, and in the backward
@pytest.mark.parametrize(
    ("keywords", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float16),
        ({"reduction": "none"}, torch.float32),
        ({"num_items": 5, "return_parts": True}, torch.float32),
    ],
)
def test_heads_trace_without_a_break(keywords: dict[str, Any], dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return kd_loss(Head(hidden, weight), heads.teacher_side, labels, chunk_rows=10, **keywords)

    inputs = (heads.hidden, heads.weight, heads.labels)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same(compiled, loss, inputs, inputs[:2], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_heads_trace_under_autocast() -> None:
    heads = make_heads()

    def loss(hidden: Tensor, weight: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return kd_loss(Head(hidden, weight), heads.teacher_side, heads.labels)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (f(heads.hidden, heads.weight) for f in (compiled, loss))
    assert torch.equal(got, want)


# ------------------------------------------------------------------ what varies during training

#: Dynamo gives up at the ninth value of what it specialises on.
TWELVE = range(1, 13)
PAIRS: dict[str, tuple[bool, bool]] = {  # whether the student, and the teacher, is a Head
    "logits": (False, False),
    "heads": (True, True),
    "a head and logits": (True, False),
    "logits and a head": (False, True),
}


def make_sides(pair: str, n: int) -> tuple[Side, Side, Tensor]:
    # Returns sides of n rows, and labels; the student's tensors require grad.
    sides: list[Side] = []
    for is_head, grad in zip(PAIRS[pair], (True, False), strict=True):
        hidden, weight = torch.randn(n, H), torch.randn(V, H)
        head = Head(hidden.requires_grad_(grad), weight.requires_grad_(grad), torch.randn(V))
        sides.append(head if is_head else torch.randn(n, V).requires_grad_(grad))
    return sides[0], sides[1], torch.randint(V, (n,))


def trained(side: Side) -> tuple[Tensor, ...]:
    return (side.hidden, side.weight) if isinstance(side, Head) else (side,)


def compiles_twice_at_most(
    compiler: str,
    function: Callable[..., Any],
    calls: list[tuple[Any, ...]],
    set_up: Callable[[int], object] = lambda call: None,
) -> None:
    """Assert that calls with these arguments give eager's numbers, from two graphs at most.

    `set_up` is called with each call's index before the call.
    """
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for number, arguments in enumerate(calls):
        set_up(number)
        same(compiled, function, arguments, trained(arguments[0]), rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


def varying(i: int) -> dict[str, Any]:
    weights = {"hard_weight": i / 13, "soft_weight": 1 - i / 13}
    return {"temperature": 0.5 + i / 2, "num_items": i, **weights}


@pytest.mark.parametrize(
    ("compiler", "pair", "values"),
    [
        *(("aot_eager", pair, varying) for pair in PAIRS),
        ("aot_eager", "a head and logits", lambda i: {"num_items": i + 0.5}),
        *(pytest.param("inductor", pair, varying, marks=pytest.mark.slow) for pair in PAIRS),
    ],
)
def test_twelve_values_compile_twice_at_most(
    compiler: str, pair: str, values: Callable[[int], dict[str, Any]]
) -> None:
    def loss(s: Side, t: Side, y: Tensor, varying: dict[str, Any]) -> Any:
        return kd_loss(s, t, y, backend=QUICK, **varying)

    sides = make_sides(pair, 6)
    compiles_twice_at_most(compiler, loss, [(*sides, values(i)) for i in TWELVE])


@pytest.mark.parametrize(
    ("pair", "backend", "reduction"),
    [
        *((pair, QUICK, "mean") for pair in PAIRS),
        *(("logits", name, "mean") for name in {"reference"} - {QUICK}),
        *(pytest.param("logits", n, "none", marks=pytest.mark.slow) for n in (QUICK, "reference")),
    ],
)
def test_a_scheduled_module_and_other_numbers_of_rows_compile_twice_at_most(
    pair: str, backend: str, reduction: str
) -> None:
    loss = KDLoss(backend=backend, reduction=reduction)

    def set_up(step: int) -> None:
        loss.temperature, loss.hard_weight = 1.5 + step / 4, (1 + step) / 14

    calls = [make_sides(pair, 2 + n) for n in TWELVE]
    compiles_twice_at_most("aot_eager", loss, calls, set_up)


@pytest.mark.slow
def test_gradients_of_a_16_bit_head_have_its_dtypes_in_a_trace() -> None:
    # Eagerly a single chunk's weight gradient is made in 16 bits; no trace may expect that.
    student, teacher, labels = make_sides("heads", 6)
    assert isinstance(student, Head)
    brain = student.to(torch.bfloat16)
    leaves = tuple(x.detach().requires_grad_() for x in brain[:2])

    def loss(hidden: Tensor, weight: Tensor) -> Any:
        return 0.3 * kd_loss(Head(hidden, weight), teacher, labels, backend=QUICK)

    compiled = torch.compile(loss, fullgraph=True)  # inductor reads memory as the fake has it
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert [x.dtype for x in ours] == [torch.bfloat16] * 2
    torch.testing.assert_close(ours, theirs)


class Model(nn.Module):
    """A model that computes its own loss, as trainers expect: of two Heads, or of logits."""

    def __init__(self, backend: str, heads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, H), nn.Linear(H, H)
        self.head = nn.Linear(H, V)
        self.loss = KDLoss(temperature=2.0, backend=backend, chunk_rows=4 if heads else None)

    def forward(self, ids: Tensor, teacher_hidden: Tensor, head: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        if self.loss.chunk_rows is None:
            return self.loss(self.head(hidden), teacher_hidden @ head.t(), labels)
        student = Head(hidden, self.head.weight, self.head.bias)
        return self.loss(student, Head(teacher_hidden, head), labels)


def train(model: nn.Module, call: Callable[..., Any]) -> list[Tensor]:
    """Train three steps of different lengths by `call`; return their losses and the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draw = torch.Generator().manual_seed(0)
    dtype, losses = model.head.weight.dtype, []
    for length in (12, 21, 9):
        ids, labels = (torch.randint(V, (3, length), generator=draw) for _ in range(2))
        labels[:, :2] = -100
        teacher, head = (torch.randn(*n, 6, generator=draw).to(dtype) for n in ((3, length), (V,)))
        loss = call(ids, teacher, head, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *model.parameters()]


# the gradient of float32 passes as it is, that of bfloat16 through a cast
@pytest.mark.parametrize(
    ("compiler", "backend", "heads", "dtype"),
    [
        ("inductor", QUICK, False, torch.float32),
        ("aot_eager", QUICK, True, torch.float32),
        *(
            pytest.param("inductor", *case, marks=pytest.mark.slow)
            for case in (
                (QUICK, True, torch.float32),
                (QUICK, False, torch.bfloat16),
                ("reference", False, torch.float32),
            )
        ),
    ],
    ids=str,
)
def test_training_around_a_loss(
    compiler: str, backend: str, heads: bool, dtype: torch.dtype
) -> None:
    model, same = (Model(backend, heads).to(dtype) for _ in range(2))
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    got, want = train(model, compiled), train(same, same)
    assert want[0] != want[1]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(got, want, **tolerance)
    assert counter.frame_count <= 2


def test_a_label_out_of_range_is_nan_in_a_trace(backend: str) -> None:
    student, teacher, labels = make(4)
    labels[2] = V
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    rows = compiled(student, teacher, labels, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.isnan().all(1).tolist() == [False, False, True, False]


def test_a_graph_s_error_has_its_message() -> None:
    s, t, y = make(4)
    loss = liger.LigerJSD()
    for fullgraph, name in ((True, "labels"), (False, "shift_labels")):
        with pytest.raises(Exception, match=f"{name} must have the leading shape"):
            torch.compile(loss, fullgraph=fullgraph, backend="eager")(s, t, y[1:])


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", [QUICK, pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "divergence",
    ["forward_kl", *(pytest.param(d, marks=pytest.mark.slow) for d in ("reverse_kl", "jsd"))],
)
def test_equal_sides_give_nothing(divergence: str, compiler: str, backend: str) -> None:
    # A compiler can fuse the two sides differently.
    def loss(student: Tensor, teacher: Tensor) -> Any:
        return kd_loss(student, teacher, hard_weight=0, divergence=divergence, backend=backend)

    student = (50 * torch.randn(1, 248_320)).bfloat16().requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend=compiler)(student, student.detach().clone())
    assert got == 0
    assert torch.count_nonzero(torch.autograd.grad(got, student)[0]) == 0


@pytest.mark.parametrize("compiler", COMPILERS)
def test_columns_of_minus_infinity(compiler: str, backend: str) -> None:
    labels = torch.tensor([0, 1, 2, V - 1])

    def loss(student: Tensor, teacher: Tensor) -> Any:
        return kd_loss(student, teacher, labels, label_smoothing=0.1, backend=backend)

    student, teacher = torch.randn(4, V), torch.randn(4, V)
    student[:, 5:9] = teacher[:, 5:9] = teacher[:, 20] = -torch.inf
    student.requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend=compiler)(student, teacher)
    want = loss(student, teacher)
    assert want.isfinite()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, student), torch.autograd.grad(want, student)
    )


@pytest.mark.parametrize("sides", ["logits", "heads"])
def test_weights_and_counts_of_symbolic_sizes(sides: str) -> None:
    student, teacher = torch.randn(V, 8, requires_grad=True), torch.randn(V, 8)

    def loss(hidden: Tensor, labels: Tensor, weight: Tensor, count: Tensor) -> Any:
        rows: dict[str, Any] = {"token_weight": weight, "num_items": count, "backend": QUICK}
        if sides == "heads":
            heads = Head(hidden, student), Head(hidden.detach(), teacher)
            return kd_loss(*heads, labels, chunk_rows=3, **rows)
        return kd_loss(hidden @ student.t(), hidden.detach() @ teacher.t(), labels, **rows)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend=counter)
    for rows in (5, 11, 7):
        hidden = torch.randn(rows, 8, requires_grad=True)
        labels = torch.randint(V, (rows,)).int()
        labels[0] = -100
        arguments = (hidden, labels, torch.rand(rows), torch.tensor(3.0 * rows))
        got, want = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(got, want)
        ours, theirs = (torch.autograd.grad(x, (hidden, student)) for x in (got, want))
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2


SIDES = {"logits": lambda x, weight: x @ weight.t(), "head": Head}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("student", "teacher"), [("logits", "head"), ("head", "logits")])
def test_a_default_device_changes_nothing(student: str, teacher: str, compiled: bool) -> None:
    s, t, w_s, w_t = (torch.randn(n, H) for n in (4, 4, V, V))
    arguments = SIDES[student](s, w_s), SIDES[teacher](t, w_t), torch.arange(4)

    def loss() -> Tensor:
        return kd_loss(*arguments, temperature=2.0)

    expected = loss()
    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    with torch.device("meta"):
        assert torch.equal(run(), expected)
