"""Runs a disassembled kernel, and counts how often warps execute each of its instructions.

All lanes of a launch advance together: a step takes the first instruction at which a lane is, and
runs all lanes that are there as far as they stay together. The count is what a warp issues: its
lanes part at branches, and are one again where the compiler's reconvergence instructions (BSYNC,
WARPSYNC) join them; parted lanes are counted separately even if they run in the same step. Waiting
costs nothing: a lane that waits for a barrier or a copy goes on when that is done, after one try.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sass import Code, Instruction
from .sass_operations import WARP, Array, Operation, Registers, build, split, whole_warps

#: Straight runs of instructions: over a hundred times what a row takes.
MAX_STEPS = 200_000
#: Where a block's shared memory begins in its window, and global memory.
SHARED_BASE, GLOBAL_BASE = 0x400, 0x7000_0000_0000
_BYTES = {"U8": 1, "U16": 2, "64": 8, "128": 16}
_CONTROL = ("BRA", "EXIT", "BSYNC", "WARPSYNC", "BAR", "UCGABAR_WAIT", "SYNCS.PHASECHK")


@dataclass(frozen=True)
class Launch:
    """A grid."""

    blocks: int
    cluster: int  # blocks
    threads: int  # of a block
    shared_bytes: int  # of a block
    params: bytes  # the kernel's argument


@dataclass
class Mbarrier:
    """A barrier in shared memory."""

    count: int
    bytes: int = 0  # still to come
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def add(self, arrivals: int, bytes_: int) -> None:
        """Take arrivals and expected bytes into account; begin the next phase if this is over."""
        self.pending -= arrivals
        self.bytes += bytes_
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Machine:
    """One launch of a kernel, on global memory of bytes from GLOBAL_BASE on."""

    def __init__(self, code: Code, launch: Launch, memory: Array) -> None:
        self.code, self.launch, self.memory = code, launch, memory
        self.lanes = launch.blocks * launch.threads
        self.lane = np.arange(self.lanes)
        self.block = self.lane // launch.threads
        self.rank = self.block % launch.cluster
        special = {
            "SR_TID.X": self.lane % launch.threads,
            "SR_CTAID.X": self.block,
            "SR_CgaCtaId": self.rank,
        }
        # what the compiler reads there on sm_90: 0x28 is the stack, 0x208 the memory descriptor
        words = {0x0: launch.threads, 0x28: 0, 0x140: 1, 0x188: launch.cluster}
        constants = {offset: value.to_bytes(4, "little") for offset, value in words.items()}
        self.registers = Registers(
            self.lanes,
            {name: value.astype(np.uint32) for name, value in special.items()},
            constants | {0x208: bytes(8), 0x210: launch.params},
        )
        self.stride = (launch.shared_bytes + 127) // 128 * 128
        #: Global memory, then the shared memory of each block.
        self.data = np.full(memory.size + launch.blocks * self.stride, 0xFF, np.uint8)
        self.data[: memory.size] = memory
        self.barriers: dict[int, Mbarrier] = {}

        self.pc = np.zeros(self.lanes, np.int64)
        self.waiting, self.ended = np.zeros((2, self.lanes), bool)
        self.leader = self.lane // WARP * WARP  # of the part of a warp that a lane belongs to
        self.tokens = np.full((16, self.lanes), -1)  # of convergence barriers: with whom
        self.steps = 0
        self.heads = set(code.labels.values())
        self.operations: dict[int, Operation] = {}
        #: How often each instruction was executed by a warp, or a part of one.
        self.counts = np.zeros(len(code.instructions), np.int64)

    def run(self) -> Array:
        """Run the launch to its end; return the counts. Raise if lanes wait or loop for ever."""
        with np.errstate(all="ignore"):
            while not self.ended.all():
                ready = ~(self.waiting | self.ended)
                if ready.any():
                    self._step(ready)
                else:
                    self._release()
        self.memory[:] = self.data[: self.memory.size]
        return self.counts

    def _step(self, ready: Array) -> None:
        """Run the lanes that are at the first instruction, up to where others may be."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise RuntimeError(f"the kernel does not end within {MAX_STEPS} steps")
        i = int(self.pc[ready].min())
        active = ready & (self.pc == i)
        parts = len(np.unique(self.leader[active]))
        while True:
            self.counts[i] += parts
            one = self.code.instructions[i]
            mask = self._taken(one.guard, active)
            if one.opcode.startswith(_CONTROL):
                return self._control(i, mask, active)
            if mask.any():
                self._operation(i)(mask)
            i += 1
            if i in self.heads:
                self.pc[active] = i
                return None

    def _taken(self, condition: str, lanes: Array) -> Array:
        """Return the lanes for which a predicate holds."""
        return lanes & self.registers.source(condition, "?")() if condition else lanes

    def _operation(self, i: int) -> Operation:
        if i not in self.operations:
            one = self.code.instructions[i]
            own = {
                **dict.fromkeys(("LDG", "STG", "LDS", "STS"), self._access),
                "STAS": self._push,
                "UBLKCP.S.G": self._bulk_copy,
                "SYNCS": self._mbarrier,
                "BSSY": self._convergence,
            }
            make = own.get(one.opcode) or own.get(one.opcode.split(".")[0])
            try:
                self.operations[i] = (
                    make(one.opcode, *split(one.operands))
                    if make
                    else build(one.opcode, one.operands, self.registers)
                )
            except (KeyError, NotImplementedError) as error:
                where = f"{one.address:#x}: {one.opcode} {one.operands}"
                raise NotImplementedError(f"unknown instruction at {where} ({error})") from error
        return self.operations[i]

    # -------------------------------------------------------------------- branches and waiting

    def _control(self, i: int, taken: Array, active: Array) -> None:
        """Run an instruction at which lanes part, end or wait."""
        one = self.code.instructions[i]
        self.pc[active] = i + 1
        if one.opcode.startswith("BRA"):
            taken = self._branch(one, taken, active)
            self.pc[taken] = self.code.labels[one.target]
        elif one.opcode == "EXIT":
            self.ended |= taken
        else:
            self.waiting |= taken
            self.pc[taken] = i
        self._group(taken, self.leader)
        self._group(active & ~taken, self.leader)

    def _branch(self, one: Instruction, taken: Array, active: Array) -> Array:
        """Return the lanes that a branch takes away."""
        if one.opcode == "BRA.DIV":  # unless the whole warp is here, as one
            together = active & (self.leader == self.lane // WARP * WARP)
            return taken & whole_warps(~together)
        for condition in split(one.operands)[:-1]:
            taken = self._taken(condition, taken)
        if one.opcode == "BRA.U.ANY":
            return active & whole_warps(taken)
        if one.opcode != "BRA":
            raise NotImplementedError(one.opcode)
        return taken

    def _group(self, lanes: Array, key: Array) -> None:
        """Make these lanes a part of their warp for each value of the key, named by its first."""
        where = lanes.nonzero()[0]
        _, first, back = np.unique(key[where], return_index=True, return_inverse=True)
        self.leader[where] = where[first][back]

    def _release(self) -> None:
        """Let the lanes go on whose wait is over."""
        places = [int(i) for i in np.unique(self.pc[self.waiting])]
        free = {i: self._over(i, self.waiting & (self.pc == i)) for i in places}
        for i, lanes in free.items():
            if self.code.instructions[i].opcode.startswith(("BSYNC", "WARPSYNC")):
                self._group(lanes, self.lane // WARP)
            self.waiting[lanes] = False
            self.pc[lanes] = i + 1
        if not any(lanes.any() for lanes in free.values()):
            raise RuntimeError(f"the kernel waits for ever, at instructions {places}")

    def _over(self, i: int, here: Array) -> Array:
        """Return those lanes, of the ones that wait at an instruction, whose wait is over."""
        one = self.code.instructions[i]
        operands, missing = split(one.operands), ~here & ~self.ended
        groups = {  # all lanes of which have to be here
            "BSYNC": lambda: self.tokens[int(operands[0][1:])],
            "WARPSYNC.ALL": lambda: self.lane // WARP,
            "BAR.SYNC.DEFER_BLOCKING": lambda: {"0x0": self.block}[one.operands],
            "UCGABAR_WAIT": lambda: self.block // self.launch.cluster,
        }
        if one.opcode in groups:
            group = groups[one.opcode]()
            return here & ~np.isin(group, group[missing])
        lanes, over = here.nonzero()[0], np.zeros_like(here)
        barriers = self._barriers(lanes, self.registers.address(operands[1])())
        parity = self.registers.register(operands[2])
        over[lanes] = np.array([barrier.phase % 2 for barrier in barriers]) != parity[lanes]
        self.registers.target(operands[0], "?")(True, over)
        return over

    def _convergence(self, opcode: str, barrier: str, target: str) -> Operation:
        tokens = self.tokens[int(barrier[1:])]

        def run(mask: Array) -> None:
            tokens[mask] = self.steps * self.lanes + self.leader[mask]

        return run

    # ---------------------------------------------------------------------------------- memory

    def _words(self, text: str, count: int) -> list[Array]:
        """Return the arrays of neighbouring registers."""
        name = text.strip("[]").removesuffix(".64")
        return [self.registers.register(name, "I", k) for k in range(count)]

    def _size(self, opcode: str) -> int:
        """Return the bytes of an access."""
        suffixes = [one for one in opcode.split(".")[1:] if one not in ("E", "EF")]
        if len(suffixes) > 1 or not _BYTES.keys() >= set(suffixes):
            raise NotImplementedError(opcode)
        return _BYTES[suffixes[0]] if suffixes else 4

    def _index(self, lanes: Array, address: Array, size: int, peers: bool = False) -> Array:
        """Return where in `data` addresses are: in shared memory their block's own, or a peer's."""
        offset, start, room = address[lanes].astype(np.int64), 0, self.memory.size
        if (offset < GLOBAL_BASE).all():
            rank, own, room = offset >> 24, self.rank[lanes], self.launch.shared_bytes
            if (rank >= self.launch.cluster).any() or (not peers and (rank != own).any()):
                raise RuntimeError("another block's shared memory")
            start = self.memory.size + (self.block[lanes] - own + rank) * self.stride
            offset = (offset & 0xFFFFFF) - SHARED_BASE
        else:
            offset = offset - GLOBAL_BASE
        if (offset % min(size, 16)).any() or (offset < 0).any() or (offset + size > room).any():
            raise RuntimeError(f"an address outside of memory, or no multiple of {size}")
        return start + offset

    def _barriers(self, lanes: Array, address: Array) -> list[Mbarrier]:
        return [self.barriers[int(at)] for at in self._index(lanes, address, 8, peers=True)]

    def _access(self, opcode: str, first: str, second: str) -> Operation:
        """Return a load or a store."""
        size, loads = self._size(opcode), opcode[0] == "L"
        name, place = (first, second) if loads else (second, first)
        address, words = self.registers.address(place), self._words(name, max(1, size // 4))
        unit = min(size, 4)
        view = self.data.view(f"u{unit}")

        def run(mask: Array) -> None:
            lanes = mask.nonzero()[0]
            index = self._index(lanes, address(), size) // unit
            for k, word in enumerate(words):
                if loads:
                    word[lanes] = view[index + k]
                else:
                    view[index + k] = word[lanes]

        return run

    def _mbarrier(self, opcode: str, target: str, place: str, register: str) -> Operation:
        """Return the beginning of an mbarrier, or an arrival that expects bytes."""
        address, source = self.registers.address(place), self.registers.register(register)

        def begin(mask: Array) -> None:
            lanes = _firsts(mask)
            for lane, at in zip(lanes, self._index(lanes, address(), 8), strict=True):
                self.barriers[int(at)] = Mbarrier(0x100000 - (int(source[lane]) >> 1))

        def arrive(mask: Array) -> None:
            lanes = mask.nonzero()[0]
            for lane, barrier in zip(lanes, self._barriers(lanes, address()), strict=True):
                barrier.add(1, int(source[lane]))

        return {"SYNCS.EXCH.64": begin, "SYNCS.ARRIVE.TRANS64": arrive}[opcode]

    def _push(self, opcode: str, place: str, data: str) -> Operation:
        """Return a store to a peer's shared memory, which its mbarrier expects."""
        size = self._size(opcode)
        words, (target, barrier) = self._words(data, size // 4), self._words(place, 2)

        def run(mask: Array) -> None:
            lanes = mask.nonzero()[0]
            index = self._index(lanes, target, size, peers=True) // 4
            for k, word in enumerate(words):
                self.data.view(np.uint32)[index + k] = word[lanes]
            for waited in self._barriers(lanes, barrier):
                waited.add(0, -size)

        return run

    def _bulk_copy(self, opcode: str, to: str, from_: str, units: str, policy: str) -> Operation:
        """Return a copy of units of 16 bytes to shared memory, which an mbarrier expects."""
        (target, barrier), (count,) = self._words(to, 2), self._words(units, 1)
        source = self.registers.source(from_.strip("[]"), "Q")

        def run(mask: Array) -> None:
            for lane in _firsts(mask):
                where, size = np.array([lane]), int(count[lane]) * 16
                (begin,), (start,) = (self._index(where, x, size) for x in (target, source()))
                self.data[begin : begin + size] = self.data[start : start + size]
                self._barriers(where, barrier)[0].add(0, -size)

        return run


def _firsts(mask: Array) -> Array:
    """Return the first lane of each warp that is here."""
    lanes = mask.nonzero()[0]
    return lanes[np.unique(lanes // WARP, return_index=True)[1]]
