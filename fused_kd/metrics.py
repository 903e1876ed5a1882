"""Measurements of student, teacher and labels, token by token: :func:`kd_metrics`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import choose_name
from .checks import check_call, check_side
from .classes import NO_CLASS, Classes, classes_of
from .divergences import centred, forward_kl, keep
from .engines.products import Products, Projection, products_for
from .engines.selection import Selection, take
from .options import options_of, temperature_tensor
from .rows import label_rows, labels_and_kept, row_weights
from .sides import (
    Head,
    Side,
    Teacher,
    TopK,
    arithmetic_dtype,
    operand_dtype,
    row_shape,
    rows_tensor,
    vocabulary,
)

#: Entries of a chunk of rows, of which about a dozen temporaries are made: 1 MiB each in float32 on
#: a CPU, in its cache (8 MiB take twice the time), 32 MiB on a GPU, so that launches cost little.
_ENTRIES_ON_CPU, _ENTRIES_ON_GPU = 2**18, 2**23


class KDMetrics(NamedTuple):
    """The result of :func:`kd_metrics`: float32 (or float64) tensors, shaped like the labels.

    Rows that are left out are 0 in all fields.
    """

    hard: Tensor  # cross-entropy with the label, at temperature 1
    soft: Tensor  # T² times the forward KL divergence at T
    student_entropy: Tensor  # at temperature 1, as the next
    teacher_entropy: Tensor
    student_entropy_at_t: Tensor  # at T, as the next
    teacher_entropy_at_t: Tensor
    agreement: Tensor  # 1 if the largest entries of student and teacher are the same, else 0
    accuracy: Tensor  # 1 if the student's largest entry is the label, else 0
    hard_square: Tensor  # |π - y|²
    soft_square: Tensor  # |T·(p - q)|²
    product: Tensor  # <π - y, T·(p - q)>
    student_mass: Tensor  # of the support of a TopK at T; 1 for a dense teacher; as the next
    teacher_mass: Tensor
    weight: Tensor  # of the row in the mean: token_weight or 1

    def mean(self) -> KDMetrics:
        """Return Σ w·row / Σ w of every field, 0-d, with w as in the loss; `weight` is Σ w.

        Without rows of weight > 0 all is 0. Results of several batches are combined by a mean with
        these weights.
        """
        weight = self.weight.double()
        total = weight.sum()
        share = weight / torch.where(total == 0, 1.0, total)
        means = [(share * x.double()).sum().to(x.dtype) for x in self[:-1]]
        return KDMetrics._make([*means, total.to(self.weight.dtype)])


def kd_metrics(
    student: Side,  # (..., V)
    teacher: Teacher,  # (..., V)
    labels: Tensor | None = None,  # (...)
    *,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    backend: str = "auto",
) -> KDMetrics:
    """Measure how student, teacher and labels differ, for every row and without gradients.

    With π = softmax(s) and y the one-hot label, p = softmax(s/T), q = softmax(t/T), the terms of
    the loss have the gradients π - y and T·(p - q) by the student's logits. Their squared norms and
    their product are a map of the conflicts between label and teacher, token by token: where
    product < 0, the two pull these logits against each other. They are no evidence about the
    parameters: the gradients of parameters sum over tokens, through the whole model.

    There is no fused kernel for it yet: it is plain torch, and on a CPU takes 50 to 120 times as
    long as the loss's forward. Measure a sample of the tokens.

    Logits, heads, kept rows and -inf entries have the semantics of :func:`fused_kd.kd_loss`; a term
    is infinite, and a row NaN, in the same cases. The logits of a Head exist for a chunk of rows at
    a time; nothing of size (..., V) is allocated. The arithmetic is float32, float64 if a side is.

    For a TopK the quantities are those of its classes: its K tokens, and all others as one class
    (see :class:`fused_kd.TopK`). There are five exceptions:

    * `hard`, `accuracy` and `agreement` use the student's V entries; the teacher's largest entry is
      that of its support (`agreement` is 0 without one).
    * "renormalize": p, q and the entropies have no such class; π and y do, where T·(p - q) is 0.
    * The masses are those before a renormalisation of the student, and after one of the teacher.
    * teacher_entropy, at temperature 1, is NaN if a tail or draws are known at another T only.
    * "sampled": `soft` is the divergence from the draws; that of the loss is larger by
      T²·teacher_entropy_at_t.

    Args:
        student: logits (..., V), 1-D for a single row; or a Head.
        teacher: logits (..., V), a Head or a TopK, as for the loss.
        labels: (...), as for the loss. None: all rows are kept, and hard, accuracy, hard_square and
            product are 0.
        temperature: T.
        token_weight: (...), the weights of :meth:`KDMetrics.mean`, as for the loss. Rows of weight
            0 are left out. None: 1.
        ignore_index: rows with this label are left out.
        backend: as for the loss; it decides how a Head's logits are computed.

    Returns:
        KDMetrics, whose :meth:`KDMetrics.mean` reduces every field. Of equal largest entries the
        one with the smallest index counts.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A value, shape or device does not fit; the message names the argument.
        RuntimeError: The requested backend cannot run.
    """
    options = options_of(
        "kd_metrics",
        {
            "temperature": temperature,
            "ignore_index": ignore_index,
            "backend": backend,
            "hard_weight": 0.0 if labels is None else 1.0,
            "reduction": "sum",
        },
    )
    labels, kept = labels_and_kept(labels, options)
    if teacher is None:  # the loss's message would offer soft_weight=0
        check_side("teacher", teacher)
    check_call(options, student, teacher, labels, kept, token_weight, None, None)
    x, size, shape = rows_tensor(student), vocabulary(student), row_shape(student)
    dtype = arithmetic_dtype(x, rows_tensor(teacher))
    name = choose_name(options.backend, student, teacher)
    with torch.no_grad():
        weight = row_weights(student, dtype, kept, token_weight, options, None, None).row
        other: Classes | _Rows
        if isinstance(teacher, TopK):
            other, _ = classes_of(teacher, size, dtype)
        else:
            other = _Rows(teacher, name, dtype)
        own, y = _Rows(student, name, dtype), label_rows(labels, options)
        t = temperature_tensor(options)
        selection = Selection(len(weight), weight, None, None)
        out = x.new_zeros((len(KDMetrics._fields) - 1, len(weight)), dtype=dtype)
        entries = _ENTRIES_ON_CPU if x.device.type == "cpu" else _ENTRIES_ON_GPU
        height = max(1, entries // size)
        with torch.autocast(x.device.type, enabled=False):
            for begin in range(0, selection.count, height):
                rows = selection.at(begin, min(begin + height, selection.count))
                of_rows = None if y is None else y[rows]
                out[:, rows] = _measured(own.at(rows), other.at(rows), of_rows, t)
        if isinstance(teacher, TopK) and isinstance(other, Classes) and temperature != 1.0:
            unknown = _has_tail_at_t(other, teacher.tail == "sampled")
            out[KDMetrics._fields.index("teacher_entropy")].masked_fill_(unknown, math.nan)
        out = keep(out, weight != 0)  # on a GPU all rows are computed
    return KDMetrics._make([*out.view(-1, *shape), weight.view(shape)])


class _Rows:
    """The logits of a side, a chunk at a time."""

    def __init__(self, side: Side, backend: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.products: Products | None = None
        self.side: Tensor | Projection
        if isinstance(side, Head):
            self.products = products_for(backend, side.hidden.device, dtype)
            self.side = Projection(*side[:3], operand_dtype(side), float(side.scale))
        else:
            self.side = side

    def at(self, rows: slice | Tensor) -> Tensor:
        """Return the logits (C, V) of these rows, float32 or float64."""
        if isinstance(self.side, Tensor):
            return take(self.side, rows).to(self.dtype)
        assert self.products is not None
        hidden = take(self.side.hidden, rows)
        logits = hidden.new_empty((len(hidden), len(self.side.weight)), dtype=self.dtype)
        self.products.logits(logits, hidden, self.side)
        return logits


class _Sides(NamedTuple):
    """What is compared in a row: B classes, which are V entries, or those of a TopK."""

    student: Tensor  # (C, B) logits for exponentials at T; -inf for a tail that is no class
    student_1: Tensor  # (C, B) the same at temperature 1
    whole_1: Tensor  # (C, B) student_1 with any tail
    teacher: Tensor  # (C, B) logits, for both temperatures
    label: Tensor | None  # (C,) the class of the label
    token: Tensor  # (C,) the teacher's largest entry
    student_mass: Tensor  # (C,)
    teacher_mass: Tensor  # (C,)


def _measured(
    s: Tensor,  # (C, V)
    teacher: Tensor | Classes,  # (C, V)
    y: Tensor | None,  # (C,)
    temperature: Tensor,
) -> Tensor:
    """Return all fields but the weight, (13, C), of rows of logits."""
    label = None if y is None else torch.where((y >= 0) & (y < s.shape[1]), y, 0)
    if isinstance(teacher, Tensor):
        one = s.new_ones(len(s))
        sides = _Sides(s, s, s, teacher, label, teacher.argmax(1), one, one)
    else:
        sides = _sides_of(s, teacher, label, temperature)
    divergence, soft = forward_kl(sides.student, sides.teacher, temperature, 0.0)
    soft = temperature * soft
    best = s.argmax(1)
    no_student, no_teacher = (~x.amax(1).isfinite() for x in (s, sides.teacher))
    no_soft = no_student | no_teacher
    whole_1 = _softened(sides.whole_1)
    student_1 = whole_1 if sides.student_1 is sides.whole_1 else _softened(sides.student_1)
    entropies = [
        _entropy(student_1).masked_fill(no_student, math.nan),
        _entropy(_softened(sides.teacher)),
    ]
    if temperature == 1:
        entropies *= 2
    else:
        own, other = _softened(sides.student / temperature), _softened(sides.teacher / temperature)
        entropies += [_entropy(own).masked_fill(no_student, math.nan), _entropy(other)]
    hard = accuracy = hard_square = product = s.new_zeros(len(s))
    if y is not None and label is not None:
        z, log_sum = whole_1[:2] if sides.whole_1 is s else centred(s)
        no_hard = no_student | (y != label)
        hard = (log_sum - z.gather(1, label[:, None])).squeeze(1).masked_fill(no_hard, math.nan)
        accuracy = (best == label).to(s.dtype).masked_fill(no_hard, math.nan)
        difference = _minus_label(whole_1.p, sides.label)
        hard_square = difference.square().sum(1).masked_fill(no_hard, math.nan)
        product = (difference * soft).sum(1).masked_fill(no_hard | no_soft, math.nan)
    return torch.stack(
        [
            hard,
            (temperature.square() * divergence).masked_fill(no_soft, math.nan),
            *entropies,
            (best == sides.token).to(s.dtype).masked_fill(no_soft, math.nan),
            accuracy,
            hard_square,
            soft.square().sum(1).masked_fill(no_soft, math.nan),
            product,
            sides.student_mass.masked_fill(no_student, math.nan),
            sides.teacher_mass.masked_fill(no_teacher, math.nan),
        ]
    )


def _sides_of(s: Tensor, classes: Classes, label: Tensor | None, temperature: Tensor) -> _Sides:
    """Return the classes of a TopK in both sides, for the student's logits s (C, V)."""
    ids, t, size = classes.token_ids, classes.logits, s.shape[1]
    has_class = t[:, -1:] != NO_CLASS
    t = torch.cat([t[:, :-1], torch.where(has_class, t[:, -1:], -math.inf)], 1)
    # absent entries read and write a column of their own, which is dropped
    at = torch.where(ids >= 0, ids, size).to(torch.int64)
    padded = torch.nn.functional.pad(s, (0, 1), value=-math.inf)
    inside, outside = padded.gather(1, at), padded.scatter(1, at, -math.inf)[:, :-1]
    # relative to the largest logit that belongs to a class: a large one costs no accuracy
    of_class = torch.where(has_class, outside.amax(1, keepdim=True), -math.inf)
    largest = torch.cat([inside, of_class], 1).amax(1, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    inside, outside = inside - largest, outside - largest
    whole_1 = torch.cat([inside, outside.logsumexp(1, keepdim=True)], 1)
    tail = (outside / temperature).logsumexp(1, keepdim=True) * temperature
    whole = torch.cat([inside, tail], 1)
    is_tail = torch.arange(t.shape[1], device=t.device) == ids.shape[1]
    no_class = is_tail & ~has_class
    if label is not None:  # the first True: that of its token, else the tail
        is_label = torch.cat([ids == label[:, None], torch.ones_like(has_class)], 1)
        label = is_label.to(torch.uint8).argmax(1)
    support = t.masked_fill(is_tail, -math.inf)
    is_largest = (support == support.amax(1, keepdim=True)) & (support != -math.inf)
    tokens = torch.nn.functional.pad(at, (0, 1), value=size)
    return _Sides(
        student=whole.masked_fill(no_class, -math.inf),
        student_1=whole_1.masked_fill(no_class, -math.inf),
        whole_1=whole_1,
        teacher=t,
        label=label,
        token=torch.where(is_largest, tokens, size).amin(1),
        student_mass=_support_mass(whole / temperature),
        teacher_mass=_support_mass(t / temperature),
    )


class _Softened(NamedTuple):
    """Logits relative to their maximum z (C, B), log Σ exp z (C, 1), and the softmax p (C, B)."""

    z: Tensor
    log_sum: Tensor
    p: Tensor


def _softened(x: Tensor) -> _Softened:
    z, log_sum = centred(x)
    return _Softened(z, log_sum, (z - log_sum).exp())


def _minus_label(p: Tensor, label: Tensor | None) -> Tensor:
    """Return π - y (C, B); at the label minus the other π, without the rounding of a π near 1."""
    assert label is not None
    at = label[:, None]
    others = p.scatter(1, at, 0.0)
    return others.scatter_(1, at, -others.sum(1, keepdim=True))


def _entropy(x: _Softened) -> Tensor:
    """Return -Σ p·log p (C,), as a sum of two terms that are not negative."""
    return x.log_sum.squeeze(1) - keep(x.p * x.z, x.p != 0).sum(1)


def _support_mass(x: Tensor) -> Tensor:
    return _softened(x).p[:, :-1].sum(1)


def _has_tail_at_t(classes: Classes, is_drawn: bool) -> Tensor:
    """Return bool (N,): the masses follow at no other temperature, for a tail or draws."""
    has_entries = (classes.token_ids >= 0).any(1)
    return has_entries & (classes.logits[:, -1].isfinite() | is_drawn)
