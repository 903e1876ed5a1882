"""Regression cases N-11 to N-34: ignored rows, denominators, what a call leaves as it was."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from fast import rows_and_gradient, scalar_and_gradient
from regression_helpers import V, close, grad, loss_of, make, raises
from regression_registry import case
from torch import Tensor

from fused_kd import Head, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import eager_kd_loss


@case("N-11", "pytorch#73205: the smoothing term counts ignored rows")
@case("N-12", "pytorch#69339: smoothing and a label of -100")
def smoothing_of_ignored_rows(backend: str) -> None:
    for reduction, ignored in itertools.product(("mean", "sum", "none"), (-100, V + 70)):
        options: dict[str, Any] = {"label_smoothing": 0.2, "ignore_index": ignored}
        options |= {"reduction": reduction, "backend": backend}
        student, teacher, labels = make(2)
        labels[0] = ignored
        got = loss_of(student, teacher, labels, **options)
        alone = loss_of(student[1:], teacher[1:], labels[1:], **options)
        want = F.cross_entropy(student[1:], labels[1:], label_smoothing=0.2)
        want = 0.5 * want + 0.5 * F.kl_div(
            student[1:].log_softmax(1), teacher[1:].softmax(1), reduction="batchmean"
        )
        close(got.sum(), want)
        close(alone.sum(), want)
        close(grad(got.sum(), student), grad(want, student))


NO_READ_AT_THE_LABEL = """
import sys, torch
from fused_kd import kd_loss
from fused_kd.backends import named
from fused_kd.options import Formula, KDOptions, temperature_tensor
from fused_kd.testing import guarded
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    rows = [guarded(33, dtype, "before").normal_() for _ in range(2)]  # entry -100: no such page
    for label in (-100, -4000):
        labels = torch.tensor([label])
        for reduction in ("mean", "sum", "none"):
            student = rows[0].view(1, 33).requires_grad_()
            loss = kd_loss(student, rows[1].view(1, 33), labels, label_smoothing=0.1,
                           ignore_index=label, reduction=reduction, backend=sys.argv[1])
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert loss.sum() == 0 and not gradient.any()
        # kept and out of range, as a trace or a GPU would find it
        student, one = student.detach()[None], torch.ones(1)
        run, temperature = named(sys.argv[1]).forward_backward, temperature_tensor(KDOptions())
        formula = Formula("forward_kl", temperature, 0.5, "t2", 0.1)
        assert run(student, rows[1].view(1, 1, 33), labels, one, one, formula, False)[0].isnan()
print("done")
"""


@case("N-12", "pytorch#91383: what is read at index -100, before the row")
def no_read_at_the_label(backend: str) -> None:
    run = [sys.executable, "-c", NO_READ_AT_THE_LABEL, backend]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", (result.returncode, result.stderr)


@case("N-13", "pytorch#176338: an ignore_index that is a class is handled by a weight of 0")
def any_ignore_index(backend: str) -> None:
    for ignored, divergence in itertools.product((3, -1, -100, V - 1, 0), DIVERGENCES):
        student, teacher, labels = make()
        labels = labels.clamp(4, V - 2)
        labels[[0, 4]] = ignored
        options: dict[str, Any] = {"divergence": divergence, "backend": backend}
        options |= {"ignore_index": ignored, "label_smoothing": 0.1}
        broken = student.detach().clone()
        broken[0], broken[4, 1], teacher[4] = torch.nan, torch.inf, torch.nan
        kept = torch.tensor([1, 2, 3, 5])
        got = scalar_and_gradient(broken, teacher, labels, **options)
        want = scalar_and_gradient(broken[kept], teacher[kept], labels[kept], **options)
        close(got[0], want[0])
        close(got[1][kept], want[1])
        assert torch.count_nonzero(got[1][[0, 4]]) == 0


@case("N-14", "TransformerEngine#2476: divided by all rows, and the test compared it with itself")
def the_mean_is_over_the_kept_rows(backend: str) -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 5.0], [0.0, 0.0], [9.0, 2.0]]).log_softmax(1)
    student[2] = torch.tensor([0.25, 0.75]).log()
    teacher = torch.full((4, 2), 0.5).log()
    labels = torch.tensor([-100, -100, 0, -100])
    hard, soft = 1.3862943611, 0.1438410362  # log 4, and log 2 - log 3 / 2, by hand
    for divisor, items in ((1, None), (4, 4)):
        got = loss_of(student, teacher, labels, hard_weight=0.25, num_items=items, backend=backend)
        want = torch.tensor((0.25 * hard + 0.5 * soft) / divisor)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@case("N-22", "trl#5461: labels are masked in place through an alias")
def inputs_are_untouched(backend: str) -> None:
    for dtype, inplace in itertools.product((torch.int64, torch.int32), (False, True)):
        student, teacher, _ = make(8)
        memory = torch.randint(V, (2, 9)).to(dtype)  # of which the labels are a shifted view
        memory[0, :3] = memory[1, 5:] = -100
        labels, weight = memory[:, 1:5], torch.rand(2, 9)[:, 2:6]
        count = torch.tensor(4)
        kept = [x.clone() for x in (memory, weight, count, teacher)]
        logits = student.view(2, 4, V) * 1.0
        loss_of(
            logits,
            teacher.view(2, 4, V),
            labels,
            token_weight=weight,
            num_items=count,
            inplace=inplace,
            backend=backend,
        ).backward()
        hidden, head = torch.randn(2, 4, 5, requires_grad=True), torch.randn(V, 5)
        before = hidden.detach().clone()
        sides = Head(hidden, head), Head(hidden.detach(), head)
        got = kd_loss(*sides, labels, token_weight=weight, backend=backend)
        assert isinstance(got, Tensor)
        got.backward()
        assert torch.equal(hidden, before)
        for x, was in zip((memory, weight, count, teacher), kept, strict=True):
            assert torch.equal(x, was)
            assert x._version == 0 or x is memory  # which this test has filled


@case("N-24", "labml#66: the teacher's logits stand on both sides, and nothing is distilled")
def the_soft_term_pulls_to_the_teacher(backend: str) -> None:
    for divergence in DIVERGENCES:
        options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0, "backend": backend}
        student, teacher, labels = make()
        near = scalar_and_gradient(teacher, teacher.clone(), labels, **options)
        assert near[0] == 0
        far, gradient = scalar_and_gradient(student, teacher, labels, **options)
        assert far > 0.01
        assert (gradient[1:].abs().amax(1) > 1e-4).all()
        step = 0.1 / gradient.abs().max()
        after, _ = scalar_and_gradient(student - step * gradient, teacher, labels, **options)
        assert after < far


@case("N-29", "sentence-transformers#3757: the teacher is not detached, and moves too")
def teachers_get_no_gradient(backend: str) -> None:
    student, teacher, labels = make()
    for taught in (teacher.clone().requires_grad_(), teacher.clone().requires_grad_() * 1):
        raises(
            ValueError,
            "teacher must not require grad",
            lambda t=taught: loss_of(student, t, labels, backend=backend),  # type: ignore[misc]
        )
    hidden, head = torch.randn(6, 5, requires_grad=True), torch.randn(V, 5, requires_grad=True)
    own = Head(hidden, head)
    for name in ("hidden", "weight", "bias"):
        frozen = Head(torch.randn(6, 5), torch.randn(V, 5), torch.randn(V))
        parameter = getattr(frozen, name).requires_grad_()
        attached = frozen._replace(**{name: parameter * 1})
        raises(
            ValueError,
            f"teacher.{name} must not be attached to a graph",
            lambda t=attached: kd_loss(own, t, labels, backend=backend),  # type: ignore[misc]
        )
        # a parameter of a frozen model whose requires_grad was left on
        loss = kd_loss(own, frozen, labels, backend=backend)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert parameter.grad is None
    assert head.grad is not None


@case("N-33", "Megatron-LM cached_logits_loss.py: student_logits -= max writes the model's logits")
def logits_serve_a_second_loss_afterwards(backend: str) -> None:
    for reduction in ("mean", "none"):
        student, teacher, labels = make()
        logits = student * 1.0  # float32, which .float() does not copy
        kd = loss_of(logits, teacher, labels, reduction=reduction, backend=backend).sum()
        total = kd + F.cross_entropy(logits, labels) + logits.logsumexp(1).square().mean()
        want = eager_kd_loss(student, teacher, labels, reduction=reduction).sum()
        want = want + F.cross_entropy(student, labels) + student.logsumexp(1).square().mean()
        close(total, want)
        close(grad(total, student), grad(want, student))


@case("N-15", "verl#7200: normalised by micro-batch, 8 times the loss at micro-batches of 1")
def sequences_of_unequal_length(backend: str) -> None:
    lengths = (1, 12, 3, 7, 12, 2, 5, 9)
    student, teacher = torch.randn(8, 12, V), torch.randn(8, 12, V)
    labels = torch.randint(V, (8, 12))
    for sequence, length in zip(labels, lengths, strict=True):
        sequence[length:] = -100
    exact = student.double().requires_grad_()
    want = eager_kd_loss(exact, teacher.double(), labels)
    count = torch.tensor(sum(lengths))
    for size in (8, 4, 1):
        losses, gradients = [], []
        for micro in zip(*(x.split(size) for x in (student, teacher, labels)), strict=True):
            loss, gradient = scalar_and_gradient(*micro, num_items=count, backend=backend)
            losses.append(loss)
            gradients.append(gradient)
        close(torch.stack(losses).sum(), want.detach())
        close(torch.cat(gradients), grad(want, exact, retain_graph=True))
    rows, _ = rows_and_gradient(student, teacher, labels, backend=backend)
    close(rows.sum() / sum(lengths), want.detach())
