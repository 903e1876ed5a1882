"""torch.compile(fullgraph=True): the same numbers, forward and backward, also with a changing N."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_kd import KDLoss, KDLossParts, kd_loss
from fused_kd.backends import why_not
from fused_kd.integrations import liger
from fused_kd.options import BACKENDS

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


class Distilled(nn.Module):
    """A model that computes its own loss, as trainers have it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.head = nn.Linear(H, V)
        self.loss = KDLoss(temperature=2.0, backend=backend)

    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(self.head(hidden), teacher, labels)
        assert isinstance(loss, Tensor)
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
        torch.testing.assert_close(got, want, **tolerance)  # type: ignore[arg-type]


def test_a_label_out_of_range_is_nan_in_a_trace_R_34(backend: str) -> None:
    student, teacher, labels = make(4)
    labels[2] = V
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    rows = compiled(student, teacher, labels, reduction="none", backend=backend)
    assert isinstance(rows, Tensor)
    assert rows.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.isnan().all(1).tolist() == [False, False, True, False]


def test_a_graph_s_error_has_its_message() -> None:
    s, t, y = make(4)
    loss = liger.LigerJSD()
    for fullgraph, name in ((True, "labels"), (False, "shift_labels")):
        with pytest.raises(Exception, match=f"{name} must have the leading shape"):
            torch.compile(loss, fullgraph=fullgraph, backend="eager")(s, t, y[1:])
