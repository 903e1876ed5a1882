"""Memory accesses of a disassembled kernel: global and shared memory, mbarriers, bulk copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .sass_operands import WARP, Array, Get, Registers
from .sass_operations import Operation

#: Where a block's shared memory begins in its window, and the window's upper address half.
SHARED_BEGIN, SHARED_WINDOW = 0x400, 0x7F00
_WIDTHS = {"U8": 1, "U16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Launch:
    """A grid."""

    blocks: int
    cluster: int  # blocks
    threads: int  # of a block
    shared_bytes: int  # of a block
    params: bytes  # the kernel's argument

    def constants(self) -> dict[int, bytes]:
        """Return the constant bank: what the compiler reads there, on sm_90."""

        def word(number: int) -> bytes:
            return number.to_bytes(4, "little")

        return {
            0x0: word(self.threads),
            0x28: word(0),  # the stack
            0x140: word(1),  # that there are clusters
            0x188: word(self.cluster),
            0x208: bytes(8),  # the memory descriptor
            0x210: self.params,
        }


@dataclass
class Mbarrier:
    """The state of one in shared memory."""

    count: int
    pending: int
    bytes: int = 0  # still to come
    phase: int = 0

    def complete(self) -> None:
        """Begin the next phase if this one is over."""
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Memory:
    """Global memory: one piece, from `base` on."""

    data: Array  # uint8
    base: int = 0x7000_0000_0000


class MemoryUnit:
    """The memory that a launch reads and writes.

    Args:
        launch: The grid.
        registers: Of all lanes.
        memory: Global memory.
        completed: Called when an mbarrier may have completed a phase.
    """

    def __init__(
        self, launch: Launch, registers: Registers, memory: Memory, completed: Callable[[], None]
    ) -> None:
        self.launch, self.registers, self.memory = launch, registers, memory
        self.completed = completed
        self.lanes = registers.lanes
        self.block = np.arange(self.lanes) // launch.threads
        self.rank = (self.block % launch.cluster).astype(np.uint32)
        self.stride = (launch.shared_bytes + SHARED_BEGIN + 127) // 128 * 128
        self.shared = np.full(launch.blocks * self.stride, 0xFF, np.uint8)
        self.barriers: dict[tuple[int, int], Mbarrier] = {}

    def build(self, name: str, suffixes: list[str], operands: list[str]) -> Operation | None:
        """Return what an instruction does; None if it is none of memory."""
        if name in ("LDG", "STG", "LD", "ST", "LDS", "STS"):
            return self._access(name, suffixes, operands)
        make = {"UBLKCP": self._bulk_copy, "STAS": self._push, "SYNCS": self._mbarrier}.get(name)
        return make(suffixes, operands) if make else None

    def _shared_index(self, address: Array, where: Array, anywhere: bool) -> Array:
        """Return where in `shared` these lanes' addresses are: their block's own, or a peer's."""
        low = address[where].astype(np.int64)
        rank, offset = low >> 24, (low & 0xFFFFFF) - SHARED_BEGIN
        own = self.rank[where]
        if not anywhere and (rank != own).any():
            raise RuntimeError("another block's shared memory")
        if (rank >= self.launch.cluster).any():
            raise RuntimeError("shared memory of a block that is not there")
        if (offset < 0).any() or (offset >= self.launch.shared_bytes).any():
            raise RuntimeError("an address outside of shared memory")
        return (self.block[where] - own + rank) * self.stride + offset

    def _access(self, name: str, suffixes: list[str], operands: list[str]) -> Operation:
        """A load or a store."""
        size = next((_WIDTHS[one] for one in suffixes if one in _WIDTHS), 4)
        strange = set(suffixes) - {"E", "EF", "STRONG", "SYS", "GPU", "SM", "CONSTANT", *_WIDTHS}
        if strange:
            raise NotImplementedError(f"{name}: {sorted(strange)}")
        loads, shared = name.startswith("L"), name.endswith("S")
        text, register = (operands[1], operands[0]) if loads else (operands[0], operands[1])
        get, wide = self.registers.address(text, extended="E" in suffixes)
        unit = {1: np.uint8, 2: np.uint16}.get(size, np.uint32)
        words = max(1, size // 4)
        sources = [] if loads else [self.registers.integer(register, k) for k in range(words)]

        def run(mask: Array | None) -> None:
            where = np.arange(self.lanes) if mask is None else mask.nonzero()[0]
            address = np.broadcast_to(get(), (self.lanes,))
            for array, lanes, index in self._places(address, where, shared, wide):
                if (index % size).any():
                    raise RuntimeError(f"{name}: an address that is not a multiple of {size}")
                if (index < 0).any() or (index + size > len(array)).any():
                    raise RuntimeError(f"{name}: an address outside of memory")
                first, view = index // min(size, 4), array.view(unit)
                for k in range(words):
                    if not loads:
                        value = np.broadcast_to(sources[k](), (self.lanes,))
                        view[first + k] = value[lanes].astype(unit)
                    elif (target := self.registers.find(register, k)) is not None:
                        target[lanes] = view[first + k].astype(np.uint32)

        return run

    def _places(
        self, address: Array, where: Array, shared: bool, wide: bool
    ) -> list[tuple[Array, Array, Array]]:
        """Return memory, lanes and bytes into it, for each kind of memory."""
        if shared:
            return [(self.shared, where, self._shared_index(address, where, False))]
        if not wide:
            raise NotImplementedError("a global address of 32 bits")
        peers = address[where] >> np.uint64(32) == SHARED_WINDOW
        found = []
        if peers.any():
            some = where[peers]
            found.append((self.shared, some, self._shared_index(address & 0xFFFFFFFF, some, True)))
        if not peers.all():
            some = where[~peers]
            found.append(
                (self.memory.data, some, address[some].astype(np.int64) - self.memory.base)
            )
        return found

    def barrier(self, lane: int, address: int) -> Mbarrier:
        key = self._barrier_key(lane, address)
        if key not in self.barriers:
            raise RuntimeError("an mbarrier used before its initialization")
        return self.barriers[key]

    def _barrier_key(self, lane: int, address: int) -> tuple[int, int]:
        """Return the block whose shared memory it is in, and where."""
        first = int(self.block[lane]) - int(self.rank[lane])
        return first + (address >> 24), address & 0xFFFFFF

    def _parts(self, mask: Array | None) -> list[int]:
        """Return the first lane of each warp that is here."""
        where = np.arange(self.lanes) if mask is None else mask.nonzero()[0]
        _, first = np.unique(where // WARP, return_index=True)
        return [int(one) for one in where[first]]

    def _mbarrier(self, suffixes: list[str], operands: list[str]) -> Operation:
        get, _ = self.registers.address(operands[1])
        source = self.registers.integer(operands[2])

        def init(mask: Array | None) -> None:
            for lane in self._parts(mask):
                count = 0x100000 - (int(np.broadcast_to(source(), (self.lanes,))[lane]) >> 1)
                key = self._barrier_key(lane, int(get()[lane]))
                self.barriers[key] = Mbarrier(count, count)

        expects = "A1T0" not in suffixes  # bytes too

        def arrive(mask: Array | None) -> None:
            for lane in range(self.lanes) if mask is None else mask.nonzero()[0]:
                barrier = self.barrier(lane, int(get()[lane]))
                if expects:
                    barrier.bytes += int(np.broadcast_to(source(), (self.lanes,))[lane])
                barrier.pending -= 1
                barrier.complete()
            self.completed()

        kinds = {
            ("EXCH", "64"): init,
            ("ARRIVE", "TRANS64"): arrive,
            ("ARRIVE", "TRANS64", "A1T0"): arrive,
            ("ARRIVE", "TRANS64", "RED", "A1T0"): arrive,  # a peer's
        }
        if tuple(suffixes) not in kinds:
            raise NotImplementedError(f"SYNCS {suffixes}")
        return kinds[tuple(suffixes)]

    def _push(self, suffixes: list[str], operands: list[str]) -> Operation:
        """STAS [shared address and mbarrier, of a peer], data."""
        size = 4
        for one in suffixes:
            size = _WIDTHS[one] if one in ("64", "128") else 0
        if not size:
            raise NotImplementedError(f"STAS {suffixes}")
        name = operands[0].strip("[]").removesuffix(".64")
        target, barrier_at = self.registers.integer(name), self.registers.integer(name, 1)
        sources = [self.registers.integer(operands[1], k) for k in range(size // 4)]

        def run(mask: Array | None) -> None:
            where = np.arange(self.lanes) if mask is None else mask.nonzero()[0]
            index = self._shared_index(target().astype(np.uint64), where, True)
            if (index % size).any():
                raise RuntimeError(f"STAS: an address that is not a multiple of {size}")
            for k, source in enumerate(sources):
                value = np.broadcast_to(source(), (self.lanes,))
                self.shared.view(np.uint32)[index // 4 + k] = value[where]
            for lane in where:
                barrier = self.barrier(lane, int(barrier_at()[lane]))
                barrier.bytes -= size
                barrier.complete()
            self.completed()

        return run

    def _bulk_copy(self, suffixes: list[str], operands: list[str]) -> Operation:
        """UBLKCP.S.G [shared address and mbarrier], [global address], units of 16 bytes, policy."""
        if suffixes != ["S", "G"]:
            raise NotImplementedError(f"UBLKCP {suffixes}")
        to, from_ = (one.strip("[]") for one in operands[:2])
        target = self.registers.integer(to)
        barrier_at: Get = self.registers.integer(to, 1)
        source, size = self.registers.pair(from_), self.registers.integer(operands[2])

        def run(mask: Array | None) -> None:
            for lane in self._parts(mask):
                count = int(size()[lane]) * 16
                where = np.array([lane])
                address = np.broadcast_to(target(), (self.lanes,)).astype(np.uint64)
                begin = int(self._shared_index(address, where, False)[0])
                start = int(source()[lane]) - self.memory.base
                room = (self.block[lane] + 1) * self.stride - SHARED_BEGIN
                if begin + count > room or not 0 <= start <= len(self.memory.data) - count:
                    raise RuntimeError("a bulk copy outside of memory")
                self.shared[begin : begin + count] = self.memory.data[start : start + count]
                barrier = self.barrier(lane, int(barrier_at()[lane]))
                barrier.bytes -= count
                barrier.complete()
            self.completed()

        return run
