"""What the CUDA kernel that reads each logit once executes, per element.

The compiler's machine code of rows_cluster is run (see benchmarks/sass_machine.py) on rows of a
training step, with the parameters and the grid that launch.cu chooses, and every basic block that a
warp executes is counted: prologue, new maxima, merges, exchange, gradient, ends. The losses and
gradients that come out are held against float64: code that is read wrongly gives wrong ones.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fused_kd.ops import STATS

from .sass import Code, Instruction, find_tool
from .sass_machine import Machine
from .sass_memory import Launch, Memory
from .sass_operations import to_bf16
from .source_functions import function_at

Array = np.ndarray[Any, Any]

V, ROWS, SEED, SPREAD = 151936, 2, 0, 3.0
#: An H200's, like an H100's: multiprocessors; shared memory of a block of which three or two share
#: the 228 KiB of one.
DEVICE = (132, 228 * 1024 // 3 - 1024, 228 * 1024 // 2 - 1024)
TEMPERATURES = {"T = 1": 1.0, "T = 2": 2.0, "another T": 3.0}
#: Phase of a row: the function that computes it. Code in none of them is "around", and so are the
#: scalars that a pass begins with.
PHASES = {"first": "first_pass", "second": "second_pass", "gradient": "gradient_pass"}
SCALARS = {"Gradient", "constants"}
REBASE = "rebase"


@dataclass(frozen=True)
class Card:
    """What a GPU can do for each element in the time that its memory takes."""

    name: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second, read and written

    def instructions(self, bytes_: float = 6) -> float:
        """Return how many a lane can issue: 128 lanes of a multiprocessor, a clock."""
        elements = self.terabytes * 1e12 / bytes_
        return 128 * self.multiprocessors * self.gigahertz * 1e9 / elements

    def special(self, bytes_: float = 6) -> float:
        """Return how many special functions: 16 lanes of a multiprocessor, a clock."""
        return self.instructions(bytes_) / 8


#: H200: its copies measured; the others by their data sheets.
CARDS = (
    Card("H100", 132, 1.95, 3.35),
    Card("H200", 132, 1.98, 4.3),
    Card("B200", 148, 1.9, 7.2),
)


@dataclass
class Executed:
    """Of one divergence and temperature, per element."""

    divergence: str
    temperature: str
    phases: Counter[str] = field(default_factory=Counter)
    functions: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # phase, innermost function
    opcodes: Counter[str] = field(default_factory=Counter)
    rebases: tuple[float, float] | None = None  # of a thread, of a warp: in the first pass

    @property
    def instructions(self) -> float:
        """Return those of all phases together."""
        return sum(self.phases.values())

    @property
    def special(self) -> float:
        """Return exponentials, logarithms and reciprocals: one kind of unit does them all."""
        return sum(n for name, n in self.opcodes.items() if name.startswith("MUFU"))

    @property
    def bytes(self) -> int:
        """Return what an element moves: its logits, on one side or both, and its gradient."""
        return 4 if self.divergence == "none" else 6

    def within(self, card: Card) -> bool:
        """Return whether a card's memory is the limit, by both budgets."""
        return self.instructions <= card.instructions(self.bytes) and (
            self.special <= card.special(self.bytes)
        )


# ------------------------------------------------------------------------------------- the launch


class Planner:
    """launch.cu, compiled for the host: what it would launch.

    Args:
        sources: csrc/cuda of the checkout.
        flags: nvcc's.
        folder: for the library.

    Raises:
        RuntimeError: the compiler's message.
    """

    def __init__(self, sources: Path, flags: list[str], folder: Path) -> None:
        library = folder / "captured_launch.so"
        source = Path(__file__).with_name("captured_launch.cu")
        command = [str(find_tool("nvcc")), *flags, "-shared", "-Xcompiler=-fPIC", "-arch=sm_90a"]
        command += [f"-I{sources}", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name}: {done.stderr[-3000:]}")
        self._library = ctypes.CDLL(str(library))

    def plan(self, number: int, temperature: float, places: Mapping[str, int]) -> Launch:
        """Return the launch for ROWS rows at these addresses.

        Raises:
            RuntimeError: it is not one launch of rows_cluster.
        """
        pointers = [ctypes.c_void_p(places.get(name, 0)) for name in
                    ("student", "teacher", "grad", "labels", "w_hard", "w_soft", "hard", "soft",
                     "stats")]  # fmt: skip
        error = self._library.capture(
            ctypes.c_int64(ROWS), ctypes.c_int64(V), number, ctypes.c_double(temperature),
            ctypes.c_double(temperature**2), *pointers, *DEVICE,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"launch.cu does not launch rows_cluster once: {error}")
        params = ctypes.create_string_buffer(self._library.captured_bytes())
        shape = (ctypes.c_int64 * 4)()
        self._library.captured(params, shape)
        return Launch(shape[0], shape[3], shape[1], shape[2], params.raw)


# --------------------------------------------------------------------------------------- the rows


class Rows:
    """Rows of logits as an ordinary step has them, in one piece of memory, and what comes out."""

    def __init__(self, temperature: float, divergence: str) -> None:
        random = np.random.default_rng(SEED)
        logits = [(SPREAD * random.standard_normal((ROWS, V))).astype(np.float32) for _ in "st"]
        bits = [to_bf16(one).astype(np.uint16) for one in logits]
        self.student, self.teacher = (
            (one.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
            for one in bits
        )
        self.labels = random.integers(0, V, ROWS)
        self.weight = np.float32(0.5 / ROWS)
        self.temperature, self.divergence = temperature, divergence
        parts = {
            "student": bits[0], "teacher": bits[1], "grad": np.zeros((ROWS, V), np.uint16),
            "labels": self.labels, "w_hard": np.full(ROWS, self.weight),
            "w_soft": np.full(ROWS, self.weight), "hard": np.zeros(ROWS, np.float32),
            "soft": np.zeros(ROWS, np.float32), "stats": np.zeros((ROWS, STATS), np.float32),
        }  # fmt: skip
        self._begins: dict[str, int] = {}
        size = 0
        for name, part in parts.items():
            self._begins[name] = size
            size += (part.nbytes + 255) // 256 * 256
        self.memory = Memory(np.zeros(size, np.uint8))
        for name, part in parts.items():
            self._bytes(name, part.nbytes)[:] = part.reshape(-1).view(np.uint8)
        if divergence == "none":
            del self._begins["w_soft"]

    def places(self) -> dict[str, int]:
        """Return the address of each tensor."""
        return {name: self.memory.base + begin for name, begin in self._begins.items()}

    def _bytes(self, name: str, size: int) -> Array:
        return self.memory.data[self._begins[name] :][:size]

    def check(self) -> None:
        """Hold losses and gradients against float64.

        Raises:
            RuntimeError: they are not right, so the code was read wrongly.
        """
        hard = self._bytes("hard", 4 * ROWS).view(np.float32)
        soft = self._bytes("soft", 4 * ROWS).view(np.float32)
        bits = self._bytes("grad", 2 * ROWS * V).view(np.uint16).astype(np.uint32)
        grad = (bits << np.uint32(16)).view(np.float32).reshape(ROWS, V)
        true_hard, true_soft, true_grad = self._reference()
        for name, found, true in (
            ("hard loss", hard, true_hard), ("soft loss", soft, true_soft),
        ):  # fmt: skip
            if not np.allclose(found, true, rtol=1e-4, atol=1e-6):
                raise RuntimeError(
                    f"{self.divergence}: the {name} comes out wrong: {found}, {true}"
                )
        # the label's entry is larger than all others together
        others = np.ones((ROWS, V), bool)
        others[np.arange(ROWS), self.labels] = False
        for part in (others, ~others):
            error = _norm((grad - true_grad) * part) / _norm(true_grad * part)
            if not (error < 0.01).all():
                raise RuntimeError(f"{self.divergence}: the gradient comes out wrong, by {error}")

    def _reference(self) -> tuple[Array, Array, Array]:
        T, row = self.temperature, np.arange(ROWS)
        hard_p, hard_log = _softmax(self.student)
        hard = -hard_log[row, self.labels]
        hard_p[row, self.labels] -= 1
        grad = self.weight * hard_p
        if self.divergence == "none":
            return hard, np.zeros(ROWS), grad
        value, slope = _divergence(self.divergence, self.student, self.teacher, T)
        return hard, T * T * value, grad + self.weight * T * T * slope


def _norm(x: Array) -> Array:
    return np.linalg.norm(x, axis=1)


def _softmax(x: Array) -> tuple[Array, Array]:
    shifted = x - x.max(1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.exp(log), log


def _divergence(name: str, s: Array, t: Array, T: float) -> tuple[Array, Array]:
    """Return the value and its gradient by s."""
    if name == "mse":
        return ((s - t) ** 2).mean(1) / T**2, 2 * (s - t) / (s.shape[1] * T**2)
    (p, log_p), (q, log_q) = _softmax(s / T), _softmax(t / T)

    def mean(x: Array) -> Array:
        return (p * x).sum(1, keepdims=True)

    if name == "forward_kl":
        return (q * (log_q - log_p)).sum(1), (p - q) / T
    if name == "reverse_kl":
        ratio = log_p - log_q
        return mean(ratio)[:, 0], p * (ratio - mean(ratio)) / T
    if name == "tvd":
        sign = np.sign(p - q)
        return 0.5 * np.abs(p - q).sum(1), 0.5 * p * (sign - mean(sign)) / T
    middle = np.log(0.5 * (p + q))
    ratio = log_p - middle
    value = 0.5 * ((q * (log_q - middle)).sum(1) + mean(ratio)[:, 0])
    return value, 0.5 * p * (ratio - mean(ratio)) / T


# -------------------------------------------------------------------------------------- the count


def names_of(one: Instruction) -> list[str]:
    """Return the functions that an instruction is part of, the innermost first."""
    return [name for place in one.places if (name := function_at(*place))]


def phase_of(names: list[str]) -> str:
    """Return the phase of a row that functions belong to."""
    if SCALARS & set(names):
        return "around"
    return next((phase for phase, name in PHASES.items() if name in names), "around")


def same_code(left: Code, right: Code) -> bool:
    """Return whether two kernels are the same but for what is known of their lines."""
    return [(x.opcode, x.operands, x.guard) for x in left.instructions] == [
        (x.opcode, x.operands, x.guard) for x in right.instructions
    ]


def execute(divergence: str, number: int, label: str, code: Code, planner: Planner) -> Executed:
    """Run a kernel on rows, and count.

    Raises:
        RuntimeError: what it computes is wrong, or its source lines name none of the phases.
        NotImplementedError: it executes an instruction that is unknown.
    """
    temperature = TEMPERATURES.get(label, 1.0)
    rows = Rows(temperature, divergence)
    launch = planner.plan(number, temperature, rows.places())
    counts = Machine(code, launch, rows.memory).run()
    rows.check()
    found = Executed(divergence, label)
    share = 32 / (ROWS * V)
    for block, warps in zip(code.blocks, counts.warps, strict=True):
        for i in block:
            one = code.instructions[i]
            names, amount = names_of(one), int(warps) * share
            phase = phase_of(names)
            found.phases[phase] += amount
            found.functions[phase, names[0] if names else "the compiler's"] += amount
            found.opcodes[one.opcode] += amount
    for phase in ("first", "gradient"):
        if not found.phases[phase]:
            raise RuntimeError(f"no instruction belongs to {PHASES[phase]}: was it renamed?")
    found.rebases = _rebases(code, counts.warps, counts.lanes, launch)
    return found


def _rebases(code: Code, warps: Array, lanes: Array, launch: Launch) -> tuple[float, float] | None:
    """Return how often a thread and a warp took a new reference in the first pass.

    A rebase is a run of a block that has its exponentials; of several source lines that have any,
    the one that is run most.
    """
    lines: dict[Any, list[int]] = {}
    for number, block in enumerate(code.blocks):
        places = set()
        for i in block:
            one = code.instructions[i]
            names = names_of(one)
            if one.opcode.startswith("MUFU") and REBASE in names and PHASES["first"] in names:
                places.add(one.places[names.index(REBASE)])
        for place in places:
            lines.setdefault(place, []).append(number)
    if not lines:
        return None
    threads = launch.blocks * launch.threads
    return (
        max(int(lanes[blocks].sum()) for blocks in lines.values()) / threads,
        max(int(warps[blocks].sum()) for blocks in lines.values()) / (threads / 32),
    )


def labels_of(divergence: str) -> Iterator[str]:
    """Return the temperatures that make a difference."""
    if divergence in ("mse", "none"):
        yield "any T"
    else:
        yield from TEMPERATURES
