"""A picture of both losses with their errors, and of the verdicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .held_out import NAMES
from .monitor import ConvergenceMonitor

#: The colour of a verdict on both objectives, behind the losses.
COLOURS = {
    "converged": "tab:green",
    "stopped moving": "tab:olive",
    "trading off": "tab:red",
    "both improving": "tab:blue",
    "improving": "tab:cyan",
    "worsening": "tab:orange",
    "undecided": "lightgrey",
}


def draw(monitor: ConvergenceMonitor, path: str | os.PathLike[str]) -> None:
    """Draw the evaluations of a monitor: a panel for each objective, verdicts as the background.

    The band is two standard errors of the change since the evaluation before to either side, the
    bar at the last evaluation goes from -δ to δ about it, and the dotted line is the first
    evaluation whose verdict ends the run.

    Args:
        monitor: with at least one evaluation.
        path: a file of a type that matplotlib can write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no evaluations; or matplotlib writes no files of this type.
    """
    if not monitor.history:
        raise ValueError("monitor must have evaluations; got none: call its update first")
    check_path(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = [name for name in NAMES if monitor.deltas[name] is not None]
    figure = Figure(figsize=(8, 3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        _draw_objective(monitor, name, panel)
    panels[-1].set_xlabel("step")
    seen = [pair for pair in COLOURS if any(point.pair == pair for point in monitor.history)]
    patches = [Patch(color=COLOURS[pair], alpha=0.3) for pair in seen]
    figure.legend(patches, seen, loc="outside upper center", ncols=4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise ImportError or ValueError, as draw(), if no picture can be written to `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install fused_kd[plot]") from error
    kind, kinds = Path(path).suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if kind and kind not in kinds:
        raise ValueError(
            f"a picture's path must end with the name of a file type, one of {sorted(kinds)}; got "
            f"{os.fspath(path)!r}"
        )


def _draw_objective(monitor: ConvergenceMonitor, name: str, panel: Any) -> None:
    history, delta = monitor.history, monitor.deltas[name]
    assert delta is not None
    steps = [point.step for point in history]
    losses = [getattr(point, name) for point in history]
    errors = [2 * getattr(point, f"{name}_error") for point in history]
    panel.plot(steps, losses, color="black")
    low, high = ([x + sign * e for x, e in zip(losses, errors, strict=True)] for sign in (-1, 1))
    panel.fill_between(steps, low, high, color="black", alpha=0.15)
    panel.errorbar(steps[-1], losses[-1], delta, color="tab:purple", capsize=4)
    panel.set_ylabel(f"{name} loss a token, δ = {delta:g}")
    for i, point in enumerate(history):
        begin = steps[i - 1] if i else point.step
        panel.axvspan(begin, point.step, color=COLOURS[point.pair], alpha=0.3, linewidth=0)
    stop = next((point.step for point in history if point.pair in monitor.stop_on), None)
    if stop is not None:
        panel.axvline(stop, color="black", linestyle=":")
