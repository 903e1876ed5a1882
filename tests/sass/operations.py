"""Registers and operations of disassembled code, for all lanes of a launch at once.

The instruction set is not published: operations follow from their names, and are right if kernels
that are run this way give the right losses and gradients. The table has what the row kernels
execute on sm_90; anything else raises KeyError or NotImplementedError. Fused multiply-adds are
rounded twice (to float64 first), which differs in the last bit at most.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WARP = 32
LOW = 0xFFFFFFFF
_PREDICATE = re.compile(r"(U?)P([0-6T])")
_REGISTER = re.compile(r"(U?)R(\d+)")
_SIGNS = {"-": np.negative, "~": np.invert, "!": np.invert}


class Registers:
    """The registers of every lane; a uniform register is stored for each lane of its warp.

    They begin as garbage: a value that was never computed must not pass for 0. The kind of an
    operand is one of numpy's letters for types, or "w": 32 bits without a sign, widened to 64, so
    that the two's complement of 0 carries.

    Args:
        lanes: The number of lanes.
        special: The registers that S2R reads, by name.
        constants: What the constant bank holds, by offset.
    """

    def __init__(
        self, lanes: int, special: Mapping[str, Array], constants: Mapping[int, bytes]
    ) -> None:
        self.lanes, self.special, self.constants = lanes, special, constants
        self.words = np.full((160, lanes, 2), 0x7FE5E5E5, np.uint32)  # 256, 64 uniform; in pairs
        self.predicates = np.zeros((16, lanes), bool)
        self.predicates[[7, 15]] = True

    def array(self, name: str, kind: str = "I", offset: int = 0) -> Array:
        """Return the memory of a predicate, or as `kind` of the register `offset` after `name`.

        Writing to it changes the register; for RZ it is new zeros. `kind` must not be "w".
        NotImplementedError for other names.
        """
        if match := _PREDICATE.fullmatch(name):
            return self.predicates[8 * bool(match[1]) + (7 if match[2] == "T" else int(match[2]))]
        if name in ("RZ", "URZ", "SRZ"):
            return np.zeros(self.lanes, kind)
        if (match := _REGISTER.fullmatch(name)) is None:
            raise NotImplementedError(f"operand {name}")
        number, typed = int(match[2]) + offset + 256 * bool(match[1]), self.words.view(kind)
        return typed[number // 2, :, number % 2 * typed.shape[2] // 2]

    def read(self, text: str, kind: str) -> Array:
        """Return an operand in each lane as `kind`, with its sign or negation; it may be a view."""
        if text == "PR":  # the predicates as bits
            return np.packbits(self.predicates[:7], 0, "little")[0].astype(np.uint32)
        sign, name = (text[0], text[1:]) if text[0] in "-+~!" else ("", text)
        value = self._unsigned(name.strip("|"), "I" if kind == "w" else kind)
        if name.startswith("|"):
            value = np.fabs(value)
        if kind == "w":
            return (~value if sign else value).astype(np.uint64) + np.uint64(sign == "-")
        return _SIGNS[sign](value) if sign in _SIGNS else value

    def _unsigned(self, name: str, kind: str) -> Array:
        """Return the value of an operand whose sign was removed."""
        if name.startswith("c["):
            return np.full(self.lanes, self._constant(name, np.dtype(kind)))
        if name in self.special:
            return self.special[name]
        if name.startswith("0x"):
            return np.full(self.lanes, int(name, 16), "Q" if kind == "Q" else "I").view(kind)
        if kind == "f" and not re.match("U?R", name):
            return np.full(self.lanes, float(name.replace("QNAN", "nan")), np.float32)
        return self.array(name.removesuffix(".H0_H0") if kind == "e" else name, kind)

    def _constant(self, text: str, kind: np.dtype[Any]) -> Any:
        bank, offset = (int(number, 16) for number in re.findall("0x[0-9a-f]+", text))
        for start, data in self.constants.items():
            if bank == 0 and 0 <= offset - start <= len(data) - kind.itemsize:
                return np.frombuffer(data, kind, 1, offset - start)[0]
        raise NotImplementedError(f"constant {text}, {kind.itemsize} bytes")

    def address(self, text: str) -> Array:
        """Return the address of a memory operand in each lane."""
        inner = text[text.rindex("[") + 1 : -1]
        total = sum(
            self.read(term.removesuffix(".64"), "Q" if ".64" in inner or "0x" in term else "w")
            for term in inner.split("+")
        )
        return total & np.uint64(0xFFFFFFFFFFFFFFFF if ".64" in inner else LOW)

    def write(self, name: str, kind: str, value: Array, mask: Array) -> None:
        """Write an operand in the lanes of a mask, a uniform one in their warps; never PT or RZ."""
        if name not in ("PT", "UPT", "RZ", "URZ"):
            where = whole_warps(mask) if name.startswith("U") else mask
            np.copyto(self.array(name, kind), value, where=where)


def split(operands: str) -> list[str]:
    """Return the operands that a listing separates by commas."""
    return [text.strip().replace(".reuse", "") for text in operands.split(",") if operands]


def execute(opcode: str, operands: str, registers: Registers, mask: Array) -> None:
    """Run an instruction, but no memory access or branch, on a mask's lanes; raise if unknown."""
    if opcode.split(".")[0] in NOTHING:
        return
    signature, function = OPERATIONS.get(opcode) or OPERATIONS[opcode.removeprefix("U")]
    texts, (outputs, inputs) = split(operands), (x.split() for x in signature.split("="))
    targets, values = [], []
    for kind in outputs:  # an optional predicate can be missing
        absent = kind == "?" and not _PREDICATE.fullmatch(texts[0])
        targets.append(("PT" if absent else texts.pop(0), kind))
    for kind in inputs:
        text = "" if kind == "mask" else texts.pop(0) if texts or kind != "?" else "!PT"
        if kind == "mask":
            values.append(mask)
        elif kind == "n":
            values.append(0 if text == "RZ" else int(text, 0))
        elif len(kind) == 1:
            values.append(registers.read(text, kind))
        elif text.removeprefix("U") != kind:
            raise NotImplementedError(f"{opcode} without {kind}")
    if texts:
        raise NotImplementedError(f"{opcode} with {', '.join(texts)}")
    results = function(*values)
    for target, result in zip(targets, results if len(targets) > 1 else (results,), strict=True):
        registers.write(*target, result, mask)


# --------------------------------------------------------------------------------- the functions


def _same(a: Array) -> Array:
    return a


def _choose(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _carry(total: Array) -> tuple[Array, Array]:
    return total, total > LOW


def _table(a: Array, b: Array, c: Array, table: int) -> Array:
    """Combine three inputs bit by bit: bits a, b, c select bit 4a + 2b + c of the table."""
    total = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            total |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return total


def _logic(a: Array, b: Array, c: Array, table: int, other: Array) -> tuple[Array, Array]:
    value = _table(a, b, c, table)
    return (value != 0) | other, value


def _permute(a: Array, selector: int, c: Array) -> Array:
    """Select four bytes of the pair (c, a); a nibble of 8 or more repeats the byte's sign bit."""
    pair, total = a | c << 32, np.zeros_like(a)
    for place in range(0, 32, 4):
        nibble = selector >> place & 15
        byte = pair >> 8 * (nibble & 7) & 255
        total |= (byte // 128 * 255 if nibble & 8 else byte) << 2 * place
    return total


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _moderate(x: Array) -> Array:
    return (np.abs(x) > 2.0**-100) & (np.abs(x) < 2.0**100)


def _bf16(x: Array) -> Array:
    """Return the upper 16 bits of a float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(x != x, np.uint32(0x7FFF), (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _f16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def whole_warps(mask: Array) -> Array:
    """Return a mask of all lanes whose warp has a lane in `mask`."""
    return mask.reshape(-1, WARP).any(1).repeat(WARP)


def _first(mask: Array) -> Array:
    """Return for each lane the first lane of its warp that is in the mask."""
    return mask.reshape(-1, WARP).argmax(1).repeat(WARP) + np.arange(len(mask)) // WARP * WARP


def _maximum(a: Array, mask: Array) -> Array:
    """Return for each lane the maximum over the lanes of its warp that are in the mask."""
    return np.where(mask, a, np.int32(-(2**31))).reshape(-1, WARP).max(1).repeat(WARP)


def _compare(
    test: Callable[..., Any], join: Callable[..., Any], a: Array, b: Array, *others: Array
) -> tuple[Array, Array]:
    """Return two predicates, the test and its negation, each joined with the first of `others`."""
    value = test(a, b, *others[1:])
    return join(value, others[0]), join(~value, others[0])


# ------------------------------------------------------------------------------------- the table

#: Opcodes that do nothing here: the lanes run one after the other, so memory is in order.
NOTHING = ("NOP", "MEMBAR", "CCTL", "FENCE", "YIELD", "UCGABAR_ARV")
#: Opcode: outputs = inputs, and a function of the inputs. A uniform instruction is the same with a
#: U in front. Letters are the types of operands, "n" a number of the encoding; predicates at the
#: end can be missing. "mask": the lanes that run; another word: what the operand has to be.
OPERATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    **dict.fromkeys(("MOV", "S2R", "S2UR", "LDC"), ("I = I", _same)),
    **dict.fromkeys(("CS2R", "LDC.64"), ("Q = Q", _same)),
    "LDC.U8": ("I = B", _same),
    "VIADD": ("I = I I", operator.add),
    "VIADDMNMX": ("i = i i i PT", lambda a, b, c: np.minimum(a + b, c)),
    **dict.fromkeys(
        ("IADD3", "IADD3.X"),
        ("I ? = w w w ? ?", lambda a, b, c, p, q: _carry(a + b + c + p + q)),
    ),
    **dict.fromkeys(
        ("IMAD", "IMAD.IADD", "IMAD.MOV.U32", "IMAD.SHL.U32", "IMAD.U32", "IMAD.X"),
        ("I = I I I ?", lambda a, b, c, p: a * b + c + p),
    ),
    "IMAD.WIDE": ("Q = i i Q", lambda a, b, c: (a.astype("q") * b).view("Q") + c),
    "IMAD.WIDE.U32": ("Q = w w Q", lambda a, b, c: a * b + c),
    "LEA": ("I ? = w w n", lambda a, b, n: _carry((a << n & LOW) + b)),
    **dict.fromkeys(
        ("LEA.HI", "LEA.HI.X"),
        ("I = w w w n ?", lambda a, b, c, n, p: ((a | c << 32) << n >> 32) + b + p),
    ),
    "LEA.HI.X.SX32": ("i = i i n ?", lambda a, b, n, p: (a.astype("q") << n >> 32) + b + p),
    "SHF.L.U32": ("I = w n RZ", operator.lshift),
    "SHF.L.U64.HI": ("I = w n w", lambda a, n, c: (a | c << 32) << n >> 32),
    "SHF.R.U32": ("I = w n RZ", operator.rshift),
    "SHF.R.U32.HI": ("I = RZ w w", lambda n, a: a >> np.minimum(n, 63)),
    "SHF.R.S32.HI": ("i = RZ n i", lambda n, a: a >> min(n, 31)),
    "SHF.R.S64": ("i = RZ n i", lambda n, a: a.astype("q") << 32 >> n),
    "LOP3.LUT": ("? I = I I I n ?", _logic),
    "PLOP3.LUT": ("? ? = ? ? ? n n", lambda a, b, c, *n: tuple(_table(a, b, c, x) for x in n)),
    "PRMT": ("I = w n w", _permute),
    "SEL": ("I = I I ?", _choose),
    "P2R": ("I = I RZ n", lambda predicates, n: predicates & n),
    # floating-point numbers
    "FADD": ("f = f f", operator.add),
    "FMUL": ("f = f f", operator.mul),
    "FFMA": ("f = f f f", lambda a, b, c: a.astype(float) * b + c),
    "FMNMX": ("f = f f ?", lambda a, b, p: np.where(p, np.fmin(a, b), np.fmax(a, b))),
    "FSEL": ("f = f f ?", _choose),
    # whether a/b needs the slow path: that is not published, and only matters for extreme values
    "FCHK": (
        "? = f f",
        lambda a, b: ~(_moderate(b) & (_moderate(a) & _moderate(a / b) | (a == 0))),
    ),
    "MUFU.EX2": ("f = f", lambda a: _flush(np.exp2(_flush(a).astype(float)).astype("f"))),
    "MUFU.RCP": ("f = f", lambda a: 1 / a.astype(float)),
    "I2FP.F32.S32": ("f = i", lambda a: a.astype(float)),
    "F2I.TRUNC.NTZ": (
        "i = f",
        lambda a: np.nan_to_num(a).astype(float).clip(-(2.0**31), 2.0**31 - 1).astype("i"),
    ),
    "F2FP.BF16.F32.PACK_AB": ("I = f f", lambda high, low: _bf16(high) << 16 | _bf16(low)),
    "HADD2.F32": ("f = -RZ e", _same),  # a conversion
    "HFMA2.MMA": ("I = -RZ RZ f f", lambda high, low: _f16(high) << 16 | _f16(low)),  # a constant
    # lanes of a warp
    "R2UR": ("I = I mask", lambda a, mask: a[_first(mask)]),
    "ELECT": ("? = RZ PT mask", lambda mask: _first(mask) == np.arange(len(mask))),
    "VOTE.ANY": ("? = ? mask", lambda p, mask: whole_warps(p & mask)),
    "SHFL.BFLY": ("? I = I n 0x1f", lambda a, n: (True, a[np.arange(len(a)) ^ n])),
    "SHFL.IDX": ("? I = I n 0x1f", lambda a, n: (True, a[n::WARP].repeat(WARP))),
    "REDUX.MAX.S32": ("i = i mask", _maximum),
}
#: Tests by their part of an opcode; with a U at the end they hold for NaN, too.
_TESTS: dict[str, Callable[..., Any]] = {
    **{name.upper(): getattr(operator, name) for name in ("eq", "lt", "gt", "ge")},
    "NE": lambda a, b: (a < b) | (a > b),
    "NEU": operator.ne,
    "GEU": lambda a, b: ~(a < b),
    "LEU": lambda a, b: ~(a > b),
    "NUM": lambda a, b: (a == a) & (b == b),
}
_JOINS = {"AND": operator.and_, "OR": operator.or_}
_FORMS = {"ISETP.{}.{}": "i", "ISETP.{}.U32.{}": "I", "FSETP.{}.{}": "f"}
OPERATIONS |= {
    form.format(name, how): (f"? ? = {kind} {kind} ?", partial(_compare, _TESTS[name], _JOINS[how]))
    for (form, kind), name, how in product(_FORMS.items(), _TESTS, _JOINS)
}
#: Comparisons of the upper halves of 64 bits, after that of the lower ones.
_HALVES: dict[str, Callable[..., Any]] = {
    "NE": lambda a, b, lower: (a != b) | lower,
    "GE": lambda a, b, lower: (a > b) | ((a == b) & lower),
}
OPERATIONS |= {
    f"ISETP.{name}.AND.EX": ("? ? = i i ? ?", partial(_compare, test, operator.and_))
    for name, test in _HALVES.items()
}
