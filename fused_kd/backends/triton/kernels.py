"""The Triton kernels, launched by :mod:`.launch`; the formulas are in :mod:`.formulas`.

:mod:`.parameters` defines row, part, weights, tile, numbers, terms, launch and layout;
:mod:`.rules` the symbols, sums, again, refs and constants.

Traffic: the first pass reads a pair of rows from global memory. The second statistics pass (of
divergences with two) and the gradient pass, which goes backwards, read it from L2. The gradient is
written once. Everything is float32 from the load to the one rounding at the store.

A row is cut into slices, one for each of PARTS programs. A slice is read in tiles of UNROLL x LANES
x VECTOR entries. Every lane (a thread of the GPU) has its own references and sums, so a tile costs
no barrier and no shuffle. Lanes, then parts, are merged once, both by `fold`. Entries beyond the
end of a row are loaded as -inf on both sides, that is as absent entries.

The passes leave out the support of a top-k teacher, which :mod:`.classes` adds. There is one pass
over the row before the gradient, for any divergence; the second one is over the classes.

With WAIT the programs of a row wait for each other. Row and part then come from a ticket that a
program takes when it starts, so programs start in the order of the rows. Only programs of the row
that started last can be waiting for one that has not started; all others run to their end and free
their resources. So PARTS programs must fit on the GPU at once, not the whole grid. The sums of the
parts are stored in a ring of rows: a row reuses the place of the row RING before it, after all
programs of that row have read it. Without WAIT the same code runs as one launch per STEP, and the
ring holds all rows.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102
from __future__ import annotations

import triton
import triton.language as tl

from fused_kd import ops

from .classes import (
    gather_support,
    hard_constants,
    hard_is_nan,
    hard_reference,
    load_solution,
    outside_support,
    report,
    soft_constants_of_classes,
    solve,
    store_support_gradient,
)
from .elements import entries_of, is_power_of_two, largest, rounded, widened
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
from .parameters import (
    Classes,
    Launch,
    Layout,
    Numbers,
    Part,
    Pointers,
    Row,
    Shape,
    Terms,
    Tile,
    Weights,
)
from .rules import (
    NONE,  # noqa: F401  for launches
    TAIL,
    Again,
    Constants,
    References,
    Sums,
    rule_of,
)

# the values of STEP: what a launch computes
ALL = tl.constexpr(0)  # losses, and the gradient if there is a pointer to it
FIRST = tl.constexpr(1)  # the sums of the first pass, of every part
SECOND = tl.constexpr(2)  # the sums of the second statistics pass, of every part
LAST = tl.constexpr(3)  # the results of ALL, from the sums of the parts
BACKWARD = tl.constexpr(4)  # the gradient, from the statistics of an earlier forward

SUMS = tl.constexpr(len(Sums._fields))
STATS = tl.constexpr(ops.STATS)  # floats per row: the sums of both passes, and one unused
PARTIAL = tl.constexpr(16)  # floats per part: the same, padded to 64 bytes


@triton.jit
def _store_sums(ptr, sums):
    for i in tl.static_range(SUMS):
        tl.store(ptr + i, sums[i])


@triton.jit
def load_sums(ptr):
    """Return the sums of a part or a row, or of each of several at a tensor of pointers."""
    sums = ()
    for i in tl.static_range(SUMS):
        sums = sums + (tl.load(ptr + i, cache_modifier=".cg"),)  # from L2: another program wrote it
    M_s, M_t, d_s, d_t, d_1, w, differences, count = sums
    return Sums(M_s, M_t, d_s, d_t, d_1, w, differences, count)


@triton.jit
def _arrive(counter_ptr):
    """Release this program's stores, and signal that its reads are complete, by a counter."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter_ptr, expected):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < expected:
        pass


@triton.jit
def load_tile(s_at, t_at, o, part, terms, layout, WHOLE: tl.constexpr, POLICY: tl.constexpr):
    """Load a tile of both sides from entry o on; the student twice if no term reads the teacher.

    WHOLE: the slice contains the whole tile; else one sub-block is loaded, with -inf beyond the end
    of the slice. s_at, t_at: pointers to the row's entries that `part.entries` lists.
    """
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    s, t = (), ()
    s_from, t_from = s_at + o, t_at + o
    for u in tl.static_range(layout.UNROLL if WHOLE else 1):
        inside, beyond = (None, None) if WHOLE else (o + u * BLOCK + part.entries < part.end, -INF)
        x = tl.load(s_from + u * BLOCK, inside, beyond, eviction_policy=POLICY)
        s = s + (x,)
        if terms.rule.teacher or (terms.SMOOTHING and not terms.rule.soft):
            t = t + (tl.load(t_from + u * BLOCK, inside, beyond, eviction_policy=POLICY),)
        else:
            t = t + (x,)
    return Tile(s, t)


@triton.jit
def _add(sums, tile, refs, numbers, terms, layout, UNROLL: tl.constexpr):
    """Return the lanes' sums with a tile of UNROLL sub-blocks added.

    These are the sums of the first pass if `refs` is None, else those of the second.
    """
    COUNT: tl.constexpr = UNROLL * layout.VECTOR
    s, t = (), ()
    for u in tl.static_range(UNROLL):
        s = s + entries_of(widened(tile.s[u], layout), layout)
        t = t + entries_of(widened(tile.t[u], layout), layout)
    if refs is not None:
        return add_tile_again(sums, s, t, refs, numbers, terms, COUNT)
    else:
        top_s = largest(tile.s, s, UNROLL, layout)
        top_t = largest(tile.t, t, UNROLL, layout) if terms.rule.teacher else top_s
        return add_tile(sums, s, t, (top_s, top_t), numbers, terms, COUNT, layout.VECTOR)


# -------------------------------------------------------------------------- passes over one slice


@triton.jit
def whole_tiles(length, TILE: tl.constexpr):
    """Return `length` rounded down to a multiple of TILE, a power of two; 0 if it is negative."""
    return (tl.maximum(length, 0).to(tl.uint32) // TILE * TILE).to(tl.int32)


@triton.jit
def _statistics_pass(sums, row, part, refs, numbers, terms, layout, POLICY: tl.constexpr):
    """Return the lanes' sums, of the pass that `refs` sets for :func:`_add`, with a slice added."""
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    TILE: tl.constexpr = layout.UNROLL * BLOCK
    s_at, t_at = row.s + part.entries, row.t + part.entries
    whole = part.begin + whole_tiles(part.end - part.begin, TILE)
    for o in range(part.begin, whole, TILE):
        tile = load_tile(s_at, t_at, o, part, terms, layout, True, POLICY)
        if row.classes is not None:
            tile = outside_support(tile, o, row, part, True, layout)
        sums = _add(sums, tile, refs, numbers, terms, layout, layout.UNROLL)
    for o in range(whole, part.end, BLOCK):
        tile = load_tile(s_at, t_at, o, part, terms, layout, False, POLICY)
        if row.classes is not None:
            tile = outside_support(tile, o, row, part, False, layout)
        sums = _add(sums, tile, refs, numbers, terms, layout, 1)
    return sums


@triton.jit
def _gradient_pass(row, part, constants, on_soft, numbers, terms, layout):
    """Store the gradient of a slice, backwards, since L2 holds what the last pass read last."""
    BLOCK: tl.constexpr = layout.LANES * layout.VECTOR
    TILE: tl.constexpr = layout.UNROLL * BLOCK
    s_at, t_at, g_at = row.s + part.entries, row.t + part.entries, row.g + part.entries
    refs, soft, hard = constants
    whole = part.begin + whole_tiles(part.end - part.begin, TILE)
    for o in range(whole, part.end, BLOCK):
        tile = load_tile(s_at, t_at, o, part, terms, layout, False, "evict_first")
        s, t = widened(tile.s[0], layout), widened(tile.t[0], layout)
        g = gradient(s, t, refs, soft, hard, on_soft, numbers, terms)
        inside = o + part.entries < part.end
        tl.store(g_at + o, rounded(g, row.g), inside, eviction_policy="evict_first")
    for forwards in range(part.begin, whole, TILE):
        o = part.begin + whole - TILE - forwards
        tile = load_tile(s_at, t_at, o, part, terms, layout, True, "evict_first")
        for u in tl.static_range(layout.UNROLL):
            s, t = widened(tile.s[u], layout), widened(tile.t[u], layout)
            g = gradient(s, t, refs, soft, hard, on_soft, numbers, terms)
            tl.store(g_at + o + u * BLOCK, rounded(g, row.g), eviction_policy="evict_first")


# -------------------------------------------------------------------------------------- one row


@triton.jit
def _owns(row, part, V, HAS_HARD: tl.constexpr):
    """Return whether this program owns the row, whether the label is in [0, V), and the label.

    The owner stores the losses and the gradient at the label. Its slice contains the label; without
    a label in [0, V) it is part 0. Every call loads the label, to save registers in the passes.
    """
    if HAS_HARD:
        label = tl.load(row.label)
        in_row = (label >= 0) & (label < V)
        y = label.to(tl.int32)
        owns = tl.where(in_row, (y >= part.begin) & (y < part.end), part.index == 0)
        return owns, in_row, y
    else:
        return part.index == 0, True, 0


@triton.jit
def _row_sums(row, part, V, on_soft, numbers, terms, launch, layout):
    """Return the sums of a whole row, and those of its second pass.

    By STEP they are computed, stored for later launches, or loaded from earlier ones. A program
    that stores no result of the row may get those of its part.
    """
    x, y = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if launch.STEP == BACKWARD:
        again = Again(tl.load(row.stats + SUMS), tl.load(row.stats + SUMS + 1))
        return load_sums(row.stats), again
    TWO_PASSES: tl.constexpr = terms.rule.two_passes
    GRADIENT: tl.constexpr = row.g is not None
    # what is read again soon stays in L2 longer than what is read for the last time; a policy for
    # it ("evict_last") would take six instructions a tile
    POLICY: tl.constexpr = "" if GRADIENT or TWO_PASSES else "evict_first"
    mine = part.partials + part.index * PARTIAL
    all_parts = part.partials + tl.arange(0, launch.PARTS) * PARTIAL
    zero = tl.full((layout.LANES,), 0.0, tl.float32)
    sums = Sums(x, x, x, x, x, x, x, x)
    if launch.STEP == ALL or launch.STEP == FIRST:
        nothing = tl.full((layout.LANES,), LOWEST, tl.float32)
        lanes = Sums(nothing, nothing, zero, zero, zero, zero, zero, zero)
        lanes = _statistics_pass(lanes, row, part, None, numbers, terms, layout, POLICY)
        sums = fold(lanes, numbers.power, terms)
        if launch.PARTS > 1:
            _store_sums(mine, sums)
    # without a gradient only the owner goes on, and reads the sums that the others have stored
    goes_on = True
    if not GRADIENT:
        goes_on, _, _ = _owns(row, part, V, terms.HAS_HARD)
    if launch.WAIT:
        _arrive(part.arrived)
    if launch.PARTS > 1 and launch.STEP != FIRST:
        if goes_on | TWO_PASSES:
            if launch.WAIT:
                _wait(part.arrived, launch.PARTS)
            sums = fold(load_sums(all_parts), numbers.power, terms)
    if TWO_PASSES and launch.STEP != FIRST:
        if launch.STEP == ALL or launch.STEP == SECOND:
            refs = references(sums, on_soft, terms)
            lanes = _statistics_pass(
                Again(zero, zero), row, part, refs, numbers, terms, layout, POLICY
            )
            x, y = tl.sum(lanes.x, 0), tl.sum(lanes.y, 0)
            if launch.PARTS > 1:
                tl.store(mine + SUMS, x)
                tl.store(mine + SUMS + 1, y)
        if launch.WAIT:
            _arrive(part.arrived)
        if launch.PARTS > 1 and launch.STEP != SECOND:
            if goes_on:
                if launch.WAIT:
                    _wait(part.arrived, 2 * launch.PARTS)
                x = tl.sum(tl.load(all_parts + SUMS, cache_modifier=".cg"), 0)
                y = tl.sum(tl.load(all_parts + SUMS + 1, cache_modifier=".cg"), 0)
    if launch.WAIT:
        _arrive(part.arrived + 1)
    return sums, Again(x, y)


@triton.jit
def _report(row, sums, again, s_y, hard_nan, weights, numbers, terms):
    """Store the row's losses and statistics; a term that is off, or has weight 0, is 0.

    s_y: the label's logit; hard_nan: the hard term is NaN.
    """
    hard_at, soft_at = row.hard + row.n, row.soft + row.n
    hard, soft = 0.0, 0.0
    if terms.HAS_HARD:
        hard = hard_value(sums, s_y, numbers, terms)
        hard = tl.where(weights.hard != 0.0, tl.where(hard_nan, float("nan"), hard), 0.0)
    if terms.rule.soft:
        soft = soft_value(sums, again, numbers, terms.rule)
        soft = tl.where(weights.soft != 0.0, soft, 0.0)
    tl.store(hard_at, hard)
    tl.store(soft_at, soft)
    _store_sums(row.stats, sums)
    tl.store(row.stats + SUMS, again.x)
    tl.store(row.stats + SUMS + 1, again.y)
    tl.store(row.stats + SUMS + 2, 0.0)


@triton.jit
def _store_at_label(row, y, g, is_here, weights, numbers):
    """Store the label's gradient; g: without -w_hard·(1-ε). Nothing if the hard term is off."""
    g -= weights.hard * (1.0 - numbers.smoothing)
    tl.debug_barrier()
    tl.store(row.g + y, rounded(g, row.g), is_here & (weights.hard != 0.0))


@triton.jit
def _kept_row(row, part, V, weights, numbers, terms, launch, layout):
    """Compute one program's part of a row that has a weight: sums, and by STEP its results."""
    on_soft = weights.soft != 0.0
    sums, again = _row_sums(row, part, V, on_soft, numbers, terms, launch, layout)
    owns, in_row, y = _owns(row, part, V, terms.HAS_HARD)
    hard_nan, s_y, t_y = False, 0.0, 0.0
    if terms.HAS_HARD:
        # masked, so that nothing outside of the row is read
        s_y = tl.load(row.s + y, in_row & owns, 0.0).to(tl.float32)
        if terms.rule.soft or terms.SMOOTHING:
            t_y = tl.load(row.t + y, in_row & owns, 0.0).to(tl.float32)
        d_1 = hard_sum(sums, numbers.power, terms)
        hard_nan = unusable(sums.M_s) | (d_1 != d_1) | ~in_row
        tl.debug_barrier()  # every warp reads it before any warp stores the gradient there
    if launch.STEP == ALL or launch.STEP == LAST:
        if owns:
            _report(row, sums, again, s_y, hard_nan, weights, numbers, terms)
    if row.g is not None and launch.STEP != FIRST and launch.STEP != SECOND:
        refs = references(sums, on_soft, terms)
        soft, hard = Constants(0.0, 0.0), Constants(0.0, 0.0)
        if terms.rule.soft:
            weight = weights.soft * numbers.soft_slope
            soft = soft_constants(sums, again, on_soft, weight, numbers, terms.rule)
        if terms.HAS_HARD:
            nan = hard_nan & (weights.hard != 0.0)
            scale = tl.where(nan, float("nan"), tl.div_rn(weights.hard, d_1))
            hard = Constants(scale, -weights.hard * tl.div_rn(numbers.smoothing, sums.count))
        _gradient_pass(row, part, (refs, soft, hard), on_soft, numbers, terms, layout)
        if terms.HAS_HARD:
            # computed in float32 from the logits: the rounded entry above would lose 1 - π_y
            g = gradient(s_y, t_y, refs, soft, hard, on_soft, numbers, terms)
            _store_at_label(row, y, g, in_row & owns, weights, numbers)


@triton.jit
def _kept_classes(row, part, V, weights, numbers, terms, launch, layout):
    """Compute what :func:`_kept_row` does, for a row with a top-k teacher."""
    if launch.STEP != LAST:
        gather_support(row, part, launch.STEP != BACKWARD, layout)
    if launch.STEP == BACKWARD:
        solution = load_solution(row.stats)
        _gradient_of_classes(row, part, V, solution, weights, numbers, terms, layout)
    else:
        on_soft = weights.soft != 0.0
        sums, _ = _row_sums(row, part, V, on_soft, numbers, terms, launch, layout)
        owns, in_row, y = _owns(row, part, V, terms.HAS_HARD)
        GRADIENT: tl.constexpr = row.g is not None
        if launch.STEP != FIRST:
            if owns | GRADIENT:
                solved = solve(sums, row, on_soft, numbers, terms, layout)
                if owns:
                    report(solved, row, in_row, y, weights, numbers, terms)
                if GRADIENT:
                    _gradient_of_classes(row, part, V, solved[0], weights, numbers, terms, layout)


@triton.jit
def _gradient_of_classes(row, part, V, solution, weights, numbers, terms, layout):
    """Store the gradient of this program's part of a row with a top-k teacher."""
    owns, in_row, y = _owns(row, part, V, terms.HAS_HARD)
    M, on_soft = hard_reference(solution), weights.soft != 0.0
    refs, soft, tail = soft_constants_of_classes(solution, row, weights, numbers, terms)
    tail_refs = References(solution.tail_M, solution.tail_M, 1.0, 0.0)
    hard, tail_hard, s_y = Constants(0.0, 0.0), Constants(0.0, 0.0), 0.0
    if terms.HAS_HARD:
        is_nan = hard_is_nan(solution) | ~in_row
        hard = hard_constants(solution, M, is_nan, weights, numbers)
        tail_hard = hard_constants(solution, solution.tail_M, is_nan, weights, numbers)
        s_y = tl.load(row.s + y, in_row & owns, 0.0).to(tl.float32)
    tl.debug_barrier()  # every warp reads s_y before any warp stores the gradient there
    _gradient_pass(row, part, (tail_refs, tail, tail_hard), on_soft, numbers, terms, layout)
    if terms.HAS_HARD:
        # the label as an entry of the tail; if it is in the support, it is stored again below
        g = gradient(s_y, s_y, tail_refs, tail, tail_hard, on_soft, numbers, terms)
        _store_at_label(row, y, g, in_row & owns, weights, numbers)
    tl.debug_barrier()
    constants = refs, soft, References(M, M, 1.0, 0.0), hard
    store_support_gradient(row, part, y, constants, weights, numbers, terms, layout)


# --------------------------------------------------------------------------------- the kernels
# The arguments of a launch are not grouped: `do_not_specialize` has no effect inside a tuple
# (triton 3.6 and 3.9), so that N = 1, or an N that 16 divides, would compile another binary.


@triton.jit
def row_offset(row, S, stride_b, stride_s):
    """Return the 64-bit offset of row (row // S, row % S), in entries."""
    offset = row.to(tl.int64) * stride_s
    if row >= S:
        offset = (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    return offset


@triton.jit
def _weight(w_ptr, row, scale, GIVEN: tl.constexpr):
    """Return the row's weight of a term times `scale`; 0 if the term is off, for any scale."""
    if GIVEN:
        w = tl.load(w_ptr + row)
        return tl.where(w != 0.0, w * scale, 0.0)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def _row_part(index, scale, pointers, shape, numbers, terms, launch, layout):
    """Process part index % PARTS of row index // PARTS; zeros for a row without weight."""
    PARTS: tl.constexpr = launch.PARTS
    index = tl.cast(index, tl.uint32)  # shifts, not divisions
    n, p = (index // PARTS).to(tl.int32), (index % PARTS).to(tl.int32)
    # slices begin at multiples of 8 vectors, which are whole cache lines if the rows are aligned
    STEP: tl.constexpr = 8 * layout.VECTOR
    SLICE = tl.cdiv(tl.cdiv(shape.V, PARTS), STEP) * STEP if PARTS > 1 else shape.V
    begin, end = p * SLICE, tl.minimum(p * SLICE + SLICE, shape.V)
    entries = tl.arange(0, layout.LANES)[:, None] * layout.VECTOR
    entries = entries + tl.arange(0, layout.VECTOR)[None, :]
    w_hard = _weight(pointers.w_hard, n, scale, terms.HAS_HARD)
    w_soft = _weight(pointers.w_soft, n, scale, terms.rule.soft)
    s = pointers.s + row_offset(n, shape.S, shape.s_stride_b, shape.s_stride_s)
    t = pointers.t + row_offset(n, shape.S, shape.t_stride_b, shape.t_stride_s)
    if terms.STANDS_IN:
        t = tl.where(w_soft != 0.0, t, s)
    g = None
    if pointers.g is not None:
        g = pointers.g + row_offset(n, shape.S, shape.g_stride_b, shape.g_stride_s)
    stats = pointers.stats + n.to(tl.int64) * STATS
    partials = stats
    if pointers.partial is not None:
        place = n % launch.RING if launch.WAIT else n
        partials = pointers.partial + place.to(tl.int64) * (PARTS * PARTIAL)
    arrived = pointers.counters + 1 + 2 * n if launch.WAIT else n
    label = pointers.labels + n if terms.HAS_HARD else n
    classes = None
    if pointers.token_ids is not None:
        at, marks = n.to(tl.int64) * shape.K, pointers.marks
        if marks is not None:
            place = n % launch.RING * PARTS + p if launch.WAIT else tl.program_id(0)
            marks += place.to(tl.int64) * shape.MARKS
        classes = Classes(pointers.token_ids + at, t, pointers.inside + at, marks, shape.K, shape.V)
    row = Row(n, s, t, g, label, pointers.hard, pointers.soft, stats, classes)
    part = Part(p, begin, end, entries, partials, arrived)
    if launch.WAIT:  # until all programs of the row RING before have read this place of the ring
        if n >= launch.RING:
            _wait(arrived + 1 - 2 * launch.RING, PARTS)
    if (w_hard != 0.0) | (w_soft != 0.0):
        weights = Weights(w_hard, w_soft)
        if row.classes is not None:
            _kept_classes(row, part, shape.V, weights, numbers, terms, launch, layout)
        else:
            _kept_row(row, part, shape.V, weights, numbers, terms, launch, layout)
    elif launch.STEP == ALL or launch.STEP == LAST or launch.STEP == BACKWARD:
        if launch.WAIT:
            _arrive(arrived + 1)
        if g is not None:
            for o in range(begin, end, layout.LANES * layout.VECTOR):
                tl.store(g + o + entries, entries * 0.0, o + entries < end)
        if launch.STEP != BACKWARD:
            if p == 0:
                tl.store(pointers.hard + n, 0.0)
                tl.store(pointers.soft + n, 0.0)
                tl.store(stats + tl.arange(0, 16), 0.0, tl.arange(0, 16) < STATS)


@triton.jit(do_not_specialize=["N", "S", "K", "MARKS"])
def _kd_rows_kernel(
    s_ptr, t_ptr, g_ptr,  # logits and gradient (None: not wanted; may be the student's memory)
    labels_ptr, w_hard_ptr, w_soft_ptr,  # (N,), None if the term is off
    scale_ptr,  # 0-d, BACKWARD only: times the weights, unless is_power_of_two; or None
    hard_ptr, soft_ptr, stats_ptr,  # (N,), (N,), (N, STATS); written, or read by BACKWARD
    partial_ptr,  # (RING or N, PARTS, PARTIAL), if PARTS > 1
    counters_ptr,  # (1 + 2 N,) zeros, if WAIT: tickets; of each row, programs arrived, finished
    token_ids_ptr,  # (N, K), of a top-k teacher, else None as K: t_ptr are then (N, K+1)
    inside_ptr,  # (N, K), if there are token ids: scratch memory of classes.py, as the next
    marks_ptr,  # (RING·PARTS if WAIT, else the programs, MARKS); None for BACKWARD, as MARKS
    N, S, V, K, MARKS,
    s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s,
    k, power, temperature, beta, soft_factor, soft_slope, smoothing,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, STEP: tl.constexpr,
    WAIT: tl.constexpr, PARTS: tl.constexpr, RING: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Compute losses, statistics and gradient of N rows, with N·PARTS programs.

    The number of programs is free with a scale, and with `marks_ptr` if not WAIT. With a scale they
    return at once if is_power_of_two.
    """
    # a compiled caller may pass float64
    numbers = Numbers(
        tl.cast(k, tl.float32), tl.cast(power, tl.float32), tl.cast(temperature, tl.float32),
        tl.cast(beta, tl.float32), tl.cast(soft_factor, tl.float32),
        tl.cast(soft_slope, tl.float32), tl.cast(smoothing, tl.float32),
    )  # fmt: skip
    pointers = Pointers(
        s_ptr, t_ptr, g_ptr, labels_ptr, w_hard_ptr, w_soft_ptr, hard_ptr, soft_ptr, stats_ptr,
        partial_ptr, counters_ptr, token_ids_ptr, inside_ptr, marks_ptr,
    )  # fmt: skip
    shape = Shape(
        S, V, s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s, K, MARKS
    )
    rule: tl.constexpr = rule_of(D if token_ids_ptr is None else TAIL)
    # in a row whose soft term is off, the student's logits replace the teacher's
    STANDS_IN: tl.constexpr = (
        rule.soft and rule.teacher and not SMOOTHING and s_ptr.dtype == t_ptr.dtype
    )
    scale = tl.full((), 1.0, tl.float32)
    if scale_ptr is not None or (marks_ptr is not None and not WAIT):
        has_work = True
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
            has_work = ~is_power_of_two(scale)  # else _kd_scale_kernel has done it
        if has_work:
            for index in range(tl.program_id(0), N * PARTS, tl.num_programs(0)):
                _row_part(
                    index, scale, pointers, shape, numbers,
                    Terms(
                        rule, HAS_HARD, SMOOTHING, STANDS_IN,
                        Terms(rule_of(D), False, False, False, None),
                    ),
                    Launch(STEP, WAIT, PARTS, RING), Layout(LANES, VECTOR, UNROLL, CUDA),
                )  # fmt: skip
    else:
        index = tl.program_id(0)
        if WAIT:
            index = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        _row_part(
            index, scale, pointers, shape, numbers,
            Terms(
                rule, HAS_HARD, SMOOTHING, STANDS_IN, Terms(rule_of(D), False, False, False, None)
            ),
            Launch(STEP, WAIT, PARTS, RING), Layout(LANES, VECTOR, UNROLL, CUDA),
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "S"])
def _kd_scale_kernel(
    g_ptr, scale_ptr, N, S, V, stride_b, stride_s,
    ANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply a gradient (N rows of V) by the scalar at scale_ptr, with any number of programs.

    ANY: for any scalar; else only if it is a power of two, so that the product is exact. Programs
    return at once if there is nothing to do.
    """
    scale = tl.load(scale_ptr)
    if (scale != 1.0) & (ANY | is_power_of_two(scale)):
        blocks = tl.cdiv(V, BLOCK)
        for index in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
            g_row = g_ptr + row_offset(index // blocks, S, stride_b, stride_s)
            i = index % blocks * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(g_row + i, i < V, 0.0).to(tl.float32)
            # an ignored row stays 0 if the scale is infinite
            g = tl.where(g == 0.0, g, g * scale)
            tl.store(g_row + i, rounded(g, g_ptr), i < V)
