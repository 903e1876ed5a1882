"""What each instruction of a disassembled kernel computes.

The instruction set is not published: this is how it reads, and a kernel that is run by it has to
give the right losses and gradients. What is not known here is refused. Fused multiply-adds are
rounded twice (float64 first), which differs in the last bit at most.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .sass_operands import Array, Get, Registers, split

#: Takes the lanes that run it (None: all).
Operation = Callable[[Any], None]

_U64 = np.uint64
_LOW = _U64(0xFFFFFFFF)
#: Nothing to do for one who runs all lanes in turn: memory is always in order here.
NOTHING = ("NOP", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "FENCE", "YIELD", "DEPBAR", "NANOSLEEP")


def build(
    opcode: str, operands: str, registers: Registers, special: Mapping[str, Array]
) -> Operation:
    """Return what an instruction does besides memory accesses and branches.

    Raises:
        NotImplementedError: it is unknown.
    """
    name, *suffixes = opcode.split(".")
    if name in NOTHING:
        return lambda mask: None
    make = _OPERATIONS.get(name) or _OPERATIONS.get(name.removeprefix("U"))
    if make is None:
        raise NotImplementedError(opcode)
    return make(_Parts(opcode, frozenset(suffixes), split(operands), registers, special))


class _Parts:
    """One instruction, in parts."""

    def __init__(
        self, opcode: str, suffixes: frozenset[str], operands: list[str], registers: Registers,
        special: Mapping[str, Array],
    ) -> None:  # fmt: skip
        self.opcode = opcode
        self.suffixes = suffixes
        self.operands = operands
        self.registers = registers
        self.special = special

    def only(self, *known: str) -> None:
        """Refuse any suffix but these."""
        if strange := self.suffixes - set(known):
            raise NotImplementedError(f"{self.opcode}: {', '.join(sorted(strange))}")

    def result(self, value: Get) -> Operation:
        """Return an operation that writes the first operand."""
        put, name = self.registers.put, self.operands[0]
        return lambda mask: put(name, value(), mask)

    def integers(self, first: int = 1) -> list[Get]:
        return [self.registers.integer(one) for one in self.operands[first:]]

    def floats(self, first: int = 1, last: int | None = None) -> list[Get]:
        return [self.registers.floating(one) for one in self.operands[first:last]]


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def _wide(value: Array) -> Array:
    return value.astype(_U64)


# -------------------------------------------------------------------------------------- integers


def _move(x: _Parts) -> Operation:
    x.only("64")
    if "64" in x.suffixes:
        pair, put_pair, name = x.registers.pair(x.operands[1]), x.registers.put_pair, x.operands[0]
        return lambda mask: put_pair(name, pair(), mask)
    return x.result(x.integers()[0])


def _add3(x: _Parts) -> Operation:
    """IADD3 d, [carry out, [second carry out,]] a, b, c [, carry in [, second carry in]]."""
    x.only("X")
    rest = x.operands[1:]
    carries_out = []
    while _is_predicate(rest[0]):
        carries_out.append(rest.pop(0))
    carries_in = [x.registers.condition(one) for one in rest[3:]]
    plain = [one.startswith("-") for one in rest[:3]]
    addends = [x.registers.integer(one.lstrip("-")) for one in rest[:3]]
    registers, name = x.registers, x.operands[0]

    def run(mask: Any) -> None:
        total = np.zeros(registers.lanes, _U64)
        for negative, addend in zip(plain, addends, strict=True):
            total = total + (_wide(~addend()) + _U64(1) if negative else _wide(addend()))
        for carry in carries_in:
            total = total + carry()
        registers.put(name, (total & _LOW).astype(np.uint32), mask)
        for number, carry_out in enumerate(carries_out, 1):
            registers.put_condition(carry_out, total >> _U64(32) >= number, mask)

    return run


def _multiply_add(x: _Parts) -> Operation:
    kind = x.suffixes - {"U32", "MOV", "SHL", "IADD"}
    if kind == {"WIDE"}:
        return _multiply_wide(x)
    if kind == {"HI"}:
        return _multiply_high(x)
    if kind - {"X"}:
        raise NotImplementedError(x.opcode)
    a, b, c = (x.registers.integer(one) for one in x.operands[1:4])
    carries = [x.registers.condition(one) for one in x.operands[4:]]

    def value() -> Array:
        total = a() * b() + c()
        for carry in carries:
            total = total + carry().astype(np.uint32)
        return total

    return x.result(value)


def _product(x: _Parts, a: str, b: str) -> Get:
    """Return how to make a product of 64 bits."""
    if "U32" in x.suffixes:
        left, right = x.registers.integer(a), x.registers.integer(b)
        return lambda: _wide(left()) * _wide(right())
    first, second = x.registers.signed(a), x.registers.signed(b)
    return lambda: (first().astype(np.int64) * second().astype(np.int64)).view(_U64)


def _multiply_wide(x: _Parts) -> Operation:
    carry_out = x.operands.pop(1) if _is_predicate(x.operands[1]) else None
    name, a, b, c = x.operands
    product, addend, registers = _product(x, a, b), x.registers.pair(c), x.registers

    def run(mask: Any) -> None:
        factor = product()
        total = factor + addend()
        registers.put_pair(name, total, mask)
        if carry_out is not None:
            registers.put_condition(carry_out, total < factor, mask)

    return run


def _multiply_high(x: _Parts) -> Operation:
    """The addend has 64 bits too."""
    _, a, b, c = x.operands
    product, addend = _product(x, a, b), x.registers.pair(c)
    return x.result(lambda: ((product() + addend()) >> _U64(32)).astype(np.uint32))


def _shift_add(x: _Parts) -> Operation:
    """LEA: (a << shift) + b; HI: the upper half of a pair that is shifted, and a carry in."""
    x.only("HI", "X", "SX32")
    rest = x.operands[1:]
    carry_out = rest.pop(0) if _is_predicate(rest[0]) else None
    carry_in = x.registers.condition(rest.pop()) if "X" in x.suffixes else None
    shift = _U64(int(rest.pop(), 0))
    a, b = x.registers.integer(rest[0]), x.registers.integer(rest[1])
    high = x.registers.integer(rest[2]) if len(rest) > 2 else None
    registers, name, suffixes = x.registers, x.operands[0], x.suffixes

    def run(mask: Any) -> None:
        if "SX32" in suffixes:
            whole = a().view(np.int32).astype(np.int64).view(_U64)
        else:
            whole = _wide(a()) | (_wide(high()) << _U64(32) if high else _U64(0))
        shifted = whole << shift
        part = shifted >> _U64(32) if "HI" in suffixes else shifted & _LOW
        total = part + _wide(b()) + (carry_in() if carry_in else _U64(0))
        registers.put(name, (total & _LOW).astype(np.uint32), mask)
        if carry_out is not None:
            registers.put_condition(carry_out, total > _LOW, mask)

    return run


def _shift(x: _Parts) -> Operation:
    """SHF: of the pair (high, low); HI: the upper half of what comes out.

    With a type of 32 bits the upper half is that of `high` alone.
    """
    x.only("L", "R", "U32", "S32", "U64", "S64", "HI")
    low, by, high = x.integers()
    left, upper, short = "L" in x.suffixes, "HI" in x.suffixes, "64" not in x.opcode
    negative = bool(x.suffixes & {"S32", "S64"})
    if negative and (left or (short and not upper)):
        raise NotImplementedError(x.opcode)

    def value() -> Array:
        count = np.minimum(_wide(by()), _U64(63))
        if upper and short and negative:
            return high().view(np.int32) >> np.minimum(count, _U64(31)).astype(np.int32)
        if upper and short and not left:
            return np.where(count > 31, 0, _wide(high()) >> count).astype(np.uint32)
        pair = _wide(low()) | _wide(high()) << _U64(32)
        if negative:
            shifted = (pair.view(np.int64) >> count.astype(np.int64)).view(_U64)
        else:
            shifted = pair << count if left else pair >> count
        return ((shifted >> _U64(32) if upper else shifted) & _LOW).astype(np.uint32)

    return x.result(value)


def _table(table: int, a: Array, b: Array, c: Array) -> Array:
    """Three inputs by a truth table: bit 4a + 2b + c of it."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
    for index in range(8):
        if table >> index & 1:
            total = total | (
                (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            )
    return total


def _logic(x: _Parts) -> Operation:
    """LOP3.LUT [p,] d, a, b, c, table, q: p = d is not 0, or q."""
    x.only("LUT")
    rest = list(x.operands)
    flag = rest.pop(0) if _is_predicate(rest[0]) else None
    name, table, either = rest[0], int(rest[4], 16), x.registers.condition(rest[5])
    a, b, c = (x.registers.integer(one) for one in rest[1:4])
    registers = x.registers

    def run(mask: Any) -> None:
        value = _table(table, a(), b(), c())
        registers.put(name, value, mask)
        if flag is not None:
            registers.put_condition(flag, (value != 0) | either(), mask)

    return run


def _predicate_logic(x: _Parts) -> Operation:
    x.only("LUT")
    first, second = x.operands[:2]
    a, b, c = (x.registers.condition(one) for one in x.operands[2:5])
    tables = [int(one, 16) for one in x.operands[5:7]]
    registers = x.registers

    def run(mask: Any) -> None:
        inputs = a(), b(), c()
        values = [_table(table, *inputs) for table in tables]
        registers.put_condition(first, values[0], mask)
        registers.put_condition(second, values[1], mask)

    return run


def _permute(x: _Parts) -> Operation:
    """PRMT d, a, selector, c: bytes of the pair (c, a); a selector of 8 and more: its sign."""
    x.only()
    a, selector, c = x.integers()

    def value() -> Array:
        pair = _wide(a()) | _wide(c()) << _U64(32)
        choice, total = _wide(selector()), np.zeros(x.registers.lanes, _U64)
        for place in range(4):
            nibble = choice >> _U64(4 * place) & _U64(15)
            byte = pair >> ((nibble & _U64(7)) * _U64(8)) & _U64(0xFF)
            sign = np.where(byte & _U64(0x80), _U64(0xFF), _U64(0))
            total = total | np.where(nibble & _U64(8), sign, byte) << _U64(8 * place)
        return total.astype(np.uint32)

    return x.result(value)


def _add(x: _Parts) -> Operation:
    x.only()
    a, b = x.integers()
    return x.result(lambda: a() + b())


def _least(x: _Parts, value: Get, other: Get, choice: str) -> Operation:
    """The smaller of two where the predicate holds, else the larger."""
    smaller = x.registers.condition(choice)
    return x.result(
        lambda: np.where(smaller(), np.minimum(value(), other()), np.maximum(value(), other()))
    )


def _add_least(x: _Parts) -> Operation:
    x.only("U32")
    a, b = (x.registers.integer(one) for one in x.operands[1:3])
    if "U32" in x.suffixes:
        return _least(x, lambda: a() + b(), x.registers.integer(x.operands[3]), x.operands[4])
    sum_ = lambda: (a() + b()).view(np.int32)  # noqa: E731
    return _least(x, sum_, x.registers.signed(x.operands[3]), x.operands[4])


def _integer_least(x: _Parts) -> Operation:
    x.only("U32")
    get = x.registers.integer if "U32" in x.suffixes else x.registers.signed
    return _least(x, get(x.operands[1]), get(x.operands[2]), x.operands[3])


def _select(x: _Parts) -> Operation:
    x.only()
    a, b = (x.registers.integer(one) for one in x.operands[1:3])
    which = x.registers.condition(x.operands[3])
    return x.result(lambda: np.where(which(), a(), b()))


# ----------------------------------------------------------------------------------- comparisons

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": operator.eq, "LT": operator.lt, "LE": operator.le,
    "GT": operator.gt, "GE": operator.ge,
    "NE": lambda a, b: (a < b) | (a > b),
    # or not a number
    "NEU": operator.ne, "GEU": lambda a, b: ~(a < b), "GTU": lambda a, b: ~(a <= b),
    "LEU": lambda a, b: ~(a > b), "LTU": lambda a, b: ~(a >= b),
    "EQU": lambda a, b: ~((a < b) | (a > b)),
    "NUM": lambda a, b: (a == a) & (b == b), "NAN": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def _set_predicate(x: _Parts, get: Callable[[str], Get]) -> Operation:
    """ISETP, FSETP: two predicates, of the comparison and of its contrary, each with a third."""
    (compare,) = x.suffixes & set(_COMPARE)
    (combine,) = x.suffixes & set(_COMBINE)
    x.only(compare, combine, "U32", "EX", "FTZ")
    first, second, a, b, other = x.operands[:5]
    left, right, third = get(a), get(b), x.registers.condition(other)
    lower = x.registers.condition(x.operands[5]) if "EX" in x.suffixes else None
    registers, join = x.registers, _COMBINE[combine]

    def run(mask: Any) -> None:
        if lower is None:
            told = _COMPARE[compare](left(), right())
        elif compare == "NE":
            told = (left() != right()) | lower()
        else:  # the upper halves decide, unless they are equal
            strictly = _COMPARE[compare.replace("E", "T")] if compare != "EQ" else None
            above = strictly(left(), right()) if strictly else False
            told = above | ((left() == right()) & lower())
        told, extra = np.broadcast_to(told, (registers.lanes,)), third()
        values = join(told, extra), join(~told, extra)
        registers.put_condition(first, values[0], mask)
        registers.put_condition(second, values[1], mask)

    return run


def _integer_predicate(x: _Parts) -> Operation:
    return _set_predicate(x, x.registers.integer if "U32" in x.suffixes else x.registers.signed)


def _float_predicate(x: _Parts) -> Operation:
    return _set_predicate(x, x.registers.floating)


# ---------------------------------------------------------------------------------------- floats


def _round_like(exact: Array, suffixes: frozenset[str]) -> Array:
    """Return float64 as float32, rounded in the direction that a suffix names."""
    near = exact.astype(np.float32)
    if "RM" in suffixes:
        return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    if "RP" in suffixes:
        return np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    if "RZ" in suffixes:
        return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return near


def _arithmetic(x: _Parts, compute: Callable[..., Any]) -> Operation:
    x.only("FTZ", "RM", "RP", "RZ")
    inputs, suffixes = x.floats(), x.suffixes
    double = "FFMA" in x.opcode or suffixes - {"FTZ"}

    def value() -> Array:
        given = [np.asarray(get()) for get in inputs]
        if double:
            exact = compute(*(one.astype(np.float64) for one in given))
            return _round_like(np.asarray(exact), suffixes)
        return np.asarray(compute(*given), np.float32)

    return x.result(value)


def _float_least(x: _Parts) -> Operation:
    """A number wins over what is none, unless NAN is asked for."""
    x.only("FTZ", "NAN")
    a, b = x.floats(1, 3)
    smaller = x.registers.condition(x.operands[3])
    low, high = (np.minimum, np.maximum) if "NAN" in x.suffixes else (np.fmin, np.fmax)
    return x.result(lambda: np.where(smaller(), low(a(), b()), high(a(), b())))


def _float_select(x: _Parts) -> Operation:
    x.only("FTZ")
    a, b = x.floats(1, 3)
    which = x.registers.condition(x.operands[3])
    return x.result(lambda: np.where(which(), a(), b()))


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


_SPECIAL: dict[str, Callable[[Array], Array]] = {
    "EX2": lambda v: _flush(np.exp2(_flush(v).astype(np.float64)).astype(np.float32)),
    "LG2": lambda v: np.log2(_flush(v).astype(np.float64)).astype(np.float32),
    "RCP": lambda v: (1.0 / v.astype(np.float64)).astype(np.float32),
    "RSQ": lambda v: (1.0 / np.sqrt(v.astype(np.float64))).astype(np.float32),
    "SQRT": lambda v: np.sqrt(v.astype(np.float64)).astype(np.float32),
    "TANH": lambda v: np.tanh(v.astype(np.float64)).astype(np.float32),
}


def _special(x: _Parts) -> Operation:
    (which,) = x.suffixes
    (get,) = x.floats()
    if which not in _SPECIAL:
        raise NotImplementedError(x.opcode)
    return x.result(lambda: _SPECIAL[which](np.asarray(get())))


def _check_division(x: _Parts) -> Operation:
    """FCHK: whether a/b needs the long way, by the exponents that the short way has no room for.

    What the hardware does is not published; it matters for numbers near the ends of the range only.
    """
    x.only()
    flag = x.operands[0]
    a, b = x.floats()
    registers = x.registers

    def run(mask: Any) -> None:
        top, bottom = np.asarray(a()), np.asarray(b())
        exponents = [(one.view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(np.int32)
                     for one in (top, bottom)]  # fmt: skip
        apart = exponents[0] - exponents[1]
        bad = (exponents[1] < 2) | (exponents[1] > 252) | (exponents[0] == 255)
        bad |= (top != 0) & ((exponents[0] < 25) | (apart < -125) | (apart > 125))
        registers.put_condition(flag, bad, mask)

    return run


# ----------------------------------------------------------------------------------- conversions


def _to_float(x: _Parts) -> Operation:
    """I2F, I2FP."""
    x.only("F32", "U32", "S32", "RP", "RZ", "RM")
    get = x.registers.integer if "U32" in x.suffixes else x.registers.signed
    source = get(x.operands[1])
    return x.result(lambda: _round_like(np.asarray(source()).astype(np.float64), x.suffixes))


def _to_integer(x: _Parts) -> Operation:
    """F2I: towards zero, to the nearest number that there is; NaN is 0."""
    x.only("TRUNC", "NTZ", "FTZ", "U32")
    if "TRUNC" not in x.suffixes:
        raise NotImplementedError(x.opcode)
    (get,) = x.floats()
    kind = np.uint32 if "U32" in x.suffixes else np.int32
    low, high = float(np.iinfo(kind).min), float(np.iinfo(kind).max)

    def value() -> Array:
        number = np.nan_to_num(np.asarray(get(), np.float64), nan=0.0, posinf=high, neginf=low)
        return np.clip(np.trunc(number), low, high).astype(np.int64).astype(kind)

    return x.result(value)


def to_bf16(x: Array) -> Array:
    """Return the upper 16 bits of a float32, rounded to the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint32(0x7FFF), rounded)


def _pack(x: _Parts) -> Operation:
    """F2FP.BF16.F32.PACK_AB d, high, low."""
    if x.suffixes not in ({"BF16", "F32", "PACK_AB"}, {"F16", "F32", "PACK_AB"}):
        raise NotImplementedError(x.opcode)
    high, low = x.floats()
    brain = "BF16" in x.suffixes

    def narrow(value: Any) -> Array:
        number = np.asarray(value, np.float32)
        if brain:
            return to_bf16(number)
        return number.astype(np.float16).view(np.uint16).astype(np.uint32)

    return x.result(lambda: narrow(high()) << np.uint32(16) | narrow(low()))


def _halves(text: str, registers: Registers, brain: bool) -> Callable[[], list[Array]]:
    """Return how to read two numbers of 16 bits, low and high, as float32."""
    name = text.lstrip("-")
    chosen = re.fullmatch(r"(.*?)\.(H0_H0|H1_H1|H1_H0)", name)
    bits = registers.integer(chosen[1] if chosen else name)
    order = {"H0_H0": (0, 0), "H1_H1": (1, 1)}.get(chosen[2] if chosen else "", (0, 1))
    sign = np.float32(-1 if text.startswith("-") else 1)

    def get() -> list[Array]:
        word = np.asarray(bits())
        found = []
        for half in order:
            low = word >> np.uint32(16 * half) & np.uint32(0xFFFF)
            number = (
                (low << np.uint32(16)).view(np.float32)
                if brain
                else low.astype(np.uint16).view(np.float16).astype(np.float32)
            )
            found.append(sign * number)
        return found

    return get


def _half_add(x: _Parts) -> Operation:
    """HADD2.F32 d, -RZ, half: a conversion."""
    if x.suffixes != {"F32"} or x.operands[1] != "-RZ":
        raise NotImplementedError(x.opcode)
    get = _halves(x.operands[2], x.registers, brain=False)
    return x.result(lambda: get()[0])


def _half_constant(x: _Parts) -> Operation:
    """HFMA2.MMA d, -RZ, RZ, high, low: how the compiler spells a constant."""
    if x.operands[1:3] != ["-RZ", "RZ"] or x.suffixes - {"MMA", "BF16_V2"}:
        raise NotImplementedError(f"{x.opcode} {x.operands}")
    numbers = [float(one) for one in x.operands[3:5]]
    if "BF16_V2" in x.suffixes:
        high, low = (int(to_bf16(np.float32([n]))[0]) for n in numbers)  # type: ignore[list-item]
    else:
        high, low = (int(np.float16(n).view(np.uint16)) for n in numbers)
    value = np.uint32(high << 16 | low)
    return x.result(lambda: value)  # type: ignore[arg-type, return-value]


def _half_least(x: _Parts) -> Operation:
    """HMNMX2: of each half."""
    x.only("BF16_V2", "NAN")
    brain = "BF16_V2" in x.suffixes
    a, b = (_halves(one, x.registers, brain) for one in x.operands[1:3])
    smaller = x.registers.condition(x.operands[3])
    low, high = (np.minimum, np.maximum) if "NAN" in x.suffixes else (np.fmin, np.fmax)

    def value() -> Array:
        words = []
        for left, right in zip(a(), b(), strict=True):
            chosen = np.where(smaller(), low(left, right), high(left, right))
            words.append(
                chosen.view(np.uint32) >> np.uint32(16)
                if brain
                else chosen.astype(np.float16).view(np.uint16).astype(np.uint32)
            )
        return words[0] | words[1] << np.uint32(16)

    return x.result(value)


# ------------------------------------------------------------------------------ constants, warps


def _constant(x: _Parts) -> Operation:
    """LDC, ULDC."""
    x.only("64", "U8")
    name, source = x.operands
    if "64" in x.suffixes:
        pair = np.full(x.registers.lanes, x.registers.constant(source, 8), _U64)
        return lambda mask: x.registers.put_pair(name, pair, mask)
    value = np.uint32(x.registers.constant(source, 1 if "U8" in x.suffixes else 4))
    return x.result(lambda: value)  # type: ignore[arg-type, return-value]


def _special_register(x: _Parts) -> Operation:
    """S2R, S2UR, CS2R."""
    if x.operands[1] == "SRZ":
        zero = np.zeros(x.registers.lanes, _U64)
        if "32" in x.suffixes:
            return x.result(lambda: zero.astype(np.uint32))
        return lambda mask: x.registers.put_pair(x.operands[0], zero, mask)
    if x.operands[1] not in x.special:
        raise NotImplementedError(f"{x.opcode} {x.operands[1]}")
    value = x.special[x.operands[1]]
    return x.result(lambda: value)


def _lanes_of(mask: Any, lanes: int) -> Array:
    """Return the mask, a row for each warp."""
    return np.ones((lanes // 32, 32), bool) if mask is None else mask.reshape(-1, 32)


def _to_uniform(x: _Parts) -> Operation:
    """R2UR: of the first lane that runs it, for the whole warp."""
    x.only()
    get, registers = x.integers()[0], x.registers

    def run(mask: Any) -> None:
        here = _lanes_of(mask, registers.lanes)
        value = np.broadcast_to(get(), (registers.lanes,)).reshape(-1, 32)
        first = np.take_along_axis(value, here.argmax(1)[:, None], 1)
        registers.put(x.operands[0], np.repeat(first, 32), whole_warps(mask))

    return run


def whole_warps(mask: Any) -> Any:
    """Return the mask of all lanes whose warp has a lane in this one."""
    if mask is None:
        return None
    return np.repeat(mask.reshape(-1, 32).any(1), 32)


def _elect(x: _Parts) -> Operation:
    """ELECT p, mask, q: p in the first lane that runs it."""
    if x.operands[1] != "URZ" or x.operands[2] != "PT":
        raise NotImplementedError(f"{x.opcode} {x.operands}")

    def run(mask: Any) -> None:
        here = _lanes_of(mask, x.registers.lanes)
        first = np.zeros_like(here)
        first[np.arange(len(here)), here.argmax(1)] = True
        x.registers.put_condition(x.operands[0], first.reshape(-1), mask)

    return run


def _vote(x: _Parts) -> Operation:
    """VOTE, VOTEU: of the lanes that run it; a set of lanes, a predicate or both."""
    (which,) = x.suffixes
    condition = x.registers.condition(x.operands[-1])
    outputs = x.operands[:-1]
    if which not in ("ANY", "ALL"):
        raise NotImplementedError(x.opcode)

    def run(mask: Any) -> None:
        here = _lanes_of(mask, x.registers.lanes)
        true = condition().reshape(-1, 32) & here
        told = true.any(1) if which == "ANY" else (true == here).all(1)
        ballot = (true * (_U64(1) << np.arange(32, dtype=_U64))).sum(1).astype(np.uint32)
        target = whole_warps(mask) if x.opcode.startswith("VOTEU") else mask
        for name in outputs:
            if _is_predicate(name):
                x.registers.put_condition(name, np.repeat(told, 32), target)
            else:
                x.registers.put(name, np.repeat(ballot, 32), target)

    return run


def _shuffle(x: _Parts) -> Operation:
    """SHFL.BFLY p, d, a, distance, bounds; SHFL.IDX with a lane instead of a distance."""
    kinds = {"BFLY": np.bitwise_xor, "IDX": lambda lanes, lane: lanes // 32 * 32 + lane}
    if len(x.suffixes) != 1 or not x.suffixes <= set(kinds) or x.operands[4] != "0x1f":
        raise NotImplementedError(f"{x.opcode} {x.operands}")
    flag, name, source, given = x.operands[:4]
    get, registers = x.registers.integer(source), x.registers
    number = 0 if given == "RZ" else int(given, 0)
    order = kinds[min(x.suffixes)](np.arange(registers.lanes), number)

    def run(mask: Any) -> None:
        registers.put(name, np.broadcast_to(get(), (registers.lanes,))[order], mask)
        registers.put_condition(flag, np.ones(registers.lanes, bool), mask)

    return run


_REDUCE = {"MAX": np.max, "MIN": np.min, "SUM": np.sum, "OR": np.bitwise_or.reduce}


def _reduce(x: _Parts) -> Operation:
    """REDUX: of the lanes that run it, for the whole warp."""
    (which,) = (x.suffixes - {"S32"}) or {"OR"}
    if which not in _REDUCE:
        raise NotImplementedError(x.opcode)
    get = (x.registers.signed if "S32" in x.suffixes else x.registers.integer)(x.operands[1])
    registers = x.registers

    def run(mask: Any) -> None:
        here = _lanes_of(mask, registers.lanes)
        value = np.broadcast_to(get(), (registers.lanes,)).reshape(-1, 32)
        limits = np.iinfo(value.dtype)
        nothing = {"MAX": limits.min, "MIN": limits.max}.get(which, 0)
        filled = np.where(here, value, value.dtype.type(nothing))
        found = _REDUCE[which](filled, axis=1).astype(value.dtype)
        registers.put(x.operands[0], np.repeat(found, 32), whole_warps(mask))

    return run


def _predicates_to_register(x: _Parts) -> Operation:
    """P2R d, PR, a, which: bits of a, and some predicates."""
    x.only()
    if x.operands[1] != "PR":
        raise NotImplementedError(f"{x.opcode} {x.operands}")
    which = int(x.operands[3], 0)
    source, registers = x.registers.integer(x.operands[2]), x.registers

    def value() -> Array:
        total = np.zeros(registers.lanes, np.uint32)
        for bit in range(7):
            total |= registers.predicate[bit].astype(np.uint32) << np.uint32(bit)
        return (source() & np.uint32(~which & 0xFFFFFFFF)) | (total & np.uint32(which))

    return x.result(value)


def _register_to_predicates(x: _Parts) -> Operation:
    """R2P PR, a, which."""
    x.only()
    which = int(x.operands[2], 0)
    source, registers = x.registers.integer(x.operands[1]), x.registers

    def run(mask: Any) -> None:
        word = source()
        for bit in range(7):
            if which >> bit & 1:
                registers.put_condition(f"P{bit}", (word >> np.uint32(bit) & 1).astype(bool), mask)

    return run


_OPERATIONS: dict[str, Callable[[_Parts], Operation]] = {
    "MOV": _move, "UMOV": _move, "IADD3": _add3, "IMAD": _multiply_add, "LEA": _shift_add,
    "SHF": _shift, "LOP3": _logic, "PLOP3": _predicate_logic, "PRMT": _permute, "VIADD": _add,
    "VIADDMNMX": _add_least, "VIMNMX": _integer_least, "IMNMX": _integer_least, "SEL": _select,
    "ISETP": _integer_predicate, "FSETP": _float_predicate,
    "FADD": lambda x: _arithmetic(x, operator.add),
    "FMUL": lambda x: _arithmetic(x, operator.mul),
    "FFMA": lambda x: _arithmetic(x, lambda a, b, c: a * b + c),
    "FMNMX": _float_least, "FSEL": _float_select, "MUFU": _special, "FCHK": _check_division,
    "I2F": _to_float, "I2FP": _to_float, "F2I": _to_integer, "F2FP": _pack, "HADD2": _half_add,
    "HFMA2": _half_constant, "HMNMX2": _half_least, "LDC": _constant, "ULDC": _constant,
    "S2R": _special_register, "S2UR": _special_register, "CS2R": _special_register,
    "R2UR": _to_uniform, "ELECT": _elect, "VOTE": _vote, "VOTEU": _vote, "SHFL": _shuffle,
    "REDUX": _reduce,
    "P2R": _predicates_to_register, "R2P": _register_to_predicates,
}  # fmt: skip
