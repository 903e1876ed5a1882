"""The table and the picture."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.train import STUDENT_ROWS, WINDOW, Scores, Student

MIB = 2**20
COLOURS = ("#E69F00", "#0072B2")  # eager, fused: told apart by any eye
LABELS = {"eager": "eager PyTorch", "KDLoss": "KDLoss"}
INK, PALE_INK = "#222B35", "#5A6570"


@dataclass(frozen=True)
class Summary:
    """What a row of the table and a bar of the picture show."""

    name: str
    loss_ms: float
    step_ms: float
    peak_mib: float

    @classmethod
    def of(cls, student: Student) -> "Summary":
        return cls(
            student.name,
            statistics.median(student.loss_ms),
            statistics.median(student.step_ms),
            student.peak_bytes / MIB,
        )


def largest_difference(students: list[Student]) -> float:
    """Between the two curves, over all steps."""
    first, second = students
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def table(students: list[Student], scores: dict[str, Scores]) -> str:
    """Times are medians over the steps; losses and perplexities are of the held-out text."""
    eager, fused = rows = [Summary.of(student) for student in students]
    cells = [
        ("", "loss", "step", "extra memory", "hard", "soft", "held-out"),
        ("", "ms", "ms", "of the loss", "loss", "loss", "perplexity"),
    ]
    for row in rows:
        needs = (f"{row.loss_ms:.1f}", f"{row.step_ms:.0f}", f"{row.peak_mib:.1f} MiB")
        cells.append((row.name, *needs, *shown(scores[row.name])))
    ratios = (
        times(eager.loss_ms, fused.loss_ms),
        times(eager.step_ms, fused.step_ms),
        times(eager.peak_mib, fused.peak_mib),
    )
    cells.append(("ratio", *ratios, "", "", ""))
    others = scores.keys() - {row.name for row in rows}
    cells += [(name, "", "", "", *shown(scores[name])) for name in scores if name in others]
    layout = "{:<15}{:>8}{:>8}{:>15}{:>11}{:>9}{:>12}"
    lines = [layout.format(*line) for line in cells]
    return "\n".join([*lines[:2], "─" * len(lines[0]), *lines[2:]])


def shown(of: Scores) -> tuple[str, str, str]:
    """The last three cells of a row."""
    return f"{of.hard:.4f}", f"{of.soft:.4f}", f"{of.perplexity:.1f}"


def times(eager: float, fused: float) -> str:
    """How many times less the fused loss needs."""
    ratio = eager / max(fused, 1e-9)
    return "> 9999×" if ratio > 9999 else f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def setting(vocab_size: int) -> str:
    """What was measured, in one line."""
    return (
        f"Small Llamas on the text of Python's standard library: {STUDENT_ROWS * WINDOW} tokens "
        f"a step, {vocab_size:,} vocabulary entries, float32, {torch.get_num_threads()} CPU threads"
    )


def picture(students: list[Student], vocab_size: int, path: Path) -> None:
    """Left: both loss curves on one axis. Right: bars of time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plt.rcParams |= {
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": "#9AA3AD",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    eager, fused = rows = [Summary.of(student) for student in students]
    figure = plt.figure(figsize=(12.5, 6.2), dpi=160)
    grid = figure.add_gridspec(
        3,
        2,
        width_ratios=(1.45, 1),
        left=0.065,
        right=0.97,
        top=0.79,
        bottom=0.13,
        wspace=0.3,
        hspace=1.0,
    )
    title = "The same training" + (
        f": {times(eager.loss_ms, fused.loss_ms)} less time in the loss, "
        f"{times(eager.peak_mib, fused.peak_mib)} less memory for it"
        if fused.loss_ms < eager.loss_ms
        else ", on the slow reference backend of fused_kd"
    )
    figure.text(0.02, 0.94, title, fontsize=17, fontweight="bold", va="center")
    figure.text(0.02, 0.885, setting(vocab_size), fontsize=10.5, color=PALE_INK, va="center")

    curves = figure.add_subplot(grid[:, 0])
    steps = range(1, len(students[0].losses) + 1)
    for student, colour, width in zip(students, COLOURS, (6, 1.8), strict=True):
        curves.plot(steps, student.losses, color=colour, lw=width, label=LABELS[student.name])
    curves.set_title(
        f"Training loss: the two curves are at most {largest_difference(students):.0e} apart",
        loc="left",
        fontweight="bold",
        fontsize=12,
    )
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    curves.set_xlabel("training step")
    curves.set_ylabel("½ cross-entropy + ½ T² · KL divergence,  T = 2")
    curves.grid(axis="y", color="#ECEEF0")
    curves.set_axisbelow(True)
    curves.margins(x=0.02)
    curves.legend(frameon=False, fontsize=12, loc="upper right")

    bars = (
        ("Loss, forward + backward", "ms per step", [row.loss_ms for row in rows]),
        ("Whole training step", "ms", [row.step_ms for row in rows]),
        ("Memory that the loss adds", "MiB at its peak", [row.peak_mib for row in rows]),
    )
    for place, (name, unit, values) in enumerate(bars):
        axes = figure.add_subplot(grid[place, 1])
        axes.barh([LABELS[row.name] for row in rows], values, color=COLOURS, height=0.72)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(values))
        axes.set_title(f"{name}, {unit}", loc="left", fontweight="bold", fontsize=12)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        ratio = f"   {times(*values)} less"
        for height, value in enumerate(values):
            shown = f" {value:,.0f}" if value >= 10 else f" {value:.1f}"
            axes.text(value, height, shown + (ratio if height else ""), va="center")
    figure.savefig(path)
    plt.close(figure)
