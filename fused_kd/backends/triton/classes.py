"""A top-k teacher: the tokens of its support, and the divergence of the K+1 classes.

:mod:`fused_kd.classes` defines the classes. The passes over a row leave out the support; their rule
is Tail, and their sums are those of the tail. They find the support by marks: a byte for each
vector of the slice, a bit for each entry. The classes are then a short row, which is processed by
the formulas of any row. The tail is an entry of it that no logit represents: relative to its own
reference M its P is the sum d, so that large logits cost no accuracy. No sum is a difference.

The hard term's sums go on from those of the tail. Its reference is the largest logit of all; that
of the classes is the largest of the classes, among which the tail may not be.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .elements import rounded, widened
from .formulas import (
    INF,
    LOWEST,
    add_tile,
    add_tile_again,
    fold,
    gradient,
    hard_sum,
    hard_value,
    references,
    soft_constants,
    soft_value,
    unusable,
)
from .parameters import Tile
from .rules import Again, Constants, Entry, References, Sums


class Solution(NamedTuple):
    """What the gradient of a row depends on: its statistics, in the order of `stats`."""

    M_s: tl.tensor  # sums of the classes
    M_t: tl.tensor
    d_s: tl.tensor
    d_t: tl.tensor
    w: tl.tensor
    x: tl.tensor  # sums of their second pass
    y: tl.tensor
    tail_M: tl.tensor  # sums of the tail
    tail_d: tl.tensor
    d_1: tl.tensor  # sums of all entries; the reference is the larger of M_s and tail_M
    count: tl.tensor


FLOATS = tl.constexpr(len(Solution._fields))


# ------------------------------------------------------------------------------------- the support


@triton.jit
def gather_support(row, part, MARK: tl.constexpr, layout):
    """Copy the logits of the support in this slice to `inside`; if MARK, mark their entries."""
    lanes, marks = tl.arange(0, layout.LANES), row.classes.marks
    if MARK:
        words = tl.cdiv(part.end - part.begin, 4 * layout.VECTOR)
        for i in range(0, words, layout.LANES):
            tl.store(marks + i + lanes, 0, i + lanes < words)
        tl.debug_barrier()
    for i in range(0, row.classes.K, layout.LANES):
        token = tl.load(row.classes.token_ids + i + lanes, i + lanes < row.classes.K, -1)
        here = (token >= part.begin) & (token < part.end)
        s = tl.load(row.s + token, here, 0.0).to(tl.float32)
        tl.store(row.classes.inside + i + lanes, s, here)
        if MARK:
            place = tl.where(here, token, part.begin) - part.begin
            vector, entry = place // layout.VECTOR, place % layout.VECTOR
            bit = tl.full((layout.LANES,), 1, tl.int32) << (vector % 4 * 8 + entry)
            tl.atomic_or(marks + vector // 4, bit, here, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def outside_support(tile, o, row, part, WHOLE: tl.constexpr, layout):
    """Return a tile from entry o on, widened, with -inf in the place of the support's logits."""
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    lanes, entry = tl.arange(0, layout.LANES)[:, None], tl.arange(0, layout.VECTOR)[None, :]
    marks = row.classes.marks.to(tl.pointer_type(tl.uint8), bitcast=True)
    marks += (o - part.begin) // layout.VECTOR + lanes
    s = ()
    for u in tl.static_range(layout.UNROLL if WHOLE else 1):
        inside = None if WHOLE else o + u * BLOCK + lanes * layout.VECTOR < part.end
        # from L2, where the atomic operations were performed
        byte = tl.load(marks + u * layout.LANES, inside, cache_modifier=".cg").to(tl.int32)
        s = s + (tl.where(((byte >> entry) & 1) != 0, -INF, widened(tile.s[u], layout)),)
    return Tile(s, s)


@triton.jit
def _support(row, i, layout):
    """Return LANES entries of the support from i on: their tokens, and the logits of both sides.

    Logits are -inf on both sides for a token that is not in [0, V).
    """
    at = i + tl.arange(0, layout.LANES)
    token = tl.load(row.classes.token_ids + at, at < row.classes.K, -1)
    present = (token >= 0) & (token < row.classes.V)
    # from L2: another program may have stored it
    s = tl.load(row.classes.inside + at, present, -INF, cache_modifier=".cg")
    t = tl.load(row.classes.logits + at, present, -INF)
    return token, s, t


# ------------------------------------------------------------------------------------- the classes


@triton.jit
def _tail(M, d, row):
    """Return M and d of the tail, and its teacher's logit; those of no entry if it is no class."""
    t = tl.load(row.classes.logits + row.classes.K)
    # a NaN or +inf outside the support spoils the row even then
    is_class = (t != INF) | (d != d) | (M >= -LOWEST)
    return tl.where(is_class, M, LOWEST), tl.where(is_class, d, 0.0), tl.where(t == INF, -INF, t)


@triton.jit
def _tail_entry(tail, refs, numbers):
    """Return the tail, of :func:`_tail`, as an entry of the row of classes."""
    M, d, t = tail
    a, b = (M - refs.M_s) + tl.log2(d), tl.fma(t, numbers.k, -refs.M_t)
    return Entry(a, b, tl.exp2(a), tl.exp2(b), a)


@triton.jit
def _in_first_lane(sums, layout):
    """Return the sums of lanes of which the first has `sums`, and the others have no entry."""
    first = tl.arange(0, layout.LANES) == 0
    M_s, M_t, d_s, d_t, d_1, w, differences, count = sums
    M_s, M_t = tl.where(first, M_s, LOWEST), tl.where(first, M_t, LOWEST)
    d_s, d_t, d_1 = tl.where(first, d_s, 0.0), tl.where(first, d_t, 0.0), tl.where(first, d_1, 0.0)
    w, differences = tl.where(first, w, 0.0), tl.where(first, differences, 0.0)
    return Sums(M_s, M_t, d_s, d_t, d_1, w, differences, tl.where(first, count, 0.0))


@triton.jit
def solve(tail_sums, row, on_soft, numbers, terms, layout):
    """Return the Solution of a row from the sums of its tail, and the sums that its losses need.

    These are the sums of the classes, and of all entries for the hard term, if there is one.
    """
    rule: tl.constexpr = terms.classes.rule
    zero, one = tl.full((), 0.0, tl.float32), tl.full((), 1.0, tl.float32)
    tail = _tail(tail_sums.M_s, tail_sums.d_s, row)
    # the teacher's reference is such that b = a exactly if the tail is the only class, with t = 0
    M_t = tail[2] * numbers.k - tl.where(tail[1] > 0.0, tl.log2(tail[1]), 0.0)
    refs = References(tail[0], tl.maximum(M_t, LOWEST), one, zero)
    e, w = _tail_entry(tail, refs, numbers), zero
    if rule.own_sum:
        w = rule.add(w, e)
    classes = Sums(refs.M_s, refs.M_t, e.P, e.Q, zero, w, zero, zero)
    classes, entries = _in_first_lane(classes, layout), tail_sums
    if terms.HAS_HARD:
        entries = _in_first_lane(entries, layout)
    for i in range(0, row.classes.K, layout.LANES):
        _, s, t = _support(row, i, layout)
        classes = add_tile(classes, (s,), (t,), (s, t), numbers, terms.classes, 1, 1)
        if terms.HAS_HARD:
            entries = add_tile(entries, (s,), (t,), (s, s), numbers, terms, 1, 1)
    classes = fold(classes, numbers.power, terms.classes)
    if terms.HAS_HARD:
        entries = fold(entries, numbers.power, terms)
    again = Again(zero, zero)
    if rule.two_passes:
        refs = references(classes, on_soft, terms.classes)
        x, y = rule.add_again(zero, zero, _tail_entry(tail, refs, numbers), refs, numbers.beta)
        first = tl.arange(0, layout.LANES) == 0
        again = Again(tl.where(first, x, 0.0), tl.where(first, y, 0.0))
        for i in range(0, row.classes.K, layout.LANES):
            _, s, t = _support(row, i, layout)
            again = add_tile_again(again, (s,), (t,), refs, numbers, terms.classes, 1)
        again = Again(tl.sum(again.x, 0), tl.sum(again.y, 0))
    solution = Solution(
        classes.M_s, classes.M_t, classes.d_s, classes.d_t, classes.w, again.x, again.y,
        tail_sums.M_s, tail_sums.d_s, hard_sum(entries, numbers.power, terms), entries.count,
    )  # fmt: skip
    return solution, classes, entries


@triton.jit
def report(solved, row, in_row, y, weights, numbers, terms):
    """Store the losses and statistics of a row; a term that is off, or has weight 0, is 0.

    solved: of :func:`solve`; in_row: the label y is in [0, V).
    """
    solution, classes, entries = solved
    soft = soft_value(classes, Again(solution.x, solution.y), numbers, terms.classes.rule)
    tl.store(row.soft + row.n, tl.where(weights.soft != 0.0, soft, 0.0))
    hard = 0.0
    if terms.HAS_HARD:
        s_y = tl.load(row.s + y, in_row, 0.0).to(tl.float32)
        hard = hard_value(entries, s_y, numbers, terms)
        hard = tl.where(in_row & ~hard_is_nan(solution), hard, float("nan"))
        hard = tl.where(weights.hard != 0.0, hard, 0.0)
    tl.store(row.hard + row.n, hard)
    for i in tl.static_range(FLOATS):
        tl.store(row.stats + i, solution[i])


@triton.jit
def load_solution(ptr):
    """Return the Solution that :func:`report` has stored."""
    x = ()
    for i in tl.static_range(FLOATS):
        x = x + (tl.load(ptr + i),)
    M_s, M_t, d_s, d_t, w, x, y, tail_M, tail_d, d_1, count = x
    return Solution(M_s, M_t, d_s, d_t, w, x, y, tail_M, tail_d, d_1, count)


# ------------------------------------------------------------------------------------ the gradient


@triton.jit
def hard_reference(solution):
    """Return the reference of d_1."""
    return tl.maximum(solution.M_s, solution.tail_M)


@triton.jit
def hard_is_nan(solution):
    """Return True if the hard term is NaN for any label."""
    return unusable(hard_reference(solution)) | (solution.d_1 != solution.d_1)


@triton.jit
def hard_constants(solution, M, is_nan, weights, numbers):
    """Return the constants of the hard term for entries whose P is relative to M."""
    by = (hard_reference(solution) - M) * numbers.power
    scale = tl.div_rn(weights.hard, solution.d_1 * tl.exp2(by))
    scale = tl.where(is_nan & (weights.hard != 0.0), float("nan"), scale)
    return Constants(scale, -weights.hard * tl.div_rn(numbers.smoothing, solution.count))


@triton.jit
def soft_constants_of_classes(solution, row, weights, numbers, terms):
    """Return references and constants of the classes, then the constants of Tail."""
    rule: tl.constexpr = terms.classes.rule
    zero, on_soft = tl.full((), 0.0, tl.float32), weights.soft != 0.0
    M_s, M_t, d_s, d_t, w, x, y, tail_M, tail_d, _, _ = solution
    sums, again = Sums(M_s, M_t, d_s, d_t, zero, w, zero, zero), Again(x, y)
    refs = references(sums, on_soft, terms.classes)
    weight = weights.soft * numbers.soft_slope
    soft = soft_constants(sums, again, on_soft, weight, numbers, rule)
    tail = _tail(tail_M, tail_d, row)
    e = _tail_entry(tail, refs, numbers)
    x, y = rule.gradient(e, refs, soft, numbers.beta)
    g = rule.gradient_alone(e, refs, soft, x, y)  # by the logit of the tail
    scale = tl.where(tail[1] == 0.0, 0.0, tl.div_rn(g, tail[1]))
    scale = tl.where(soft.scale == soft.scale, scale, float("nan"))  # if the row is NaN
    return refs, soft, Constants(tl.where(on_soft, scale, 0.0), zero)


@triton.jit
def store_support_gradient(row, part, y, constants, weights, numbers, terms, layout):
    """Store the gradient of the support's entries in this slice, each from its own logit.

    constants: references and constants of the classes, then those of the hard term. y: the label.
    """
    refs, soft, hard_refs, hard = constants
    none, on_soft = Constants(0.0, 0.0), weights.soft != 0.0
    for i in range(0, row.classes.K, layout.LANES):
        token, s, t = _support(row, i, layout)
        g = gradient(s, t, refs, soft, none, on_soft, numbers, terms.classes)
        g = tl.where(on_soft, g, 0.0)
        if terms.HAS_HARD:
            g += gradient(s, t, hard_refs, none, hard, on_soft, numbers, terms)
            g -= tl.where(token == y, weights.hard * (1.0 - numbers.smoothing), 0.0)
        here = (token >= part.begin) & (token < part.end)
        tl.store(row.g + token, rounded(g, row.g), here)
