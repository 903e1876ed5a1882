"""Every check of a user's tensors, and its message. Nothing is written before all have passed.

Each message names the argument, what was expected and what came. Checks that look at *values*
(a label's range, a weight's sign) run only for plain CPU tensors outside a compiler's trace: on a
GPU they would force a synchronisation, which FUSED_KD_DEBUG=1 asks for.
"""

from __future__ import annotations

import math
import os
from numbers import Real

import torch
from torch import Tensor, nn

from .options import LARGEST, SMALLEST, KDOptions

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
#: Of a view made by an ordinary operator; autograd forbids writing to all others.
WRITABLE_VIEW = torch._C._autograd.CreationMeta.DEFAULT
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse_transforms() -> None:
    """Raise RuntimeError under a transform of torch.func."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the loss does not run under torch.func (grad, vmap, jvp, jacrev); call it on ordinary "
            "tensors and use torch.autograd.grad, or fused_kd.testing.eager_kd_loss, plain torch"
        )


def check_logits(student: Tensor, teacher: Tensor | None, soft_weight: float) -> None:
    """Types, layouts, dtypes, devices and shapes of the two logits.

    Raises:
        TypeError: not a dense floating tensor.
        ValueError: shapes or devices that do not match, a teacher that requires grad, or none
            although soft_weight is not 0.
    """
    check_floating("student_logits", student)
    if student.dim() == 0:
        raise ValueError(
            "student_logits must have shape (..., V) with at least one dimension; got 0 dimensions"
        )
    if student.shape[-1] == 0:
        raise ValueError(
            f"student_logits must have at least one vocabulary entry; got {tuple(student.shape)}"
        )
    if teacher is None:
        if soft_weight != 0.0:
            raise ValueError(
                "teacher_logits must be given when soft_weight is not 0; got teacher_logits=None "
                f"with soft_weight={soft_weight}: pass the teacher's logits, or soft_weight=0 for "
                "the hard term alone"
            )
        return
    check_floating("teacher_logits", teacher)
    if student.dim() != teacher.dim():
        raise ValueError(
            "teacher_logits must have as many dimensions as student_logits; "
            f"got {tuple(teacher.shape)} for {tuple(student.shape)}"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same vocabulary size; "
            f"got V = {student.shape[-1]} for the student and V = {teacher.shape[-1]} for the "
            "teacher: if the larger one only has padding columns at its end, slice them off "
            "(logits[..., :V]), otherwise the two models need the same tokenizer"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            "teacher_logits must have the leading shape of student_logits; "
            f"got {tuple(teacher.shape)} for {tuple(student.shape)}"
        )
    check_device("teacher_logits", teacher, student)
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits must not require grad, since the teacher gets no gradient; got a "
            "tensor that does: detach it (teacher_logits.detach()) or run the teacher under "
            "torch.no_grad()"
        )


def check_floating(name: str, tensor: Tensor | None) -> None:
    """Refuse what is not a dense tensor of one of LOGIT_DTYPES."""
    check_dense(name, tensor)
    assert tensor is not None
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def check_rows(
    labels: Tensor | None,
    token_weight: Tensor | None,
    num_items: float | Tensor | None,
    options: KDOptions,
    student: Tensor,
    vocabulary: int,
    name: str = "student_logits",
) -> Tensor | None:
    """What comes with the rows of `student`, (..., anything), which messages call `name`.

    Returns:
        Which rows are kept, (...) bool; None: all.
    """
    check_labels(labels, student, options.hard_weight, name)
    check_token_weight(token_weight, student, name)
    check_num_items(num_items, options.reduction, student, name)
    if labels is None:
        return None
    kept = labels != options.ignore_index
    check_label_range(labels, kept, vocabulary, options.ignore_index)
    return kept


def check_labels(
    labels: Tensor | None, student: Tensor, hard_weight: float, name: str = "student_logits"
) -> None:
    """Presence, type, device and shape of the labels; their values: :func:`check_label_range`."""
    if labels is None:
        if hard_weight != 0.0:
            raise ValueError(
                f"labels must be given when hard_weight is not 0; got labels=None with "
                f"hard_weight={hard_weight}: pass labels, or hard_weight=0 for the soft term alone"
            )
        return
    check_dense("labels", labels)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be an integer tensor of class indices; got {labels.dtype}")
    _check_row_shape("labels", labels, student, name)
    check_device("labels", labels, student, name)


def check_label_range(labels: Tensor, kept: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Every kept label lies in [0, V); by value, so on the CPU only.

    Args:
        labels: (...), integer.
        kept: (...), bool: labels that are not ignore_index.
        vocabulary: V.
        ignore_index: named in the message.
    """
    if labels.numel() == 0 or not may_look_at_values(labels):
        return
    low, high = torch.aminmax(torch.where(kept, labels, 0))
    if low.item() >= 0 and high.item() < vocabulary:
        return
    first = (kept & ((labels < 0) | (labels >= vocabulary))).nonzero()[0].tolist()
    value = int(labels[tuple(first)].item())
    raise ValueError(
        f"labels must be in [0, {vocabulary}) or equal to ignore_index={ignore_index}; "
        f"got {value} at position {_position(first)}"
    )


def check_token_weight(
    token_weight: Tensor | None, student: Tensor, name: str = "student_logits"
) -> None:
    """Type, shape, device and (on the CPU) values of the weights of the tokens."""
    if token_weight is None:
        return
    check_dense("token_weight", token_weight)
    if token_weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"token_weight must be a bool, int or float tensor; got {token_weight.dtype}"
        )
    _check_row_shape("token_weight", token_weight, student, name)
    check_device("token_weight", token_weight, student, name)
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight must not require grad, since it gets no gradient; got a tensor that "
            "does: detach it"
        )
    if token_weight.numel() == 0 or not may_look_at_values(token_weight):
        return
    low, high = (bound.item() for bound in torch.aminmax(token_weight))
    largest = torch.finfo(torch.float32).max
    if not (low >= 0 and high <= largest):
        bad = ~((token_weight >= 0) & (token_weight <= largest))
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            "token_weight must be at least 0 and finite; "
            f"got {token_weight[tuple(first)].item()} at position {_position(first)}"
        )


def check_num_items(
    num_items: float | Tensor | None,
    reduction: str,
    student: Tensor,
    name: str = "student_logits",
) -> None:
    """A positive number or a 0-d tensor (where 0 is allowed: the loss is then 0)."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            "num_items is the denominator of reduction='mean'; "
            f"got it with reduction={reduction!r}: leave it out"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(
                "num_items must be a number or a 0-d tensor; got a tensor of shape "
                f"{tuple(num_items.shape)}"
            )
        if num_items.device.type != "cpu":
            check_device("num_items", num_items, student, name)
        if num_items.is_complex() or num_items.dtype == torch.bool or num_items.requires_grad:
            raise TypeError(
                "num_items must be an int or float tensor without grad; "
                f"got {num_items.dtype}, requires_grad={num_items.requires_grad}"
            )
        if may_look_at_values(num_items) and not 0 <= num_items.item() < math.inf:
            raise ValueError(
                f"num_items must not be negative and must be finite; got {num_items.item()}"
            )
    elif not isinstance(num_items, (int, float, Real)) or isinstance(num_items, bool):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor; got {type(num_items).__name__}"
        )
    elif not SMALLEST <= num_items <= LARGEST:
        bounds = f", in [{SMALLEST:.0e}, {LARGEST:.0e}]" if 0 < num_items < math.inf else ""
        raise ValueError(f"num_items must be positive and finite{bounds}; got {num_items}")


def check_inplace(student: Tensor, teacher: Tensor | None) -> None:
    """The student's memory may be overwritten with the gradient."""
    if student._is_view() and torch._C._autograd._get_creation_meta(student) != WRITABLE_VIEW:
        raise ValueError(
            "inplace=True needs student_logits that autograd lets be written to; got a view made "
            "by chunk, split or unbind, by a custom autograd.Function, or without gradients: pass "
            "inplace=False, the whole tensor, or a slice of it (logits[a:b])"
        )
    base = student._base if student._is_view() else None
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True needs student_logits that a model computed; got a leaf tensor that "
            "requires grad, or a view of one, whose values the gradient would destroy"
        )
    if _overlaps(student):
        raise ValueError(
            "inplace=True needs student_logits whose entries do not share memory; got shape "
            f"{tuple(student.shape)} with strides {student.stride()} (an expanded or overlapping "
            "view)"
        )
    if teacher is not None and _share_memory(student, teacher):
        raise ValueError(
            "inplace=True needs teacher_logits in memory of their own, or exactly where "
            "student_logits lie; got two that partly share it: clone one"
        )


def refuse_copy_inplace(student: Tensor) -> None:
    """Says why a layout that would have to be copied cannot be used in place."""
    raise ValueError(
        "inplace=True needs student_logits with a last stride of 1 and leading dimensions that "
        f"collapse to two strides; got shape {tuple(student.shape)} with strides "
        f"{student.stride()}: pass inplace=False, or student_logits.contiguous()"
    )


def may_look_at_values(tensor: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)  # a fake tensor has no values
        and tensor.device.type != "meta"
        and (tensor.device.type == "cpu" or os.environ.get("FUSED_KD_DEBUG") == "1")
    )


def check_dense(name: str, tensor: Tensor | None) -> None:
    """`name` is an ordinary local tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = f"layout {tensor.layout}"
        if tensor.is_nested or tensor.is_quantized:
            kind = "a nested tensor" if tensor.is_nested else "a quantised tensor"
        raise TypeError(f"{name} must be a dense, unquantised tensor; got {kind}")
    if type(tensor) is not Tensor and hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name} must be a local tensor; got a DTensor: call the loss inside the forward of "
            "the module that was sharded (docs/howto/distributed.md); full_tensor() of what is "
            "trained gives each shard a wrong gradient"
        )


def _check_row_shape(name: str, tensor: Tensor, student: Tensor, like: str) -> None:
    if tensor.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of {like}, "
            f"{tuple(student.shape[:-1])}; got {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, student: Tensor, like: str = "student_logits") -> None:
    """`name` lies on the device of the student, which messages call `like`."""
    if tensor.device != student.device:
        raise ValueError(
            f"{name} must be on the device of {like}, {student.device}; got {tensor.device}"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two entries may share memory: each stride must step over the smaller ones' reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _share_memory(student: Tensor, teacher: Tensor) -> bool:
    """Whether bytes of both overlap, unless each entry lies where its counterpart does."""
    if not (_has_memory(student) and _has_memory(teacher)):
        return False
    same = (teacher.data_ptr(), teacher.stride(), teacher.dtype)
    if (student.data_ptr(), student.stride(), student.dtype) == same:
        return False
    (a, end_a), (b, end_b) = _span(student), _span(teacher)
    return a < end_b and b < end_a


def _has_memory(tensor: Tensor) -> bool:
    """Return False for an empty, a meta and a fake tensor."""
    is_fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return tensor.numel() > 0 and tensor.device.type != "meta" and not is_fake


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte and behind the last."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _position(index: list[int]) -> str:
    return str(index[0]) if len(index) == 1 else str(tuple(index))
