"""Conversions: logits after the load, the gradient before the store."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: The largest of eight 16-bit numbers in four registers, as a float32.
_LARGEST = """
{{
    .reg .b32 x, y;
    {maximum} x, $8, $9;
    {maximum} y, $10, $11;
    {maximum} x, x, y;
    {widen}
    max.f32 $0, $0, $1;
    mov.b32 $1, $0; mov.b32 $2, $0; mov.b32 $3, $0;
    mov.b32 $4, $0; mov.b32 $5, $0; mov.b32 $6, $0; mov.b32 $7, $0;
}}
"""
_LARGEST_BF16 = tl.constexpr(
    _LARGEST.format(maximum="max.bf16x2", widen="shl.b32 $0, x, 16; and.b32 $1, x, 0xffff0000;")
)
_LARGEST_F16 = tl.constexpr(
    _LARGEST.format(
        maximum="max.f16x2",
        widen=".reg .b16 l, h; mov.b32 {l, h}, x; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;",
    )
)


@triton.jit
def _split(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR == 1:
        return (tl.reshape(x, (LANES,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (LANES, VECTOR // 2, 2)))
        return _split(even, LANES, VECTOR // 2) + _split(odd, LANES, VECTOR // 2)


@triton.jit
def entries_of(x, layout):
    """Split (LANES, VECTOR) into tensors (LANES,): registers of a thread, in a fixed order.

    That is not the order in the row if VECTOR is above 2.
    """
    return _split(x, layout.LANES, layout.VECTOR)


@triton.jit
def widened(x, layout):
    """Return logits as float32; for bfloat16, two at once in two instructions instead of three."""
    if layout.CUDA > 0 and layout.VECTOR > 1 and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r",
            [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def largest(
    x,  # UNROLL x (LANES, VECTOR), as loaded
    entries,  # the same, widened
    UNROLL: tl.constexpr,
    layout,
):
    """Return the largest entry of each lane; NaN only if all are NaN.

    NVIDIA's GPUs compare two 16-bit numbers in one instruction.
    """
    if layout.CUDA >= 80 and layout.VECTOR == 8 and x[0].dtype != tl.float32:
        BRAIN: tl.constexpr = x[0].dtype == tl.bfloat16
        top = x[0]
        for u in tl.static_range(1, UNROLL):
            top = tl.inline_asm_elementwise(
                "max.bf16x2 $0, $1, $2;" if BRAIN else "max.f16x2 $0, $1, $2;", "=&r,r,r",
                [top, x[u]], dtype=x[0].dtype, is_pure=True, pack=2,
            )  # fmt: skip
        # the result, eight times
        lane_max = tl.inline_asm_elementwise(
            _LARGEST_BF16 if BRAIN else _LARGEST_F16, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
            [top], dtype=tl.float32, is_pure=True, pack=8,
        )  # fmt: skip
        return entries_of(lane_max, layout)[0]
    else:
        top = entries[0]
        for i in tl.static_range(1, UNROLL * layout.VECTOR):
            top = tl.maximum(top, entries[i])
        return top


@triton.jit
def is_power_of_two(x):
    """Return True for 0 and normal powers of two of either sign; x is float32.

    Multiplying by x is exact, unless the product underflows.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return ((bits & 0x7FFFFF) == 0) & (bits != 0x7F800000)


@triton.jit
def rounded(x, ptr):
    """Return x, float32, in the dtype of ptr, rounded to nearest even.

    For bfloat16 in the interpreter the rounding is written out, since Triton's truncates.
    """
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(ptr.dtype.element_ty)
