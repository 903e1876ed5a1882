"""What autograd keeps between forward and backward, and that nothing stays behind."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import as_loss, gradient, make_ignored
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.testing import cpu_peak


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensor_hooks_see_every_saved_tensor_R_31(backend: str, reduction: str) -> None:
    student, teacher, labels = make_ignored()
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = as_loss(kd_loss(student, teacher, labels, reduction=reduction, backend=backend))
    addresses = {x.data_ptr() for x in seen}
    assert {student.data_ptr(), teacher.data_ptr(), labels.data_ptr()} <= addresses
    loss.sum().backward()


def test_an_unused_teacher_is_not_saved(backend: str) -> None:
    student, teacher, labels = make_ignored()
    for given in (teacher, None):
        seen = list[Tensor]()

        def pack(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kd_loss(student * 1.0, given, labels, soft_weight=0.0, backend=backend)
        assert len([x for x in seen if x.numel() == student.numel()]) == 1


def test_moving_what_is_saved_elsewhere_gives_the_same_gradient(backend: str) -> None:
    student, teacher, labels = make_ignored(torch.float16)
    want = gradient(as_loss(kd_loss(student, teacher, labels, backend=backend)), student)
    with torch.autograd.graph.save_on_cpu():
        loss = as_loss(kd_loss(student, teacher, labels, backend=backend))
    assert torch.equal(gradient(loss, student), want)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("run_backward", [True, False])
def test_nothing_waits_for_the_garbage_collector_R_28(
    backend: str, inplace: bool, run_backward: bool
) -> None:
    student, teacher, labels = make_ignored()

    def step() -> None:
        logits = student * 1.0
        loss = as_loss(kd_loss(logits, teacher, labels, inplace=inplace, backend=backend))
        if run_backward:
            torch.autograd.grad(loss, student)

    step()
    gc.collect()
    gc.disable()
    try:
        left = [left_by_five_steps(step) for _ in range(3)]
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def left_by_five_steps(step: Any) -> int:
    """Bytes left by five steps; the collection happens before, not after, them."""
    return cpu_peak(lambda: [step() for _ in itertools.repeat(None, 5)]).left


def test_the_memory_probe_reads_a_known_figure() -> None:
    rows, vocabulary = 256, 3200
    logits = torch.randn(rows, vocabulary, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    peak = cpu_peak(lambda: F.cross_entropy(logits, labels).backward())
    size = rows * vocabulary * 4
    assert size <= peak.left < size + 4096
    assert 3 * size <= peak.highest < 3 * size + 4096
    assert peak.largest == size
