"""What the callbacks of all trainers do with a ConvergenceMonitor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...objectives import ConvergenceMonitor, HeldOut, Verdict, draw
from ...objectives.held_out import NAMES
from ...objectives.picture import check_path


class Watch:
    """A monitor that evaluates a trainer's student.

    Args:
        monitor: a ConvergenceMonitor.
        measure: returns the losses of the held-out set, as ``objectives.evaluate``.
        picture: a file for the picture at the end of the training; None: no picture.

    Raises:
        TypeError: `monitor` or `measure` has the wrong type.
        ImportError, ValueError: The picture could not be drawn, see objectives.draw.
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
        if picture is not None:
            check_path(picture)  # now, not at the end of the training
        self.monitor, self.measure, self.picture = monitor, measure, picture
        self.verdict: Verdict | None = None  # the last
        self._step = -1.0  # of that

    def join_processes(self) -> None:
        """Make all processes the ranks of a monitor without a group, if there are several.

        It may be older than the process group; and with a verdict for each process some of them
        would stop, and the others wait for them.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.monitor.group is None:
            self.monitor.group = dist.group.WORLD

    def check_start(self, step: int) -> None:
        """Refuse a monitor that has evaluations of a training other than that from `step` on.

        Raises:
            ValueError: It has them, of another training.
        """
        history = self.monitor.history
        if history and (step == 0 or history[-1].step > step):
            raise ValueError(
                "monitor must have no evaluations of another training; got one with "
                f"{len(history)}, the last at step {history[-1].step:g}, in a training that starts "
                f"at step {step}: make a new one for each training"
            )

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
