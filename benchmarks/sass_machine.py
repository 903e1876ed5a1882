"""Runs a disassembled kernel, and counts how often each warp executes each basic block.

All lanes of a launch advance together: a step takes the earliest basic block at which any lane is,
and runs it for all lanes that are there. What counts is what a warp would issue: its lanes part at
branches, and are one again where the compiler's reconvergence instructions (BSYNC, WARPSYNC) make
them one; parted lanes are counted apart, even if they happen to run in the same step. Waiting costs
nothing: a lane that waits for a barrier or a copy comes back when that is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from .sass import Code, Instruction
from .sass_operands import Array, Get, Registers, split
from .sass_operations import Operation, build, whole_warps

WARP = 32
#: Where a block's shared memory begins in its window, and the window's upper address half.
SHARED_BEGIN, SHARED_WINDOW = 0x400, 0x7F00
_WIDTHS = {"U8": 1, "U16": 2, "64": 8, "128": 16}


class State(IntEnum):
    """What a lane waits for."""

    READY = 0
    CONVERGENCE = 1  # BSYNC
    WARP = 2  # WARPSYNC
    BLOCK = 3  # BAR.SYNC
    CLUSTER = 4  # UCGABAR_WAIT
    PHASE = 5  # SYNCS.PHASECHK.TRYWAIT
    ENDED = 6


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
class Counts:
    """How often each basic block was run: by warps (parts of one apart), and by lanes."""

    warps: Array
    lanes: Array


@dataclass
class Memory:
    """Global memory: one piece, from `base` on."""

    data: Array  # uint8
    base: int = 0x7000_0000_0000


@dataclass
class Machine:
    """One launch of a kernel."""

    code: Code
    launch: Launch
    memory: Memory
    barriers: dict[tuple[int, int], Mbarrier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        launch = self.launch
        self.lanes = launch.blocks * launch.threads
        lane = np.arange(self.lanes)
        self.block = lane // launch.threads
        rank = (self.block % launch.cluster).astype(np.uint32)
        self.registers = Registers(self.lanes, launch.constants())
        special: Mapping[str, Array] = {
            "SR_TID.X": (lane % launch.threads).astype(np.uint32),
            "SR_CTAID.X": self.block.astype(np.uint32),
            "SR_CgaCtaId": rank,
            "SR_SWINHI": np.full(self.lanes, SHARED_WINDOW, np.uint32),
            "SR_LANEID": (lane % WARP).astype(np.uint32),
        }
        self.rank = rank
        self.stride = (launch.shared_bytes + SHARED_BEGIN + 127) // 128 * 128
        self.shared = np.full(launch.blocks * self.stride, 0xFF, np.uint8)
        self.leader = lane // WARP * WARP
        self.pc = np.zeros(self.lanes, np.int64)
        self.state = np.zeros(self.lanes, np.int8)
        self.waits_for = np.zeros(self.lanes, np.int64)  # the convergence barrier's number
        self.members = np.zeros((16, self.lanes), bool)
        self.cluster_arrived = np.zeros(self.lanes, np.int64)
        self.cluster_waited = np.zeros(self.lanes, np.int64)
        self.phases: dict[int, tuple[Array, Array, str]] = {}
        self.operations: list[Operation | None] = [None] * len(self.code.instructions)
        self.special = special
        self.number = np.zeros(len(self.code.instructions) + 1, np.int64)
        for i, block in enumerate(self.code.blocks):
            self.number[block.start] = i
        self.rank_of_block = _ranks(self.code.successors())
        size = len(self.code.blocks)
        self.counts = Counts(np.zeros(size, np.int64), np.zeros(size, np.int64))

    # --------------------------------------------------------------------------------- running

    def run(self) -> Counts:
        """Run the launch to its end.

        Raises:
            NotImplementedError: an instruction that is executed is unknown.
            RuntimeError: the lanes wait for each other.
        """
        with np.errstate(all="ignore"):
            while self._step():
                pass
        return self.counts

    def _step(self) -> bool:
        ready = self.state == State.READY
        if not ready.any():
            if (self.state == State.ENDED).all():
                return False
            raise RuntimeError(f"the kernel waits for ever: {np.bincount(self.state).tolist()}")
        at = np.where(ready, self.rank_of_block[self.number[self.pc]], np.iinfo(np.int64).max)
        active = at == at.min()
        number = int(self.number[self.pc[active.argmax()]])
        where = active.nonzero()[0]
        self.counts.warps[number] += int((self.leader[where] == where).sum())
        self.counts.lanes[number] += len(where)
        mask = None if len(where) == self.lanes else active
        block = self.code.blocks[number]
        for i in block[:-1]:
            self._execute(i, mask)
        self.pc[active] = block[-1]
        self._finish(block[-1], active)
        return True

    def _guard(self, one: Instruction, mask: Array | None) -> Array | None:
        if not one.guard:
            return mask
        holds = self.registers.condition(one.guard.lstrip("@"))()
        return holds.copy() if mask is None else holds & mask

    def _execute(self, i: int, mask: Array | None) -> None:
        one = self.code.instructions[i]
        mask = self._guard(one, mask)
        if mask is not None and not mask.any():
            return
        operation = self.operations[i]
        if operation is None:
            try:
                operation = self.operations[i] = self._build(one)
            except NotImplementedError as error:
                raise self._unknown(one, error) from error
        operation(mask)

    def _unknown(self, one: Instruction, error: object = "") -> NotImplementedError:
        place = f", {one.places[0][0]}:{one.places[0][1]}" if one.places else ""
        return NotImplementedError(
            f"unknown instruction at {one.address:#x}{place}: {one.opcode} {one.operands} ({error})"
        )

    def _build(self, one: Instruction) -> Operation:
        name, *suffixes = one.opcode.split(".")
        operands = split(one.operands)
        if name in ("LDG", "STG", "LD", "ST", "LDS", "STS"):
            return self._access(name, suffixes, operands)
        if name == "UBLKCP":
            return self._bulk_copy(suffixes, operands)
        if name == "STAS":
            return self._push(suffixes, operands)
        if name == "SYNCS":
            return self._mbarrier(suffixes, operands)
        if name == "UCGABAR_ARV":
            return self._arrive_at_cluster
        if name in ("BSSY", "BREAK"):
            return self._convergence(name, operands)
        operation = build(one.opcode, one.operands, self.registers, self.special)
        if name.startswith("U") or name == "S2UR":
            return lambda mask: operation(whole_warps(mask))
        return operation

    # -------------------------------------------------------------------------- ends of a block

    def _finish(self, i: int, active: Array) -> None:
        """Run a block's last instruction, and move on the lanes that go on."""
        one = self.code.instructions[i]
        name, *suffixes = one.opcode.split(".")
        if not one.ends_block:
            self._execute(i, None if active.all() else active)
            self.pc[active] += 1
            return
        taken = self._guard(one, active)
        assert taken is not None
        operands = split(one.operands)
        if name in ("BRA", "CALL"):
            self._jump(one, self._condition(suffixes, operands, taken, active), active)
        elif name == "RET":
            address = self.registers.integer(operands[0].split()[0])()
            starts = {x.address: k for k, x in enumerate(self.code.instructions)}
            for where in np.unique(address[taken]):
                here = taken & (address == where)
                self.pc[here] = starts[int(where)]
                self._part(here)
        elif name == "EXIT":
            self.pc[active] += 1
            self._part(active & ~taken)
            self.state[taken] = State.ENDED
            for barrier in range(len(self.members)):
                self._release_converged(barrier)
            self._release_warps()
            self._release_blocks()
            self._release_clusters()
        elif name == "BSYNC":
            self._wait(taken, State.CONVERGENCE)
            barrier = int(operands[0].lstrip("B"))
            self.waits_for[taken] = barrier
            self._skip(active & ~taken)
            self._release_converged(barrier)
        elif name == "WARPSYNC" and suffixes == ["ALL"]:
            self._wait(taken, State.WARP)
            self._skip(active & ~taken)
            self._release_warps()
        elif name == "BAR" and "SYNC" in suffixes and operands == ["0x0"]:
            self._wait(taken, State.BLOCK)
            self._skip(active & ~taken)
            self._release_blocks()
        elif name == "UCGABAR_WAIT":
            self._wait(taken, State.CLUSTER)
            self._skip(active & ~taken)
            self._release_clusters()
        elif name == "SYNCS":
            self._wait(taken, State.PHASE)
            self._skip(active & ~taken)
            address, _ = self.registers.address(operands[1])
            parity = np.broadcast_to(self.registers.integer(operands[2])(), (self.lanes,))
            self.phases.setdefault(i, (address().copy(), parity.copy(), operands[0]))
            before = self.phases[i]
            before[0][taken], before[1][taken] = address()[taken], parity[taken]
            self._release_phases()
        else:
            raise self._unknown(one)

    def _condition(
        self, suffixes: list[str], operands: list[str], taken: Array, active: Array
    ) -> Array:
        """Return the lanes that a branch takes away."""
        if suffixes == ["DIV"]:  # unless the whole warp is here
            full = active & (self.leader == self.leader.reshape(-1, WARP)[:, :1].repeat(WARP))
            return taken & ~full.reshape(-1, WARP).all(1).repeat(WARP)
        for condition in operands[:-1]:
            taken = taken & self.registers.condition(condition)()
        if suffixes == ["U", "ANY"]:
            return active & whole_warps(taken)
        if suffixes not in ([], ["U"], ["REL", "NOINC"]):
            raise NotImplementedError(f"a branch with {suffixes}")
        return taken

    def _jump(self, one: Instruction, taken: Array, active: Array) -> None:
        assert one.target is not None
        stay = active & ~taken
        self.pc[taken] = self.code.labels[one.target]
        self.pc[stay] += 1
        if taken.any() and stay.any():
            self._part(taken)
            self._part(stay)

    def _part(self, lanes: Array) -> None:
        """Make what is left of each part of a warp a part of its own, named by its first lane."""
        where = lanes.nonzero()[0]
        if len(where):
            _, first, back = np.unique(self.leader[where], return_index=True, return_inverse=True)
            self.leader[where] = where[first][back]

    def _wait(self, lanes: Array, state: State) -> None:
        self.state[lanes] = state

    def _skip(self, lanes: Array) -> None:
        self.pc[lanes] += 1
        self._part(lanes)

    def _join(self, lanes: Array) -> None:
        """Let these go on, as one part of each warp."""
        where = lanes.nonzero()[0]
        if not len(where):
            return
        _, first, back = np.unique(where // WARP, return_index=True, return_inverse=True)
        leaders = where[first]
        if (self.pc[where] != self.pc[leaders][back]).any():
            raise RuntimeError("lanes of a warp meet at different instructions")
        self.leader[where] = leaders[back]
        self._let_go(lanes)

    def _let_go(self, lanes: Array) -> None:
        self.state[lanes] = State.READY
        self.pc[lanes] += 1

    # -------------------------------------------------------------------------- who may go on

    def _release_converged(self, barrier: int) -> None:
        here = (self.state == State.CONVERGENCE) & (self.waits_for == barrier)
        if not here.any():
            return
        missing = self.members[barrier] & ~here & (self.state != State.ENDED)
        complete = ~missing.reshape(-1, WARP).any(1)
        self._join(here & complete.repeat(WARP))

    def _release_warps(self) -> None:
        here = self.state == State.WARP
        missing = ~here & (self.state != State.ENDED)
        self._join(here & ~missing.reshape(-1, WARP).any(1).repeat(WARP))

    def _release_blocks(self) -> None:
        here = self.state == State.BLOCK
        missing = ~here & (self.state != State.ENDED)
        threads = self.launch.threads
        self._let_go(here & ~missing.reshape(-1, threads).any(1).repeat(threads))

    def _release_clusters(self) -> None:
        here = self.state == State.CLUSTER
        if not here.any():
            return
        size = self.launch.threads * self.launch.cluster
        arrived = np.where(self.state == State.ENDED, np.iinfo(np.int64).max, self.cluster_arrived)
        least = arrived.reshape(-1, size).min(1).repeat(size)
        free = here & (least > self.cluster_waited)
        self.cluster_waited[free] += 1
        self._let_go(free)

    def _release_phases(self) -> None:
        for i, (address, parity, flag) in self.phases.items():
            waiting = (self.state == State.PHASE) & (self.pc == i)
            if not waiting.any():
                continue
            free = np.zeros(self.lanes, bool)
            keys = self.block.astype(np.uint64) << np.uint64(33) | address << np.uint64(1) | parity
            for key in np.unique(keys[waiting]):
                these = waiting & (keys == key)
                one = int(these.argmax())
                barrier = self._barrier(one, int(address[one]))
                if barrier.phase % 2 != int(parity[one]):
                    free |= these
            self.registers.put_condition(flag, np.ones(self.lanes, bool), free)
            self._let_go(free)

    # ---------------------------------------------------------------------------- instructions

    def _convergence(self, name: str, operands: list[str]) -> Operation:
        number = [int(one.lstrip("B")) for one in operands if one.startswith("B")][-1]

        def begin(mask: Array | None) -> None:
            lanes = np.ones(self.lanes, bool) if mask is None else mask
            np.copyto(self.members[number], lanes, where=whole_warps(lanes))

        def leave(mask: Array | None) -> None:
            self.members[number] &= False if mask is None else ~mask
            self._release_converged(number)

        return begin if name == "BSSY" else leave

    def _arrive_at_cluster(self, mask: Array | None) -> None:
        self.cluster_arrived[slice(None) if mask is None else mask] += 1
        self._release_clusters()

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

    def _barrier(self, lane: int, address: int) -> Mbarrier:
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
                barrier = self._barrier(lane, int(get()[lane]))
                if expects:
                    barrier.bytes += int(np.broadcast_to(source(), (self.lanes,))[lane])
                barrier.pending -= 1
                barrier.complete()
            self._release_phases()

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
                barrier = self._barrier(lane, int(barrier_at()[lane]))
                barrier.bytes -= size
                barrier.complete()
            self._release_phases()

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
                barrier = self._barrier(lane, int(barrier_at()[lane]))
                barrier.bytes -= count
                barrier.complete()
            self._release_phases()

        return run


def _ranks(successors: list[list[int]]) -> Array:
    """Return an order of the basic blocks in which loops are run to their end before what follows.

    Strongly connected parts in topological order; inside one, without the edges to its entry, the
    same again.
    """
    order: list[int] = []

    def arrange(nodes: list[int], entry: int, edges: dict[int, list[int]]) -> None:
        for part in reversed(_components(nodes, entry, edges)):
            if len(part) == 1:
                order.append(part[0])
                continue
            inside = set(part)
            head = next(
                (
                    n
                    for n in part
                    if n == entry or any(n in edges[m] for m in nodes if m not in inside)
                ),
                part[0],
            )
            kept = {n: [s for s in edges[n] if s in inside and s != head] for n in part}
            arrange(part, head, kept)

    everything = dict(enumerate(successors))
    arrange(list(everything), 0, everything)
    rank = np.zeros(len(successors), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _components(nodes: list[int], entry: int, edges: dict[int, list[int]]) -> list[list[int]]:
    """Return the strongly connected parts, each after those that it leads to (Tarjan)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in [entry, *nodes]:
        if root in index:
            continue
        work: list[tuple[int, Any]] = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, following = work[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    found.append(part)
    return found
