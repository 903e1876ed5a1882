"""Every check of the linear level's tensors and settings, and its message."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import checks
from ..checks import check_device, check_floating

_STUDENT = "student_hidden"
_PARTS = ("hidden", "weight", "bias")
_SHARDED = (
    "a head sharded by FSDP is whole only inside the forward of the module that was sharded: call "
    "the loss there (docs/howto/distributed.md)"
)
_PARTITIONED = (
    "DeepSpeed ZeRO-3 has partitioned it; it is whole inside the forward of the module that "
    "DeepSpeed was given: call the loss there. A head that is not trained may be gathered by "
    "deepspeed.zero.GatheredParameters (docs/howto/distributed.md)"
)


def check_heads(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight, bias
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    teacher_logits: Tensor | None,
    soft_weight: float,
) -> None:
    """Types, layouts, dtypes, devices and shapes of both models' tensors.

    Raises:
        TypeError: not a dense floating tensor with values.
        ValueError: shapes, dtypes or devices that do not match; a teacher attached to a graph.
    """
    _check_pair("student", *student)
    hidden, weight, _ = student
    rows, vocabulary = tuple(hidden.shape[:-1]), weight.shape[0]
    if teacher_logits is not None:
        given = [f"teacher_{n}" for n, x in zip(_PARTS, teacher, strict=True) if x is not None]
        if given:
            raise ValueError(
                "teacher_logits are given instead of the teacher's hidden states and head; got "
                f"them and {' and '.join(given)}: leave one of the two out"
            )
        _check_teacher_logits(teacher_logits, rows, vocabulary)
        check_device("teacher_logits", teacher_logits, hidden, _STUDENT)
        return
    if soft_weight == 0.0 and all(x is None for x in teacher):
        return
    teacher_hidden, teacher_weight, teacher_bias = teacher
    if teacher_hidden is None or teacher_weight is None:
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_weight"
        raise ValueError(
            "the teacher must be given as teacher_hidden and teacher_weight, or as "
            f"teacher_logits; got {missing}=None without teacher_logits: pass one of the two, or "
            "none of them with soft_weight=0"
        )
    _check_pair("teacher", teacher_hidden, teacher_weight, teacher_bias)
    if tuple(teacher_hidden.shape[:-1]) != rows:
        raise ValueError(
            f"teacher_hidden must have the leading shape of student_hidden, {rows}; "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            "student_weight and teacher_weight must have the same vocabulary size; "
            f"got V = {vocabulary} for the student and V = {teacher_weight.shape[0]} for the "
            "teacher: if the larger one only has padding rows at its end, slice them off "
            "(weight[:V]), otherwise the two models need the same tokenizer"
        )
    check_device("teacher_hidden", teacher_hidden, hidden, _STUDENT)
    for name, x in zip(_PARTS, teacher, strict=True):
        if x is not None:
            _check_detached(f"teacher_{name}", x)


def check_chunks(
    chunk_rows: int | None, memory_budget: int | None, grad_accum_dtype: object
) -> None:
    """The settings of the chunks that a module keeps.

    Raises:
        TypeError: not an int, or not a dtype.
        ValueError: not positive, or both heights given.
    """
    for name, value in (("chunk_rows", chunk_rows), ("memory_budget", memory_budget)):
        check_count(name, value, least=1)
    if chunk_rows is not None and memory_budget is not None:
        raise ValueError(
            "chunk_rows and memory_budget both decide the height of a chunk; got "
            f"{chunk_rows} and {memory_budget}: leave one of the two out"
        )
    if not isinstance(grad_accum_dtype, torch.dtype):
        raise TypeError(f"grad_accum_dtype must be a torch.dtype; got {grad_accum_dtype!r}")


def check_accumulation(dtype: torch.dtype, weight: torch.dtype) -> None:
    """float32, or the weight's own dtype."""
    if dtype not in (torch.float32, weight):
        raise ValueError(
            "grad_accum_dtype must be torch.float32 or the dtype of the student's weight, "
            f"{weight}; got {dtype}"
        )


def check_kept_rows(kept_rows: int | None, kept: Tensor | None, rows: int) -> None:
    """An int; on the CPU (by value) at least the number of rows that are not ignored."""
    check_count("kept_rows", kept_rows, least=0)
    if kept_rows is None:
        return
    if kept is None:
        number = rows
    elif checks.may_look_at_values(kept):
        number = int(kept.sum().item())
    else:
        return
    if kept_rows < number:
        raise ValueError(
            f"kept_rows must be at least the number of rows that are not ignored, {number}; "
            f"got {kept_rows}"
        )


def _check_pair(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One model's hidden states (..., H), weight (V, H) and bias (V,)."""
    names = {f"{side}_hidden": hidden, f"{side}_weight": weight, f"{side}_bias": bias}
    for name, x in names.items():
        if x is not None or not name.endswith("_bias"):
            _check_values(name, x)
    if hidden.dim() == 0:
        raise ValueError(f"{side}_hidden must have shape (..., H); got 0 dimensions")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{side}_weight must have shape (V, H) with V > 0 and H > 0; "
            f"got {tuple(weight.shape)}: {_PARTITIONED if hasattr(weight, 'ds_id') else _SHARDED}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden and {side}_weight must have the same hidden size; got "
            f"H = {hidden.shape[-1]} for hidden and H = {weight.shape[1]} for weight, "
            f"of shapes {tuple(hidden.shape)} and {tuple(weight.shape)} (V, H)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}_bias must have shape (V,) = ({weight.shape[0]},); got {tuple(bias.shape)}"
        )
    for name in ("weight", "bias"):
        x = names[f"{side}_{name}"]
        if x is not None:
            check_device(f"{side}_{name}", x, hidden, f"{side}_hidden")


def check_dtypes(side: str, hidden: Tensor, weight: Tensor) -> None:
    """Outside autocast, hidden states and weight are multiplied as they are."""
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{side}_hidden and {side}_weight must have the same dtype outside autocast (which "
            f"leaves float64 alone); got {hidden.dtype} and {weight.dtype}: cast one, or call "
            "under torch.autocast"
        )


def _check_teacher_logits(logits: Tensor, rows: tuple[int, ...], vocabulary: int) -> None:
    _check_values("teacher_logits", logits)
    expected = (*rows, vocabulary)
    if tuple(logits.shape) != expected:
        raise ValueError(
            "teacher_logits must have the leading shape of student_hidden and the vocabulary of "
            f"student_weight, {expected}; got {tuple(logits.shape)}"
        )
    if logits.requires_grad:
        raise ValueError(
            "teacher_logits must not require grad, since the teacher gets no gradient; got a "
            "tensor that does: detach it (teacher_logits.detach()) or run the teacher under "
            "torch.no_grad()"
        )


def _check_detached(name: str, x: Tensor) -> None:
    if x.requires_grad and not x.is_leaf:
        raise ValueError(
            f"{name} must not be attached to a graph, since the teacher gets no gradient; got a "
            "tensor that is: detach it, or run the teacher under torch.no_grad()"
        )


def _check_values(name: str, x: Tensor | None) -> None:
    check_floating(name, x)
    if x is not None and x.device.type == "meta":
        raise TypeError(f"{name} must have values; got a tensor on the meta device")


def check_count(name: str, value: object, least: int) -> None:
    if value is None or isinstance(value, torch.SymInt):
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if int(value) >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits; got {value}")
