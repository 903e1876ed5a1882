"""Schedules of the weights and of the temperature of a loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from ..modules import KDLoss

SHAPES = ("linear", "cosine")


class Ramp(NamedTuple):
    """A value that goes from `start` to `end` in `steps` steps, and stays there."""

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        share = min(max(step / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * self.start + share * self.end


class LossSchedule:
    """Changes temperature and weights of a loss at each step, as a scheduler the learning rate.

    ::

        schedule = LossSchedule(loss, temperature=Ramp(4.0, 1.0, 1000, "cosine"))
        for batch in loader:
            loss(student(batch), teacher(batch), labels).backward()
            ...
            schedule.step()

    The numbers are arguments of the operators: under ``torch.compile`` changes after the first do
    not compile again, but for a weight that reaches 0, which removes its term. Nothing synchronizes
    with the device. Other options stay unchanged.

    A ConvergenceMonitor refuses evaluations with different numbers, which are different losses:
    create it after the last change.

    Args:
        loss: whose attributes are set, at once and by each :meth:`step`.
        temperature: T of the soft term.
        hard_weight: factor of the hard term.
        soft_weight: factor of the soft term.

    Raises:
        TypeError: `loss` is no KDLoss, or a schedule no Ramp.
        ValueError: No schedule is passed; a ramp has an unknown shape or no steps; or a value that
            the loss refuses.
    """

    def __init__(
        self,
        loss: KDLoss,
        *,
        temperature: Ramp | None = None,
        hard_weight: Ramp | None = None,
        soft_weight: Ramp | None = None,
    ) -> None:
        if not isinstance(loss, KDLoss):
            raise TypeError(f"loss must be a KDLoss; got {type(loss).__name__}")
        ramps = {"temperature": temperature, "hard_weight": hard_weight, "soft_weight": soft_weight}
        self.ramps = {name: ramp for name, ramp in ramps.items() if ramp is not None}
        if not self.ramps:
            raise ValueError("temperature, hard_weight or soft_weight must be a Ramp; got none")
        for name, ramp in self.ramps.items():
            _check(name, ramp)
        for at in ("start", "end"):  # refused now, not at the end of the training
            replace(loss.options, **{name: getattr(ramp, at) for name, ramp in self.ramps.items()})
        self.loss, self.steps = loss, 0
        self._set(0)

    def step(self) -> None:
        """Set the values of the next step."""
        self.steps += 1
        self._set(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of steps, and set their values."""
        self.steps = state["steps"]
        self._set(self.steps)

    def _set(self, step: int) -> None:
        for name, ramp in self.ramps.items():
            setattr(self.loss, name, ramp.at(step))


def _check(name: str, ramp: Ramp) -> None:
    if not isinstance(ramp, Ramp):
        raise TypeError(
            f"{name} must be a Ramp; got {type(ramp).__name__}: Ramp(start, end, steps)"
        )
    if ramp.shape not in SHAPES:
        raise ValueError(f"{name}'s shape must be one of {SHAPES}; got {ramp.shape!r}")
    if ramp.steps < 1:
        raise ValueError(f"{name}'s steps must be at least 1; got {ramp.steps}")
