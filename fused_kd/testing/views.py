"""What the error rule needs of Inputs: which entries count, some columns, what is compared."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import reference
from ..classes import NO_CLASS, classes_of
from ..sides import TopK
from .inputs import Inputs


def present_entries(inputs: Inputs) -> Tensor:
    """Return bool (N, V): False for entries that both terms treat as absent."""
    student, teacher = inputs.student, inputs.teacher
    if isinstance(teacher, Tensor):
        return reference.present_entries(student, teacher)
    classes, _ = classes_of(teacher, student.shape[1], torch.float64)
    return reference.present_entries(student, classes)


def columns_of(inputs: Inputs, row: int, columns: Tensor) -> Inputs:
    """Return one row with a part of the vocabulary.

    Args:
        inputs: of any number of rows.
        row: the index of the row.
        columns: bool (V,): the entries that are left; the label and the support must be among them.
    """
    place = columns.cumsum(0) - 1  # of an entry among those that are left
    if isinstance(inputs.teacher, TopK):
        topk = inputs.teacher.rows(slice(row, row + 1))
        ids = torch.where(topk.logprobs == -math.inf, 0, topk.token_ids)
        teacher: Tensor | TopK = topk._replace(token_ids=place[ids.long()])
    else:
        teacher = inputs.teacher[row, columns][None]
    return Inputs(inputs.student[row, columns][None], teacher, place[inputs.labels[row]][None])


class Compared(NamedTuple):
    """The logits between which the divergence of every row is computed, in float64."""

    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    reach: Tensor  # (N,): how far a finite logit is below the largest one of its side


def compared(inputs: Inputs, temperature: float) -> Compared:
    """Return the logits of both sides, for a TopK those of an equivalent dense teacher.

    That is the one with the same loss and the same gradient for this student: the mass of the tail
    is spread over the tokens outside the support in the student's own proportions. If these tokens
    are no class, both sides are -inf there. The reach is that of the classes' logits.

    Args:
        inputs: of any number of rows.
        temperature: T of the loss.
    """
    s = inputs.student.double()
    if isinstance(inputs.teacher, Tensor):
        t = inputs.teacher.double()
        return Compared(s, t, torch.maximum(reach_of(s), reach_of(t)))
    classes, _ = classes_of(inputs.teacher, s.shape[1], torch.float64)
    inside, tail = classes.logits[:, :-1], classes.logits[:, -1:]
    at = torch.where(classes.token_ids >= 0, classes.token_ids, s.shape[1]).long()
    padded = pad(s, (0, 1), value=-math.inf)
    outside = padded.scatter(1, at, -math.inf)[:, :-1]
    is_class = tail != NO_CLASS
    tail_of_student = temperature * (outside / temperature).logsumexp(1, keepdim=True)
    t = torch.where(is_class & (outside != -math.inf), outside - tail_of_student + tail, -math.inf)
    both = (padded.gather(1, at), tail_of_student), (inside, tail)
    reaches = [reach_of(torch.cat([x, torch.where(is_class, y, -math.inf)], 1)) for x, y in both]
    return Compared(
        torch.where(is_class | (outside == -math.inf), s, -math.inf),
        pad(t, (0, 1)).scatter(1, at, inside)[:, :-1],
        torch.maximum(*reaches),
    )


def reach_of(x: Tensor) -> Tensor:
    """Return how far a finite entry of each row (N, V) is below the largest one; 0 if none is."""
    below = x.amax(1, keepdim=True) - x
    return torch.where(below.isfinite(), below, 0.0).amax(1)
