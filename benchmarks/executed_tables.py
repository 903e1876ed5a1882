"""The tables of what the CUDA kernels execute."""

from __future__ import annotations

from collections.abc import Iterable

from .cuda_executed import CARDS, PHASES, ROWS, SPREAD, Executed, V
from .report import markdown_table


def executed_table(found: Iterable[Executed]) -> str:
    """Return one line for each divergence and temperature."""
    phases = ("around", *PHASES)
    rows = []
    for one in found:
        thread, warp = (f"{x:.2f}" for x in one.rebases) if one.rebases else ("–", "–")
        rows.append([
            f"`{one.divergence}`" if one.divergence != "none" else "hard term alone",
            one.temperature, *(f"{one.phases[phase]:.1f}" for phase in phases),
            f"{one.instructions:.1f}", f"{one.special:.1f}", thread, warp,
            *("yes" if one.within(card) else "**no**" for card in CARDS),
        ])  # fmt: skip
    head = ["divergence", "hard term at", "around", "first pass", "second", "gradient", "together",
            "special", "rebases per thread", "per warp",
            *(f"{x.name} ({x.instructions():.1f}, {x.special():.1f})" for x in CARDS)]  # fmt: skip
    return markdown_table(head, rows, left=2)


def functions_table(one: Executed, least: float = 0.05) -> str:
    """Return where the instructions are, by phase and function: those of `least` or more."""
    rows = [
        [phase, f"`{name}`", f"{amount:.2f}"]
        for (phase, name), amount in one.functions.most_common()
        if amount >= least
    ]
    return markdown_table(["phase", "function", "instructions"], rows, left=2)


def opcodes_table(one: Executed, least: float = 0.1) -> str:
    """Return which instructions they are: those of `least` or more."""
    rows = [[f"`{x}`", f"{n:.2f}"] for x, n in one.opcodes.most_common() if n >= least]
    return markdown_table(["opcode", "instructions"], rows)


def executed_text() -> str:
    """Return what the table of what is executed shows."""
    cards = "; ".join(
        f"{x.name}: {x.multiprocessors} multiprocessors, {x.gigahertz:g} GHz, {x.terabytes:g} TB/s"
        for x in CARDS
    )
    return (
        "Warp instructions that `rows_cluster` executes per element (times 32 lanes): bfloat16, "
        f"sm_90a, V = {V}, forward and backward in one read, with the hard term. Its machine code "
        f"is run on {ROWS} rows of logits ({SPREAD:g} times standard normal) and everything "
        "counts: prologue, rebases, merges, exchange, ends. Rebases: new references in the first "
        "pass, per thread, and per warp, which executes one if any of its threads does. "
        "Special functions: exponentials, reciprocals, logarithms. Yes: not more than a card can "
        "issue in the time that its memory takes, 128 lanes × multiprocessors × clock / "
        "(bandwidth / 6 bytes) instructions and an eighth of that special functions; two thirds "
        f"of it without a teacher, which is 4 bytes. {cards}."
    )
