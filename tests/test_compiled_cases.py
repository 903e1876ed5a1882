"""Cases of public reports that concern torch.compile: the same numbers, few compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import FAST
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_kd import Head, KDLoss, kd_loss

V = 40
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def _grad(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", [*FAST[:1], pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "divergence",
    ["forward_kl", *(pytest.param(d, marks=pytest.mark.slow) for d in ("reverse_kl", "jsd"))],
)
def test_equal_sides_give_nothing_N_02(divergence: str, compiler: str, backend: str) -> None:
    """EasyDeL#267: 0.0248 where eager gave 0; a compiler fused the two sides differently."""

    def loss(student: Tensor, teacher: Tensor) -> Any:
        return kd_loss(student, teacher, hard_weight=0, divergence=divergence, backend=backend)

    student = (50 * torch.randn(1, 248_320)).bfloat16().requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend=compiler)(student, student.detach().clone())
    assert got == 0
    assert torch.count_nonzero(_grad(got, student)[0]) == 0


@pytest.mark.parametrize("compiler", COMPILERS)
def test_columns_of_minus_infinity_N_06(compiler: str, backend: str) -> None:
    """tensorflow#40606: NaN when compiled where a logit is -inf and not the label's."""
    labels = torch.tensor([0, 1, 2, 39])

    def loss(student: Tensor, teacher: Tensor) -> Any:
        return kd_loss(student, teacher, labels, label_smoothing=0.1, backend=backend)

    student, teacher = torch.randn(4, V), torch.randn(4, V)
    student[:, 5:9] = teacher[:, 5:9] = teacher[:, 20] = -torch.inf
    student.requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend=compiler)(student, teacher)
    want = loss(student, teacher)
    assert want.isfinite()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(_grad(got, student), _grad(want, student))


class _Model(nn.Module):
    """Embedding, one layer and a head, with the loss from hidden states."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, V)
        self.loss = KDLoss(temperature=2.0, chunk_rows=4, backend=backend)

    def forward(self, ids: Tensor, taught: Tensor, head: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        student = Head(hidden, self.head.weight, self.head.bias)
        return self.loss(student, Head(taught, head), labels)


def _train(model: nn.Module, call: Callable[..., Any]) -> list[Tensor]:
    """Three steps of other sizes; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for length in (12, 21, 9):
        ids, labels = (torch.randint(V, (3, length), generator=draw) for _ in range(2))
        labels[:, :2] = -100
        taught, head = (torch.randn(*shape, 6, generator=draw) for shape in ((3, length), (V,)))
        loss = call(ids, taught, head, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", FAST[:1])
def test_training_around_a_loss_of_heads_N_31(compiler: str, backend: str) -> None:
    """pytorch#141639: a chunked Function that adds in place breaks in an outer compile, or lies."""
    model, same = _Model(backend), _Model(backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    losses, wanted = _train(model, compiled), _train(same, same)
    assert wanted[0] != wanted[1]
    for got, want in zip(
        [*losses, *model.parameters()], [*wanted, *same.parameters()], strict=True
    ):
        torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", FAST[:1])
@pytest.mark.parametrize("sides", ["logits", "heads"])
def test_weights_and_counts_of_symbolic_sizes_N_32(sides: str, backend: str) -> None:
    """pytorch#181870: weight.numel() of a symbolic size fails with dynamic=True."""
    student, teacher = torch.randn(V, 8, requires_grad=True), torch.randn(V, 8)

    def loss(hidden: Tensor, labels: Tensor, weight: Tensor, count: Tensor) -> Any:
        rows: dict[str, Any] = {"token_weight": weight, "num_items": count, "backend": backend}
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
        ours, theirs = (_grad(x, hidden, student) for x in (got, want))
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2
