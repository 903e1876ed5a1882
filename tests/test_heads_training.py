"""Heads in training: autograd's corners, autocast, compilation, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import H_S, distance, eager, make_heads, near, ours, truth
from support.logits import DTYPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_kd import Head, kd_loss
from fused_kd.engines import products


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_gradients_only_where_they_are_asked_for(
    wanted: tuple[int, ...], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = make_heads()
    full = ours(heads, reduction=reduction)
    student = [
        x.detach().requires_grad_(bool(w)) for x, w in zip(heads.student, wanted, strict=True)
    ]
    calls = _count_products(monkeypatch)
    loss = kd_loss(Head(*student), heads.teacher_side, heads.labels, reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.sum().backward()
    for x, want, asked in zip(student, full[1:], wanted, strict=True):
        assert (x.grad is not None) == bool(asked)
        if asked:
            torch.testing.assert_close(x.grad, want)
    assert calls["hidden_gradient"] == wanted[0]  # a frozen head costs no product
    assert calls["weight_gradient"] == wanted[1]


def _count_products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the gradients' products from now on; return the counts, which later calls update."""
    calls = {"hidden_gradient": 0, "weight_gradient": 0}
    kind = type(products.products_for("auto", torch.device("cpu"), torch.float32))

    def counted(name: str) -> Any:
        original = getattr(kind, name)

        def call(*arguments: Any) -> None:
            calls[name] += 1
            original(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(kind, name, counted(name))
    return calls


def test_a_second_backward_gives_the_same(dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)
    student = Head(heads.hidden, heads.weight)
    loss = kd_loss(student, heads.teacher_side, heads.labels, chunk_rows=10)
    upstream = torch.tensor(2.0)  # exact in every dtype
    first, second, third = (
        torch.autograd.grad(loss, (heads.hidden, heads.weight), upstream, retain_graph=True)
        for _ in range(3)
    )
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(b, c)
        assert distance(a, b) <= torch.finfo(dtype).eps


def test_gradients_accumulate(dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)
    for x in heads.student:
        x.grad = torch.ones_like(x)
    got = ours(heads)
    kd_loss(heads.student_side, heads.teacher_side, heads.labels).backward()
    for x, gradient in zip(heads.student, got[1:], strict=True):
        assert torch.equal(x.grad, 1 + gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    heads = make_heads()
    student = Head(heads.hidden, heads.weight)
    loss = kd_loss(student, heads.teacher_side, heads.labels, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, (heads.hidden, heads.weight), create_graph=True)
    for gradient in gradients:
        for x in (heads.hidden, heads.weight):
            with pytest.raises(RuntimeError, match="differentiated twice"):
                torch.autograd.grad(gradient.sum(), x, retain_graph=True)


def test_an_infinite_loss_scale_leaves_ignored_rows_zero() -> None:
    for dtype in DTYPES:
        heads = make_heads(dtype=dtype)
        heads.labels[4] = -100
        got = ours(heads, torch.tensor(torch.inf))
        assert not got.hidden[4].any()
        assert not got.hidden[5].isfinite().all()


def test_float16_is_scaled_before_it_is_rounded() -> None:
    # Gradients that float16 would round to 0, but for the loss scale that comes from upstream.
    heads = make_heads(dtype=torch.float16)
    scale = torch.tensor(2.0**16)
    for height in (37, 5):
        got = ours(heads, scale, num_items=2.0**26, chunk_rows=height)
        want = truth(heads, scale, num_items=2.0**26)
        near(got, want, 2e-3)


def test_tied_embeddings_get_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(131, H_S)
    tokens = torch.randint(131, (37,))
    heads = make_heads()

    def run(kind: str) -> Tensor:
        hidden = torch.tanh(embedding(tokens))
        if kind == "heads":
            loss = kd_loss(Head(hidden, embedding.weight), heads.teacher_side, heads.labels)
        else:
            logits = F.linear(hidden, embedding.weight)
            loss = kd_loss(logits, F.linear(*heads.teacher), heads.labels)
        return torch.autograd.grad(loss, embedding.weight)[0]

    torch.testing.assert_close(run("heads"), run("logits"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    heads = make_heads()

    def loss(hidden: Tensor) -> Any:
        return kd_loss(Head(hidden, heads.weight), heads.teacher_side, heads.labels)

    want = torch.autograd.grad(loss(heads.hidden), (heads.hidden, heads.weight))
    checkpoint(loss, heads.hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(heads.hidden.grad, want[0])
    assert torch.equal(heads.weight.grad, want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_operands_and_nothing_else(dtype: torch.dtype) -> None:
    heads = make_heads()
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    rounded = heads._replace(
        **{name: getattr(heads, name).detach().to(dtype).float() for name in names}
    )
    rounded.hidden.requires_grad_()
    rounded.weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        got = ours(heads, chunk_rows=10)
    want = truth(rounded)
    assert got.hidden.dtype == got.weight.dtype == torch.float32
    assert distance(got.loss, want.loss) < 1e-6
    # a processor that multiplies bfloat16 rounds the gradient too, once
    native = dtype == torch.bfloat16
    near(got[1:], want[1:], (2e-3 if native else 1e-6))


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parameters", DTYPES)
def test_autocast_of_any_parameters(
    parameters: torch.dtype, bias: bool, enabled: torch.dtype
) -> None:
    # Liger#305, #336: addmm was given two dtypes without bias, or with float32 master weights.
    heads, hidden = make_heads(dtype=parameters), make_heads().hidden
    student = [hidden, heads.weight, *([heads.bias] if bias else [])]
    with torch.autocast("cpu", enabled):
        loss = kd_loss(Head(*student), heads.teacher_side, heads.labels)
        logits = F.linear(*student).float(), F.linear(*heads.teacher).float()
    want = kd_loss(*logits, heads.labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=0)
    eager = torch.autograd.grad(want, student)
    for x, got, expected in zip(student, torch.autograd.grad(loss, student), eager, strict=True):
        assert got.dtype == x.dtype
        assert distance(got, expected) < 3e-2


def test_autocast_takes_what_would_not_match_without_it() -> None:
    heads = make_heads()
    hidden = heads.hidden.detach().bfloat16().requires_grad_()
    sides = Head(hidden, heads.weight), heads.teacher_side
    with pytest.raises(TypeError, match="outside autocast"):
        kd_loss(*sides, heads.labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd_loss(*sides, heads.labels)
    loss.backward()  # outside: the backward has the forward's dtypes
    assert hidden.grad.dtype == torch.bfloat16
    assert heads.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_parameters_of_a_teacher_are_detached(name: str) -> None:
    heads = make_heads()
    teacher = heads.teacher_side._replace(bias=torch.randn(131))
    parameter = getattr(teacher, name).clone().requires_grad_()
    teacher = teacher._replace(**{name: parameter})
    kd_loss(heads.student_side, teacher, heads.labels).backward()
    assert parameter.grad is None
    assert heads.weight.grad is not None


def test_a_training_step_with_the_optimizer_between() -> None:
    # The weight changes after the backward; a backward after the change is refused by torch.
    heads = make_heads()
    loss = kd_loss(Head(heads.hidden, heads.weight), heads.teacher_side, heads.labels)
    with torch.no_grad():
        heads.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_eager_is_what_it_is_compared_with() -> None:
    # The baseline of the error rule computes the same function.
    heads = make_heads()
    near(eager(heads), truth(heads), 1e-5)
