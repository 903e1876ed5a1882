"""Operands of disassembled instructions, read and written for all lanes of a launch at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Get = Callable[[], Array]

WARP = 32
_FLOATS = {"INF": np.inf, "QNAN": np.nan}


def split(operands: str) -> list[str]:
    """Return the operands of a listing's line."""
    return [one.strip().replace(".reuse", "") for one in operands.split(",")] if operands else []


class Registers:
    """The registers of every lane; what is uniform is kept once a lane too, equal in a warp.

    They begin as garbage: a value that was never computed must not pass for 0.
    """

    def __init__(self, lanes: int, constants: dict[int, bytes]) -> None:
        self.lanes = lanes
        self.vector = np.full((256, lanes), 0x7FE5E5E5, np.uint32)
        self.uniform = np.full((64, lanes), 0x7FE5E5E5, np.uint32)
        self.vector[255] = self.uniform[63] = 0
        self.predicate = np.zeros((8, lanes), bool)
        self.uniform_predicate = np.zeros((8, lanes), bool)
        self.predicate[7] = self.uniform_predicate[7] = True
        self.constants = constants

    # ------------------------------------------------------------------------------ whole names

    def find(self, name: str, offset: int = 0) -> Array | None:
        """Return the array of R4 or UR4 (offset registers further); None for RZ and URZ."""
        found = re.fullmatch(r"(U?)R(\d+|Z)(?:\.64)?", name)
        if found is None:
            raise NotImplementedError(f"operand {name}")
        if found[2] == "Z":
            return None
        return (self.uniform if found[1] else self.vector)[int(found[2]) + offset]

    def constant(self, text: str, size: int = 4) -> int:
        """Return a number of the constant bank.

        Raises:
            NotImplementedError: what the driver stores there is unknown.
        """
        found = re.fullmatch(r"c\[0x0\]\[(?:RZ|URZ|(0x[0-9a-f]+))\]", text)
        offset = int(found[1] or "0", 16) if found else -1
        for start, data in self.constants.items():
            if start <= offset and offset + size <= start + len(data):
                return int.from_bytes(data[offset - start : offset - start + size], "little")
        raise NotImplementedError(f"constant {text}, {size} bytes")

    # ---------------------------------------------------------------------------------- reading

    def _bits(self, text: str, offset: int = 0) -> Get:
        """Return how to read 32 bits without a sign."""
        if text.startswith("c["):
            value = np.uint32(self.constant(text))
            return lambda: value  # type: ignore[return-value]
        array = self.find(text, offset)
        if array is None:
            array = np.zeros(self.lanes, np.uint32)
        return lambda: array

    def integer(self, text: str, offset: int = 0) -> Get:
        """Return how to read 32 bits: a register, a constant or a number, negated or inverted."""
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            value = np.uint32(int(text, 0) & 0xFFFFFFFF)
            return lambda: value  # type: ignore[return-value]
        if text.startswith("-"):
            positive = self._bits(text[1:], offset)
            return lambda: (~positive()) + np.uint32(1)
        if text.startswith("~"):
            plain = self._bits(text[1:], offset)
            return lambda: ~plain()
        if text.startswith("|"):
            signed = self._bits(text.strip("|"), offset)
            return lambda: np.abs(signed().view(np.int32)).view(np.uint32)
        return self._bits(text, offset)

    def signed(self, text: str) -> Get:
        """Return how to read 32 bits as a signed number."""
        get = self.integer(text)
        return lambda: get().view(np.int32)

    def pair(self, text: str) -> Get:
        """Return how to read 64 bits: two registers, RZ or a number."""
        if text in ("RZ", "URZ", "SRZ"):
            zero = np.zeros(self.lanes, np.uint64)
            return lambda: zero
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            value = np.uint64(int(text, 16) & 0xFFFFFFFFFFFFFFFF)
            return lambda: value  # type: ignore[return-value]
        low, high = self._bits(text), self._bits(text, 1)
        return lambda: low().astype(np.uint64) | high().astype(np.uint64) << np.uint64(32)

    def floating(self, text: str) -> Get:
        """Return how to read a float32, with its sign and magnitude signs."""
        found = re.fullmatch(r"([-+]?)(\|?)([^|]*?)(\|?)", text)
        assert found is not None
        name = found[3]
        if name in _FLOATS or re.fullmatch(r"[\d.]+(e[-+]?\d+)?", name):
            number = np.float32(_FLOATS.get(name) or float(name))
            value = -number if found[1] == "-" else number
            return lambda: value  # type: ignore[return-value]
        bits = self._bits(name)
        if found[2] and found[1] == "-":
            return lambda: -np.abs(bits().view(np.float32))
        if found[2]:
            return lambda: np.abs(bits().view(np.float32))
        if found[1] == "-":
            return lambda: -bits().view(np.float32)
        return lambda: bits().view(np.float32)

    def condition(self, text: str) -> Get:
        """Return how to read a predicate: P0, !UP0, PT."""
        name = text.lstrip("!")
        array = self.predicate_of(name)
        if text.startswith("!"):
            return lambda: ~array
        return lambda: array

    def predicate_of(self, name: str) -> Array:
        """Return the array of P0, UP0, PT or UPT."""
        found = re.fullmatch(r"(U?)P(\d|T)", name)
        if found is None:
            raise NotImplementedError(f"predicate {name}")
        all_of_kind = self.uniform_predicate if found[1] else self.predicate
        return all_of_kind[7 if found[2] == "T" else int(found[2])]

    def address(self, text: str, extended: bool = False) -> tuple[Get, bool]:
        """Return how to read a memory operand's address, and whether it has 64 bits.

        Args:
            text: The operand.
            extended: Whether its first register is a pair even if it does not say so.
        """
        found = re.search(r"\[([^\[\]]*)\]$", text)
        if found is None:
            raise NotImplementedError(f"address {text}")
        parts: list[Get] = []
        offset, wide = 0, False
        terms = found[1].split("+")
        if extended and re.fullmatch(r"R\d+", terms[0]):
            terms[0] += ".64"
        is_wide = any(".64" in term for term in terms)
        for term in terms:
            if re.fullmatch(r"-?0x[0-9a-f]+", term):
                offset = int(term, 16)
            elif term.endswith(".64") or (is_wide and term.startswith("UR") and term != "URZ"):
                parts.append(self.pair(term.removesuffix(".64")))
                wide = True
            elif term not in ("RZ", "URZ"):
                one = self.integer(term.removesuffix(".U32"))
                parts.append(lambda one=one: one().astype(np.int64).view(np.uint64))  # type: ignore[misc]
        move = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)
        base = np.zeros(self.lanes, np.uint64)

        def get() -> Array:
            total = base + move
            for part in parts:
                total = total + part()
            return total & mask

        return get, wide

    # ---------------------------------------------------------------------------------- writing

    def put(self, name: str, value: Any, mask: Array | None, offset: int = 0) -> None:
        """Write 32 bits, of any type, to the lanes of the mask (None: to all)."""
        array = self.find(name, offset)
        if array is None:
            return
        write(array, value, mask)

    def put_pair(self, name: str, value: Array, mask: Array | None) -> None:
        """Write 64 bits to two registers."""
        self.put(name, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)
        self.put(name, (value >> np.uint64(32)).astype(np.uint32), mask, 1)

    def put_condition(self, name: str, value: Any, mask: Array | None) -> None:
        """Write a predicate; PT is not written."""
        if not name.endswith("T"):
            write(self.predicate_of(name), value, mask)


def write(array: Array, value: Any, mask: Array | None) -> None:
    """Write to the lanes of the mask; floats and signed numbers keep their bits."""
    value = np.asarray(value)
    if array.dtype == np.uint32 and value.dtype in (np.float32, np.int32):
        value = value.view(np.uint32)
    assert value.dtype == array.dtype, value.dtype
    if mask is None:
        array[...] = value
    else:
        np.copyto(array, value, where=mask)
