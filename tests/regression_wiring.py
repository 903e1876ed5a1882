"""Regression cases about the wiring of gradients: in-place writes, retained graphs, layouts."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fast import rows_and_gradient, truth
from helpers import DTYPES
from regression_helpers import V, close, grad, loss_of, make, raises
from regression_registry import case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import cpu_peak, eager_kd_loss

# ------------------------------------------------- gradient wiring, in-place writes, retain_graph


@case("R-18", "Liger#272, #343: the gradient is stored over the logits, unasked")
def logits_stay_as_they_are(backend: str) -> None:
    student, teacher, labels = make()
    logits = student * 1.0
    before, version = logits.detach().clone(), logits._version
    beside = logits.softmax(-1)
    loss = loss_of(logits, teacher, labels, backend=backend)
    total = loss + beside.square().sum()
    got = grad(total, student)
    assert torch.equal(logits, before)
    assert logits._version == version
    want = eager_kd_loss(student, teacher, labels) + student.softmax(-1).square().sum()
    close(got, grad(want, student))
    logits = student * 1.0
    beside = logits.softmax(-1).log() + logits.square()
    loss = loss_of(logits, teacher, labels, inplace=True, backend=backend)
    assert logits._version > 0
    raises(RuntimeError, "inplace operation", lambda: grad(loss + beside.sum(), student))


@case("R-19", "unsloth#5002: a second head and checkpointing are corrupted")
def two_losses_and_checkpointing(backend: str) -> None:
    student, teacher, labels = make()
    logits = student * 1.0
    total = F.cross_entropy(logits, labels) + loss_of(logits, teacher, labels, backend=backend)
    total = total + loss_of(logits, teacher, labels, divergence="jsd", backend=backend)
    want = F.cross_entropy(student, labels) + eager_kd_loss(student, teacher, labels)
    want = want + eager_kd_loss(student, teacher, labels, divergence="jsd")
    close(grad(total, student), grad(want, student))

    def step(x: Tensor) -> Tensor:
        return loss_of(x * 1.0, teacher, labels, backend=backend)

    again = checkpoint(step, student, use_reentrant=False)
    close(grad(again, student), grad(eager_kd_loss(student, teacher, labels), student))


@case("R-20", "Liger, fla: a second backward multiplies twice")
def backward_twice(backend: str) -> None:
    for dtype in DTYPES:
        student, teacher, labels = make(dtype=dtype)
        loss = loss_of(student, teacher, labels, backend=backend)
        two = torch.tensor(2.0)
        first = grad(loss, student, two, retain_graph=True)
        second = grad(loss, student, two, retain_graph=True)
        third = grad(loss, student, torch.tensor(1.0))
        assert torch.equal(first, second)
        close(first, 2 * third)


@case("R-21", "verl#4797: written in place, nowhere declared")
def schemas_name_what_is_written(backend: str) -> None:
    if backend != "cpu":
        return
    operators = torch.ops.fused_kd
    for name in ("forward_backward_", "backward_"):
        written = [
            a.name
            for a in getattr(operators, name).default._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        assert written == ["student"], name
    for name in ("forward", "forward_backward", "backward"):
        arguments = getattr(operators, name).default._schema.arguments
        assert all(a.alias_info is None for a in arguments), name


@case("R-22", "Liger#1305: the upstream gradient is overwritten")
def upstream_gradients_are_unchanged(backend: str) -> None:
    for reduction, shape in (("none", (6,)), ("mean", ()), ("sum", ())):
        student, teacher, labels = make()
        loss = loss_of(student, teacher, labels, reduction=reduction, backend=backend)
        upstream = torch.randn(shape)
        before = upstream.clone()
        grad(loss, student, upstream)
        assert torch.equal(upstream, before)


@case("R-23", "Liger#678, #968: every row is scaled by the first row's upstream gradient")
def rows_have_their_own_upstream_gradient(backend: str) -> None:
    for dtype in DTYPES:
        student, teacher, labels = make(dtype=dtype)
        upstream = torch.randn(6)
        got = grad(
            loss_of(student, teacher, labels, reduction="none", backend=backend), student, upstream
        )
        want = eager_kd_loss(student, teacher, labels, reduction="none")
        close(got, grad(want, student, upstream))
        assert torch.count_nonzero(got[0]) == 0
        assert torch.count_nonzero(got[1:]) > 0


@case("R-24", "TE#2139: a row gradient is read as a scalar, strided ones are misread")
def upstream_gradients_of_any_layout(backend: str) -> None:
    reductions: list[Callable[[Tensor], Tensor]] = [
        torch.sum,
        torch.mean,
        lambda x: (x * x).sum(),
        lambda x: x.t().reshape(-1)[::2].sum(),
        lambda x: (x.expand(4, 2, 3) * torch.arange(24.0).view(4, 2, 3)).sum(),
    ]
    for reduce in reductions:
        student, teacher, labels = make()
        tensors = student.view(2, 3, V), teacher.view(2, 3, V), labels.view(2, 3)
        loss = loss_of(*tensors, reduction="none", backend=backend)
        want = eager_kd_loss(*tensors, reduction="none")
        close(grad(reduce(loss), student), grad(reduce(want), student))


@case("R-26", "axolotl#3660: the CE term has no gradient, the printed loss is right")
def each_term_has_its_gradient(backend: str) -> None:
    student, teacher, labels = make()
    seen = []
    for hard, soft in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (0.7, 0.3)):
        weights = {"hard_weight": hard, "soft_weight": soft}
        got = grad(loss_of(student, teacher, labels, backend=backend, **weights), student)
        close(got, grad(eager_kd_loss(student, teacher, labels, **weights), student))
        seen.append(got)
    for a, b in itertools.combinations(seen, 2):
        assert not torch.allclose(a, b, rtol=1e-3)


@case("R-27", "trl#2277: KL's value right, its gradient wrong")
def numerical_gradients(backend: str) -> None:
    """By differences; gradcheck in float64 of the reference is in test_reference.py."""
    for divergence in DIVERGENCES:
        options: dict[str, Any] = {"divergence": divergence, "temperature": 1.5, "beta": 0.3}
        student, teacher = torch.randn(1, 7), torch.randn(1, 7)
        weights = {"hard_weight": 0, "soft_weight": 1}
        got = rows_and_gradient(student, teacher, backend=backend, **options, **weights)[1]
        for i in range(7):
            ends = [student.double(), student.double()]
            ends[0][0, i] += 1e-6
            ends[1][0, i] -= 1e-6
            up, down = (truth(x, teacher, **options, **weights)[0] for x in ends)
            torch.testing.assert_close(got[:, i].double(), (up - down) / 2e-6, rtol=2e-4, atol=1e-6)


@case("R-28", "pytorch#185987: a cycle through ctx, freed only by the garbage collector")
def nothing_is_left(backend: str) -> None:
    """The peaks are in test_memory.py."""
    student, teacher, labels = make()

    def step() -> None:
        grad(loss_of(student, teacher, labels, backend=backend), student, retain_graph=True)

    step()
    gc.collect()
    gc.disable()
    try:
        assert cpu_peak(lambda: [step() for _ in range(3)]).left == 0
    finally:
        gc.enable()


@case("R-29", "Liger#930, #1156: crashes under no_grad, or where some input needs no gradient")
def every_subset_of_requires_grad(backend: str) -> None:
    contexts = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for needs, reduction, context in itertools.product((True, False), ("mean", "none"), contexts):
        student, teacher, labels = make()
        with context():
            loss = loss_of(
                student.detach().requires_grad_(needs),
                teacher,
                labels,
                reduction=reduction,
                backend=backend,
            )
        assert loss.requires_grad == (needs and context is torch.enable_grad)
        close(loss, eager_kd_loss(student, teacher, labels, reduction=reduction).detach())


@case("R-31", "quack 66d8016: a class weight is loaded at index -100; a tensor kept on ctx")
def saved_tensors_are_seen(backend: str) -> None:
    student, teacher, labels = make()
    seen: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        seen.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of(student, teacher, labels, reduction="none", backend=backend)
    assert {student.data_ptr(), teacher.data_ptr()} <= seen
