"""Checks of a top-k teacher."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..divergences import TABLE
from ..options import BOUNDS, LARGEST, SMALLEST, KDOptions
from ..sides import TAILS, Side, TopK, arithmetic_dtype, vocabulary
from .tensors import (
    check_dense,
    check_floating,
    check_on_device_of,
    may_read_values,
    position,
    rows_name,
    sorted_rows,
)

#: A tail that is computed as 1 minus the support's mass must be at least this large: below, it is
#: mostly the rounding of the log-probabilities.
SMALLEST_TAIL = 1e-3


def check_topk(student: Side, rows: torch.Size, teacher: TopK, options: KDOptions) -> None:
    """Check a TopK against the rows, V and device of the student, without reading its values.

    Raises:
        TypeError: A field has the wrong type or dtype.
        ValueError: A setting, shape or device does not fit.
    """
    ids, logprobs, tail = teacher.token_ids, teacher.logprobs, teacher.tail_logprob
    check_dense("teacher.token_ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher.token_ids must be int32 or int64; got {ids.dtype}")
    check_floating("teacher.logprobs", logprobs)
    if tail is not None:
        check_dense("teacher.tail_logprob", tail)
    if logprobs.dim() == 0 or logprobs.shape != ids.shape:
        raise ValueError(
            "teacher.token_ids and teacher.logprobs must have the same shape (..., K); got "
            f"{tuple(ids.shape)} and {tuple(logprobs.shape)}"
        )
    if logprobs.shape[:-1] != rows:
        raise ValueError(
            f"teacher.logprobs must have the leading shape of {rows_name('student', student)}, "
            f"{tuple(rows)}; got {tuple(logprobs.shape[:-1])} and K = {logprobs.shape[-1]}"
        )
    for name, x in zip(("token_ids", "logprobs", "tail_logprob"), teacher[:3], strict=True):
        if x is None:
            continue
        check_on_device_of(f"teacher.{name}", x, student)
        if x.requires_grad:
            raise ValueError(
                f"teacher.{name} must not require grad, since the teacher gets no gradient; got a "
                "tensor that does: detach it"
            )
    _check_tail(teacher, options)
    if tail is not None:
        if tail.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"teacher.tail_logprob must be float32 or float64; got {tail.dtype}, which cannot "
                "hold the tail to the accuracy of the loss: measure it in float32"
            )
        if tail.shape != rows:
            raise ValueError(
                f"teacher.tail_logprob must have the leading shape of teacher.logprobs, "
                f"{tuple(rows)}; got {tuple(tail.shape)}"
            )
    k, size = logprobs.shape[-1], vocabulary(student)
    if k > size and teacher.tail != "sampled":
        raise ValueError(
            f"teacher.logprobs must have at most V = {size} entries a row; got K = {k}"
        )


def _check_tail(teacher: TopK, options: KDOptions) -> None:
    """Check the tail and the temperature of a TopK against each other and the options."""
    tail, name = teacher.tail, options.divergence
    if not isinstance(tail, str) or tail not in TAILS:
        known = ", ".join(repr(known) for known in TAILS)
        raise ValueError(f"teacher.tail must be one of {known}; got {tail!r}")
    if not isinstance(teacher.temperature, (int, float, Real, torch.SymFloat)) or isinstance(
        teacher.temperature, bool
    ):
        raise TypeError(
            f"teacher.temperature must be a Python number; got {type(teacher.temperature).__name__}"
        )
    if not SMALLEST <= teacher.temperature <= LARGEST:
        raise ValueError(f"teacher.temperature must be {BOUNDS}; got {teacher.temperature}")
    if options.soft_weight == 0.0:
        return
    entry = TABLE[name]
    if entry.of_logits:
        raise ValueError(
            f"divergence={name!r} compares logits, which a TopK does not have; got a TopK: pass a "
            "divergence of probabilities, or the teacher's logits"
        )
    if tail == "zero" and entry.needs_mass:
        raise ValueError(
            f"divergence={name!r} is infinite for every student if the teacher has no mass outside "
            "its support; got a TopK with tail='zero': use 'bucket' or 'renormalize'"
        )
    if tail == "sampled" and not entry.is_linear:
        raise ValueError(
            "a TopK with tail='sampled' is for divergence='forward_kl', whose gradient alone is "
            f"linear in the teacher and so unbiased; got divergence={name!r}"
        )
    if tail in ("bucket", "sampled") and teacher.temperature != options.temperature:
        why = (
            "the mass outside the support at another temperature does not follow from it: measure "
            "tail_logprob at the loss's temperature, or use tail='renormalize'"
            if tail == "bucket"
            else "the entries must be drawn at the loss's temperature"
        )
        raise ValueError(
            f"teacher.temperature must be the loss's, {options.temperature}, for a TopK with "
            f"tail={tail!r}; got {teacher.temperature}: {why}"
        )
    if tail == "bucket" and teacher.tail_logprob is None and teacher.logprobs.itemsize < 4:
        raise TypeError(
            "teacher.tail_logprob must be given for log-probabilities of 16 bits, since 1 minus "
            f"their sum is mostly rounding; got None with {teacher.logprobs.dtype}: measure it in "
            "float32 (TopK.from_logits does), or use tail='renormalize'"
        )


def check_topk_values(teacher: TopK, size: int) -> None:
    """Check the ids and log-probabilities of a TopK for a vocabulary of `size` entries.

    Raises:
        ValueError: A value does not fit.
    """
    ids, logprobs, tail = teacher.token_ids, teacher.logprobs, teacher.tail
    if logprobs.numel() > 0:
        low, high = torch.aminmax(logprobs)
        if not high.item() < math.inf:
            _refuse_logprobs(logprobs)
        if low.item() == -math.inf:
            absent = logprobs == -math.inf
            _check_range(torch.where(absent, 0, ids), size)
            ids = torch.where(absent, -1, ids)
        else:
            _check_range(ids, size)
        if tail != "sampled":
            _check_unique(ids)
    if tail in ("bucket", "sampled"):
        _check_masses(teacher, ids, size)


def reads_values(topk: TopK) -> bool:
    """Return True if the values of a TopK may be read, and so are checked."""
    return all(may_read_values(x) for x in topk[:3] if x is not None)


def mass_slack(topk: TopK) -> float:
    """Return by how much rounding may raise the sum of a row's probabilities."""
    measured = [x for x in (topk.logprobs, topk.tail_logprob) if x is not None]
    eps = max(torch.finfo(x.dtype).eps for x in measured)
    return 8 * eps * (1 + math.log(max(topk.logprobs.shape[-1], 1)))


def masses(topk: TopK) -> tuple[Tensor, float]:
    """Return the mass of each row's entries (...), float64, and the rounding of its sum."""
    dtype = arithmetic_dtype(topk.logprobs)
    return topk.logprobs.to(dtype).exp().sum(-1, dtype=torch.float64), mass_slack(topk)


def _refuse_logprobs(logprobs: Tensor) -> None:
    first = (~(logprobs < math.inf)).nonzero()[0].tolist()
    raise ValueError(
        "teacher.logprobs must be finite, or -inf for an absent entry; got "
        f"{logprobs[tuple(first)].item()} at position {position(first)}"
    )


def _check_range(ids: Tensor, size: int) -> None:
    """Check that ids are in [0, size)."""
    low, high = torch.aminmax(ids)
    if low.item() < 0 or high.item() >= size:
        first = ((ids < 0) | (ids >= size)).nonzero()[0].tolist()
        raise ValueError(
            f"teacher.token_ids must be in [0, V) = [0, {size}); got {ids[tuple(first)].item()} at "
            f"position {position(first)}: an entry that pads a row needs a log-probability of -inf"
        )


def _check_unique(ids: Tensor) -> None:
    """Check that no id >= 0 is listed twice in a row of ids (..., K), all below 2**31."""
    ordered = sorted_rows(ids.to(torch.int32))
    equal = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(equal.any()):
        first = equal.nonzero()[0].tolist()
        raise ValueError(
            "teacher.token_ids must list an entry at most once in a row; got "
            f"{ordered[tuple(first)].item()} twice in row {position(first[:-1] or [0])}: give the "
            "repeated entry a log-probability of -inf, or use tail='sampled' for drawn entries"
        )


def _check_masses(teacher: TopK, ids: Tensor, size: int) -> None:
    """Check the sums of a TopK's probabilities, and its tail."""
    tail_logprob, k = teacher.tail_logprob, teacher.logprobs.shape[-1]
    mass, slack = masses(teacher)
    if tail_logprob is not None and teacher.tail == "bucket":
        if not bool((tail_logprob < math.inf).all()):
            raise ValueError("teacher.tail_logprob must be finite or -inf; got NaN or inf")
        total = mass + tail_logprob.double().exp()
    else:
        total = mass
    if total.numel() == 0:
        return
    over = total.max().item() - 1
    if over > slack:
        first = (total - 1 > slack).nonzero()[0].tolist()
        raise ValueError(
            f"teacher.logprobs{'' if total is mass else ' and teacher.tail_logprob'} must hold "
            f"probabilities whose sum is at most 1 in each row, to {slack:.1e}; got 1 + {over:.3g} "
            f"(first in row {position(first or [0])}): logits need log_softmax over the whole "
            "vocabulary first, padding needs -inf (verl pads with 0.0), and a server that applies "
            "a temperature or top-p renormalises (tail='renormalize' takes any offset)"
        )
    if teacher.tail == "sampled":
        has_entries = (ids >= 0).any(-1)
        under = torch.where(has_entries, 1 - mass, 0.0).max().item()
        if under > slack:
            raise ValueError(
                "exp(teacher.logprobs) must be counts over the number of draws, with a sum of 1 in "
                f"each row with entries, for tail='sampled'; got a sum of 1 - {under:.3g}"
            )
    elif tail_logprob is None and k > 0:
        known = (ids >= 0).sum(-1) == size  # all of V: there is no tail
        rest = torch.where(known, 1.0, 1 - mass).min().item()
        if rest < SMALLEST_TAIL:
            raise ValueError(
                "teacher.tail_logprob must be given if the mass outside the support is below "
                f"{SMALLEST_TAIL}, since 1 - sum is then mostly rounding; got a row with {rest:.3g}"
                ": measure the tail in float32 (TopK.from_logits does), or use tail='renormalize'"
            )
