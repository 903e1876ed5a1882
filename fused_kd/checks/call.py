"""The checks of a call, and of everything in it but a top-k teacher."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..options import BOUNDS, LARGEST, SMALLEST, KDOptions, check_count
from ..rows import LABEL_DTYPES, are_rows, writes_in_place
from ..sides import (
    Head,
    Side,
    Teacher,
    TopK,
    autocast_dtype,
    row_count,
    row_shape,
    rows_tensor,
    vocabulary,
)
from .tensors import (
    LOGIT_DTYPES,
    check_dense,
    check_device,
    check_floating,
    check_on_device_of,
    may_read_values,
    position,
    rows_name,
)
from .topk import check_topk

WEIGHT_DTYPES = (
    torch.bool,
    *LABEL_DTYPES,
    *LOGIT_DTYPES,
)
#: The creation meta of a view from an ordinary operator; autograd forbids writing to all others.
WRITABLE_VIEW = torch._C._autograd.CreationMeta.DEFAULT
_SHARDED = (
    "if it is sharded by FSDP, it is whole only inside the forward of the module that was sharded: "
    "call the loss there (docs/howto/distributed.md)"
)
_PARTITIONED = (
    "DeepSpeed ZeRO-3 has partitioned it; it is whole inside the forward of the module that "
    "DeepSpeed was given: call the loss there. A head that is not trained may be gathered by "
    "deepspeed.zero.GatheredParameters (docs/howto/distributed.md)"
)


def check_call(
    options: KDOptions,
    student: Side,
    teacher: Teacher | None,
    labels: Tensor | None,  # (...), int64
    kept: Tensor | None,  # (...), bool: labels that are not ignore_index; None without labels
    token_weight: Tensor | None,  # (...)
    num_items: float | Tensor | None,
    kept_rows: int | None,
) -> None:
    """Check all arguments of :func:`fused_kd.kd_loss`, the labels as labels_and_kept returns them.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A value, shape, device or layout does not fit.
        RuntimeError: A transform of ``torch.func`` is active.
    """
    _refuse_transforms()
    check_side("student", student)
    rows = row_shape(student)
    if isinstance(teacher, TopK):
        check_topk(student, rows, teacher, options)
    else:
        _check_teacher(student, rows, teacher, options.soft_weight)
    _check_labels(labels, student, rows, options.hard_weight)
    if token_weight is not None:
        _check_token_weight(token_weight, student, rows)
    if num_items is not None:
        _check_num_items(num_items, options.reduction, student)
    if labels is not None and kept is not None:
        _check_label_range(labels, kept, vocabulary(student), options.ignore_index)
    _check_chunk_options(options, kept_rows, student, teacher)
    if kept_rows is not None:
        _check_kept_rows(kept_rows, student, kept)
    if options.inplace:
        if isinstance(student, Head):
            raise ValueError(
                "inplace=True writes the gradient over the student's logits; got student as a "
                "Head, whose logits are never stored: pass inplace=False"
            )
        if writes_in_place(student, options):
            _check_inplace(student, None if options.soft_weight == 0.0 else teacher)


# --------------------------------------------------------------------------------------- sides


def check_side(name: str, side: object) -> None:
    """Check logits or a Head, which messages call `name`.

    Raises:
        TypeError: It is neither, or a tensor has the wrong type or dtype.
        ValueError: A shape, value or device does not fit.
    """
    if isinstance(side, Head):
        _check_head(name, side)
        return
    if not isinstance(side, Tensor):
        got = type(side).__name__
        if isinstance(side, TopK):
            got = "a TopK, which only the teacher may be: pass logits or a Head"
        elif isinstance(side, (tuple, list)):
            got = (
                f"a plain {got}: pass Head(hidden, weight, bias=None, scale=1.0), or of a teacher "
                "TopK(token_ids, logprobs)"
            )
        elif hasattr(side, "logits"):  # the output of a Hugging Face model
            got = f"{got}: pass its logits (output.logits)"
        raise TypeError(f"{name} must be a torch.Tensor of logits or a fused_kd.Head; got {got}")
    check_floating(name, side)
    if side.dim() == 0:
        raise ValueError(
            f"{name} must have shape (..., V) with at least one dimension; got 0 dimensions"
        )
    if side.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one vocabulary entry; got {tuple(side.shape)}")


def _check_head(name: str, head: Head) -> None:
    """Check hidden (..., H), weight (V, H), bias (V,), scale and softcap of a head."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part, x in parts.items():
        check_floating(f"{name}.{part}", x)
        if x.device.type == "meta":
            raise TypeError(
                f"{name}.{part} must have values; got a tensor on the meta device: load the "
                "model's weights before the call"
            )
    if hidden.dim() == 0:
        raise ValueError(f"{name}.hidden must have shape (..., H); got 0 dimensions")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name}.weight must have shape (V, H) with V > 0 and H > 0; "
            f"got {tuple(weight.shape)}: {_PARTITIONED if hasattr(weight, 'ds_id') else _SHARDED}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}.hidden and {name}.weight must have the same hidden size; got "
            f"H = {hidden.shape[-1]} for hidden and H = {weight.shape[1]} for weight, "
            f"of shapes {tuple(hidden.shape)} and {tuple(weight.shape)} (V, H)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}.bias must have shape (V,) = ({weight.shape[0]},); got {tuple(bias.shape)}"
        )
    for part in parts:
        check_device(f"{name}.{part}", parts[part], f"{name}.hidden", hidden)
    if hidden.dtype != weight.dtype and autocast_dtype(head) is None:
        raise TypeError(
            f"{name}.hidden and {name}.weight must have the same dtype outside autocast (which "
            f"leaves float64 alone); got {hidden.dtype} and {weight.dtype}: cast one, or call "
            "under torch.autocast"
        )
    if not isinstance(head.scale, (int, float, Real)) or isinstance(head.scale, bool):
        raise TypeError(
            f"{name}.scale must be a Python number; got {type(head.scale).__name__}: a tensor's "
            "value is x.item()"
        )
    if not SMALLEST <= abs(head.scale) <= LARGEST:
        raise ValueError(
            f"{name}.scale must not be 0 and must be finite, with a size {BOUNDS}; got {head.scale}"
        )
    if head.softcap is not None:
        raise ValueError(
            f"{name}.softcap must be None, since a soft-capped head is not supported; got "
            f"{head.softcap}: compute the logits and pass them instead of the Head"
        )


def _check_teacher(
    student: Side, rows: torch.Size, teacher: Side | None, soft_weight: float
) -> None:
    """Check the teacher, even if no term reads it, against the rows, V and device of the student.

    The student must have been checked before. None is refused unless soft_weight is 0.
    """
    if teacher is None:
        if soft_weight != 0.0:
            raise ValueError(
                "teacher must be given when soft_weight is not 0; got teacher=None with "
                f"soft_weight={soft_weight}: pass the teacher's logits or Head, or soft_weight=0 "
                "for the hard term alone"
            )
        return
    check_side("teacher", teacher)
    if vocabulary(student) != vocabulary(teacher):
        raise ValueError(
            "student and teacher must have the same vocabulary size; "
            f"got V = {vocabulary(student)} for the student and V = {vocabulary(teacher)} for the "
            "teacher: if the larger one only has padding entries at its end, slice them off "
            "(logits[..., :V], or weight[:V] of a Head), otherwise the two models need the same "
            "tokenizer"
        )
    if row_shape(teacher) != rows:
        raise ValueError(
            f"{rows_name('teacher', teacher)} must have the leading shape of "
            f"{rows_name('student', student)}, {tuple(rows)}; got {tuple(row_shape(teacher))}: "
            "run both models on the same tokens"
        )
    check_on_device_of("teacher", rows_tensor(teacher), student)
    if isinstance(teacher, Head):
        for part, x in zip(("hidden", "weight", "bias"), teacher[:3], strict=True):
            # a leaf is a parameter of the teacher's head: it is detached later, not refused
            if x is not None and x.requires_grad and not x.is_leaf:
                raise ValueError(
                    f"teacher.{part} must not be attached to a graph, since the teacher gets no "
                    "gradient; got a tensor that is: detach it, or run the teacher under "
                    "torch.no_grad()"
                )
    elif teacher.requires_grad:
        raise ValueError(
            "teacher must not require grad, since the teacher gets no gradient; got a tensor that "
            "does: detach it (teacher.detach()) or run the teacher under torch.no_grad()"
        )


def _check_chunk_options(
    options: KDOptions, kept_rows: int | None, student: Side, teacher: Teacher | None
) -> None:
    has_head = isinstance(student, Head) or isinstance(teacher, Head)
    for name, value in (
        ("memory_budget", options.memory_budget),
        ("chunk_rows", options.chunk_rows),
        ("kept_rows", kept_rows),
    ):
        if value is not None and not has_head:
            raise ValueError(
                f"{name} is for a student or teacher given as a Head, whose logits are computed "
                f"in chunks; got {name}={value} with logits on both sides: leave it out"
            )
    dtype = options.grad_accum_dtype
    if dtype is None:
        return
    if not isinstance(student, Head):
        raise ValueError(
            "grad_accum_dtype is for the weight gradient of a student given as a Head; got "
            f"{dtype} with the student's logits: leave it out"
        )
    check_accumulation(dtype, student.weight.dtype)


def check_accumulation(dtype: torch.dtype, weight: torch.dtype) -> None:
    """Check grad_accum_dtype: float32, or `weight`, the dtype of the student's weight.

    Raises:
        ValueError: It is another dtype.
    """
    if dtype not in (torch.float32, weight):
        raise ValueError(
            "grad_accum_dtype must be torch.float32 or the dtype of student.weight, "
            f"{weight}; got {dtype}"
        )


def _check_kept_rows(kept_rows: int, student: Side, kept: Tensor | None) -> None:
    """Check kept_rows, also against the number of rows that are not ignored if it can be read."""
    check_count("kept_rows", kept_rows, least=0)
    if kept is None:
        number = row_count(row_shape(student))
    elif may_read_values(kept):
        number = int(kept.sum().item())
    else:
        return
    if kept_rows < number:
        raise ValueError(
            f"kept_rows must be at least the number of rows that are not ignored, {number}; "
            f"got {kept_rows}"
        )


# ------------------------------------------------------------------------------ labels, weights


def _refuse_transforms() -> None:
    """Raise RuntimeError under a transform of torch.func, except in a trace."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the loss does not run under torch.func (grad, vmap, jvp, jacrev); call it on ordinary "
            "tensors and use torch.autograd.grad, or fused_kd.testing.eager_kd_loss, plain torch"
        )


def _check_labels(
    labels: Tensor | None, student: Side, rows: torch.Size, hard_weight: float
) -> None:
    """Check that labels are given if needed, and their type, shape and device."""
    if labels is None:
        if hard_weight != 0.0:
            raise ValueError(
                f"labels must be given when hard_weight is not 0; got labels=None with "
                f"hard_weight={hard_weight}: pass labels, or hard_weight=0 for the soft term alone"
            )
        return
    check_dense("labels", labels)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels must be an integer tensor of class indices; got {labels.dtype}: for class "
            "indices pass labels.long()"
        )
    _check_row_shape("labels", labels, student, rows)
    check_on_device_of("labels", labels, student)


def _check_label_range(labels: Tensor, kept: Tensor, size: int, ignore_index: int) -> None:
    """Check that every kept label is in [0, size), if values may be read (may_read_values)."""
    if labels.numel() == 0 or not may_read_values(labels):
        return
    low, high = torch.aminmax(torch.where(kept, labels, 0))
    if low.item() >= 0 and high.item() < size:
        return
    first = (kept & ((labels < 0) | (labels >= size))).nonzero()[0].tolist()
    value = int(labels[tuple(first)].item())
    raise ValueError(
        f"labels must be in [0, {size}) or equal to ignore_index={ignore_index}; "
        f"got {value} at position {position(first)}"
    )


def _check_token_weight(token_weight: Tensor, student: Side, rows: torch.Size) -> None:
    """Check type, shape and device of token_weight, and its values if they may be read."""
    check_dense("token_weight", token_weight)
    if token_weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"token_weight must be a bool, int or float tensor; got {token_weight.dtype}"
        )
    _check_row_shape("token_weight", token_weight, student, rows)
    check_on_device_of("token_weight", token_weight, student)
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight must not require grad, since it gets no gradient; got a tensor that "
            "does: detach it"
        )
    if token_weight.numel() == 0 or not may_read_values(token_weight):
        return
    low, high = (bound.item() for bound in torch.aminmax(token_weight))
    largest = torch.finfo(torch.float32).max
    if not (low >= 0 and high <= largest):
        bad = ~((token_weight >= 0) & (token_weight <= largest))
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            "token_weight must be at least 0 and finite; "
            f"got {token_weight[tuple(first)].item()} at position {position(first)}"
        )


def _check_num_items(num_items: float | Tensor, reduction: str, student: Side) -> None:
    """Check num_items: a positive number, or a 0-d tensor, which may be 0 (the loss is then 0).

    Any is refused unless the reduction is "mean".
    """
    if reduction != "mean":
        raise ValueError(
            "num_items is the denominator of reduction='mean'; "
            f"got it with reduction={reduction!r}: leave it out"
        )
    if isinstance(num_items, Tensor):
        check_dense("num_items", num_items)
        if num_items.dim() != 0:
            raise ValueError(
                "num_items must be a number or a 0-d tensor; got a tensor of shape "
                f"{tuple(num_items.shape)}: pass its sum, or the result of "
                "fused_kd.integrations.loop.global_num_items()"
            )
        if num_items.device.type != "cpu":
            check_on_device_of("num_items", num_items, student)
        if num_items.is_complex() or num_items.dtype == torch.bool or num_items.requires_grad:
            raise TypeError(
                "num_items must be an int or float tensor without grad; "
                f"got {num_items.dtype}, requires_grad={num_items.requires_grad}"
            )
        if may_read_values(num_items):
            value = num_items.item()
            if not (value == 0 or SMALLEST <= value <= LARGEST):
                raise ValueError(f"num_items must be 0 or {BOUNDS}; got {value}")
    elif not isinstance(num_items, (int, float, Real)) or isinstance(num_items, bool):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor; got {type(num_items).__name__}"
        )
    elif not SMALLEST <= num_items <= LARGEST:
        expected = BOUNDS if 0 < num_items < math.inf else "positive and finite"
        raise ValueError(f"num_items must be {expected}; got {num_items}")


# ------------------------------------------------------------------------------------- in place


def _check_inplace(student: Tensor, teacher: Teacher | None) -> None:
    """Check that the student's logits may be overwritten, and do not overlap the teacher."""
    if student._is_view() and torch._C._autograd._get_creation_meta(student) != WRITABLE_VIEW:
        raise ValueError(
            "inplace=True needs student logits that autograd lets be written to; got a view made "
            "by chunk, split or unbind, by a custom autograd.Function, or without gradients: pass "
            "inplace=False, the whole tensor, or a slice of it (logits[a:b])"
        )
    if student.is_neg() or student.is_conj():
        raise ValueError(
            "inplace=True needs student logits whose memory holds their values; got a view that "
            "negates them lazily: pass inplace=False, or student.resolve_neg()"
        )
    base = student._base if student._is_view() else None
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True needs student logits that a model computed; got a leaf tensor that "
            "requires grad, or a view of one, whose values the gradient would destroy: pass "
            "inplace=False"
        )
    if _overlaps(student):
        raise ValueError(
            "inplace=True needs student logits whose entries do not share memory; got shape "
            f"{tuple(student.shape)} with strides {student.stride()} (an expanded or overlapping "
            "view): pass inplace=False, or student.contiguous()"
        )
    if not are_rows(student):
        raise ValueError(
            "inplace=True needs student logits with a last stride of 1 and leading dimensions that "
            f"collapse to two strides; got shape {tuple(student.shape)} with strides "
            f"{student.stride()}: pass inplace=False, or student.contiguous()"
        )
    if isinstance(teacher, TopK):  # its log-probabilities are copied
        return
    if isinstance(teacher, Head):  # every chunk reads its weight
        shares = any(x is not None and _share_memory(student, x) for x in teacher[:3])
    else:
        shares = (
            teacher is not None
            and _share_memory(student, teacher)
            and not _is_same_memory(student, teacher)
        )
    if shares:
        raise ValueError(
            "inplace=True needs a teacher in its own memory, or exactly that of the student's "
            "logits; got two that partly share it: pass inplace=False, or clone one"
        )


def _check_row_shape(name: str, tensor: Tensor, student: Side, rows: torch.Size) -> None:
    if tensor.shape != rows:
        raise ValueError(
            f"{name} must have the leading shape of {rows_name('student', student)}, "
            f"{tuple(rows)}; got {tuple(tensor.shape)}"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Return True if two entries of the tensor may share memory.

    That is if a stride is smaller than the span of all dimensions with smaller strides.
    """
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _is_same_memory(student: Tensor, teacher: Tensor) -> bool:
    """Return True if two tensors of equal shape have the same address, strides and dtype.

    Both must have memory.
    """
    same = (teacher.data_ptr(), teacher.stride(), teacher.dtype)
    return (student.data_ptr(), student.stride(), student.dtype) == same


def _share_memory(student: Tensor, teacher: Tensor) -> bool:
    """Return True if both have memory and their address ranges overlap."""
    if not (_has_memory(student) and _has_memory(teacher)):
        return False
    (a, end_a), (b, end_b) = _span(student), _span(teacher)
    return a < end_b and b < end_a


def _has_memory(tensor: Tensor) -> bool:
    """Return False for an empty tensor, a meta tensor and a fake tensor."""
    is_fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return tensor.numel() > 0 and tensor.device.type != "meta" and not is_fake


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte, and after the last, of a tensor with memory."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
