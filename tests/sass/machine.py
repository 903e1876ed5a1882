"""Run a disassembled kernel, and count how often warps execute each of its instructions.

Each step takes the lowest instruction at which a lane of the launch is, and runs all lanes that are
there as far as they stay together. The count is what warps issue: the lanes of a warp diverge at
branches, and the compiler's reconvergence instructions (BSYNC, WARPSYNC) join them; diverged parts
of a warp are counted separately even if they run in the same step. Waiting costs nothing: a lane
that waits for a barrier or a copy continues when that is complete, after one try.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.sass import Code, Instruction

from .operations import WARP, Array, Registers, execute, split, whole_warps

#: The most steps of a launch: over a hundred times what a row takes.
MAX_STEPS = 200_000
#: The addresses at which a block's shared memory (in its window) and global memory begin.
SHARED_BASE, GLOBAL_BASE = 0x400, 0x7000_0000_0000
_BYTES = {"": 4, "U8": 1, "U16": 2, "64": 8, "128": 16}  # of an access, by the opcode's suffixes
_CONTROL = ("BRA", "EXIT", "BSYNC", "WARPSYNC", "BAR", "UCGABAR_WAIT", "SYNCS.PHASECHK")


class Launch(NamedTuple):
    """A grid, and what its kernel is called with."""

    blocks: int
    threads: int  # of a block
    shared_bytes: int  # of a block
    cluster: int  # blocks of a cluster
    params: bytes  # the kernel's argument


@dataclass
class Mbarrier:
    """A barrier in shared memory."""

    count: int  # arrivals that end a phase
    pending: int  # arrivals missing in this phase
    bytes: int = 0  # missing in this phase
    phase: int = 0  # the number of phases that are over

    def add(self, arrivals: int, bytes_: int) -> None:
        """Add arrivals and expected bytes (received: negative); end a phase if all came."""
        self.pending -= arrivals
        self.bytes += bytes_
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Machine:
    """A launch; `memory`: the bytes of global memory from GLOBAL_BASE on, which `run` changes."""

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
        # constants that code for sm_90 reads: 0x28 is the stack, 0x208 the memory descriptor
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
        self.leader = self.lane // WARP * WARP  # first lane of the lane's part of a warp
        self.tokens = np.full((16, self.lanes), -1)  # by convergence barrier: number of the part
        self.steps = 0
        self.heads = set(code.labels.values())
        #: How often each instruction was executed by a warp, or a part of one.
        self.counts = np.zeros(len(code.instructions), np.int64)

    def run(self) -> Array:
        """Run the launch to its end, once; return counts.

        Raises RuntimeError if lanes wait or loop for ever, or leave memory; else as _execute().
        """
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
        """Run the ready lanes at the lowest instruction, up to the next branch, wait or label."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise RuntimeError(f"the kernel does not end within {MAX_STEPS} steps")
        i = int(self.pc[ready].min())
        active = ready & (self.pc == i)
        parts = len(np.unique(self.leader[active]))
        while True:
            self.counts[i] += parts
            instruction = self.code.instructions[i]
            mask = self._holds(instruction.guard, active)
            if instruction.opcode.startswith(_CONTROL):
                return self._control(i, mask, active)
            if mask.any():
                self._execute(instruction, mask)
            i += 1
            if i in self.heads:
                self.pc[active] = i
                return None

    def _holds(self, condition: str, lanes: Array) -> Array:
        """Return those of the lanes for which a predicate holds; all for ""."""
        return lanes & self.registers.read(condition, "?") if condition else lanes

    def _execute(self, instruction: Instruction, mask: Array) -> None:
        """Run an instruction without branch or wait; NotImplementedError if it is unknown."""
        own = {
            **dict.fromkeys(("LDG", "STG", "LDS", "STS", "STAS"), self._access),
            "UBLKCP": self._bulk_copy,
            "SYNCS": self._mbarrier,
            "BSSY": self._convergence,
        }
        opcode, operands = instruction.opcode, instruction.operands
        run = own.get(opcode.split(".")[0])
        try:
            if run:
                run(mask, opcode, *split(operands))
            else:
                execute(opcode, operands, self.registers, mask)
        except (KeyError, NotImplementedError) as error:
            what = f"unknown instruction {opcode} {operands} ({error})"
            raise NotImplementedError(what) from error

    # -------------------------------------------------------------------- branches and waiting

    def _control(self, i: int, taken: Array, active: Array) -> None:
        """Run a branch, exit or wait for the lanes `taken`, those of `active` whose guard holds."""
        instruction = self.code.instructions[i]
        self.pc[active] = i + 1
        if instruction.opcode.startswith("BRA"):
            taken = self._branch(instruction, taken, active)
            self.pc[taken] = self.code.labels[instruction.target]
        elif instruction.opcode == "EXIT":
            self.ended |= taken
        else:
            self.waiting |= taken
            self.pc[taken] = i
        self._group(taken, self.leader)
        self._group(active & ~taken, self.leader)

    def _branch(self, instruction: Instruction, taken: Array, active: Array) -> Array:
        """Return the active lanes that a branch takes; `taken` are those whose guard holds."""
        if instruction.opcode == "BRA.DIV":  # unless the whole warp is here, as one
            together = active & (self.leader == self.lane // WARP * WARP)
            return taken & whole_warps(~together)
        for condition in split(instruction.operands)[:-1]:
            taken = self._holds(condition, taken)
        if instruction.opcode == "BRA.U.ANY":
            return active & whole_warps(taken)
        if instruction.opcode != "BRA":
            raise NotImplementedError(instruction.opcode)
        return taken

    def _group(self, lanes: Array, key: Array) -> None:
        """Make these lanes with equal `key` one part of a warp, led by the first.

        A value of `key` must not be in two warps.
        """
        where = lanes.nonzero()[0]
        _, first, back = np.unique(key[where], return_index=True, return_inverse=True)
        self.leader[where] = where[first][back]

    def _convergence(self, mask: Array, opcode: str, barrier: str, target: str) -> None:
        """Record the parts of warps that will reconverge at a barrier (BSSY)."""
        self.tokens[int(barrier[1:])][mask] = self.steps * self.lanes + self.leader[mask]

    def _release(self) -> None:
        """Release the lanes whose wait is over; RuntimeError if there are none."""
        places = [int(i) for i in np.unique(self.pc[self.waiting])]
        free = {i: self._over(i, self.waiting & (self.pc == i)) for i in places}
        for i, lanes in free.items():
            if self.code.instructions[i].opcode.startswith(("BSYNC", "WARPSYNC")):
                self._group(lanes, self.lane // WARP)
            self.waiting[lanes] = False
            self.pc[lanes] = i + 1
        if not any(lanes.any() for lanes in free.values()):
            raise RuntimeError(f"the kernel waits for ever, at instructions {places}")

    def _over(self, i: int, present: Array) -> Array:
        """Return those lanes of `present`, all waiting at instruction i, whose wait is over."""
        instruction = self.code.instructions[i]
        operands, missing = split(instruction.operands), ~present & ~self.ended
        groups = {  # all lanes of which have to be present
            "BSYNC": lambda: self.tokens[int(operands[0][1:])],
            "WARPSYNC.ALL": lambda: self.lane // WARP,
            "BAR.SYNC.DEFER_BLOCKING": lambda: {"0x0": self.block}[operands[0]],
            "UCGABAR_WAIT": lambda: self.block // self.launch.cluster,
        }
        if instruction.opcode in groups:
            group = groups[instruction.opcode]()
            return present & ~np.isin(group, group[missing])
        lanes, over = present.nonzero()[0], np.zeros_like(present)
        barriers = self._barriers(lanes, self.registers.address(operands[1]))
        parity = self.registers.read(operands[2], "I")
        over[lanes] = np.array([barrier.phase % 2 for barrier in barriers]) != parity[lanes]
        self.registers.write(operands[0], "?", over, over)
        return over

    # ---------------------------------------------------------------------------------- memory

    def _words(self, text: str, count: int) -> list[Array]:
        """Return the arrays of `count` registers from a named one on."""
        name = text.strip("[]").removesuffix(".64")
        return [self.registers.array(name, "I", k) for k in range(count)]

    def _index(self, lanes: Array, address: Array, size: int, peers: bool = False) -> Array:
        """Return the lanes' indices in `data` for an access of `size` bytes at each address.

        `peers` allows other blocks' shared memory. RuntimeError if it is outside or not aligned.
        """
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

    def _access(self, mask: Array, opcode: str, first: str, second: str) -> None:
        """Load, store, or (STAS) store to a peer's shared memory and count that at its mbarrier."""
        kind, *suffixes = (word for word in opcode.split(".") if word not in ("E", "EF"))
        size, lanes = _BYTES[".".join(suffixes)], mask.nonzero()[0]
        name, place = (first, second) if kind.startswith("L") else (second, first)
        barrier = self._words(place, 2)[1] if kind == "STAS" else None  # after the address
        address = self._words(place, 1)[0] if kind == "STAS" else self.registers.address(place)
        unit = min(size, 4)
        view = self.data.view(f"u{unit}")
        index = self._index(lanes, address, size, peers=kind == "STAS") // unit
        for k, word in enumerate(self._words(name, max(1, size // 4))):
            if kind.startswith("L"):
                word[lanes] = view[index + k]
            else:
                view[index + k] = word[lanes]
        for waited in () if barrier is None else self._barriers(lanes, barrier):
            waited.add(0, -size)

    def _mbarrier(self, mask: Array, opcode: str, target: str, place: str, register: str) -> None:
        """Create an mbarrier, or arrive at one and expect bytes."""
        lanes, address = mask.nonzero()[0], self.registers.address(place)
        values = self.registers.read(register, "I")[lanes].tolist()
        if opcode == "SYNCS.EXCH.64":
            for value, at in zip(values, self._index(lanes, address, 8).tolist(), strict=True):
                count = 0x100000 - (value >> 1)
                self.barriers[at] = Mbarrier(count, count)
        elif opcode == "SYNCS.ARRIVE.TRANS64":
            for value, barrier in zip(values, self._barriers(lanes, address), strict=True):
                barrier.add(1, value)
        else:
            raise NotImplementedError(opcode)

    def _bulk_copy(
        self, mask: Array, opcode: str, to: str, from_: str, units: str, *_: str
    ) -> None:
        """Copy units of 16 bytes to shared memory and count them at an mbarrier."""
        (target, barrier), (count,) = self._words(to, 2), self._words(units, 1)
        source = self.registers.read(from_.strip("[]"), "Q")
        for lane in mask.nonzero()[0]:
            where, size = np.array([lane]), int(count[lane]) * 16
            (begin,), (start,) = (self._index(where, x, size) for x in (target, source))
            self.data[begin : begin + size] = self.data[start : start + size]
            self._barriers(where, barrier)[0].add(0, -size)
