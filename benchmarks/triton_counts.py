"""``python -m benchmarks.triton_counts``: instructions of the Triton kernel per element.

A kernel runs each of its instructions a number of times that follows from the shape:

* The loops over a slice are recognised by their loads. How often each runs follows from V and the
  configuration (:func:`trips`), averaged over the parts of a row.
* The loops over the support of a top-k teacher run once, which is enough for 256 tokens (an upper
  bound: they may be unrolled).
* A loop that waits for the other programs of a row is counted once: what a program spends on
  waiting depends on the card.
* Elsewhere the longest path is taken (an upper bound), except for the slow paths of a division,
  which only subnormal numbers need; the division by S, which only rows at two strides need; and
  the zeros of an ignored row. At T = 2 the path is the longest of those with the fewest
  exponentials, at one that is neither 1 nor 2 the longest of those with the most.
* The program that has the label in its part also reports the row: the longest path with the most
  stores is counted for one program of a row, the longest with the fewest for the others.

The loops have no branch that depends on the logits. Predicated instructions count: they are issued.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import networkx as nx
import torch

from fused_kd.backends.triton.configuration import Configuration, configuration
from fused_kd.backends.triton.device import load_kernels
from fused_kd.divergences import DIVERGENCES

from .sass import Code, disassemble
from .triton_resources import Variant, compile_variant

#: Criteria of a path count one after the other: each outweighs any number of the next.
_BASE = 10**5
_LEAVES = ("EXIT", "RET", "BRX", "JMP", "JMX")
#: The slow path of a division, and a division of integers.
_SLOW = ("CALL", "I2F")


def executed(variant: Variant, folder: Path, two: bool = True) -> tuple[float, float, int]:
    """Return what `count` does, and the registers, for a call that is one launch on sm_90.

    Of one that measures, these are those of its last launch, which follows that of the losses.
    two: T = 2; otherwise T is neither 1 nor 2. The cubin is left in the folder.
    """
    *before, kernel = compile_variant(variant, 90, folder)
    (code,) = disassemble(folder / "kernel.cubin").values()
    rule = load_kernels().rule_of(DIVERGENCES.index(variant.divergence or "forward_kl"))
    is_dense, measures = variant.k is None, variant.operator == "measure"
    assert measures or not before
    passes = 1 + (is_dense and bool(rule.two_passes)) + (variant.operator != "forward")
    teacher = variant.teacher if is_dense else None
    chosen = configuration(variant.vocabulary, variant.student, teacher)
    load = r"LDG" if is_dense and not measures else r"LDG\..*128"
    if measures:
        passes, chosen = 1, replace(chosen, parts=1)
    return *count(code, variant.vocabulary, chosen, passes, two, load), kernel.registers


def count(
    code: Code,
    vocabulary: int,
    chosen: Configuration,
    passes: int,
    two: bool = True,
    load: str = r"LDG",
) -> tuple[float, float]:
    """Return the instructions that a thread executes per entry of a row, and those of them by MUFU.

    MUFU computes exponentials, logarithms and reciprocals. The kernel passes `passes` times over
    each row; `two`: at T = 2, else at a T that is neither 1 nor 2. `load`: a regular
    expression of the opcodes that load logits, in the loops over a slice and in no other.
    LookupError if its loops are not as expected.
    """
    opcodes = [*(instruction.opcode for instruction in code.instructions), ""]
    graph, loops = _control_flow(code)
    loads = {
        last: sum(bool(re.match(load, opcode)) for opcode in opcodes[first : last + 1])
        for last, first in loops.items()
    }
    loads = {last: number for last, number in loads.items() if number}
    if len(loads) != 2 * passes:
        raise LookupError(f"expected two loops for each of {passes} passes; got {loads}")

    def path(first: int, last: int, stores: int = 0) -> list[int]:
        """Return the longest path through all loops, with the most (1) or fewest (-1) stores."""

        def cost(_: int, i: int, edge: object) -> int:
            worth = int(i in loops)
            for criterion in (
                -opcodes[i].startswith(_SLOW),
                stores * opcodes[i].startswith("STG"),
                (opcodes[i] == "MUFU.EX2") * (-1 if two else 1),
                1,
            ):
                worth = worth * _BASE + criterion
            return -worth

        return nx.bellman_ford_path(graph, first, last, cost)

    whole, rest, entries = trips(vocabulary, chosen)
    runs = []  # how often, and which instructions
    for share, stores in ((1 / chosen.parts, 1), (1 - 1 / chosen.parts, -1)):
        runs.append((share, path(0, len(code.instructions), stores)[:-1]))
        if not loads.keys() <= set(runs[-1][1]):  # one pass through each
            raise LookupError("no path leads through all loops")
    for last, number in loads.items():
        is_whole = number == max(loads.values())
        runs.append(((whole if is_whole else rest) - 1, path(loops[last], last)))
    special = [opcode.startswith("MUFU") for opcode in opcodes]
    total = sum(times * len(path) for times, path in runs)
    return total / entries, sum(n * sum(special[i] for i in path) for n, path in runs) / entries


def trips(vocabulary: int, chosen: Configuration) -> tuple[float, float, float]:
    """Return means over a row's parts: rounds over tiles, over the rest, a lane's entries."""
    block = chosen.lanes * chosen.vector
    tile, step = block * chosen.unroll, 8 * chosen.vector
    length = -(-vocabulary // chosen.parts)
    length = -(-length // step) * step if chosen.parts > 1 else vocabulary
    slices = [max(0, min(length, vocabulary - p * length)) for p in range(chosen.parts)]
    whole = sum(n // tile for n in slices) / chosen.parts
    rest = sum(-(-(n % tile) // block) for n in slices) / chosen.parts
    return whole, rest, vocabulary / chosen.parts / chosen.lanes


def _control_flow(code: Code) -> tuple[nx.DiGraph, dict[int, int]]:
    """Return the graph of the instructions and an end, without back edges; and the loops.

    These are the loops that load: the first instruction of each, by the last one.
    """
    edges, loops = [], {}
    for i, instruction in enumerate(code.instructions):
        leaves = instruction.opcode.startswith(_LEAVES)
        if instruction.opcode.startswith(("BRA", "UBRA")):
            edges.append((i, code.labels[instruction.target]))
            leaves = instruction.operands == f"`({instruction.target})"
        if instruction.opcode == "EXIT":
            edges.append((i, len(code.instructions)))
        if instruction.guard or not leaves:
            edges.append((i, i + 1))
    graph = nx.DiGraph(edges)
    for part in list(nx.strongly_connected_components(graph)):
        back = [(i, j) for i, j in graph.subgraph(part).edges if j <= i]
        graph.remove_edges_from(back)
        # a loop that waits reads a counter, with a memory order
        names = [code.instructions[i].opcode for i in part if back]
        loads = any(name.startswith("LDG") and "STRONG" not in name for name in names)
        loops |= {i: j for i, j in back if i != j and loads}
    return graph, loops


#: The rows of the table: a name, the call, T.
COUNTED = [
    *((name, Variant(divergence=name), "2") for name in DIVERGENCES),
    ("forward_kl", Variant(), "1.5"),
    ("forward_kl, label smoothing", Variant(smoothing=True), "2"),
    ("forward_kl, forward only", Variant("forward"), "2"),
    *((f"{name}, top-k", Variant(divergence=name, k=64), "2") for name in ("forward_kl", "jsd")),
    ("kd_metrics, without the forward", Variant("measure"), "2"),
    ("kd_metrics, without the forward", Variant("measure"), "1.5"),
    ("kd_metrics, top-k, without the forwards", Variant("measure", k=64), "2"),
    ("forward_kl, float32", Variant(student=torch.float32, teacher=torch.float32), "2"),
]


def main() -> None:
    """Print a table of COUNTED at two vocabularies."""
    print("| | T | V | instructions | special | registers |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, variant, temperature in COUNTED:
            for vocabulary in (128256, 151936):
                call = replace(variant, vocabulary=vocabulary)
                total, special, registers = executed(call, Path(folder), temperature == "2")
                cells = f"{vocabulary} | {total:.1f} | {special:.1f} | {registers}"
                print(f"| {name} | {temperature} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
