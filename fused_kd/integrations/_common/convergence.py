"""What the callbacks of all trainers do with a ConvergenceMonitor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ...objectives import ConvergenceMonitor, HeldOut, Verdict, draw
from ...objectives.held_out import NAMES


class Watch:
    """A monitor that evaluates a trainer's student.

    Args:
        monitor: a ConvergenceMonitor.
        measure: returns the losses of the held-out set, as ``objectives.evaluate``.
        picture: a file for the picture at the end of the training; None: no picture.

    Raises:
        TypeError: `monitor` or `measure` has the wrong type.
    """

    def __init__(
        self,
        monitor: ConvergenceMonitor,
        measure: Callable[[], HeldOut],
        picture: str | os.PathLike[str] | None,
    ) -> None:
        if not isinstance(monitor, ConvergenceMonitor):
            raise TypeError(f"monitor must be a ConvergenceMonitor; got {type(monitor).__name__}")
        if not callable(measure):
            raise TypeError(
                f"measure must be a function without arguments; got {type(measure).__name__}: pass "
                "lambda: evaluate(loss, student, teacher, loader)"
            )
        self.monitor, self.measure, self.picture = monitor, measure, picture
        self.verdict: Verdict | None = None  # the last
        self._step = -1.0  # of that

    def look(self, step: int, optimizer: torch.optim.Optimizer | None) -> Verdict | None:
        """Evaluate and return the verdict; None if this step has one already."""
        history = self.monitor.history
        if step == self._step or (history and step <= history[-1].step):
            return None
        lr = None if optimizer is None else max(float(g["lr"]) for g in optimizer.param_groups)
        self.verdict = self.monitor.update(**self.measure()._asdict(), step=step, lr=lr)
        self._step = step
        return self.verdict

    def log_entries(self) -> dict[str, Any]:
        """Return the last evaluation as log entries: numbers, and the verdict's words.

        One that was skipped, since it is not finite, has words only.
        """
        assert self.verdict is not None
        history = self.monitor.history
        is_skipped = not history or history[-1].step != self._step
        entries: dict[str, Any] = {"convergence": self.verdict.pair}
        for name, state in zip(NAMES, self.verdict[:2], strict=True):
            if state == "off":
                continue
            entries[f"convergence_{name}"] = state
            if not is_skipped:
                entries[f"convergence_{name}_loss"] = getattr(history[-1], name)
            interval = getattr(self.verdict, f"{name}_interval")
            if interval is not None:
                entries[f"convergence_{name}_improvement"] = interval.improvement
                entries[f"convergence_{name}_half_width"] = interval.half_width
        return entries

    def finish(self) -> None:
        """Draw the picture, if one is wanted and there are evaluations."""
        if self.picture is not None and self.monitor.history:
            draw(self.monitor, self.picture)
