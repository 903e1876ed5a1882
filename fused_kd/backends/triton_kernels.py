"""The Triton kernels: launched by :mod:`fused_kd.backends.triton`; formulas: `triton_rules`.

Traffic: the first visit reads a pair of rows from memory, a second statistics visit (jsd, tvd) and
the gradient visit, which goes backwards, find it in L2; the gradient is written once. Everything
is float32 from the load to the one rounding at the store.

A row is cut into a slice for each of PARTS programs; a slice is read in tiles of UNROLL x LANES x
VECTOR entries, and every lane (a thread of the GPU) keeps references and sums of its own: a tile
costs no barrier and no shuffle. Lanes, then parts, are folded once, both by `fold`. What is beyond
the end of a row is loaded as -inf on both sides, which is absent and adds nothing.

With WAIT the programs of a row wait for each other. Row and part then come from a ticket that a
program takes when it starts, so that programs start in the order of the rows: only those of the
row that started last can be waiting for one that has not started; all others run to their end and
make room. What it takes is room for PARTS programs at once, not for the whole grid. Sums of parts
are stored in a ring of rows: a row takes the place of one long before it, once that has been read.
Without WAIT the same bodies run as one launch per STEP, and the ring holds all rows.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102, SIM109
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rules import (
    INF,
    JSD,
    LOWEST,
    NONE,
    SUMS,
    TVD,
    add_tile,
    add_tile_again,
    entries_of,
    fold,
    gradient,
    hard_sum,
    hard_value,
    is_power_of_two,
    largest,
    references,
    rounded,
    soft_constants,
    soft_value,
    unusable,
    widened,
)

# what a launch does
ALL = tl.constexpr(0)  # losses, and the gradient if there is a pointer to it
FIRST = tl.constexpr(1)  # the first visit's sums of every part
SECOND = tl.constexpr(2)  # the second statistics visit's
LAST = tl.constexpr(3)  # what ALL does, from the sums of the parts
BACKWARD = tl.constexpr(4)  # the gradient, from the statistics of an earlier forward

STATS = tl.constexpr(11)  # floats per row: the first visit's SUMS, the second's two, one to spare
PARTIAL = tl.constexpr(16)  # floats per part, the same: 64 bytes


@triton.jit
def _store_sums(ptr, sums):
    for i in tl.static_range(SUMS):
        tl.store(ptr + i, sums[i])


@triton.jit
def _load_sums(ptr):
    sums = ()
    for i in tl.static_range(SUMS):
        sums = sums + (tl.load(ptr + i, cache_modifier=".cg"),)  # from L2: others have written it
    return sums


@triton.jit
def _arrive(counter_ptr):
    """Releases what this program has stored, and says to a later row that it has read."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter_ptr, expected):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < expected:
        pass


@triton.jit
def _tile(
    s_at, t_at, o, entries, end,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    READ_T: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Loads UNROLL sub-blocks of both sides from entry o on; the student twice if READ_T is off."""
    s, t = (), ()
    s_from, t_from = s_at + o, t_at + o
    for u in tl.static_range(UNROLL):
        inside, beyond = (o + u * BLOCK + entries < end, -INF) if TAIL else (None, None)
        x = tl.load(s_from + u * BLOCK, inside, beyond, eviction_policy=POLICY)
        s = s + (x,)
        if READ_T:
            t = t + (tl.load(t_from + u * BLOCK, inside, beyond, eviction_policy=POLICY),)
        else:
            t = t + (x,)
    return s, t


@triton.jit
def _add(
    sums, s, t, refs, k, power, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, AGAIN: tl.constexpr,
    CUDA: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the sums of the lanes, the first visit's or, AGAIN, the second's."""
    ss, ts = (), ()
    for u in tl.static_range(UNROLL):
        ss = ss + entries_of(widened(s[u], VECTOR, CUDA), LANES, VECTOR)
        ts = ts + entries_of(widened(t[u], VECTOR, CUDA), LANES, VECTOR)
    if AGAIN:
        return add_tile_again(sums, ss, ts, refs, k, beta, UNROLL * VECTOR, D)
    else:
        top_s = largest(s, ss, UNROLL, LANES, VECTOR, CUDA)
        top_t = largest(t, ts, UNROLL, LANES, VECTOR, CUDA) if D != NONE else top_s
        return add_tile(
            sums, ss, ts, top_s, top_t, k, power, UNROLL * VECTOR, VECTOR, D, HAS_HARD, SMOOTHING
        )


# -------------------------------------------------------------------------- visits of one slice


@triton.jit
def _whole_tiles(length, TILE: tl.constexpr):
    """Returns the entries of a slice that fill tiles, whose size is a power of two."""
    return (tl.maximum(length, 0).to(tl.uint32) // TILE * TILE).to(tl.int32)


@triton.jit
def _statistics_visit(
    sums, s_ptr, t_ptr, begin, end, entries, refs, k, power, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr,
    AGAIN: tl.constexpr, POLICY: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Adds a slice to the sums of the lanes, the first visit's or, AGAIN, the second's."""
    BLOCK: tl.constexpr = LANES * VECTOR
    READ_T: tl.constexpr = D != NONE or SMOOTHING
    s_at, t_at = s_ptr + entries, t_ptr + entries
    whole = begin + _whole_tiles(end - begin, UNROLL * BLOCK)
    for o in range(begin, whole, UNROLL * BLOCK):
        s, t = _tile(s_at, t_at, o, entries, end, UNROLL, BLOCK, False, READ_T, POLICY)
        sums = _add(
            sums, s, t, refs, k, power, beta, LANES, VECTOR, UNROLL, D, HAS_HARD, SMOOTHING, AGAIN,
            CUDA,
        )  # fmt: skip
    for o in range(whole, end, BLOCK):
        s, t = _tile(s_at, t_at, o, entries, end, 1, BLOCK, True, READ_T, POLICY)
        sums = _add(
            sums, s, t, refs, k, power, beta, LANES, VECTOR, 1, D, HAS_HARD, SMOOTHING, AGAIN, CUDA
        )
    return sums


@triton.jit
def _gradient_visit(
    s_ptr, t_ptr, g_ptr, begin, end, entries, refs, soft, hard, on_soft, k, power, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, STANDS_IN: tl.constexpr,
    CUDA: tl.constexpr,
):  # fmt: skip
    """Backwards: what the visit before has read last is nearest."""
    BLOCK: tl.constexpr = LANES * VECTOR
    READ_T: tl.constexpr = D != NONE or SMOOTHING
    s_at, t_at, g_at = s_ptr + entries, t_ptr + entries, g_ptr + entries
    whole = begin + _whole_tiles(end - begin, UNROLL * BLOCK)
    for o in range(whole, end, BLOCK):
        s, t = _tile(s_at, t_at, o, entries, end, 1, BLOCK, True, READ_T, "evict_first")
        g = gradient(
            widened(s[0], VECTOR, CUDA), widened(t[0], VECTOR, CUDA),
            refs, soft, hard, on_soft, k, power, beta, D, HAS_HARD, SMOOTHING, STANDS_IN,
        )  # fmt: skip
        tl.store(g_at + o, rounded(g, g_ptr), o + entries < end, eviction_policy="evict_first")
    for forwards in range(begin, whole, UNROLL * BLOCK):
        o = begin + whole - UNROLL * BLOCK - forwards
        s, t = _tile(s_at, t_at, o, entries, end, UNROLL, BLOCK, False, READ_T, "evict_first")
        for u in tl.static_range(UNROLL):
            g = gradient(
                widened(s[u], VECTOR, CUDA), widened(t[u], VECTOR, CUDA),
                refs, soft, hard, on_soft, k, power, beta, D, HAS_HARD, SMOOTHING, STANDS_IN,
            )  # fmt: skip
            tl.store(g_at + o + u * BLOCK, rounded(g, g_ptr), eviction_policy="evict_first")


# -------------------------------------------------------------------------------------- one row


@triton.jit
def _owns(label_ptr, part, begin, end, V, HAS_HARD: tl.constexpr):
    """Returns whether this program reports the losses and sets the label's entry.

    It does if the label is in its slice. Also returns whether the label is in the row, and where.
    Loaded when needed: registers are scarce in a visit.
    """
    if HAS_HARD:
        label = tl.load(label_ptr)
        in_row = (label >= 0) & (label < V)
        y = label.to(tl.int32)
        return tl.where(in_row, (y >= begin) & (y < end), part == 0), in_row, y
    else:
        return part == 0, True, 0


@triton.jit
def _row_sums(
    s_ptr, t_ptr, label_ptr, stats, partials, arrived,
    part, V, begin, end, entries, on_soft, k, power, beta,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr,
    STEP: tl.constexpr, WAIT: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Returns the sums of the whole row and x, y of its second visit, as far as STEP goes."""
    x, y = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if STEP == BACKWARD:
        return _load_sums(stats), tl.load(stats + SUMS), tl.load(stats + SUMS + 1)
    TWO_VISITS: tl.constexpr = D == JSD or D == TVD
    # read again soon: stays in L2 longer than what is read for the last time. A policy of its own
    # ("evict_last") would take six instructions a tile.
    POLICY: tl.constexpr = "" if GRADIENT or TWO_VISITS else "evict_first"
    mine, all_parts = partials + part * PARTIAL, partials + tl.arange(0, PARTS) * PARTIAL
    zero = tl.full((LANES,), 0.0, tl.float32)
    sums = (x, x, x, x, x, x, x, x)
    if STEP == ALL or STEP == FIRST:
        nothing = tl.full((LANES,), LOWEST, tl.float32)
        lanes = _statistics_visit(
            (nothing, nothing, zero, zero, zero, zero, zero, zero),
            s_ptr, t_ptr, begin, end, entries, 0, k, power, beta,
            LANES, VECTOR, UNROLL, D, HAS_HARD, SMOOTHING, False, POLICY, CUDA,
        )  # fmt: skip
        sums = fold(lanes, power, D, HAS_HARD, SMOOTHING)
        if PARTS > 1:
            _store_sums(mine, sums)
    # forward only, the owner alone goes on, and reads what the others have stored
    goes_on = True
    if not GRADIENT:
        goes_on, _, _ = _owns(label_ptr, part, begin, end, V, HAS_HARD)
    if WAIT:
        _arrive(arrived)
    if PARTS > 1 and STEP != FIRST:
        if goes_on | TWO_VISITS:
            if WAIT:
                _wait(arrived, PARTS)
            sums = fold(_load_sums(all_parts), power, D, HAS_HARD, SMOOTHING)
    if TWO_VISITS and STEP != FIRST:
        if STEP == ALL or STEP == SECOND:
            lanes = _statistics_visit(
                (zero, zero),
                s_ptr, t_ptr, begin, end, entries, references(sums, on_soft, D), k, power, beta,
                LANES, VECTOR, UNROLL, D, HAS_HARD, False, True, POLICY, CUDA,
            )  # fmt: skip
            x, y = tl.sum(lanes[0], 0), tl.sum(lanes[1], 0)
            if PARTS > 1:
                tl.store(mine + SUMS, x)
                tl.store(mine + SUMS + 1, y)
        if WAIT:
            _arrive(arrived)
        if PARTS > 1 and STEP != SECOND:
            if goes_on:
                if WAIT:
                    _wait(arrived, 2 * PARTS)
                x = tl.sum(tl.load(all_parts + SUMS, cache_modifier=".cg"), 0)
                y = tl.sum(tl.load(all_parts + SUMS + 1, cache_modifier=".cg"), 0)
    if WAIT:
        _arrive(arrived + 1)
    return sums, x, y


@triton.jit
def _report(
    hard_ptr, soft_ptr, stats, sums, x, y, s_y, hard_nan, w_hard, w_soft,
    k, power, temperature, beta, soft_factor, smoothing,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Stores the row's losses and statistics."""
    hard, soft = 0.0, 0.0
    if HAS_HARD:
        hard = hard_value(sums, s_y, smoothing, k, power, D, SMOOTHING)
        hard = tl.where(w_hard != 0.0, tl.where(hard_nan, float("nan"), hard), 0.0)
    if D != NONE:
        soft = soft_value(sums, x, y, temperature, beta, soft_factor, D)
        soft = tl.where(w_soft != 0.0, soft, 0.0)
    tl.store(hard_ptr, hard)
    tl.store(soft_ptr, soft)
    _store_sums(stats, sums)
    tl.store(stats + SUMS, x)
    tl.store(stats + SUMS + 1, y)
    tl.store(stats + SUMS + 2, 0.0)


@triton.jit
def _kept_row(
    s_ptr, t_ptr, g_ptr, label_ptr, hard_ptr, soft_ptr, stats, partials, arrived,
    row, part, V, begin, end, entries, w_hard, w_soft,
    k, power, temperature, beta, soft_factor, soft_slope, smoothing,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr,
    STEP: tl.constexpr, WAIT: tl.constexpr, PARTS: tl.constexpr,
    STANDS_IN: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """One program's part of a row that counts."""
    sums, x, y_sum = _row_sums(
        s_ptr, t_ptr, label_ptr, stats, partials, arrived,
        part, V, begin, end, entries, w_soft != 0.0, k, power, beta,
        D, HAS_HARD, SMOOTHING, GRADIENT, STEP, WAIT, PARTS, LANES, VECTOR, UNROLL, CUDA,
    )  # fmt: skip
    owns, in_row, y = _owns(label_ptr, part, begin, end, V, HAS_HARD)
    hard_nan, s_y, t_y = False, 0.0, 0.0
    if HAS_HARD:
        # read only inside of the row
        s_y = tl.load(s_ptr + y, in_row & owns, 0.0).to(tl.float32)
        if D != NONE or SMOOTHING:
            t_y = tl.load(t_ptr + y, in_row & owns, 0.0).to(tl.float32)
        d_1 = hard_sum(sums, power, D)
        hard_nan = unusable(sums[0]) | (d_1 != d_1) | ~in_row
        tl.debug_barrier()  # by every warp, before one may store the gradient there
    if STEP == ALL or STEP == LAST:
        if owns:
            _report(
                hard_ptr + row, soft_ptr + row, stats, sums, x, y_sum, s_y, hard_nan, w_hard,
                w_soft, k, power, temperature, beta, soft_factor, smoothing, D, HAS_HARD, SMOOTHING,
            )  # fmt: skip
    if GRADIENT and STEP != FIRST and STEP != SECOND:
        on_soft = w_soft != 0.0
        refs, soft, hard = references(sums, on_soft, D), (0.0, 0.0), (0.0, 0.0)
        if D != NONE:
            soft = soft_constants(
                sums, x, y_sum, on_soft, w_soft * soft_slope, temperature, beta, D
            )
        if HAS_HARD:
            scale = tl.where(hard_nan & (w_hard != 0.0), float("nan"), tl.div_rn(w_hard, d_1))
            hard = scale, -w_hard * tl.div_rn(smoothing, sums[7])
        _gradient_visit(
            s_ptr, t_ptr, g_ptr, begin, end, entries, refs, soft, hard, on_soft, k, power, beta,
            LANES, VECTOR, UNROLL, D, HAS_HARD, SMOOTHING, STANDS_IN, CUDA,
        )  # fmt: skip
        if HAS_HARD:
            # made in float32 from the logits: what was rounded above would lose 1 - π_y
            g = gradient(
                s_y, t_y, refs, soft, hard, on_soft, k, power, beta, D, HAS_HARD, SMOOTHING,
                STANDS_IN,
            )  # fmt: skip
            g -= w_hard * (1.0 - smoothing)
            tl.debug_barrier()
            tl.store(g_ptr + y, rounded(g, g_ptr), in_row & owns & (w_hard != 0.0))


# --------------------------------------------------------------------------------- the kernels


@triton.jit
def _row_offset(row, S, stride_b, stride_s):
    """Returns where row (row // S, row % S) begins: anywhere in 64 bits."""
    offset = row.to(tl.int64) * stride_s
    if row >= S:
        offset = (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    return offset


@triton.jit
def _weight(w_ptr, row, scale, GIVEN: tl.constexpr):
    """Returns a term's weight in this row's gradient; 0 if it is off, whatever the scale."""
    if GIVEN:
        w = tl.load(w_ptr + row)
        return tl.where(w != 0.0, w * scale, 0.0)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def _row_part(
    index, scale,
    s_ptr, t_ptr, g_ptr, labels_ptr, w_hard_ptr, w_soft_ptr, hard_ptr, soft_ptr, stats_ptr,
    partial_ptr, counters_ptr,
    S, V, s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s,
    k, power, temperature, beta, soft_factor, soft_slope, smoothing,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, STEP: tl.constexpr,
    WAIT: tl.constexpr, PARTS: tl.constexpr, RING: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Does one program's share of the work: part index % PARTS of row index // PARTS."""
    index = tl.cast(index, tl.uint32)  # shifts, not divisions
    row, part = (index // PARTS).to(tl.int32), (index % PARTS).to(tl.int32)
    # slices begin at multiples of 8 vectors, whole cache lines where rows do
    SLICE = tl.cdiv(tl.cdiv(V, PARTS), 8 * VECTOR) * (8 * VECTOR) if PARTS > 1 else V
    begin, end = part * SLICE, tl.minimum(part * SLICE + SLICE, V)
    entries = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    w_hard = _weight(w_hard_ptr, row, scale, HAS_HARD)
    w_soft = _weight(w_soft_ptr, row, scale, D != NONE)
    s_row = s_ptr + _row_offset(row, S, s_stride_b, s_stride_s)
    t_row = t_ptr + _row_offset(row, S, t_stride_b, t_stride_s)
    # the teacher of a row whose soft term is off has no part in it
    STANDS_IN: tl.constexpr = D != NONE and not SMOOTHING and s_ptr.dtype == t_ptr.dtype
    if STANDS_IN:
        t_row = tl.where(w_soft != 0.0, t_row, s_row)
    GRADIENT: tl.constexpr = g_ptr is not None
    g_row = g_ptr + _row_offset(row, S, g_stride_b, g_stride_s) if GRADIENT else s_row
    stats = stats_ptr + row.to(tl.int64) * STATS
    partials = stats
    if partial_ptr is not None:
        place = row % RING if WAIT else row
        partials = partial_ptr + place.to(tl.int64) * (PARTS * PARTIAL)
    arrived = counters_ptr + 1 + 2 * row if WAIT else row
    label_ptr = labels_ptr + row if HAS_HARD else row
    if WAIT:  # the row before in this place of the ring has been read by all of its programs
        if row >= RING:
            _wait(arrived + 1 - 2 * RING, PARTS)
    if (w_hard != 0.0) | (w_soft != 0.0):
        _kept_row(
            s_row, t_row, g_row, label_ptr, hard_ptr, soft_ptr, stats, partials, arrived,
            row, part, V, begin, end, entries, w_hard, w_soft,
            k, power, temperature, beta, soft_factor, soft_slope, smoothing,
            D, HAS_HARD, SMOOTHING, GRADIENT, STEP, WAIT, PARTS, STANDS_IN,
            LANES, VECTOR, UNROLL, CUDA,
        )  # fmt: skip
    elif STEP == ALL or STEP == LAST or STEP == BACKWARD:
        if WAIT:
            _arrive(arrived + 1)
        if GRADIENT:
            for o in range(begin, end, LANES * VECTOR):
                tl.store(g_row + o + entries, entries * 0.0, o + entries < end)
        if STEP != BACKWARD:
            if part == 0:
                tl.store(hard_ptr + row, 0.0)
                tl.store(soft_ptr + row, 0.0)
                tl.store(stats + tl.arange(0, 16), 0.0, tl.arange(0, 16) < STATS)


@triton.jit(do_not_specialize=["N", "S"])
def _kd_rows_kernel(
    s_ptr, t_ptr, g_ptr,  # logits and gradient (None: not wanted; may be the student's memory)
    labels_ptr, w_hard_ptr, w_soft_ptr,  # (N,), None where a term is off
    scale_ptr,  # 0-d, BACKWARD only: times the weights, unless it is a power of two; or None
    hard_ptr, soft_ptr, stats_ptr,  # (N,), (N,), (N, STATS); written, or read by BACKWARD
    partial_ptr,  # (RING or N, PARTS, PARTIAL), PARTS > 1
    counters_ptr,  # (1 + 2 N,) of zeros, WAIT: tickets; of each row, programs arrived, finished
    N, S, V,  # row n begins at (n // S)·stride_b + (n % S)·stride_s
    s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s,
    k, power, temperature, beta, soft_factor, soft_slope, smoothing,
    D: tl.constexpr, HAS_HARD: tl.constexpr, SMOOTHING: tl.constexpr, STEP: tl.constexpr,
    WAIT: tl.constexpr, PARTS: tl.constexpr,
    RING: tl.constexpr,  # WAIT: rows whose parts' sums are kept, a power of two
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    CUDA: tl.constexpr,  # the compute capability, times ten, of an NVIDIA GPU; else 0
):  # fmt: skip
    """Computes losses, statistics and gradient of N rows, with N·PARTS programs.

    With a scale, any number of programs will do; they end at once where it is a power of two.
    """
    # a caller that is compiled may hand over float64
    k, temperature = tl.cast(k, tl.float32), tl.cast(temperature, tl.float32)
    beta, soft_factor = tl.cast(beta, tl.float32), tl.cast(soft_factor, tl.float32)
    soft_slope, smoothing = tl.cast(soft_slope, tl.float32), tl.cast(smoothing, tl.float32)
    power = tl.cast(power, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        if ~is_power_of_two(scale):  # else _kd_scale_kernel has done it
            for index in range(tl.program_id(0), N * PARTS, tl.num_programs(0)):
                _row_part(
                    index, scale,
                    s_ptr, t_ptr, g_ptr, labels_ptr, w_hard_ptr, w_soft_ptr,
                    hard_ptr, soft_ptr, stats_ptr, partial_ptr, counters_ptr,
                    S, V, s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s,
                    k, power, temperature, beta, soft_factor, soft_slope, smoothing,
                    D, HAS_HARD, SMOOTHING, STEP, WAIT, PARTS, RING, LANES, VECTOR, UNROLL, CUDA,
                )  # fmt: skip
    else:
        index = tl.program_id(0)
        if WAIT:
            index = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        _row_part(
            index, tl.full((), 1.0, tl.float32),
            s_ptr, t_ptr, g_ptr, labels_ptr, w_hard_ptr, w_soft_ptr,
            hard_ptr, soft_ptr, stats_ptr, partial_ptr, counters_ptr,
            S, V, s_stride_b, s_stride_s, t_stride_b, t_stride_s, g_stride_b, g_stride_s,
            k, power, temperature, beta, soft_factor, soft_slope, smoothing,
            D, HAS_HARD, SMOOTHING, STEP, WAIT, PARTS, RING, LANES, VECTOR, UNROLL, CUDA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "S"])
def _kd_scale_kernel(
    g_ptr, scale_ptr, N, S, V, stride_b, stride_s,
    ANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiplies a gradient (N rows of V) by the scalar at scale_ptr, with any number of programs.

    ANY: for any scalar, else only where it is a power of two, and so exact. Programs end at once
    where there is nothing to do.
    """
    scale = tl.load(scale_ptr)
    if (scale != 1.0) & (ANY | is_power_of_two(scale)):
        blocks = tl.cdiv(V, BLOCK)
        for index in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
            g_row = g_ptr + _row_offset(index // blocks, S, stride_b, stride_s)
            i = index % blocks * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(g_row + i, i < V, 0.0).to(tl.float32)
            # an ignored row stays 0 if the scale is infinite
            g = tl.where(g == 0.0, g, g * scale)
            tl.store(g_row + i, rounded(g, g_ptr), i < V)
