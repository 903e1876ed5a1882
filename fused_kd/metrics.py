"""Measurements of student, teacher and labels, token by token: :func:`kd_metrics`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Backend, choose_name, named
from .checks import check_call, check_side
from .classes import Classes, classes_of
from .divergences import keep
from .engines.memory import Sizes, chunk_rows
from .engines.products import Products, Projection, products_for
from .engines.selection import Selection, take
from .measures import Sums, Support, fields_of_sums, fields_of_support, masses_are_unknown
from .options import options_of, temperature_tensor
from .rows import label_rows, labels_and_kept, logit_rows, row_weights
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

#: Entries of a chunk of rows without a kernel, of which about a dozen temporaries are made: 1 MiB
#: each in float32 on a CPU, in its cache (8 MiB take twice the time), 32 MiB on a GPU, so that
#: launches cost little.
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
    conflict: Tensor  # 1 if product < 0, else 0: the mean is the share of tokens with a conflict
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

    Logits, heads, kept rows and -inf entries have the semantics of :func:`fused_kd.kd_loss`; a term
    is infinite, and a row NaN, in the same cases. The logits of a Head exist for a chunk of rows at
    a time, of the height that the loss's automatic budget allows; beyond that nothing grows with
    the number of rows times V. The arithmetic is float32, float64 if a side is.

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
        labels: (...), as for the loss. None: all rows are kept, and hard, accuracy, hard_square,
            product and conflict are 0.
        temperature: T.
        token_weight: (...), the weights of :meth:`KDMetrics.mean`, as for the loss. Rows of weight
            0 are left out. None: 1.
        ignore_index: rows with this label are left out.
        backend: as for the loss.

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
    dtype, shape = arithmetic_dtype(rows_tensor(student), rows_tensor(teacher)), row_shape(student)
    name = choose_name(options.backend, student, teacher)
    with torch.no_grad():
        weight = row_weights(student, dtype, kept, token_weight, options, None, None).row
        classes = None
        if isinstance(teacher, TopK):
            classes, _ = classes_of(teacher, vocabulary(student), dtype)
        y, t = label_rows(labels, options), temperature_tensor(options)
        out = weight.new_zeros((len(KDMetrics._fields) - 1, len(weight)))
        for rows, own, other in _chunks(name, student, teacher, weight, dtype):
            of_rows = None if classes is None else classes.at(rows)
            label = None if y is None else y[rows]
            out[:, rows] = _fields(named(name), own, other, of_rows, label, weight[rows], t)
        if isinstance(teacher, TopK) and classes is not None and temperature != 1.0:
            unknown = masses_are_unknown(classes, teacher.tail == "sampled")
            out[KDMetrics._fields.index("teacher_entropy")].masked_fill_(unknown, math.nan)
        out = keep(out, weight != 0)  # a kernel writes anything there; on a GPU all are computed
    return KDMetrics._make([*out.view(len(out), *shape), weight.view(shape)])


def _fields(
    backend: Backend,
    s: Tensor,  # (B, S, V)
    t: Tensor,  # (B, S, V); of a TopK the student's again
    classes: Classes | None,  # of a TopK, N = B·S rows
    y: Tensor | None,  # (N,)
    weight: Tensor,  # (N,)
    temperature: Tensor,
) -> Tensor:
    """Return all fields but the weight, (14, N), of rows of logits."""
    size = s.shape[2]
    labels = torch.zeros_like(weight, dtype=torch.int64) if y is None else y
    if classes is None:
        columns, largest = backend.measure(s, t, labels, weight, temperature)
        sums = Sums._make(columns.unbind(1))
        return fields_of_sums(sums, (largest[:, 0], largest[:, 1]), y, size, temperature)
    ids = classes.token_ids
    columns, largest = backend.measure_support(s, ids, labels, weight, temperature)
    at = torch.cat([ids.clamp(min=0).to(torch.int64), largest[:, None]], 1)
    inside = s.gather(2, at.view(*s.shape[:2], at.shape[1])).flatten(0, 1).to(columns.dtype)
    support = Support._make(columns.unbind(1))
    return fields_of_support(support, largest, inside, classes, y, size, temperature)


def _chunks(
    name: str, student: Side, teacher: Teacher, weight: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Yield rows, and the logits (B, S, V) of both sides; of a TopK the student's twice.

    Logits that were passed are one chunk of views, if kernels measure them.
    """
    device = weight.device
    other = None if isinstance(teacher, TopK) else teacher
    if name != "reference" and not isinstance(student, Head) and not isinstance(other, Head):
        s, t = logit_rows(student, other)
        yield slice(0, len(weight)), s, s if t is None else t
        return
    rows, products = Selection(len(weight), weight, None, None), products_for(name, device, dtype)
    if name == "reference":
        entries = _ENTRIES_ON_CPU if device.type == "cpu" else _ENTRIES_ON_GPU
        height = max(1, entries // vocabulary(student))
    else:
        sizes = Sizes(vocabulary(student), _hidden(student), _hidden(other), converted=True)
        height = chunk_rows(rows.count, None, None, device, sizes, products.fixed_bytes())
    own, of_teacher = (_Rows(x, products, height, dtype) for x in (student, other))
    for begin in range(0, rows.count, height):
        at = rows.at(slice(begin, min(begin + height, rows.count)))
        s = own.at(at)
        yield at, s[None], s[None] if other is None else of_teacher.at(at)[None]


def _hidden(side: Side | None) -> int | None:
    return side.hidden.shape[-1] if isinstance(side, Head) else None


class _Rows:
    """The logits of a side, a chunk at a time; of a Head in a buffer that all chunks share."""

    def __init__(
        self, side: Side | None, products: Products, height: int, dtype: torch.dtype
    ) -> None:
        self.products = products
        self.side: Tensor | Projection | None
        if isinstance(side, Head):
            self.side = Projection(*side[:3], operand_dtype(side), float(side.scale))
            self.logits = side.hidden.new_empty((height, len(side.weight)), dtype=dtype)
        else:
            self.side = side

    def at(self, rows: slice | Tensor) -> Tensor:
        """Return the logits (C, V) of these rows, those of a Head valid until the next call."""
        assert self.side is not None
        if isinstance(self.side, Tensor):
            return take(self.side, rows)
        hidden = take(self.side.hidden, rows)
        logits = self.logits[: len(hidden)]
        with torch.autocast(hidden.device.type, enabled=False):
            self.products.logits(logits, hidden, self.side)
        return logits
