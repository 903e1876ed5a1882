"""What ``benchmarks.gpu_logits`` shows of its measurements: lines, tables, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import COMPILED, EAGER, Case
from .linear_cases import LinearCase
from .measuring import Contestant, Timing
from .report import megabytes, table

COPY, LIGER = "copy", "Liger"
IN_PLACE, FORWARD_ONLY = ", in place", ", forward only"
#: Time over the floor, at most, from V = 128256 and N = 8192 on (DESIGN's numbers).
GOALS = {"cuda": 1.15, "triton": 1.5}
GOAL_ROWS, GOAL_VOCABULARY = 8192, 128256


@dataclass(frozen=True)
class Line:
    """A contestant that takes part, on its own number of rows, and its peak of memory."""

    contestant: Contestant
    case: Case | LinearCase
    peak: int

    @property
    def name(self) -> str:
        return self.contestant.name


@dataclass(frozen=True)
class Figure:
    """What came out for one contestant, scaled to the rows of the case."""

    seconds: float
    quartiles: tuple[float, float]
    peak: int
    rows: int  # measured on

    @classmethod
    def of(cls, line: Line, timing: Timing, rows: int) -> Figure:
        scale = rows / line.case.n
        low, high = timing.quartiles
        quartiles = scale * low, scale * high
        return cls(scale * timing.median, quartiles, int(scale * line.peak), line.case.n)

    def cells(self, name: str, rows: int) -> list[str]:
        """Name, milliseconds and quartiles for a table."""
        low, high = (1e3 * q for q in self.quartiles)
        scaled = "" if self.rows == rows else f" (N = {self.rows}, scaled)"
        return [name + scaled, f"{1e3 * self.seconds:.3f}", f"[{low:.3f}, {high:.3f}]"]


@dataclass
class Measured:
    """One case, the bandwidth of a copy beside it, and its contestants."""

    case: Case
    bandwidth: float  # bytes per second, read and written
    figures: dict[str, Figure]

    def add(self, line: Line, timing: Timing) -> None:
        self.figures[line.name] = Figure.of(line, timing, self.case.n)

    def bytes_of(self, name: str) -> int:
        """The least traffic with memory."""
        kind = "forward" if name.endswith(FORWARD_ONLY) else "forward_backward"
        return self.case.expected_bytes[kind]

    def floor(self, name: str = "") -> float:
        """Seconds for that at the bandwidth of a copy."""
        return self.bytes_of(name) / self.bandwidth

    def over_floor(self, name: str) -> float:
        return self.figures[name].seconds / self.floor(name)

    def goal(self, name: str) -> float | None:
        """For the ratio to the floor, where there is one."""
        is_large = self.case.n >= GOAL_ROWS and self.case.v >= GOAL_VOCABULARY
        if not is_large or self.case.divergence != "forward_kl" or name.endswith(FORWARD_ONLY):
            return None
        return GOALS.get(name.removesuffix(IN_PLACE))

    def sizes(self) -> dict[str, Any]:
        case = self.case
        return {"n": case.n, "v": case.v, "dtype": case.dtype, "temperature": case.temperature,
                "divergence": case.divergence}  # fmt: skip

    def as_dict(self, name: str) -> dict[str, Any]:
        """For the file of results; the times themselves are those of the rows measured on."""
        figure, goal = self.figures[name], self.goal(name)
        ratio = self.over_floor(name)
        return {
            **self.sizes(),
            "name": name,
            "rows_measured": figure.rows,
            "least_bytes": self.bytes_of(name),
            "bytes_per_second": self.bytes_of(name) / figure.seconds,
            "copy_bytes_per_second": self.bandwidth,
            "floor_ms": 1e3 * self.floor(name),
            "over_floor": ratio,
            "goal": goal,
            "reached": None if goal is None else ratio <= goal,
            "peak_bytes": figure.peak,
        }

    def text(self) -> str:
        """A table of this case."""
        case = self.case
        rows = []
        for name, figure in self.figures.items():
            rows.append([*figure.cells(name, case.n),
                         f"{self.bytes_of(name) / figure.seconds / 1e9:.0f}",
                         f"{self.over_floor(name):.2f}", self.verdict(name),
                         megabytes(figure.peak)])  # fmt: skip
        head = [f"{case.dtype}, N = {case.n}, V = {case.v}, {case.divergence}, T = "
                f"{case.temperature:g}", "ms", "[quartiles]", "GB/s (least traffic)", "/ floor",
                "goal", "peak beyond the inputs"]  # fmt: skip
        whole, forward = 1e3 * self.floor(), 1e3 * self.floor(FORWARD_ONLY)
        floor = f"floor {whole:.3f} ms (forward only {forward:.3f})"
        return f"\n{table(head, rows)}\n{floor}, by a copy at {self.bandwidth / 1e9:.0f} GB/s"

    def verdict(self, name: str) -> str:
        goal = self.goal(name)
        if goal is None:
            return ""
        return f"≤ {goal:g} {'reached' if self.over_floor(name) <= goal else 'NOT reached'}"


def show(every: Sequence[Measured], here: dict[str, Any], folder: Path) -> None:
    """Prints the tables, and writes them and the picture into the folder."""
    text = "\n\n".join([heading("KDLoss on GPU logits", here), *_summary(every)])
    full = "\n".join([text, *(one.text() for one in every)])
    (folder / "gpu_logits.txt").write_text(full + "\n")
    print(f"\n{text}", flush=True)
    why = _draw(every, here, folder / "gpu_logits.png")
    if why is not None:
        print(f"LEFT OUT the picture: {why}", flush=True)


def heading(what: str, here: dict[str, Any]) -> str:
    """What was measured, on what, and how."""
    named = ("driver", "torch", "triton", "cuda", "commit")
    facts = ", ".join(f"{key} {here[key]}" for key in named if here.get(key))
    return (f"{what}, {here['device']} ({facts})\nforward + backward of the public "
            "call, T = 2, device time, median of interleaved calls; the host runs ahead; the "
            "second-level cache is not flushed, the matrices are larger")  # fmt: skip


def _summary(every: Sequence[Measured]) -> list[str]:
    if not every:
        return ["nothing was measured"]
    names = list(dict.fromkeys(name for one in every for name in one.figures))

    def tabulate(title: str, columns: list[str], cell: Callable[[Measured, str], str]) -> str:
        rows = [
            [f"{m.case.dtype} {m.case.n} x {m.case.v} {m.case.divergence}",
             *(cell(m, name) if name in m.figures or not name else "" for name in columns)]
            for m in every
        ]  # fmt: skip
        return table([title, *(name or "floor" for name in columns)], rows)

    def ratio(m: Measured, name: str) -> str:
        mark = "" if m.goal(name) is None else " ok" if "NOT" not in m.verdict(name) else " !!"
        return f"{m.over_floor(name):.2f}{mark}"

    whole = [name for name in names if not name.endswith(FORWARD_ONLY)]
    ours = [name for name in names if name not in (EAGER, COMPILED, LIGER)]
    return [
        tabulate("ms, forward + backward", ["", *whole],
                 lambda m, n: f"{1e3 * (m.figures[n].seconds if n else m.floor()):.2f}"),
        tabulate("time / floor", ours, ratio)
        + f"\ngoals ({', '.join(f'{n} ≤ {g:g}' for n, g in GOALS.items())}) hold for forward_kl, "
        f"N = {GOAL_ROWS}, V ≥ {GOAL_VOCABULARY}: ok reached, !! not",
        tabulate("peak beyond the inputs, MiB", whole,
                 lambda m, n: f"{m.figures[n].peak / 2**20:.1f}"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- the picture

STYLE = {
    "cuda": ("CUDA", "#0b6e4f", "o-"),
    "triton": ("Triton", "#2a78b8", "s-"),
    "cpu": ("CPU", "#0b6e4f", "o-"),
    LIGER: ("Liger", "#8c6bb1", "v-"),
    COMPILED: ("torch.compile", "#d98200", "^-"),
    EAGER: ("eager torch", "#b03030", "D-"),
}


def _draw(every: Sequence[Measured], here: dict[str, Any], path: Path) -> str | None:
    """Time over V for the larger N, one panel for each dtype; or why there is none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        return str(error)
    shown = [m for m in every if m.case.divergence == "forward_kl"]
    if not shown:
        return "nothing was measured"
    rows = max(m.case.n for m in shown)
    shown = sorted((m for m in shown if m.case.n == rows), key=lambda m: m.case.v)
    dtypes = list(dict.fromkeys(m.case.dtype for m in shown))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(1 + 5.6 * len(dtypes), 5.2), sharey=True,
                                squeeze=False)  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _panel(axis, [m for m in shown if m.case.dtype == dtype])
        axis.set_title(dtype)
    axes[0][0].set_ylabel("milliseconds, forward + backward")
    lowest = 0.6e3 * min(m.floor() for m in shown)
    highest = 2e3 * max(f.seconds for m in shown for n, f in m.figures.items() if n in STYLE)
    for axis in axes[0]:
        axis.set_ylim(lowest, highest)
        _label_ends(axis, 1.03 * max(m.case.v for m in shown))
    figure.suptitle(f"Distillation loss on {rows} rows of logits, {here['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None


def _panel(axis: Any, shown: Sequence[Measured]) -> None:
    vocabularies = [m.case.v for m in shown]
    floors = [1e3 * m.floor() for m in shown]
    axis.fill_between(vocabularies, floors, 1e-9, color="0.88")
    axis.plot(vocabularies, floors, "k-", linewidth=2.5, label="floor: memory traffic alone")
    for name, (label, colour, style) in STYLE.items():
        points = [(m.case.v, 1e3 * m.figures[name].seconds) for m in shown if name in m.figures]
        if points:
            ratio = points[-1][1] / floors[vocabularies.index(points[-1][0])]
            text = (
                f"{label}: {ratio:.1f} × floor" if ratio >= 10 else f"{label}: {ratio:.2f} × floor"
            )
            axis.plot(*zip(*points, strict=True), style, color=colour, markersize=5, label=text)
    axis.set_yscale("log")
    ticks = [k * 10.0**e for e in range(-4, 5) for k in (1, 3)]
    axis.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axis.set_yticks([], minor=True)
    axis.set_xticks(vocabularies, [f"{v / 1000:.0f}k" for v in vocabularies], fontsize=8)
    axis.set_xlabel("vocabulary")
    axis.set_xlim(0, 1.55 * max(vocabularies))
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)


def _label_ends(axis: Any, x: float) -> None:
    """A name beside the end of each line, moved up where two would overlap; the floor's below."""
    lowest, highest = axis.get_ylim()
    step = (highest / lowest) ** 0.045
    lines = sorted(axis.get_lines(), key=lambda line: line.get_ydata()[-1])
    free = lines[0].get_ydata()[-1] / step**0.6
    for line in lines:
        free = max(line.get_ydata()[-1], free) if line is not lines[0] else free
        axis.text(x, free, line.get_label(), color=line.get_color(), va="center", fontsize=8.5)
        free *= step
