"""Heads in training: autograd's corners, autocast, compilation, checkpointing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import H_S, distance, eager, make_heads, ours, truth
from support.logits import DTYPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_kd import Head, KDLoss, kd_loss
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


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
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
    """Gradients that float16 would round to 0, but for the loss scale that comes from upstream."""
    heads = make_heads(dtype=torch.float16)
    scale = torch.tensor(2.0**16)
    for height in (37, 5):
        got = ours(heads, scale, num_items=2.0**26, chunk_rows=height)
        want = truth(heads, scale, num_items=2.0**26)
        for mine, exact in zip(got, want, strict=True):
            assert distance(mine, exact) < 2e-3


def test_tied_embeddings_get_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(131, H_S)
    tokens = torch.randint(131, (37,))
    heads = make_heads()

    def run(given: str) -> Tensor:
        hidden = torch.tanh(embedding(tokens))
        if given == "heads":
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
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert distance(mine, theirs) < (2e-3 if native else 1e-6)


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parameters", DTYPES)
def test_autocast_of_any_parameters_R_46(
    parameters: torch.dtype, bias: bool, enabled: torch.dtype
) -> None:
    """Liger#305, #336: addmm was given two dtypes without bias, or with float32 master weights."""
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


def test_parameters_of_a_teacher_are_detached() -> None:
    heads = make_heads()
    weight = heads.teacher_weight.clone().requires_grad_()
    teacher = Head(heads.teacher_hidden, weight)
    kd_loss(Head(heads.hidden, heads.weight), teacher, heads.labels).backward()
    assert weight.grad is None


def test_a_training_step_with_the_optimizer_between() -> None:
    """The weight changes after the backward; a backward after the change is refused by torch."""
    heads = make_heads()
    loss = kd_loss(Head(heads.hidden, heads.weight), heads.teacher_side, heads.labels)
    with torch.no_grad():
        heads.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_module_is_plain() -> None:
    loss = KDLoss(temperature=2.0, memory_budget=2**20, grad_accum_dtype=torch.bfloat16)
    assert loss.state_dict() == {}
    assert "memory_budget=1048576" in repr(loss)
    assert "grad_accum_dtype=torch.bfloat16" in repr(loss)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert twin.options == loss.options
        assert twin.options.memory_budget == 2**20


# --------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "case", [{}, {"reduction": "none"}, {"num_items": 5, "return_parts": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled(case: dict[str, Any], dtype: torch.dtype) -> None:
    heads = make_heads(dtype=dtype)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        student = Head(hidden, weight)
        result = kd_loss(student, heads.teacher_side, labels, chunk_rows=10, **case)
        return result if isinstance(result, Tensor) else result.loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = (heads.hidden, heads.weight, heads.labels)
    got, want = compiled(*arguments), step(*arguments)
    assert torch.equal(got, want)
    upstream = torch.full_like(want, 2.0)
    ours, theirs = (torch.autograd.grad(x, arguments[:2], upstream) for x in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= torch.finfo(dtype).eps


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_dozen_sizes_compile_twice() -> None:
    heads = make_heads(rows=40)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = KDLoss(temperature=2.0)

    def step(hidden: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        student = Head(hidden * 2, heads.weight)
        return loss(student, Head(teacher, heads.teacher_weight), labels)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in range(29, 41):
        rows = (heads.hidden[:n], heads.teacher_hidden[:n], heads.labels[:n])
        got, want = compiled(*rows), step(*rows)
        torch.testing.assert_close(got, want)
        mine, theirs = (torch.autograd.grad(x, heads.weight)[0] for x in (got, want))
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_under_autocast() -> None:
    heads = make_heads()

    def step(hidden: Tensor, weight: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return kd_loss(Head(hidden, weight), heads.teacher_side, heads.labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (f(heads.hidden, heads.weight) for f in (compiled, step))
    assert torch.equal(got, want)


def test_eager_is_what_it_is_compared_with() -> None:
    """The baseline of the error rule computes the same function."""
    heads = make_heads()
    for mine, theirs in zip(eager(heads), truth(heads), strict=True):
        assert distance(mine, theirs) < 1e-5
