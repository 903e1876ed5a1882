"""KDLoss and kd_loss as a user sees them: defaults, shapes, reductions, weights, repr, copies."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd
from fused_kd import KDLoss, KDLossParts, kd_loss
from fused_kd.env import VARIABLES, report
from fused_kd.functional import _as_rows
from fused_kd.options import DIVERGENCES, KDOptions
from fused_kd.testing import eager_kd_loss

N, V = 6, 23


def make(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = leading or (N,)
    labels = torch.randint(V, shape)
    return torch.randn(*shape, V, requires_grad=True), torch.randn(*shape, V), labels


def check(got: Any, want: Tensor, student: Tensor) -> None:
    """Loss and gradient agree to float32 rounding."""
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(got.shape)
    (ours,) = torch.autograd.grad(got, student, upstream)
    (theirs,) = torch.autograd.grad(want, student, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ the module


def test_the_defaults_R_41() -> None:
    assert dataclasses.asdict(KDLoss().options) == {
        "temperature": 1.0,
        "hard_weight": 0.5,
        "soft_weight": 0.5,
        "divergence": "forward_kl",
        "beta": 0.5,
        "soft_scale": "t2",
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": "mean",
        "inplace": False,
        "return_parts": False,
        "backend": "auto",
    }


def test_one_set_of_defaults_and_names_everywhere() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    options = {field.name: field.default for field in dataclasses.fields(KDOptions)}
    assert defaults(KDLoss.__init__) == options
    assert defaults(kd_loss) == {**options, "token_weight": None, "num_items": None}
    assert defaults(KDLoss.forward) == {"token_weight": None, "num_items": None}


def test_the_module_is_the_function(backend: str) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "backend": backend}
    weights: dict[str, Any] = {"token_weight": torch.rand(N), "num_items": 5}
    module = KDLoss(**keywords)(student, teacher, labels, **weights)
    assert torch.equal(module, kd_loss(student, teacher, labels, **keywords, **weights))


def test_the_module_holds_no_state_and_copies() -> None:
    module = KDLoss(temperature=3.0, divergence="tvd", return_parts=True)
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == module.options
        inputs = make()
        torch.testing.assert_close(other(*inputs), module(*inputs), rtol=0, atol=0)


def test_repr_shows_what_matters() -> None:
    assert repr(KDLoss(temperature=2)) == (
        "KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5, divergence='forward_kl', "
        "backend='auto')"
    )
    shown = repr(KDLoss(divergence="jsd", beta=0.1, label_smoothing=0.2, ignore_index=0))
    assert "beta=0.1, label_smoothing=0.2, ignore_index=0, backend='auto'" in shown


def test_options_are_frozen_and_replaceable() -> None:
    module = KDLoss()
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.options.temperature = 2.0  # type: ignore[misc]
    module.options = dataclasses.replace(module.options, temperature=2.0)
    inputs = make()
    assert torch.equal(module(*inputs), kd_loss(*inputs, temperature=2.0))
    with pytest.raises(ValueError, match="temperature must be positive"):
        dataclasses.replace(module.options, temperature=0)


def test_the_docstrings_equivalent_block_is_true_R_44(backend: str) -> None:
    assert kd_loss.__doc__ is not None
    block = re.search(r"Equivalent to::\n\n(.*?)\n\n    The logits", kd_loss.__doc__, re.DOTALL)
    assert block is not None
    student, teacher, labels = make(2, 3)
    labels[0, 1] = -100
    keywords: dict[str, Any] = {
        "temperature": 2.0,
        "hard_weight": 0.3,
        "soft_weight": 0.9,
        "label_smoothing": 0.1,
        "ignore_index": -100,
    }
    names: dict[str, Any] = {
        "F": F,
        "student_logits": student,
        "teacher_logits": teacher,
        "labels": labels,
        **keywords,
    }
    exec(textwrap.dedent(block.group(1)), names)
    check(kd_loss(student, teacher, labels, backend=backend, **keywords), names["loss"], student)


# ------------------------------------------------------------------------- divergences and shapes


@pytest.mark.parametrize("soft_scale", ["t2", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_against_the_eager_composition(
    backend: str, divergence: str, soft_scale: str
) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = {
        "divergence": divergence,
        "soft_scale": soft_scale,
        "temperature": 1.7,
        "beta": 0.2,
        "label_smoothing": 0.1,
        "reduction": "none",
    }
    got = kd_loss(student, teacher, labels, backend=backend, **keywords)
    check(got, eager_kd_loss(student, teacher, labels, **keywords), student)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 1, 3), (2, 3, 1, 2)])
def test_shapes_R_38(backend: str, leading: tuple[int, ...], reduction: str) -> None:
    student = torch.randn(*leading, V, requires_grad=True)
    teacher, labels = torch.randn(*leading, V), torch.randint(V, leading)
    got = kd_loss(student, teacher, labels, reduction=reduction, backend=backend)
    assert isinstance(got, Tensor)
    assert got.shape == (leading if reduction == "none" else ())
    assert got.dtype == torch.float32
    check(got, eager_kd_loss(student, teacher, labels, reduction=reduction), student)


# views of a (4, 6, V+3) base: how each is addressed
VIEWS: dict[str, Any] = {
    "sliced sequence: two strides R-54": lambda x: x[:, :-1, :V],
    "transposed batch and sequence R-54": lambda x: x.transpose(0, 1)[:, :, :V],
    "odd offset and row stride R-53": lambda x: x[1:, 1:, 2 : 2 + V],
    "expanded": lambda x: x[:1, :, :V].expand(4, 6, V),
    "overlapping": lambda x: x.as_strided((4, 6, V), (7, 3, 1)),
    "copied: last stride is not 1": lambda x: x.transpose(1, 2)[:, :V, :].transpose(1, 2),
    "four dimensions that fold": lambda x: x.view(2, 2, 6, V + 3)[..., :V],
    "four dimensions, one split": lambda x: x.view(2, 2, 6, V + 3)[:, :, :4, :V],
    "copied: does not fold": lambda x: x.view(2, 2, 3, 2, V + 3)[:, :1, :2, :, :V],
}


@pytest.mark.parametrize("teacher_view", VIEWS)
@pytest.mark.parametrize("student_view", VIEWS)
def test_strides(backend: str, student_view: str, teacher_view: str) -> None:
    base = torch.randn(4, 6, V + 3, requires_grad=True)
    student = VIEWS[student_view](base)
    teacher = VIEWS[teacher_view](torch.randn(4, 6, V + 3))
    if student.shape != teacher.shape:
        teacher = torch.randn(student.shape)
    labels = torch.randint(V, student.shape[:-1])
    got = kd_loss(student, teacher, labels, temperature=2.0, backend=backend)
    check(got, eager_kd_loss(student, teacher, labels, temperature=2.0), base)


def test_views_are_not_copied_where_two_strides_reach() -> None:
    base = torch.randn(2, 2, 6, V + 3)
    other = torch.randn(2, 2, 4, V)
    for student, teacher in (
        (base[..., :4, :V], other),  # the student decides where to fold
        (other, base[..., :4, :V]),  # the teacher does
        (other[0], base[0, :, :4, :V]),
        (other[0, 0], base[0, 0, :4, :V]),
        (other[0, 0, 0], base[0, 0, 0, :V]),
    ):
        for given, seen in zip((student, teacher), _as_rows(student, teacher, True), strict=True):
            assert seen.dim() == 3
            assert seen.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_labels(backend: str, labels_dtype: torch.dtype) -> None:
    student, teacher, labels = make()
    got = kd_loss(student, teacher, labels.to(labels_dtype), backend=backend)
    assert torch.equal(got, kd_loss(student, teacher, labels, backend=backend))  # type: ignore[arg-type]


def test_shifted_labels_view_R_52(backend: str) -> None:
    student, teacher, _ = make()
    for offset in range(5):
        labels = torch.randint(V, (N + 5,))[offset : offset + N]
        check(
            kd_loss(student, teacher, labels, backend=backend),
            eager_kd_loss(student, teacher, labels),
            student,
        )


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_independent_R_48(
    backend: str, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    student, teacher, labels = make()
    student = student.detach().to(dtype).requires_grad_()
    teacher = teacher.to(teacher_dtype)
    loss = kd_loss(student, teacher, labels, backend=backend)
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager_kd_loss(student, teacher, labels))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("double", ["student", "teacher", "both"])
def test_float64_runs_on_the_reference(double: str) -> None:
    student, teacher, labels = make()
    if double != "teacher":
        student = student.detach().double().requires_grad_()
    if double != "student":
        teacher = teacher.double()
    loss = kd_loss(student, teacher, labels, label_smoothing=0.1)
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float64
    want = eager_kd_loss(student, teacher, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == student.dtype


# ------------------------------------------------------------------ labels, weights and reductions


def test_no_labels(backend: str) -> None:
    student, teacher, _ = make(2, 3)
    got = kd_loss(student, teacher, hard_weight=0, soft_weight=1, backend=backend)
    want = eager_kd_loss(student, teacher, hard_weight=0, soft_weight=1)
    check(got, want, student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_rows_count_in_neither_term_R_36(
    backend: str, divergence: str, ignore_index: int
) -> None:
    student, teacher, labels = make()
    labels[0] = labels[3] = ignore_index
    kept = labels != ignore_index
    got = kd_loss(
        student, teacher, labels, divergence=divergence, ignore_index=ignore_index, backend=backend
    )
    want = eager_kd_loss(student[kept], teacher[kept], labels[kept], divergence=divergence)
    check(got, want, student)


def test_label_zero_counts_R_45(backend: str) -> None:
    student, teacher, _ = make()
    labels = torch.zeros(N, dtype=torch.int64)
    check(
        kd_loss(student, teacher, labels, backend=backend),
        eager_kd_loss(student, teacher, labels, ignore_index=-1),
        student,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_kept_row_is_zero_with_a_graph_R_32_R_33(
    backend: str, reduction: str, weighted: bool
) -> None:
    student, teacher, _ = make()
    labels = torch.full((N,), -100)
    weight = torch.rand(N) if weighted else None
    parts = kd_loss(
        student,
        teacher,
        labels,
        token_weight=weight,
        reduction=reduction,
        return_parts=True,
        backend=backend,
    )
    assert isinstance(parts, KDLossParts)
    for part in parts:
        assert torch.equal(part, torch.zeros_like(part))
    (gradient,) = torch.autograd.grad(parts.loss.sum(), student)
    assert torch.equal(gradient, torch.zeros(N, V))


@pytest.mark.parametrize("zero", ["weights", "num_items"])
def test_a_zero_denominator_that_is_a_tensor_gives_zero_R_40(backend: str, zero: str) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = (
        {"token_weight": torch.zeros(N)} if zero == "weights" else {"num_items": torch.tensor(0)}
    )
    loss = kd_loss(student, teacher, labels, backend=backend, **keywords)
    assert isinstance(loss, Tensor)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros(N, V))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int64, bool])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight(backend: str, reduction: str, kind: torch.dtype) -> None:
    student, teacher, labels = make()
    labels[1] = -100
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0, 0.0]).to(
        torch.bool if kind is bool else kind
    )
    got = kd_loss(
        student, teacher, labels, token_weight=weight, reduction=reduction, backend=backend
    )
    rows = eager_kd_loss(student, teacher, labels, reduction="none")
    w = torch.where(labels != -100, weight.float(), 0.0)
    want = {"mean": (w * rows).sum() / w.sum(), "sum": (w * rows).sum(), "none": w * rows}
    check(got, want[reduction], student)


def test_token_weight_is_taken_in_any_layout(backend: str) -> None:
    student, teacher, labels = make(2, 3)
    weight = torch.rand(3, 2).t()
    for reduction in ("mean", "sum", "none"):
        keywords: dict[str, Any] = {"token_weight": weight, "reduction": reduction}
        got = kd_loss(student, teacher, labels, backend=backend, **keywords)
        check(got, eager_kd_loss(student, teacher, labels, **keywords), student)


@pytest.mark.parametrize("num_items", [4, 2.5, torch.tensor(4), torch.tensor(2.5)], ids=str)
def test_num_items_is_the_denominator(backend: str, num_items: Any) -> None:
    student, teacher, labels = make()
    got = kd_loss(student, teacher, labels, num_items=num_items, backend=backend)
    want = eager_kd_loss(student, teacher, labels, reduction="sum") / float(num_items)
    check(got, want, student)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_any_split_with_num_items_equals_the_whole_R_40(backend: str, kind: Any) -> None:
    student, teacher, labels = make()
    labels[0] = labels[4] = -100
    kept = kind(4)
    for split in (1, 2, 5):
        whole = kd_loss(student, teacher, labels, backend=backend)
        pieces = [
            kd_loss(student[part], teacher[part], labels[part], num_items=kept, backend=backend)
            for part in (slice(None, split), slice(split, None))
        ]
        check(sum(pieces), whole, student)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts(backend: str, reduction: str) -> None:
    student, teacher, labels = make()
    labels[2] = -100
    keywords: dict[str, Any] = {"reduction": reduction, "temperature": 2.0}
    weights: dict[str, Any] = {"hard_weight": 0.3, "soft_weight": 0.6}
    parts = kd_loss(
        student, teacher, labels, return_parts=True, backend=backend, **keywords, **weights
    )
    assert isinstance(parts, KDLossParts)
    check(parts.loss, eager_kd_loss(student, teacher, labels, **keywords, **weights), student)
    hard = eager_kd_loss(student, teacher, labels, hard_weight=1, soft_weight=0, **keywords)
    soft = eager_kd_loss(student, teacher, labels, hard_weight=0, soft_weight=1, **keywords)
    torch.testing.assert_close(parts.hard, hard.detach())
    torch.testing.assert_close(parts.soft, soft.detach())


@pytest.mark.parametrize("off", ["hard_weight", "soft_weight"])
def test_a_term_of_weight_zero_is_not_computed_and_reported_as_zero(
    backend: str, off: str
) -> None:
    student, teacher, labels = make()
    if off == "soft_weight":
        teacher = torch.full_like(teacher, torch.nan)
    parts = kd_loss(student, teacher, labels, return_parts=True, backend=backend, **{off: 0.0})  # type: ignore[arg-type]
    assert isinstance(parts, KDLossParts)
    assert (parts.hard if off == "hard_weight" else parts.soft).item() == 0
    assert parts.loss.isfinite()
    (gradient,) = torch.autograd.grad(parts.loss, student)
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------- the package and env


def test_public_names() -> None:
    assert set(fused_kd.__all__) == {"KDLoss", "KDLossParts", "kd_loss", "__version__"}
    assert fused_kd.__version__ == "0.1.0"


def test_the_environment_report_prints_every_backend_and_variable() -> None:
    found = report()
    assert set(found["backends"]) == {"reference", "cpu"}
    assert found["backends"]["reference"] == "available"
    run = subprocess.run(
        [sys.executable, "-m", "fused_kd.env", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["versions"]["fused_kd"] == fused_kd.__version__
    run = subprocess.run(
        [sys.executable, "-m", "fused_kd.env"], capture_output=True, text=True, check=True
    )
    for name, _ in VARIABLES:
        assert name in run.stdout
