"""torch.compile(fullgraph=True): the same numbers, forward and backward, also with a changing N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_kd import Head, KDLoss, KDLossParts, kd_loss
from fused_kd.backends import why_not
from fused_kd.integrations import liger
from fused_kd.options import BACKENDS
from fused_kd.sides import Side

V, H = 33, 8


QUICK = "reference" if why_not("cpu", "cpu") else "cpu"  # for the slow ones


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def make(n: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (n,))
    labels[0] = -100
    return torch.randn(n, V, requires_grad=True), torch.randn(n, V), labels


def same(compiled: Any, eager: Any, *inputs: Tensor, **keywords: Any) -> None:
    ours, theirs = compiled(*inputs, **keywords), eager(*inputs, **keywords)
    if isinstance(theirs, KDLossParts):
        torch.testing.assert_close(tuple(ours), tuple(theirs))
        ours, theirs = ours.loss, theirs.loss
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(theirs.shape)
    (got,) = torch.autograd.grad(ours, inputs[0], upstream)
    (want,) = torch.autograd.grad(theirs, inputs[0], upstream)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


# every branch that a trace may meet: reductions, weights, no labels, terms that are off
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
        logits = s * 1.0
        return kd_loss(logits, t, **{"labels": y, "backend": backend, **keywords})

    same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, *make(4))


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_a_changing_number_of_rows_compiles_twice_at_most(backend: str, reduction: str) -> None:
    loss = KDLoss(temperature=2.0, reduction=reduction, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (4, 7, 9, 16, 5):
        same(compiled, loss, *make(n))
    assert counter.frame_count <= 2


# ------------------------------------------------------------------ what varies during training

#: Dynamo gives up at the ninth value of what it specialises on.
TWELVE = range(1, 13)
PAIRS: dict[str, tuple[bool, bool]] = {  # is a Head: student, teacher
    "logits": (False, False),
    "heads": (True, True),
    "a head and logits": (True, False),
    "logits and a head": (False, True),
}


def make_sides(pair: str, n: int) -> tuple[Side, Side, Tensor]:
    """Sides of n rows as a model makes them, and labels; those of the student require grad."""
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
    """The sides, labels and what varies as arguments: the numbers of eager in every call."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for number, arguments in enumerate(calls):
        set_up(number)
        got, want = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        by = trained(arguments[0])
        gradients = (torch.autograd.grad(x, by) for x in (got, want))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


VARYING: dict[str, Callable[[int], dict[str, Any]]] = {
    "temperature": lambda i: {"temperature": 0.5 + i / 2},
    "weights": lambda i: {"hard_weight": i / 13, "soft_weight": 1 - i / 13},
    "num_items": lambda i: {"num_items": i},
    "num_items that is a float": lambda i: {"num_items": i + 0.5},
}


@pytest.mark.parametrize(
    ("compiler", "pair", "what"),
    [
        ("aot_eager", pair, what)
        for pair in PAIRS
        for what in ("temperature", "weights", "num_items")
    ]
    + [("aot_eager", "a head and logits", "num_items that is a float")]
    + [pytest.param("inductor", p, "temperature", marks=pytest.mark.slow) for p in PAIRS],
)
def test_twelve_values_compile_twice_at_most(compiler: str, pair: str, what: str) -> None:
    def loss(s: Side, t: Side, y: Tensor, varying: dict[str, Any]) -> Any:
        return kd_loss(s, t, y, backend=QUICK, **varying)

    sides = make_sides(pair, 6)
    compiles_twice_at_most(compiler, loss, [(*sides, VARYING[what](i)) for i in TWELVE])


@pytest.mark.parametrize("pair", PAIRS)
def test_twelve_numbers_of_rows_compile_twice_at_most(pair: str) -> None:
    loss = KDLoss(temperature=2.0, backend=QUICK)
    compiles_twice_at_most("aot_eager", loss, [make_sides(pair, 1 + n) for n in TWELVE])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_scheduled_module_compiles_twice_at_most(pair: str) -> None:
    loss = KDLoss(backend=QUICK)

    def set_up(step: int) -> None:
        loss.temperature, loss.hard_weight = 1.5 + step / 4, (1 + step) / 14

    compiles_twice_at_most("aot_eager", loss, [make_sides(pair, 6)] * 12, set_up)


@pytest.mark.slow
def test_gradients_of_a_16_bit_head_have_its_dtypes_in_a_trace() -> None:
    """Eagerly a single chunk's weight gradient is made in 16 bits; no trace may expect that."""
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


class Distilled(nn.Module):
    """A model that computes its own loss, as trainers have it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.head = nn.Linear(H, V)
        self.loss = KDLoss(temperature=2.0, backend=backend)

    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(self.head(hidden), teacher, labels)
        return loss


# the gradient of float32 passes as it is, that of bfloat16 through a cast
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (QUICK, torch.float32),
        pytest.param(QUICK, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("reference", torch.float32, marks=pytest.mark.slow),
        pytest.param("reference", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_with_the_module_in_inductor(backend: str, dtype: torch.dtype) -> None:
    model = Distilled(backend).to(dtype)
    compiled = torch.compile(model, fullgraph=True)
    for n in (6, 10, 11):
        hidden = torch.randn(n, H).to(dtype).requires_grad_()
        _, teacher, labels = make(n)
        parameters = [hidden, *model.parameters()]
        ours, theirs = compiled(hidden, teacher, labels), model(hidden, teacher, labels)
        torch.testing.assert_close(ours, theirs)
        got = torch.autograd.grad(ours, parameters)
        want = torch.autograd.grad(theirs, parameters)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
        torch.testing.assert_close(got, want, **tolerance)


def test_a_label_out_of_range_is_nan_in_a_trace_R_34(backend: str) -> None:
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
