"""The classes of a top-k teacher: the form in which engines and backends take a TopK.

The divergence of :class:`fused_kd.TopK` is that of a dense teacher over K+1 entries. Class b < K is
token b of the support, with the student's logit s_b. Class K is the tail, all other tokens, with
the student's logit T·log Σ exp(s_v/T) over them. So a backend computes the tail's sum, then the
divergence of K+1 logits by the rules for dense rows; the gradient of the tail's logit times
exp(s_v/T)/Σ is that of a token outside the support. Log-probabilities measured at a temperature T'
are the teacher's logits over T'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension
from .checks import (
    SMALLEST_TAIL,
    check_topk_values,
    mass_slack,
    masses,
    reads_values,
    sorted_rows,
)
from .sides import TopK, row_count

#: The teacher's tail logit if the tokens outside the support are no class.
NO_CLASS = math.inf


class Classes(NamedTuple):
    """The teacher's logits of the K+1 classes of each row, and the tokens of the first K.

    They are relative to the row's largest one. The tail's logit is NO_CLASS if the tokens outside
    the support are no class, -inf for a mass of 0. A row without entries has the tail as its only
    class, so that its divergence is 0.
    """

    logits: Tensor  # (N, K+1), or (B, S, K+1); -inf: absent
    token_ids: Tensor  # (N, K), int32; -1 for an absent entry

    def at(self, rows: slice | Tensor) -> Classes:
        """Return these rows of N, contiguous."""
        return Classes(self.logits[rows].contiguous(), self.token_ids[rows].contiguous())


def classes_of(topk: TopK, vocabulary: int, dtype: torch.dtype) -> tuple[Classes, Tensor | None]:
    """Check the values of a teacher; return its classes, and for "sampled" its entropy.

    If the values cannot be read, on a GPU or in a trace, a row that the checks would refuse is NaN.
    Of a row without entries the tail is not read.

    Args:
        topk: N rows, in any leading shape, after :func:`fused_kd.checks.check_topk`.
        vocabulary: V.
        dtype: of the logits: float32 or float64.

    Returns:
        The classes, and -Σ q̂·log q̂ (N,), or None.

    Raises:
        ValueError: A value does not fit.
    """
    may_read = reads_values(topk)
    if may_read and dtype == torch.float32 and topk.logprobs.is_cpu:
        classes = _in_one_pass(topk, vocabulary)
        if classes is not None:
            return classes, None
    if may_read:
        check_topk_values(topk, vocabulary)
    return _step_by_step(topk, vocabulary, dtype, may_read)


def _in_one_pass(topk: TopK, vocabulary: int) -> Classes | None:
    """Return the classes by a kernel on the CPU, which takes less time than one of torch's calls.

    None: it does not take this form of a teacher, is not built, or a value must be refused.
    """
    ids, logprobs, tail_logprob, tail, temperature = topk
    is_derived = tail == "bucket" and tail_logprob is None
    if tail == "sampled" or is_derived or logprobs.dtype == torch.float64:
        return None
    if extension.cpu.load() is None:
        return None
    rows, k = row_count(logprobs.shape[:-1]), logprobs.shape[-1]
    tails = tail_logprob if tail == "bucket" else None
    out = Classes(torch.empty(rows, k + 1), torch.empty(rows, k, dtype=torch.int32))
    is_ordinary = torch.ops.fused_kd.classes_(
        *out,
        ids.reshape(rows, k).contiguous(),
        logprobs.detach().reshape(rows, k).contiguous(),
        None if tails is None else tails.detach().reshape(rows).contiguous(),
        NO_CLASS if tail == "renormalize" else -math.inf,
        vocabulary,
        float(temperature),
        mass_slack(topk) if tail == "bucket" else math.inf,
    )
    return out if is_ordinary else None


def _step_by_step(
    topk: TopK, vocabulary: int, dtype: torch.dtype, may_read: bool
) -> tuple[Classes, Tensor | None]:
    """Return classes and entropy by calls of torch, on any device and in a trace."""
    rows, k = row_count(topk.logprobs.shape[:-1]), topk.logprobs.shape[-1]
    logprobs = topk.logprobs.detach().reshape(rows, k).to(dtype)
    token_ids, entropy, invalid = topk.token_ids.reshape(rows, k), None, None
    if not may_read or k == 0 or bool((logprobs.amin(-1) == -math.inf).any()):
        absent = logprobs == -math.inf
        token_ids = torch.where(absent, -1, token_ids)
    if not may_read:
        out_of_range = ~absent & ((token_ids < 0) | (token_ids >= vocabulary))
        token_ids = torch.where(out_of_range, -1, token_ids)
        invalid = (out_of_range | ~(logprobs < math.inf)).any(-1)
        if topk.tail != "sampled":
            invalid = invalid | _has_duplicates(token_ids)
        invalid = invalid | _has_wrong_mass(topk, token_ids)
        # a token that is listed twice would be counted twice in the hard term
        token_ids = torch.where(invalid[:, None], -1, token_ids)
    token_ids = token_ids.to(torch.int32).contiguous()
    if topk.tail == "sampled":
        logprobs = merged(token_ids, logprobs)
        token_ids = torch.where(logprobs == -math.inf, -1, token_ids)
        entropy = -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(-1)
    tail = _tail(topk, logprobs, token_ids, vocabulary)
    tail = torch.where((token_ids >= 0).any(-1), tail, 0.0)
    logits = torch.cat([logprobs, tail[:, None]], -1)
    largest = logits.masked_fill(logits == NO_CLASS, -math.inf).amax(-1, keepdim=True)
    # a product with the temperature is rounded relative to its size, which is 0 for the largest
    logits = (logits - largest) * topk.temperature
    if invalid is not None:
        logits = logits.masked_fill(invalid[:, None], math.nan)
    return Classes(logits, token_ids), entropy


def _tail(topk: TopK, logprobs: Tensor, token_ids: Tensor, vocabulary: int) -> Tensor:
    """Return the tail's log-probability of every row (N,), NO_CLASS if it is no class."""
    if topk.tail == "renormalize":
        return logprobs.new_full(logprobs.shape[:1], NO_CLASS)
    if topk.tail != "bucket":
        return logprobs.new_full(logprobs.shape[:1], -math.inf)
    if topk.tail_logprob is None:
        rest = 1.0 - logprobs.double().exp().sum(-1)
        tail = torch.where(rest >= SMALLEST_TAIL, rest, math.nan).log().to(logprobs.dtype)
    else:
        tail = topk.tail_logprob.detach().reshape(-1).to(logprobs.dtype)
    tail = torch.where(tail < math.inf, tail, math.nan)
    if logprobs.shape[-1] < vocabulary:
        return tail
    return torch.where((token_ids >= 0).sum(-1) == vocabulary, NO_CLASS, tail)


def _has_duplicates(token_ids: Tensor) -> Tensor:
    """Return True for rows (N,) of ids (N, K) with an id >= 0 that is listed twice."""
    ordered = sorted_rows(token_ids)
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)


def _has_wrong_mass(topk: TopK, token_ids: Tensor) -> Tensor:
    """Return True for rows (N,) whose probabilities have a sum that the checks refuse."""
    mass, slack = masses(topk)
    mass = mass.reshape(-1)
    if topk.tail == "sampled":
        return ((mass - 1).abs() > slack) & (token_ids >= 0).any(-1)
    if topk.tail != "bucket":
        return torch.zeros_like(mass, dtype=torch.bool)
    if topk.tail_logprob is not None:
        mass = mass + topk.tail_logprob.reshape(-1).double().exp()
    return mass - 1 > slack


def merged(token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """Return log-probabilities (..., K) with the masses of equal ids in a row added.

    The first entry of an id gets the sum, the others become absent. An entry whose id is listed
    once keeps its value exactly.
    """
    ids, order = torch.where(logprobs == -math.inf, -1, token_ids).sort(stable=True, dim=-1)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = is_first.cumsum(-1) - 1  # of the entry's id among the different ones
    values = logprobs.gather(-1, order)
    absent = torch.full_like(logprobs, -math.inf)
    largest = absent.scatter_reduce(-1, place, values, "amax").gather(-1, place)
    # relative to the largest of the same id, so that the sum is at least 1, and exactly 1 for one
    share = torch.where(values == largest, 0.0, values - largest).exp()
    total = torch.zeros_like(share).scatter_add(-1, place, share).gather(-1, place)
    return absent.scatter(-1, order, torch.where(is_first, largest + total.log(), -math.inf))
