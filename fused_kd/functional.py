"""The function :func:`kd_loss`: its semantics, and the order in which a call is processed."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .autograd import differentiable_loss
from .backends import choose_name
from .checks import check_call
from .classes import classes_of
from .engines import settings_of
from .options import KDOptions, Keywords, options_of, shows_keywords, temperature_tensor
from .rows import label_rows, labels_and_kept, logit_rows, row_weights, writes_in_place
from .sides import (
    Head,
    Side,
    Teacher,
    Tensors,
    TopK,
    arithmetic_dtype,
    row_shape,
    rows_tensor,
    tensors_of,
    vocabulary,
)


class KDLossParts(NamedTuple):
    """The result with ``return_parts=True``: loss = hard_weight·hard + soft_weight·soft."""

    loss: Tensor  # 0-d, or shaped like the labels for reduction "none"; differentiable
    hard: Tensor  # H, reduced like the loss; detached; 0 if hard_weight is 0
    soft: Tensor  # c(T)·D, reduced like the loss; detached; 0 if soft_weight is 0


@overload
def kd_loss(
    student: Side,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    kept_rows: int | None = None,
    return_parts: Literal[False] = False,
    **keywords: Unpack[Keywords],
) -> Tensor: ...


@overload
def kd_loss(
    student: Side,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    kept_rows: int | None = None,
    return_parts: Literal[True],
    **keywords: Unpack[Keywords],
) -> KDLossParts: ...


@overload
def kd_loss(
    student: Side,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    kept_rows: int | None = None,
    return_parts: bool,
    **keywords: Unpack[Keywords],
) -> Tensor | KDLossParts: ...


@shows_keywords
def kd_loss(  # noqa: D417  # return_parts is among the keywords that are filled in
    student: Side,  # (..., V)
    teacher: Teacher | None,  # (..., V)
    labels: Tensor | None = None,  # (...)
    *,
    token_weight: Tensor | None = None,  # (...)
    num_items: float | Tensor | None = None,
    kept_rows: int | None = None,
    return_parts: bool = False,
    **keywords: Unpack[Keywords],
) -> Tensor | KDLossParts:
    """Compute the distillation loss: cross-entropy with labels plus a divergence from the teacher.

    For each row, with student logits s, teacher logits t, label y, temperature T, label smoothing ε
    and π = softmax(s), p = softmax(s/T), q = softmax(t/T)::

        loss = hard_weight · H + soft_weight · c(T) · D(q, p)
        H    = -(1-ε) log π_y - (ε/V) Σ log π          always at temperature 1

    The factor c(T) is T² by default, as in Hinton et al., "Distilling the Knowledge in a Neural
    Network" (2015): the soft gradient's size then does not depend on T. docs/numerics.md has all
    formulas.

    Equivalent to::

        # divergence="forward_kl", soft_scale="t2", reduction="mean"
        kept = labels != ignore_index
        log_p = F.log_softmax(student.float() / temperature, -1)
        log_q = F.log_softmax(teacher.float() / temperature, -1)
        soft = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        hard = F.cross_entropy(
            student.float().flatten(0, -2), labels.flatten(),
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none",
        ).view(labels.shape)
        loss = (hard_weight * hard + soft_weight * soft)[kept].mean()

    Each side is a tensor of logits, or a :class:`fused_kd.Head`: hidden states and the weight of
    the lm_head. A teacher may also be a :class:`fused_kd.TopK`: the log-probabilities of K tokens.

    **Logits** are float32, bfloat16 or float16, independently for each side. All arithmetic is
    float32, and so is the loss; the gradient has the student's dtype and is rounded once. float64
    logits run on the reference backend and give a float64 loss. Autocast changes nothing. The
    gradient is the only allocation of the size of the logits. Logits are copied, however, if their
    last stride is not 1 or their leading dimensions do not collapse to two strides.

    **A Head's** logits are computed for one chunk of rows at a time, in float32; they are never
    rounded to 16 bits. Their gradient is multiplied into the gradients of hidden states, weight and
    bias: chunk by chunk, or for weight and bias at the end, from the gradients of all rows' logits,
    if keeping these takes no more memory than a sum.

    * Scalar reductions compute the gradients in the forward. Reduction "none", and float16 (a loss
      scale must precede the rounding), compute the logits again in the backward.
    * The products run in the autocast dtype, else in the dtype of the inputs (hidden states and
      weight of a model must then match), with float32 results; float64 inputs in float64.
    * The gradients have the dtypes of their inputs. Some have 16 bits before the upstream gradient
      is known: of the hidden states; of the weight if it is no sum over chunks; of a student's
      logits next to a teacher's Head. They are rounded again if it is not a power of two.
    * Ignored rows are left out of the products on a CPU. On a GPU that would take a
      synchronization: they are masked, unless `kept_rows` bounds the number of the others.

    An entry that is -inf on both sides is absent, so padding a vocabulary with -inf changes
    nothing. With ``soft_weight=0`` the teacher is not read, and an entry that is -inf for the
    student is absent. A row with a NaN or +inf logit, or without a finite one, is NaN; no other row
    is affected. Terms and rows of weight 0 are skipped.

    Args:
        student: logits (..., V), 1-D for a single row; or a Head.
        teacher: logits (..., V), a Head or a TopK, with the student's leading shape, V and device.
            It gets no gradient: logits must not require grad, and of a Head only leaf tensors may.
            None needs ``soft_weight=0``.
        labels: (...), class indices of an integer dtype, aligned with the rows (nothing is
            shifted); None needs ``hard_weight=0``. A label outside [0, V) that is not ignore_index
            raises on a CPU; on a GPU and under ``torch.compile`` its hard term is NaN
            (FUSED_KD_DEBUG=1 raises on a GPU too, at the cost of a synchronisation).
        {keywords}
        token_weight: (...), a weight w ≥ 0 for each row, bool, int or float, without grad. None: 1.
        num_items: the denominator of reduction "mean": a number > 0 or a 0-d tensor. None: Σ w. For
            gradient accumulation, the number of kept tokens of the whole batch. Refused with
            another reduction.
        kept_rows: an upper bound of the rows that are not ignored, if a side is a Head (refused
            otherwise); None: not known. If there are more, the loss is NaN (on the CPU: a
            ValueError).

    Returns:
        The loss, float32 (float64 if a side is float64): 0-d, or shaped like the labels for
        reduction "none". With ``return_parts=True``, KDLossParts.

    Raises:
        TypeError: An argument has the wrong type or dtype, or a keyword is unknown.
        ValueError: A value, shape or device does not fit; the message names the argument.
        RuntimeError: The requested backend cannot run, or a transform of ``torch.func`` is active
            outside ``torch.compile``. In the backward: it is differentiated again, an input was
            written to after the call, or with ``inplace=True`` it runs twice or for a batch
            (``is_grads_batched=True``).
    """
    options = options_of("kd_loss", {"return_parts": return_parts, **keywords})
    return kd_loss_with(options, student, teacher, labels, token_weight, num_items, kept_rows)


def kd_loss_with(
    options: KDOptions,
    student: Side,  # (..., V)
    teacher: Teacher | None,  # (..., V)
    labels: Tensor | None = None,  # (...)
    token_weight: Tensor | None = None,  # (...)
    num_items: float | Tensor | None = None,
    kept_rows: int | None = None,
) -> Tensor | KDLossParts:
    """Compute :func:`kd_loss` from options that were checked before; :class:`KDLoss` calls this.

    The other arguments are checked here; errors and result are those of kd_loss.
    """
    labels, kept = labels_and_kept(labels, options)
    check_call(options, student, teacher, labels, kept, token_weight, num_items, kept_rows)
    shape = row_shape(student)
    if options.soft_weight == 0.0:
        teacher = None  # its dtype and its -inf entries decide nothing
    inplace = writes_in_place(student, options)
    backend = choose_name(options.backend, student, teacher)
    dtype = _arithmetic_dtype(student, teacher)
    settings = settings_of(options, backend, student, teacher, dtype, inplace, kept_rows)
    token_ids = entropy = None
    if isinstance(teacher, TopK):
        (teacher, token_ids), entropy = classes_of(teacher, vocabulary(student), dtype)
        if isinstance(student, Tensor):
            student, _ = logit_rows(student, None)
            teacher = teacher.view(*student.shape[:2], teacher.shape[-1])
    elif isinstance(student, Tensor) and not isinstance(teacher, Head):
        student, teacher = logit_rows(student, teacher)
    weights = row_weights(student, dtype, kept, token_weight, options, num_items, kept_rows)
    loss, hard, soft = differentiable_loss(
        settings,
        tensors_of(student),
        _detached(tensors_of(teacher)),
        token_ids,
        label_rows(labels, options),
        weights,
        temperature_tensor(options),
    )
    if entropy is not None and weights.soft is not None:
        # the kernels return the divergence from the sampled distribution; the value of "sampled" is
        # the cross-entropy
        more = torch.where(weights.soft != 0, options.soft_factor * entropy, 0.0)
        soft = soft + more
        loss = loss + (weights.soft * more if settings.per_row else (weights.soft * more).sum())
    return _returned(loss, hard, soft, weights.row, options, shape)


def _arithmetic_dtype(student: Side, teacher: Teacher | None) -> torch.dtype:
    return arithmetic_dtype(rows_tensor(student), None if teacher is None else rows_tensor(teacher))


def _detached(teacher: Tensors) -> Tensors:
    """Detach a teacher's head, whose parameters may require grad; return anything else as it is."""
    states, weight, bias = teacher
    if weight is None:
        return teacher  # logits: the checks have refused those with grad
    states, weight, bias = [None if x is None else x.detach() for x in teacher]
    return states, weight, bias


def _returned(
    loss: Tensor,  # 0-d, or (N,) for "none"
    hard: Tensor,  # (N,)
    soft: Tensor,  # (N,)
    w: Tensor,  # (N,), Weights.row
    options: KDOptions,
    shape: torch.Size,  # of the labels
) -> Tensor | KDLossParts:
    """Return the loss in the caller's shape; with ``return_parts``, also hard and soft.

    These are multiplied by `w` and reduced like the loss, which is reduced already.
    """
    per_row = options.reduction == "none"
    loss = loss.view(shape) if per_row else loss
    if not options.return_parts:
        return loss
    parts = ((w * x).view(shape) if per_row else (w * x).sum() for x in (hard, soft))
    return KDLossParts(loss, *parts)
