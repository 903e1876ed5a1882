"""The installed torchtune beside ours: values and gradients of all six classes, a recipe's step."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import pytest
import torch
from needs import need
from torch import Tensor, nn

need("torchtune")
from omegaconf import OmegaConf  # noqa: E402
from torchtune.config import instantiate  # noqa: E402
from torchtune.models.llama2 import llama2  # noqa: E402
from torchtune.modules import loss as own  # noqa: E402

from fused_kd import KDLoss  # noqa: E402
from fused_kd.integrations import torchtune as ours  # noqa: E402
from fused_kd.testing import cpu_peak  # noqa: E402

V, CHUNKS = 67, 4
WHOLE = ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"]
CHUNKED = [f"{name[:-4]}WithChunkedOutputLoss" for name in WHOLE]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student (a leaf), teacher, labels of which some are ignored."""
    student = torch.randn(*leading, V).to(dtype).requires_grad_()
    labels = torch.randint(V, leading)
    labels.view(-1)[::3] = -100
    return student, torch.randn(*leading, V).to(dtype), labels


def cut(logits: Tensor, chunks: int = CHUNKS) -> list[Tensor]:
    """As a torchtune model returns them: tensors of their own."""
    return [part.clone() for part in logits.chunk(chunks, dim=1)]


def check(ours: Tensor, own: Tensor, student: Tensor) -> None:
    """Values and gradients, under an upstream gradient that is not 1."""
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(0.3 * loss, student)[0] for loss in (ours, own)]
    rtol = 1e-5 if student.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_logits(name: str, normalize: bool, dtype: torch.dtype) -> None:
    tensors = inputs(11, dtype=dtype)
    losses = [getattr(module, name)()(*tensors, normalize=normalize) for module in (ours, own)]
    check(*losses, tensors[0])


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_the_ratio_of_the_symmetric_loss(ratio: float) -> None:
    tensors = inputs(11)
    check(*(module.SymmetricKLLoss(ratio)(*tensors) for module in (ours, own)), tensors[0])
    student, teacher, labels = inputs(2, 10)
    chunks = cut(student), cut(teacher), labels
    check(
        *(m.SymmetricKLWithChunkedOutputLoss(CHUNKS, ratio)(*chunks) for m in (ours, own)), student
    )


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("length", [8, 10])  # a last chunk of another length
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks(name: str, length: int, dtype: torch.dtype) -> None:
    student, teacher, labels = inputs(2, length, dtype=dtype)
    chunks = cut(student), cut(teacher), labels
    losses = [getattr(module, name)(CHUNKS)(*chunks) for module in (ours, own)]
    check(*losses, student)


@pytest.mark.parametrize("name", WHOLE)
def test_another_ignore_index_and_labels_of_another_shape(name: str) -> None:
    """torchtune flattens both sides by itself."""
    student, teacher, labels = inputs(10)
    labels[labels == -100] = 5
    tensors = (student, teacher, labels.view(2, 5))
    check(*(getattr(module, name)(ignore_index=5)(*tensors) for module in (ours, own)), student)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_labels_only_mask(name: str, ignore_index: int) -> None:
    """They may be no classes at all, or bools."""
    student, teacher, labels = inputs(2, 8)
    labels[labels == -100] = ignore_index
    labels[0, 1], labels[0, 2] = -1, V
    pair = [getattr(module, name)(ignore_index=ignore_index) for module in (ours, own)]
    check(*(loss(student, teacher, labels) for loss in pair), student)
    if ignore_index == 0:
        check(*(loss(student, teacher, labels != 0) for loss in pair), student)
    chunks = cut(student), cut(teacher), labels
    chunked = name.replace("Loss", "WithChunkedOutputLoss")
    check(*(getattr(m, chunked)(CHUNKS, ignore_index=ignore_index)(*chunks) for m in (ours, own)),
          student)  # fmt: skip


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_rows(name: str) -> None:
    """(B·S_i, V) each."""
    student, teacher, labels = inputs(2, 8)
    chunks = [x.flatten(0, 1) for x in cut(student)], [x.flatten(0, 1) for x in cut(teacher)]
    check(*(getattr(module, name)(CHUNKS)(*chunks, labels) for module in (ours, own)), student)


def test_an_entry_of_minus_infinity_for_one_alone_is_infinite() -> None:
    """torchtune leaves it out."""
    student, teacher, labels = inputs(5)
    without = [x.detach().clone() for x in (student, teacher)]
    for x in without:
        x[:, 7] = -torch.inf
    for logits, names in ((without[0], WHOLE[::2]), (without[1], WHOLE[1:])):
        pair = (logits, teacher) if logits is without[0] else (student, logits)
        for name in names:
            assert getattr(ours, name)()(*pair, labels).isposinf(), name
            assert getattr(own, name)()(*pair, labels).isfinite(), name


@pytest.mark.parametrize("name", [*WHOLE, *CHUNKED])
def test_no_row_that_counts_P47(name: str) -> None:
    """0 with a graph: torchtune's has none, or is 0/0."""
    student, teacher, labels = inputs(2, 8)
    labels[:] = -100
    tensors: Any = (student, teacher, labels)
    if name in CHUNKED:
        tensors = (cut(student, 8), cut(teacher, 8), labels)
    loss = getattr(ours, name)()(*tensors)
    assert loss.item() == 0.0
    assert torch.count_nonzero(torch.autograd.grad(loss, student)[0]) == 0
    theirs = getattr(own, name)()(*tensors)
    assert not theirs.requires_grad or theirs.isnan()


def test_equal_models() -> None:
    """The reverse divergence is 0, the soft cross-entropy the entropy."""
    student, _, labels = inputs(9)
    tensors = (student, student.detach(), labels)
    assert abs(ours.ReverseKLLoss()(*tensors).item()) < 1e-6
    kept = student.detach().double()[labels != -100].log_softmax(-1)
    entropy = -(kept.exp() * kept).sum(-1).mean()
    torch.testing.assert_close(ours.ForwardKLLoss()(*tensors).double(), entropy)


def test_the_preset_has_the_same_gradient() -> None:
    student, teacher, labels = inputs(9)
    losses = (KDLoss.like("torchtune"), own.ForwardKLLoss())
    gradients = [torch.autograd.grad(f(student, teacher, labels), student)[0] for f in losses]
    torch.testing.assert_close(*gradients)


def test_peak_is_one_gradient() -> None:
    """Neither the entropy nor the chunks cost a tensor as large as the logits."""
    student, teacher = torch.randn(16, 8, 4096, requires_grad=True), torch.randn(16, 8, 4096)
    labels, size = torch.randint(4096, (16, 8)), student.numel() * 4
    loss = ours.ForwardKLLoss()
    peak = cpu_peak(lambda: torch.autograd.grad(loss(student, teacher, labels), student))
    assert peak.highest <= size + 2**16
    pieces = [part.clone().detach().requires_grad_() for part in student.chunk(8, dim=1)]
    chunked = ours.ForwardKLWithChunkedOutputLoss()
    taught = cut(teacher, 8)
    peak = cpu_peak(lambda: torch.autograd.grad(chunked(pieces, taught, labels), pieces))
    assert peak.highest <= size + 2**16


def test_compiled_as_a_recipe_does() -> None:
    student, teacher, labels = inputs(2, 8)
    chunks = cut(student), cut(teacher), labels
    loss = ours.SymmetricKLWithChunkedOutputLoss(CHUNKS)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    check(compiled(*chunks), loss(*chunks), student)


@pytest.mark.parametrize("name", [*WHOLE, *CHUNKED])
def test_the_signatures_are_torchtunes(name: str) -> None:
    """Names, order and defaults; and a configuration finds the class."""

    def shape(method: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(method).parameters.values()]

    for method in ("__init__", "forward"):
        pair = [shape(getattr(getattr(module, name), method)) for module in (ours, own)]
        assert pair[0] == pair[1], method
    configured = {"_component_": f"fused_kd.integrations.torchtune.{name}"}
    made = instantiate(OmegaConf.create(configured))
    assert type(made) is getattr(ours, name)


def test_refusals() -> None:
    student, teacher, labels = inputs(2, 8)
    loss = ours.ForwardKLWithChunkedOutputLoss()
    with pytest.raises(ValueError, match=r"got \[2, 2, 2, 2\] for the student, 2 chunks for the"):
        loss(cut(student), cut(teacher, 2), labels)
    with pytest.raises(ValueError, match=r"and labels of shape \(2, 7\)"):
        loss(cut(student), cut(teacher), labels[:, 1:])
    with pytest.raises(ValueError, match="sym_kd_ratio must be in"):
        ours.SymmetricKLLoss(1.5)
    for chunks, got in (([], "none"), (student, "a Tensor"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=f"student_logits must be a list .*; got {got}"):
            loss(chunks, cut(teacher), labels)
    with pytest.raises(TypeError, match=r"teacher_logits\[0\] must be a torch\.Tensor"):
        loss(cut(student), [None] * CHUNKS, labels)
    with pytest.raises(ValueError, match=r"student_logits\[0\] must have shape \(B, S_i, V\)"):
        loss([student[0, 0]], [teacher[0, 0]], labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(B, S\); got \(16,\)"):
        loss(cut(student), cut(teacher), labels.flatten())
    for refused in (loss, ours.ForwardKLLoss()):
        logits = (cut(student), cut(teacher)) if refused is loss else (student, teacher)
        with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor; got NoneType"):
            refused(*logits, None)
    with pytest.raises(ValueError, match="labels must have the leading shape"):
        ours.ForwardKLLoss()(student, teacher, labels[:1])


def test_the_recipes_step() -> None:
    """Its models hand out chunks, its losses are added; after some steps the weights are equal."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 16}
    student, teacher = llama2(num_layers=1, **sizes), llama2(num_layers=2, **sizes)
    ids = torch.randint(V, (5, 2, 16))
    trained = [_trained(deepcopy(student), teacher, ids, module) for module in (ours, own)]
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(trained[0].output.weight, student.output.weight)


def _trained(student: Any, teacher: Any, batches: Tensor, module: Any) -> nn.Module:
    class_loss = own.CEWithChunkedOutputLoss(CHUNKS)
    kd_loss = module.ForwardKLWithChunkedOutputLoss(CHUNKS)
    for model in (student, teacher):
        model.set_num_output_chunks(kd_loss.num_output_chunks)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for ids in batches:
        labels = torch.hstack((ids[:, 1:], torch.full((len(ids), 1), -100)))
        logits = student(ids)
        with torch.no_grad():
            taught = teacher(ids)
        (0.5 * class_loss(logits, labels) + 0.5 * kd_loss(logits, taught, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student
