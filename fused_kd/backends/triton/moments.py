"""The kernels of `measure` and `measure_support`, for rows whose statistics a forward has stored.

:mod:`fused_kd.measures` defines what they measure. One program reads one row, once. Exponents are
relative to the forward's references. :mod:`.rules` explains the symbols; besides, e = P^T and, of
the teacher, f = Q^T are the exponentials at temperature 1.

The label is left out of the sums over a row, and added afterwards to those that contain it: nothing
is subtracted, so the other probabilities of a confident row keep their accuracy.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd import ops
from fused_kd.divergences import CODES
from fused_kd.measures import Support

from .classes import load_solution
from .elements import entries_of, largest, widened
from .formulas import INF, unusable
from .kernels import STATS, load_sums, load_tile, row_offset, whole_tiles
from .parameters import Layout, Part, Terms
from .rules import BIG, LN2, NONE, References, rule_of

#: The codes of rules whose passes read both sides, and the student alone.
BOTH, STUDENT = tl.constexpr(CODES["forward_kl"]), tl.constexpr(NONE)
MEASURES = tl.constexpr(ops.MEASURES)
SUPPORT = tl.constexpr(len(Support._fields))


class Moments(NamedTuple):
    """Sums over entries: of every lane, or of a row."""

    d_1: tl.tensor  # Σ e
    f_1: tl.tensor  # Σ f
    squares: tl.tensor  # Σ e²
    differences: tl.tensor  # Σ D², with D = (p - q)·d_s
    products: tl.tensor  # Σ e·D
    s: tl.tensor  # Σ P·a
    t: tl.tensor  # Σ Q·b
    s_1: tl.tensor  # Σ e·a
    t_1: tl.tensor  # Σ f·b


class Largest(NamedTuple):
    """The largest logit of every lane, and the beginning of the first tile that contains it."""

    logit: tl.tensor
    tile: tl.tensor


class Point(NamedTuple):
    """What the exponents of a row are computed with."""

    refs: References
    k: tl.tensor
    power: tl.tensor


# ----------------------------------------------------------------------------------------- entries


@triton.jit
def _at_1(P, a, power):
    """Return the exponential at temperature 1 of the entry whose exponential at T is P = 2^a."""
    e = P
    if power == 2.0:
        e = P * P
    elif power != 1.0:
        e = tl.exp2(a * power)
    return e


@triton.jit
def _difference(P, Q, refs):
    """Return (p - q)·d_s; exactly 0 for equal rows, whose ratio is 1."""
    return tl.fma(-refs.ratio, Q, P)


@triton.jit
def _add(moments, s, t, at):
    """Return the moments with entries s, t added; an entry of -inf adds 0 to its side's sums."""
    d_1, f_1, squares, differences, products, own, other, own_1, other_1 = moments
    a, b = tl.fma(s, at.k, -at.refs.M_s), tl.fma(t, at.k, -at.refs.M_t)
    P, Q = tl.exp2(a), tl.exp2(b)
    e, f = _at_1(P, a, at.power), _at_1(Q, b, at.power)
    D = _difference(P, Q, at.refs)
    # finite, so that a product with 0 is 0; a NaN shows in the forward's sums instead
    a, b = tl.maximum(a, -BIG), tl.maximum(b, -BIG)
    return Moments(
        d_1 + e, f_1 + f,
        tl.fma(e, e, squares), tl.fma(D, D, differences), tl.fma(e, D, products),
        tl.fma(P, a, own), tl.fma(Q, b, other), tl.fma(e, a, own_1), tl.fma(f, b, other_1),
    )  # fmt: skip


@triton.jit
def _larger(best, tile, entries, o, UNROLL: tl.constexpr, layout):
    """Return the lanes' largest logits with a tile from entry o on, as loaded and widened."""
    top = largest(tile, entries, UNROLL, layout)
    return Largest(tl.maximum(best.logit, top), tl.where(top > best.logit, o, best.tile))


@triton.jit
def _add_tile(found, tile, o, part, y, at, terms, layout, UNROLL: tl.constexpr):
    """Return what was found with a tile from entry o on; its moments are those without label y."""
    moments, best_s, best_t = found
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    s, t = (), ()
    for u in tl.static_range(UNROLL):
        s = s + entries_of(widened(tile.s[u], layout), layout)
        t = t + entries_of(widened(tile.t[u], layout), layout)
    best_s = _larger(best_s, tile.s, s, o, UNROLL, layout)
    if terms.rule.teacher:
        best_t = _larger(best_t, tile.t, t, o, UNROLL, layout)
        for u in tl.static_range(UNROLL):
            places = entries_of(part.entries, layout)
            for i in tl.static_range(layout.VECTOR):
                x, z = s[u * layout.VECTOR + i], t[u * layout.VECTOR + i]
                is_label = places[i] == y - (o + u * BLOCK)
                x, z = tl.where(is_label, -INF, x), tl.where(is_label, -INF, z)
                moments = _add(moments, x, z, at)
    return moments, best_s, best_t


# -------------------------------------------------------------------------------------------- rows


@triton.jit
def _read(s, t, part, y, at, terms, layout):
    """Return the moments of a row without label y, and the largest logits of both sides, of lanes.

    s, t: pointers to the row. Without a teacher in `terms` there are only the student's largest.
    """
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    TILE: tl.constexpr = layout.UNROLL * BLOCK
    zero = tl.full((layout.LANES,), 0.0, tl.float32)
    moments = Moments(zero, zero, zero, zero, zero, zero, zero, zero, zero)
    best_s = Largest(zero - INF, tl.full((layout.LANES,), 0, tl.int32))
    best_t = Largest(zero - INF, tl.full((layout.LANES,), 0, tl.int32))
    s_at, t_at = s + part.entries, t + part.entries
    whole = whole_tiles(part.end, TILE)
    for o in range(0, whole, TILE):
        tile = load_tile(s_at, t_at, o, part, terms, layout, True, "evict_first")
        found = moments, best_s, best_t
        moments, best_s, best_t = _add_tile(
            found, tile, o, part, y, at, terms, layout, layout.UNROLL
        )
    for o in range(whole, part.end, BLOCK):
        tile = load_tile(s_at, t_at, o, part, terms, layout, False, "evict_first")
        found = moments, best_s, best_t
        moments, best_s, best_t = _add_tile(found, tile, o, part, y, at, terms, layout, 1)
    return moments, best_s, best_t


@triton.jit
def _folded(moments):
    """Return the moments of a row from those of its lanes."""
    x = ()
    for i in tl.static_range(9):
        x = x + (tl.sum(moments[i], 0),)
    d_1, f_1, squares, differences, products, s, t, s_1, t_1 = x
    return Moments(d_1, f_1, squares, differences, products, s, t, s_1, t_1)


@triton.jit
def _first_largest(row, best, part, layout):
    """Return the largest logit of a row, and its first index; some index for a row of NaNs."""
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    top = tl.max(best.logit, 0)
    # all lanes read the first tile with it again
    begin = tl.min(tl.where(best.logit == top, best.tile, part.end), 0)
    index = part.end
    for o in range(begin, tl.minimum(begin + layout.UNROLL * BLOCK, part.end), BLOCK):
        place = o + part.entries
        x = tl.load(row + place, place < part.end, 0.0).to(tl.float32)
        place = tl.where((x == top) & (place < part.end), place, part.end)
        index = tl.minimum(index, tl.min(tl.min(place, 1), 0))
    return top, tl.where(index < part.end, index, 0).to(tl.int64)


@triton.jit
def _entropy(d, sum_of_exponents, power, is_nan):
    """Return the entropy, from d = Σ P and Σ P·a; with `power` from the sums of e and e·a."""
    # both terms are at least 0, but for the rounding of the reference
    value = LN2 * (tl.log2(d) - power * tl.div_rn(sum_of_exponents, d))
    return tl.where(is_nan, float("nan"), tl.where(value < 0.0, 0.0, value))


@triton.jit
def _store(ptr, columns):
    for i in tl.static_range(len(columns)):
        tl.store(ptr + i, columns[i])


@triton.jit
def _whole_row(V, layout):
    """Return the slice of a row that is the row."""
    entries = tl.arange(0, layout.LANES)[:, None] * layout.VECTOR
    return Part(0, 0, V, entries + tl.arange(0, layout.VECTOR)[None, :], 0, 0)


@triton.jit
def _measure_row(s, t, y, losses, sums, columns, largest_at, V, k, power, terms, layout):
    """Store the columns of a row, and the first largest entries.

    s, t, columns, largest_at: pointers to the row's data; y: the label, -1 without one in [0, V);
    losses: hard and soft; sums: of the forward.
    """
    at = Point(References(sums.M_s, sums.M_t, tl.div_rn(sums.d_s, sums.d_t), 0.0), k, power)
    part = _whole_row(V, layout)
    lanes, best_s, best_t = _read(s, t, part, y, at, terms, layout)
    _, first = _first_largest(s, best_s, part, layout)
    tl.store(largest_at, first)
    _, first = _first_largest(t, best_t, part, layout)
    tl.store(largest_at + 1, first)
    others = _folded(lanes)
    s_y = tl.load(s + y, y >= 0, -INF).to(tl.float32)
    t_y = tl.load(t + y, y >= 0, -INF).to(tl.float32)
    whole = _add(others, s_y, t_y, at)
    P, Q = tl.exp2(tl.fma(s_y, k, -sums.M_s)), tl.exp2(tl.fma(t_y, k, -sums.M_t))
    at_label = tl.where(y >= 0, tl.div_rn(_difference(P, Q, at.refs), sums.d_s), 0.0)
    no_s = unusable(sums.M_s) | (sums.d_s != sums.d_s)
    no_t = unusable(sums.M_t) | (sums.d_t != sums.d_t)
    _store(
        columns,
        (
            losses[0],
            losses[1],
            tl.div_rn(others.d_1, whole.d_1),
            tl.div_rn(others.squares, whole.d_1 * whole.d_1),
            tl.div_rn(others.differences, sums.d_s * sums.d_s),
            tl.div_rn(others.products, whole.d_1 * sums.d_s),
            at_label,
            _entropy(whole.d_1, whole.s_1, power, no_s),
            _entropy(whole.f_1, whole.t_1, power, no_t),
            _entropy(sums.d_s, whole.s, 1.0, no_s),
            _entropy(sums.d_t, whole.t, 1.0, no_t),
        ),
    )


@triton.jit
def _tail(solution, top, k):
    """Return the logit of all entries outside the support minus `top`, the row's largest."""
    # no logit of the tail is formed: its reference may be large
    value = tl.div_rn(tl.log2(solution.tail_d) - tl.fma(top, k, -solution.tail_M), k)
    value = tl.where(solution.tail_d == 0.0, -INF, value)
    # the tail is a class here, so a NaN anywhere is in the sum of the classes
    is_nan = unusable(solution.M_s) | (solution.d_s != solution.d_s)
    return tl.where(is_nan, float("nan"), value)


@triton.jit
def _measure_support_row(s, hard, stats, stats_1, columns, largest_at, V, k, k_1, terms, layout):
    """Store the columns of a row, and the first largest entry.

    s, stats, stats_1, columns, largest_at: pointers to the row's data.
    """
    part = _whole_row(V, layout)
    at = Point(References(0.0, 0.0, 1.0, 0.0), k, 1.0)  # without a teacher it is not used
    _, best, _ = _read(s, s, part, -1, at, terms, layout)
    top, first = _first_largest(s, best, part, layout)
    tl.store(largest_at, first)
    tail, tail_1 = _tail(load_solution(stats), top, k), _tail(load_solution(stats_1), top, k_1)
    _store(columns, (hard, tail, tail_1))


# ------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["S"])
def _kd_measure_kernel(
    s_ptr, t_ptr,  # logits
    labels_ptr, weight_ptr,  # (N,)
    hard_ptr, soft_ptr, stats_ptr,  # (N,), (N,), (N, STATS), of a forward with forward_kl
    columns_ptr, largest_ptr,  # (N, MEASURES), (N, 2); written, zeros for a row of weight 0
    S, V, s_stride_b, s_stride_s, t_stride_b, t_stride_s, k, power,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Measure N rows of both sides, with N programs."""
    n = tl.program_id(0)
    columns, largest_at = columns_ptr + n.to(tl.int64) * MEASURES, largest_ptr + n.to(tl.int64) * 2
    if tl.load(weight_ptr + n) != 0.0:
        label = tl.load(labels_ptr + n)
        y = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        _measure_row(
            s_ptr + row_offset(n, S, s_stride_b, s_stride_s),
            t_ptr + row_offset(n, S, t_stride_b, t_stride_s),
            y, (tl.load(hard_ptr + n), tl.load(soft_ptr + n)),
            load_sums(stats_ptr + n.to(tl.int64) * STATS), columns, largest_at, V,
            tl.cast(k, tl.float32), tl.cast(power, tl.float32),  # float64 of a compiled caller
            Terms(rule_of(BOTH), True, False, False, None),
            Layout(LANES, VECTOR, UNROLL, CUDA),
        )  # fmt: skip
    else:
        for i in tl.static_range(MEASURES):
            tl.store(columns + i, 0.0)
        for i in tl.static_range(2):
            tl.store(largest_at + i, 0)


@triton.jit(do_not_specialize=["S"])
def _kd_measure_support_kernel(
    s_ptr, weight_ptr,  # logits, (N,)
    hard_ptr, stats_ptr, stats_1_ptr,  # (N,), (N, STATS), the same at temperature 1; of forwards
    columns_ptr, largest_ptr,  # (N, SUPPORT), (N,); written, zeros for a row of weight 0
    S, V, s_stride_b, s_stride_s, k, k_1,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Measure N rows of the student for a top-k teacher, with N programs."""
    n = tl.program_id(0)
    columns, largest_at = columns_ptr + n.to(tl.int64) * SUPPORT, largest_ptr + n
    if tl.load(weight_ptr + n) != 0.0:
        _measure_support_row(
            s_ptr + row_offset(n, S, s_stride_b, s_stride_s), tl.load(hard_ptr + n),
            stats_ptr + n.to(tl.int64) * STATS, stats_1_ptr + n.to(tl.int64) * STATS,
            columns, largest_at, V, tl.cast(k, tl.float32), tl.cast(k_1, tl.float32),
            Terms(rule_of(STUDENT), False, False, False, None),
            Layout(LANES, VECTOR, UNROLL, CUDA),
        )  # fmt: skip
    else:
        for i in tl.static_range(SUPPORT):
            tl.store(columns + i, 0.0)
        tl.store(largest_at, 0)
