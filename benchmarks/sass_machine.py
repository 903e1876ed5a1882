"""Runs a disassembled kernel, and counts how often each warp executes each basic block.

All lanes of a launch advance together: a step takes the earliest basic block at which any lane is,
and runs it for all lanes that are there. What counts is what a warp would issue: its lanes part at
branches, and are one again where the compiler's reconvergence instructions (BSYNC, WARPSYNC) make
them one; parted lanes are counted apart, even if they happen to run in the same step. Waiting costs
nothing: a lane that waits for a barrier or a copy comes back when that is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .control_flow import ranks
from .sass import Code, Instruction
from .sass_memory import SHARED_WINDOW, Launch, Memory, MemoryUnit
from .sass_operands import WARP, Array, Registers, split
from .sass_operations import Operation, build, whole_warps

#: Basic blocks, each run by all lanes that are at it: over a hundred times what a row takes.
MAX_STEPS = 200_000


class State(IntEnum):
    """What a lane waits for."""

    READY = 0
    CONVERGENCE = 1  # BSYNC
    WARP = 2  # WARPSYNC
    BLOCK = 3  # BAR.SYNC
    CLUSTER = 4  # UCGABAR_WAIT
    PHASE = 5  # SYNCS.PHASECHK.TRYWAIT
    ENDED = 6


@dataclass
class Counts:
    """How often each basic block was run: by warps (parts of one apart), and by lanes."""

    warps: Array
    lanes: Array


@dataclass
class Machine:
    """One launch of a kernel."""

    code: Code
    launch: Launch
    memory: Memory

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
        self.memory_unit = MemoryUnit(launch, self.registers, self.memory, self._release_phases)
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
        self.rank_of_block = ranks(self.code.successors())
        size = len(self.code.blocks)
        self.counts = Counts(np.zeros(size, np.int64), np.zeros(size, np.int64))

    # --------------------------------------------------------------------------------- running

    def run(self) -> Counts:
        """Run the launch to its end.

        Raises:
            NotImplementedError: an instruction that is executed is unknown.
            RuntimeError: the lanes wait for each other, or loop for ever.
        """
        with np.errstate(all="ignore"):
            for _ in range(MAX_STEPS):
                if not self._step():
                    return self.counts
        raise RuntimeError(f"the kernel does not end within {MAX_STEPS} steps")

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
        if operation := self.memory_unit.build(name, suffixes, operands):
            return operation
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
                barrier = self.memory_unit.barrier(one, int(address[one]))
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
