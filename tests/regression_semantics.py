"""Regression cases about labels, masks, reductions, conventions, strides, threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fast import formula_of, rows_and_gradient, scalar_and_gradient, truth
from helpers import DTYPES
from regression_helpers import V, close, grad, loss_of, make, raises
from regression_registry import case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kd import KDLoss, kd_loss
from fused_kd.backends import named
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import eager_kd_loss

# ------------------------------------------------------- labels, masks, reductions, conventions


@case("R-32", "torchtune#2239: NaN where every label is ignored")
@case("R-33", "trl#6859: that loss is tied to no parameter, and distributed training hangs")
def no_row_is_kept(backend: str) -> None:
    for reduction, divergence in itertools.product(("mean", "sum", "none"), DIVERGENCES):
        student, teacher, labels = make()
        labels[:] = -100
        loss = loss_of(
            student, teacher, labels, reduction=reduction, divergence=divergence, backend=backend
        )
        assert loss.requires_grad
        assert torch.equal(loss, torch.zeros_like(loss))
        loss.sum().backward()
        assert student.grad is not None
        assert torch.equal(student.grad, torch.zeros_like(student))


@case("R-34", "Liger#588: a label out of range is read out of the row")
@case("R-35", "flash-attention: an out-of-range label silently gives loss 0")
def labels_out_of_range(backend: str) -> None:
    for bad in (V, -1, 2 * V, -101, 2**40):
        student, teacher, labels = make()
        labels[3] = bad
        raises(
            ValueError,
            f"labels must be in [0, {V}) or equal to ignore_index=-100; got {bad} at position 3",
            lambda s=student, t=teacher, y=labels: loss_of(s, t, y, backend=backend),  # type: ignore[misc]
        )


@case("R-34", "Liger#588: where nobody looked before (a trace, a GPU) the row is NaN")
def labels_out_of_range_unseen(backend: str) -> None:
    for bad in (V, -1, 2**40, -(2**62)):
        student, teacher, labels = make()
        rows, one = (student.detach()[None], teacher[None]), torch.ones(6)
        labels[0], labels[3] = 0, bad
        run = named(backend).forward_backward
        hard, _, _, gradient = run(*rows, labels, one, one, formula_of(), False)
        assert hard.isnan().tolist() == [i == 3 for i in range(6)]
        assert torch.equal(gradient[0].isnan().any(1), hard.isnan())
        assert gradient[0, 3].isnan().all()


@case("R-36", "Liger#974: ignore_index accepted, never applied in JSD")
def ignored_rows_in_every_divergence(backend: str) -> None:
    for divergence in DIVERGENCES:
        student, teacher, labels = make()
        got = rows_and_gradient(student, teacher, labels, divergence=divergence, backend=backend)
        assert got[0][0] == 0
        assert torch.count_nonzero(got[1][0]) == 0
        assert (got[0][1:] > 0).all()


@case("R-38", 'Liger#421: reduction="none" returned a scalar')
def shapes_of_reductions(backend: str) -> None:
    student, teacher, labels = make()
    tensors = student.view(2, 3, V), teacher.view(2, 3, V), labels.view(2, 3)
    for reduction, shape in (("none", (2, 3)), ("mean", ()), ("sum", ())):
        loss = loss_of(*tensors, reduction=reduction, backend=backend)
        assert loss.shape == shape
        assert loss.dtype == torch.float32


@case("R-39", "Liger#767: a division by zero deep inside where a dimension is 0")
def no_rows_or_no_vocabulary(backend: str) -> None:
    for shape, reduction in itertools.product(((0,), (2, 0), (0, 3)), ("mean", "sum", "none")):
        student = torch.randn(*shape, V, requires_grad=True)
        labels = torch.zeros(shape, dtype=torch.long)
        loss = loss_of(
            student, torch.randn(*shape, V), labels, reduction=reduction, backend=backend
        )
        assert loss.sum() == 0
        assert grad(loss.sum(), student).shape == student.shape
    nothing = torch.randn(3, 0)
    raises(ValueError, "at least one vocabulary entry", lambda: loss_of(nothing, nothing))


@case("R-40", "trl#6006: a mean of means under gradient accumulation")
def any_split_is_the_whole(backend: str) -> None:
    student, teacher, labels = make(12)
    labels[4:8] = -100
    for kept in (7, torch.tensor(7), torch.tensor(7.0)):
        whole = scalar_and_gradient(student, teacher, labels, backend=backend)
        for size in (1, 4, 5):
            parts = [
                scalar_and_gradient(s, t, y, num_items=kept, backend=backend)
                for s, t, y in zip(
                    student.split(size), teacher.split(size), labels.split(size), strict=True
                )
            ]
            close(torch.stack([p[0] for p in parts]).sum(), whole[0])
            close(torch.cat([p[1] for p in parts]), whole[1])
    zero = loss_of(student, teacher, labels, num_items=torch.tensor(0), backend=backend)
    assert zero == 0
    assert torch.count_nonzero(grad(zero, student)) == 0


@case("R-41", "trl#5731: a wrapper's defaults moved the objective by 15 %")
def defaults(backend: str) -> None:
    student, teacher, labels = make()
    want = 0.5 * F.cross_entropy(student, labels) + 0.5 * F.kl_div(
        student.log_softmax(1)[1:],
        teacher.log_softmax(1)[1:],
        log_target=True,
        reduction="batchmean",
    )
    close(loss_of(student, teacher, labels, backend=backend), want)
    got = KDLoss(backend=backend)(student, teacher, labels)
    close(got, want)
    parts = kd_loss(student, student.detach().clone(), labels, return_parts=True, backend=backend)
    assert not isinstance(parts, Tensor)
    assert parts.soft == 0


@case("R-42", "trl#3043, keras-io#869: beta turned round, T² missing, mean for batchmean")
def conventions(backend: str) -> None:
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    p, q = (0.25, 0.75), (0.5, 0.5)
    m = [0.9 * b + 0.1 * a for a, b in zip(p, q, strict=True)]  # beta weighs the teacher

    def kl(x: Any, y: Any) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))

    closed = {
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "jsd": 0.9 * kl(q, m) + 0.1 * kl(p, m),
        "tvd": 0.25,
        "mse": math.log(3) ** 2 / 2,
    }
    for divergence, (scale, factor) in itertools.product(closed, (("t2", 4.0), ("none", 1.0))):
        got = loss_of(
            2 * student,  # so that it is p at T = 2
            2 * teacher,
            hard_weight=0,
            soft_weight=1,
            temperature=2.0,
            divergence=divergence,
            beta=0.9,
            soft_scale=scale,
            backend=backend,
        )
        torch.testing.assert_close(
            got, torch.tensor(factor * closed[divergence]), rtol=1e-5, atol=1e-7
        )
    for reduction in ("batchmean", "batch_mean"):
        raises(ValueError, "mean", lambda r=reduction: loss_of(student, teacher, reduction=r))  # type: ignore[misc]


@case("R-43", "trl#2215: a cryptic broadcast error for vocabularies of 151936 and 152064")
def vocabularies_that_differ(backend: str) -> None:
    student, teacher = torch.randn(1, 151936), torch.randn(1, 152064)
    raises(
        ValueError, "V = 151936 for the student and V = 152064", lambda: loss_of(student, teacher)
    )


@case("R-44", "trl#6629: scale or temperature is missing on one path")
def all_paths_agree(backend: str) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "label_smoothing": 0.2, "soft_weight": 0.8}
    for divergence in DIVERGENCES:
        student, teacher, labels = make()
        reference = truth(student, teacher, labels, divergence=divergence, **options)[1] / 5
        keywords = {"divergence": divergence, "backend": backend, **options}
        paths = {
            "gradient in the forward": loss_of(student, teacher, labels, **keywords),
            "rows": loss_of(student, teacher, labels, reduction="none", **keywords).sum() / 5,
            "sum": loss_of(student, teacher, labels, reduction="sum", **keywords) / 5,
            "module": KDLoss(**keywords)(student, teacher, labels),
            "in place": loss_of(student * 1.0, teacher, labels, inplace=True, **keywords),
        }
        for loss in paths.values():
            close(grad(loss, student), reference)


@case("R-45", "apex xentropy: label 0 silently ignored by a default padding index")
def label_0_counts(backend: str) -> None:
    student, teacher, _ = make()
    labels = torch.zeros(6, dtype=torch.long)
    got = loss_of(student, teacher, labels, backend=backend)
    close(got, eager_kd_loss(student, teacher, labels))


# ------------------------------------------------------------- strides, traces, tensors, threads


@case("N-34", "Automodel kd_loss.py: .view(-1, V) of a transposed batch raises")
@case("R-54", "TE#2746: wrong for a transposed batch, only the last stride was looked at")
def strides(backend: str) -> None:
    base = torch.randn(2, 5, 4, V + 3)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1)[..., :V],
        lambda x: x[:, :-1, :V],
        lambda x: x[:, 1:, 2 : V + 2],
        lambda x: x.as_strided((4, 5, V), (7, 3, 1)),  # rows overlap
        lambda x: x.transpose(1, 2)[:, :V].transpose(1, 2)[..., : x.shape[1]],
        lambda x: x[:1, :, :V].expand(3, 4, V),
    ]
    for view in views:
        student, teacher = (view(x) for x in base)
        labels = torch.randint(min(V, student.shape[-1]), student.shape[:-1])
        got = rows_and_gradient(student, teacher, labels, backend=backend)
        want = truth(student.contiguous(), teacher.contiguous(), labels)
        for a, b in zip(got, want, strict=True):
            close(a, b)


@case("R-57", "Liger#1292: .item(), torch.equal(grad, 1)")
def nothing_is_read_on_the_host(backend: str) -> None:
    """A fake tensor has no value to read. On a GPU: capture and replay, with issue 3."""
    for dtype, reduction, inplace in itertools.product(DTYPES, ("mean", "none"), (False, True)):
        with FakeTensorMode():
            student, teacher = torch.randn(6, V, dtype=dtype), torch.randn(6, V, dtype=dtype)
            leaf = student.requires_grad_()
            loss = loss_of(
                leaf * 1.0,
                teacher,
                torch.zeros(6, dtype=torch.long),
                reduction=reduction,
                inplace=inplace and reduction == "mean",
                num_items=torch.tensor(5) if reduction == "mean" else None,
                token_weight=torch.ones(6),
                backend=backend,
            )
            (2.5 * loss.sum()).backward()
            assert leaf.grad is not None


@case("R-58", "CCE#31, torchtune#2800: a DTensor handed to a kernel")
def wrapped_tensors_are_refused(backend: str) -> None:
    class Looks(Tensor):
        device_mesh = None

    wrapped = torch.randn(2, V).as_subclass(Looks)  # type: ignore[type-var]
    raises(TypeError, "DTensor", lambda: loss_of(wrapped, torch.randn(2, V), backend=backend))


@case("R-62", "vmecpp#763: sums depend on the threads' order")
def threads_change_no_bit(backend: str) -> None:
    before = torch.get_num_threads()
    for shape in ((1, 70_000), (7, 3_000)):
        if backend == "reference":
            break  # torch's own reductions make no such promise
        student, teacher = torch.randn(*shape), torch.randn(*shape)
        labels = torch.arange(shape[0])
        results = []
        try:
            for number in (1, 2, 3, 8):
                torch.set_num_threads(number)
                results.append(scalar_and_gradient(student, teacher, labels, backend=backend))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert torch.equal(other[0], results[0][0])
            assert torch.equal(other[1], results[0][1])
