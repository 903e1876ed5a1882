"""The table and the picture."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from demo.cache import K
from demo.train import STUDENT_ROWS, WINDOW, Scores, Student
from fused_kd.options import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
)  # eager, logits, heads, top k: distinct for colour-blind readers
DOTS = {"ls": "none", "marker": "o", "ms": 5, "mec": "white", "mew": 0.9}
CURVES: tuple[dict[str, Any], ...] = ({"lw": 6}, {"lw": 1.8}, DOTS, {"lw": 1.8})
HEADS, TOP_K = "KDLoss, heads", f"KDLoss, top {K}"
LABELS = {"eager": "eager PyTorch", "KDLoss": "KDLoss, logits", HEADS: HEADS, TOP_K: TOP_K}
INK, PALE_INK = "#222B35", "#5A6570"
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": "#9AA3AD",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Summary:
    """A student's median times and its peaks of memory, for the table and the picture."""

    name: str
    loss_ms: float
    step_ms: float
    loss_mib: float
    step_mib: float

    @classmethod
    def of(cls, student: Student) -> "Summary":
        return cls(
            student.name,
            statistics.median(student.loss_ms),
            statistics.median(student.step_ms),
            student.loss_bytes / MIB,
            student.step_bytes / MIB,
        )

    def needs(self) -> tuple[str, ...]:
        """Format times and memory as cells; a star marks a loss that includes matrix products."""
        star = "*" if self.name == HEADS else " "
        loss_ms, loss_mib = f"{self.loss_ms:.1f}{star}", f"{self.loss_mib:.1f}{star}"
        return loss_ms, f"{self.step_ms:.0f} ", loss_mib, f"{self.step_mib:.1f} "

    def ratios(self, eager: "Summary") -> tuple[str, ...]:
        """Format the eager loss's times and memory over these; "" if the work is not the same."""
        step_ms, step_mib = times(eager.step_ms, self.step_ms), times(eager.step_mib, self.step_mib)
        if self.name == HEADS:
            return "", step_ms, "", step_mib
        loss_ms, loss_mib = times(eager.loss_ms, self.loss_ms), times(eager.loss_mib, self.loss_mib)
        return loss_ms, step_ms, loss_mib, step_mib


def largest_difference(students: list[Student]) -> float:
    """Return the largest difference in a step between two losses of the whole teacher."""
    dense = [student.losses for student in students if student.name != TOP_K]
    return max(max(losses) - min(losses) for losses in zip(*dense, strict=True))


def top_k_difference(students: list[Student]) -> float:
    """Return the largest difference in a step between the top k's loss and the eager one."""
    eager, *_, top_k = (student.losses for student in students)
    return max(abs(a - b) for a, b in zip(eager, top_k, strict=True))


def table(students: list[Student], scores: dict[str, Scores]) -> str:
    """Format time, memory and scores of each student, the ratios, and the other models' scores."""
    rows = [Summary.of(student) for student in students]
    eager, *fused = rows
    cells = [
        ("", "loss ", "step ", "loss ", "step ", "hard", "soft", "held-out"),
        ("", "ms ", "ms ", "MiB ", "MiB ", "loss", "loss", "perplexity"),
    ]
    cells += [(row.name, *row.needs(), *shown(scores[row.name])) for row in rows]
    cells += [(f"eager / {row.name}", *row.ratios(eager), "", "", "") for row in fused]
    others = [name for name in scores if name not in {row.name for row in rows}]
    cells += [(name, "", "", "", "", *shown(scores[name])) for name in others]
    layout = "{:<22}{:>8}{:>7}{:>9}{:>8}{:>8}{:>8}{:>12}"
    lines = [layout.format(*line) for line in cells]
    return "\n".join([*lines[:2], "─" * len(lines[0]), *lines[2:]])


def notes(students: list[Student], budget: int) -> str:
    """Return the notes below the table; `budget` is the memory_budget of the heads, in bytes."""
    return f"""\
Times are medians over {len(students[0].losses)} steps. Memory is the peak: of a loss,
beyond its inputs; of a step, beyond weights and optimizer; gradients
are counted. hard, soft and perplexity are those of held-out text.
* {HEADS} takes hidden states. Its loss contains the products with
  both lm_heads and the gradient of the student's, which the others leave to
  the rest of the step: compare the steps, not the losses. It holds at most
  {budget // MIB} MiB of logits at a time; the rest is the gradient of the lm_head.
{TOP_K} reads the teacher's {K} largest log-probabilities of each token,
  and the mass of all others, from the cache on disk: its steps run no teacher."""


def shown(of: Scores) -> tuple[str, str, str]:
    """Format scores as the last three cells of a row."""
    return f"{of.hard:.4f}", f"{of.soft:.4f}", f"{of.perplexity:.1f}"


def times(eager: float, fused: float) -> str:
    """Format the ratio of the eager loss's figure to a fused loss's."""
    ratio = eager / max(fused, 1e-9)
    return "> 9999×" if ratio > 9999 else f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def setting(vocab_size: int) -> str:
    """Describe the setting in one line."""
    return (
        f"Small Llamas on the text of Python's standard library: {STUDENT_ROWS * WINDOW} tokens "
        f"a step, {vocab_size:,} vocabulary entries, float32, {torch.get_num_threads()} CPU threads"
    )


def picture(students: list[Student], vocab_size: int, path: Path) -> None:
    """Save a picture at `path`: loss curves to the left, bars of time and memory to the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= STYLE
    rows = [Summary.of(student) for student in students]
    figure = plt.figure(figsize=(12.5, 6.2), dpi=160)
    sides = {"left": 0.065, "right": 0.97, "top": 0.79, "bottom": 0.13}
    grid = figure.add_gridspec(3, 2, width_ratios=(1.45, 1), wspace=0.3, hspace=1.0, **sides)
    figure.text(0.02, 0.94, title(*rows), fontsize=17, fontweight="bold", va="center")
    figure.text(0.02, 0.885, setting(vocab_size), fontsize=10.5, color=PALE_INK, va="center")
    draw_curves(figure.add_subplot(grid[:, 0]), students)
    bars = (
        ("Loss, forward + backward, ms per step", "loss_ms"),
        ("Whole training step, ms", "step_ms"),
        ("Memory of a step, MiB at its peak", "step_mib"),
    )
    for place, (name, quantity) in enumerate(bars):
        draw_bars(figure.add_subplot(grid[place, 1]), rows, name, quantity)
    figure.savefig(path)
    plt.close(figure)


def title(eager: Summary, fused: Summary, heads: Summary, *_: Summary) -> str:
    """Return the picture's title."""
    if fused.loss_ms >= eager.loss_ms:
        return "The same training, on the slow reference backend of fused_kd"
    faster, smaller = times(eager.loss_ms, fused.loss_ms), times(eager.step_mib, heads.step_mib)
    return f"The same training: a {faster} faster loss, or steps in {smaller} less memory"


def draw_curves(axes: "Axes", students: list[Student]) -> None:
    """Draw the curves on one another: a band, a line in it, and dots."""
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(students[0].losses) + 1)
    for student, colour, line in zip(students, COLOURS, CURVES, strict=True):
        name = LABELS[student.name]
        name += f": at most {top_k_difference(students):.2f} apart" if name == TOP_K else ""
        axes.plot(steps, student.losses, color=colour, label=name, **line)
    name = f"Training loss: three curves at most {largest_difference(students):.0e} apart"
    axes.set_title(name, loc="left", fontweight="bold", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("training step")
    axes.set_ylabel("½ cross-entropy + ½ T² · KL divergence,  T = 2")
    axes.grid(axis="y", color="#ECEEF0")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # free of curves, for the legend
    axes.legend(frameon=False, fontsize=12, loc="upper right")


def draw_bars(axes: "Axes", rows: list[Summary], name: str, quantity: str) -> None:
    """Draw the attribute `quantity` of every row as bars, and the first row's ratio to it."""
    values = [getattr(row, quantity) for row in rows]
    axes.barh([LABELS[row.name] for row in rows], values, color=COLOURS, height=0.72)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * max(values))
    axes.set_title(name, loc="left", fontweight="bold", fontsize=12)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for height, (row, value) in enumerate(zip(rows, values, strict=True)):
        remark = f"{times(values[0], value)} less" if height else ""
        if row.name == HEADS and quantity == "loss_ms":
            remark = "with lm_heads"
        number = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
        axes.text(value, height, f" {number}   {remark}", va="center")
