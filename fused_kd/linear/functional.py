"""linear_kd_loss: checks, weighs the rows, decides the dtypes and the backend, calls autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_name
from ..functional import KDLossParts, returned
from ..options import KDOptions
from ..reduction import arithmetic_dtype, label_rows, row_weights, wide_labels
from .autograd import Settings, linear_losses
from .checks import (
    check_accumulation,
    check_chunks,
    check_dtypes,
    check_heads,
    check_kept_rows,
)
from .chunks import sizes_of
from .memory import chunk_rows
from .products import Side, products_for


@dataclass(frozen=True)
class ChunkOptions:
    """How the work is cut into chunks, and what the weight gradient is accumulated in.

    Raises:
        TypeError, ValueError: as :func:`fused_kd.linear.checks.check_chunks`.
    """

    chunk_rows: int | None = None
    memory_budget: int | None = None
    grad_accum_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_chunks(self.chunk_rows, self.memory_budget, self.grad_accum_dtype)


def linear_kd_loss(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V, H_s)
    teacher_hidden: Tensor | None = None,  # (..., H_t)
    teacher_weight: Tensor | None = None,  # (V, H_t)
    labels: Tensor | None = None,  # (...)
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    teacher_logits: Tensor | None = None,  # (..., V)
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    grad_accum_dtype: torch.dtype = torch.float32,
    kept_rows: int | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    soft_scale: str = "t2",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,  # (...)
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossParts:
    """:func:`fused_kd.kd_loss` from hidden states: the logits of neither model are ever whole.

    Equivalent to, with the same keywords::

        student_logits = F.linear(student_hidden, student_weight, student_bias)
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
        loss = kd_loss(student_logits, teacher_logits, labels)

    but the logits of a chunk of rows are made, used and overwritten with their gradient, which is
    multiplied on at once: the memory is one chunk of float32 logits for each model. They are never
    rounded to 16 bits. Scalar reductions make the gradients in the forward; "none" makes the logits
    once more in the backward, as does float16 (the loss scale enters before the rounding).

    The products run in the autocast dtype, else in the inputs' own (hidden states and weight of a
    model must then match), with float32 results; float64 inputs compute in float64. The gradients
    have the dtypes of their inputs. What is 16-bit before the upstream gradient comes (that of the
    hidden states; where all rows fit in one chunk that of the weight) is rounded once more if the
    upstream gradient is not a power of two.

    Ignored rows are not multiplied at all on a CPU; on a GPU their number is unknown to the host,
    which never waits for it: they are masked, unless `kept_rows` tells how many there are.

    Args:
        student_hidden: (..., H_s), what the student's lm_head is applied to; 1-D is a single row.
        student_weight: (V, H_s), the lm_head's; a tied embedding's is as good.
        teacher_hidden: (..., H_t).
        teacher_weight: (V, H_t); gets no gradient.
        labels: (...), aligned with the hidden states; None needs ``hard_weight=0``.
        student_bias: (V,).
        teacher_bias: (V,).
        teacher_logits: (..., V), without grad, instead of teacher_hidden and teacher_weight. With
            ``soft_weight=0`` no teacher is needed.
        chunk_rows: rows of a chunk.
        memory_budget: bytes that a chunk may take (see ``python -m fused_kd.plan``), instead of
            chunk_rows. Default: 256 MiB on a CPU; on a GPU what 2048 rows need, at most 1/16 of its
            memory. Small chunks read and write the weight gradient more often. The reference
            backend takes several times as much.
        grad_accum_dtype: of the weight and bias gradient while chunks are added: float32, or the
            weight's dtype, which saves a buffer and rounds once per chunk. One chunk needs no sum.
        kept_rows: an upper bound of the rows that are not ignored. If there are more the loss is
            NaN (an error on the CPU).
        temperature, hard_weight, soft_weight, divergence, beta, soft_scale, label_smoothing,
            ignore_index, token_weight, reduction, num_items, return_parts, backend: as in
            :func:`fused_kd.kd_loss`.

    Returns:
        The loss: 0-d, or shaped like the labels for "none"; or KDLossParts.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit; the message names the argument.
        RuntimeError: a backend asked for by name cannot run; in the backward, when it is
            differentiated again.
    """
    options = KDOptions(
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        divergence=divergence,
        beta=beta,
        soft_scale=soft_scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        return_parts=return_parts,
        backend=backend,
    )
    return linear_kd_loss_with(
        options,
        ChunkOptions(chunk_rows, memory_budget, grad_accum_dtype),
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        teacher_logits,
        labels,
        token_weight,
        num_items,
        kept_rows,
    )


def linear_kd_loss_with(
    options: KDOptions,
    chunks: ChunkOptions,
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden (..., H_s), weight (V, H_s), bias (V,)
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],  # the same
    teacher_logits: Tensor | None,  # (..., V)
    labels: Tensor | None,  # (...)
    token_weight: Tensor | None,  # (...)
    num_items: float | Tensor | None,
    kept_rows: int | None,
) -> Tensor | KDLossParts:
    """:func:`linear_kd_loss` with its options already built and checked."""
    checks.refuse_transforms()
    labels = wide_labels(labels)
    check_heads(student, teacher, teacher_logits, options.soft_weight)
    hidden, weight, _ = student
    if options.soft_weight == 0.0:
        teacher, teacher_logits = (None, None, None), None
    teacher = tuple(None if x is None else x.detach() for x in teacher)  # type: ignore[assignment]
    kept = checks.check_rows(
        labels, token_weight, num_items, options, hidden, weight.shape[0], "student_hidden"
    )
    check_kept_rows(kept_rows, kept, math.prod(hidden.shape[:-1]))
    given = teacher_logits if teacher[0] is None else teacher[0]
    wide = arithmetic_dtype(hidden, given)
    compute = _product_dtype("student", hidden, weight)
    taught = None
    if teacher[0] is not None and teacher[1] is not None:
        taught = Side(
            teacher[0], teacher[1], teacher[2], _product_dtype("teacher", teacher[0], teacher[1])
        )
    check_accumulation(chunks.grad_accum_dtype, weight.dtype)
    accumulate = chunks.grad_accum_dtype
    if not torch.compiler.is_compiling():  # it would compile anew for another number of rows
        sides = Side(*student, compute), taught
        if _fit_in_one_chunk(math.prod(hidden.shape[:-1]), chunks, *sides, teacher_logits, wide):
            accumulate = weight.dtype  # nothing is added to it
    settings = Settings(
        options,
        choose_name(options.backend, hidden, given),
        compute,
        wide if taught is None else taught.compute,
        chunks.chunk_rows,
        chunks.memory_budget,
        kept_rows,
        accumulate if wide == torch.float32 else wide,
    )
    w = row_weights(hidden, wide, kept, token_weight, options, num_items)
    if kept_rows is not None and kept is not None:
        w = torch.where(kept.sum() > kept_rows, torch.nan, w)
    losses = linear_losses(
        student, (*teacher, teacher_logits), label_rows(labels, options), w, settings
    )
    return returned(losses, w, options, hidden.shape[:-1])


def _fit_in_one_chunk(
    rows: int,
    chunks: ChunkOptions,
    student: Side,
    teacher: Side | None,
    teacher_logits: Tensor | None,
    wide: torch.dtype,
) -> bool:
    """Whether they do, wherever they lie and whichever are kept; refuses a budget below one row."""
    device = student.hidden.device
    most = sizes_of(student, teacher, teacher_logits, wide, gathered=True)
    fixed = products_for(device, wide).fixed_bytes()
    return rows <= chunk_rows(rows, chunks.chunk_rows, chunks.memory_budget, device, most, fixed)


def _product_dtype(side: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a model's hidden states and weight are multiplied in."""
    device = hidden.device.type
    if torch.float64 not in (hidden.dtype, weight.dtype) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    check_dtypes(side, hidden, weight)
    return hidden.dtype
