"""Say whether both objectives of a run have converged, from evaluations on held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .statistics import Interval, slope_coefficients, spent_level, t_quantile, trend_error

#: The fewest evaluations of a window that is a fraction of the run.
FEWEST_LOOKS = 8
#: What a verdict says of one objective.
STATES = ("converged", "stopped moving", "improving", "worsening", "undecided", "off")
#: What it says of both.
PAIRS = (
    "converged",
    "stopped moving",
    "trading off",
    "both improving",
    "improving",
    "worsening",
    "undecided",
)
_DELTAS = "0.01 nats a token costs 1 % of perplexity; usual are 0.002 to 0.02"


class Verdict(NamedTuple):
    """What an evaluation says of both objectives."""

    hard: str  # of STATES
    soft: str
    pair: str  # of PAIRS
    reason: str  # a sentence for each objective, with its numbers
    stop: bool  # the pair is in `stop_on`
    hard_interval: Interval | None  # of the improvement over the window; None: not known
    soft_interval: Interval | None


class Look(NamedTuple):
    """An evaluation: what the monitor keeps of it as long as it is in the window."""

    step: float
    lr: float | None
    losses: dict[str, Tensor]  # by objective: (S,), sums over the tokens of each sequence


class Point(NamedTuple):
    """An evaluation in numbers, for a picture: kept for the whole run."""

    step: float
    hard: float  # loss a token; NaN if off
    soft: float
    hard_error: float  # standard error over the sequences
    soft_error: float
    pair: str


class ConvergenceMonitor:
    """An early-stopping rule for two objectives, hard and soft, with a stated error probability.

    At each evaluation it estimates how much either loss improved over a window, as minus the slope
    times the window's length, with an interval of confidence. An objective has converged if the
    whole interval is between -δ and δ, at `patience` evaluations in a row: an equivalence test, so
    that few data, which make the interval wide, never look like convergence. The standard error is
    the larger one of two: over sequences, whose tokens are not independent, and of the evaluations
    about their trend, since the noise of a checkpoint is common to all sequences.

    Args:
        hard_delta: δ of the hard loss, nats a token: the smallest improvement over a window that is
            worth the compute. None: the objective is off.
        soft_delta: the same for the soft loss, in the units of ``KDLossParts.soft``, c(T) included.
        confidence: the chance that no evaluation of a run says "converged" of an objective whose
            improvement over the window is δ or more. The rest is spent over the evaluations.
        window: a number of evaluations, at least 3; or a fraction of the run so far, then at least
            8 evaluations. A short fixed window stops slow power laws too early.
        patience: consecutive evaluations that must agree on "converged".
        max_looks: the number of evaluations of the run, among which the error probability is
            divided equally; there is no "converged" afterwards. None: not known.
        check_finite: raise for losses that are not finite; else such an evaluation is skipped.
        stop_on: the pairs of PAIRS that set ``Verdict.stop``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        hard_delta: float | None,
        soft_delta: float | None,
        *,
        confidence: float = 0.95,
        window: float = 0.5,
        patience: int = 2,
        max_looks: int | None = None,
        check_finite: bool = True,
        stop_on: Sequence[str] = ("converged",),
    ) -> None:
        deltas = {"hard": hard_delta, "soft": soft_delta}
        for name, delta in deltas.items():
            if delta is not None and not 0 < delta < math.inf:
                raise ValueError(
                    f"{name}_delta must be positive and finite, or None for an objective that is "
                    f"off; got {delta}: {_DELTAS}"
                )
        if hard_delta is None and soft_delta is None:
            raise ValueError("hard_delta and soft_delta must not both be None")
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence must be in [0.5, 1); got {confidence}")
        is_count = isinstance(window, int) and not isinstance(window, bool)
        if not (window >= 3 if is_count else 0 < window <= 1):
            raise ValueError(
                "window must be a number of evaluations, an int of at least 3, or a fraction of "
                f"the run in (0, 1]; got {window!r}"
            )
        if patience < 1:
            raise ValueError(f"patience must be at least 1; got {patience}")
        if max_looks is not None and max_looks < patience:
            raise ValueError(f"max_looks must be at least patience, {patience}; got {max_looks}")
        if unknown := [pair for pair in stop_on if pair not in PAIRS]:
            raise ValueError(f"stop_on must have names of {PAIRS}; got {unknown[0]!r}")
        self.deltas, self.confidence, self.window = deltas, confidence, window
        self.patience, self.max_looks, self.check_finite = patience, max_looks, check_finite
        self.stop_on = tuple(stop_on)
        self.history: list[Point] = []
        self._looks: list[Look] = []
        self._tokens: Tensor | None = None  # (S,)
        self._ids: Tensor | None = None
        self._measured_with: dict[str, Any] | None = None
        self._tested = 0  # evaluations that had a whole window
        self._passed = {"hard": 0, "soft": 0}  # in a row

    def update(
        self,
        *,
        hard: Tensor | None,
        soft: Tensor | None,
        tokens: Tensor,
        step: float | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
        measured_with: dict[str, Any] | None = None,
    ) -> Verdict:
        """Add an evaluation, and return what is known now.

        Args:
            hard: (sequences,): of each held-out sequence the sum of the hard loss over its tokens,
                not multiplied by the objective's weight; None if the objective is off.
            soft: the same of the soft loss, as in ``KDLossParts.soft``.
            tokens: (sequences,): the sum of the weights of the same tokens.
            step: the number of the update; None: evaluations are counted.
            lr: the learning rate. If it is lower now than at the window's start, "converged"
                becomes "stopped moving": a curve flattens under any decaying rate.
            ids: (sequences,), integers that identify the sequences; compared if passed.
            measured_with: what must not change between evaluations: temperature, divergence, ...

        Raises:
            TypeError: `tokens`, or the losses of an objective, are missing.
            ValueError: Sums are not finite (see `check_finite`), or the held-out set, its order or
                `measured_with` is not that of the first evaluation. The state is then unchanged.
        """
        losses = {
            name: x.detach().double().cpu().flatten()
            for name, x in (("hard", hard), ("soft", soft))
            if x is not None and self.deltas[name] is not None
        }
        tokens = tokens.detach().double().cpu().flatten()
        step = float(len(self.history) if step is None else step)
        self._check(losses, tokens, step, ids, measured_with)
        finite = all(bool(x.isfinite().all()) for x in losses.values())
        if not finite:
            if self.check_finite:
                bad = next(name for name, x in losses.items() if not x.isfinite().all())
                raise ValueError(
                    f"{bad} must be finite; got NaN or infinity at step {step:g}. The monitor keeps "
                    "its state; check_finite=False skips such an evaluation"
                )
            return self._verdict({}, "an evaluation that is not finite was skipped")
        self._tokens = tokens
        self._ids = None if ids is None else ids.detach().cpu().flatten()
        self._measured_with = measured_with
        self._looks.append(Look(step, lr, losses))
        self._looks = self._looks[self._begin() :]
        verdict = self._test()
        self.history.append(self._point(losses, step, verdict.pair))
        return verdict

    # ------------------------------------------------------------------------------- the window

    def _begin(self) -> int:
        """Return the first of the kept evaluations that is in the window."""
        looks = self._looks
        if isinstance(self.window, int):
            return max(0, len(looks) - self.window)
        last = looks[-1].step
        first = self.history[0].step if self.history else last
        start = last - self.window * (last - first)
        inside = next(i for i, look in enumerate(looks) if look.step >= start)
        return max(0, min(inside, len(looks) - FEWEST_LOOKS))

    def _needed(self) -> int:
        return self.window if isinstance(self.window, int) else FEWEST_LOOKS

    # --------------------------------------------------------------------------------- the test

    def _test(self) -> Verdict:
        """Return the verdict on the looks of the window."""
        if len(self._looks) < self._needed():
            missing = self._needed() - len(self._looks)
            return self._verdict({}, f"{missing} more evaluations fill the window")
        self._tested += 1
        level = spent_level(1 - self.confidence, self._tested, self.max_looks)
        intervals = {name: self._interval(name, level) for name in self._looks[-1].losses}
        for name, interval in intervals.items():
            delta = self.deltas[name]
            assert delta is not None
            inside = -delta < interval.low and interval.high < delta
            self._passed[name] = self._passed[name] + 1 if inside else 0
        return self._verdict(intervals, "")

    def _interval(self, name: str, level: float) -> Interval:
        """Return the improvement over the window, and bounds that miss it with `level` each."""
        assert self._tokens is not None
        positions = torch.tensor([look.step for look in self._looks], dtype=torch.float64)
        sums = torch.stack([look.losses[name] for look in self._looks])  # (K, S)
        total = self._tokens.sum()
        losses = sums.sum(1) / total
        c = slope_coefficients(positions)
        improvement = float(c @ losses)
        # of the ratio of sums, linearised: Σ_s d_s = 0
        d = c @ (sums - losses[:, None] * self._tokens) / total
        sequences = len(d)
        if level <= 0 or sequences < 2:
            return Interval(improvement, -math.inf, math.inf, math.inf)
        spread = float((d.square().sum() * sequences / (sequences - 1)).sqrt())
        by_sequences = t_quantile(1 - level, sequences - 1) * spread
        by_looks = t_quantile(1 - level, len(losses) - 2) * trend_error(losses, positions)
        half = max(by_sequences, by_looks)
        return Interval(improvement, improvement - half, improvement + half, by_sequences)

    # ------------------------------------------------------------------------------ the verdict

    def _verdict(self, intervals: dict[str, Interval], why: str) -> Verdict:
        states, reasons = {}, []
        for name, delta in self.deltas.items():
            interval = intervals.get(name)
            if delta is None:
                states[name] = "off"
                continue
            states[name] = "undecided" if interval is None else self._state(name, interval)
            text = why if interval is None else self._sentence(name, states[name], interval)
            reasons.append(f"{name}: {text}")
        pair = pair_of(states["hard"], states["soft"])
        found = (intervals.get("hard"), intervals.get("soft"))
        stop = pair in self.stop_on and not why
        return Verdict(states["hard"], states["soft"], pair, "; ".join(reasons), stop, *found)

    def _state(self, name: str, interval: Interval) -> str:
        if self._passed[name] >= self.patience:
            first, last = self._looks[0].lr, self._looks[-1].lr
            decayed = first is not None and last is not None and last < first
            return "stopped moving" if decayed else "converged"
        delta = self.deltas[name]
        assert delta is not None
        if self._passed[name] > 0:  # within δ, but not often enough yet
            return "undecided"
        if interval.low > 0:
            return "improving"
        return "worsening" if interval.high < 0 else "undecided"

    def _sentence(self, name: str, state: str, interval: Interval) -> str:
        delta, looks = self.deltas[name], len(self._looks)
        assert delta is not None and self._tokens is not None
        text = (
            f"{state}: improved by {interval.improvement:.4g} over {looks} evaluations, in "
            f"[{interval.low:.4g}, {interval.high:.4g}], δ = {delta:g}"
        )
        if state != "undecided":
            return text
        if self._passed[name] > 0:
            return f"{text}; within δ {self._passed[name]} of {self.patience} times in a row"
        room = delta - abs(interval.improvement)
        if not math.isfinite(interval.half_width):
            return f"{text}; the error probability of max_looks evaluations is spent"
        if room <= 0:
            return f"{text}; neither δ nor 0 is excluded"
        if interval.by_sequences < interval.half_width:
            return f"{text}; the evaluations scatter about their trend: more of them would decide"
        sequences = math.ceil(len(self._tokens) * (interval.half_width / room) ** 2)
        return f"{text}; about {sequences} sequences would decide, instead of {len(self._tokens)}"

    def _point(self, losses: dict[str, Tensor], step: float, pair: str) -> Point:
        assert self._tokens is not None
        numbers = []
        for name in ("hard", "soft"):
            x, n = losses.get(name), self._tokens
            if x is None:
                numbers.append((math.nan, math.nan))
                continue
            loss = x.sum() / n.sum()
            count = max(len(n), 2)
            spread = ((x - loss * n).square().sum() * count / (count - 1)).sqrt() / n.sum()
            numbers.append((float(loss), float(spread)))
        (hard, hard_error), (soft, soft_error) = numbers
        return Point(step, hard, soft, hard_error, soft_error, pair)

    # ------------------------------------------------------------------------- checks and state

    def _check(
        self,
        losses: dict[str, Tensor],
        tokens: Tensor,
        step: float,
        ids: Tensor | None,
        measured_with: dict[str, Any] | None,
    ) -> None:
        """Check an evaluation against the first one."""
        for name, delta in self.deltas.items():
            if delta is not None and name not in losses:
                raise TypeError(f"{name} must be given, since {name}_delta is; got None")
        for name, x in losses.items():
            if x.shape != tokens.shape or len(tokens) == 0:
                raise ValueError(
                    f"{name} and tokens must have the same shape (sequences,), at least one; got "
                    f"{tuple(x.shape)} and {tuple(tokens.shape)}"
                )
        if not bool((tokens >= 0).all()) or not 0 < float(tokens.sum()) < math.inf:
            raise ValueError(
                "tokens must be at least 0 and finite, and not all 0: the sums of the weights of "
                "the tokens that the losses are summed over"
            )
        if self.history and step <= self.history[-1].step:
            raise ValueError(
                f"step must grow; got {step:g} after {self.history[-1].step:g}: a run that was "
                "resumed needs the monitor's state_dict of that point"
            )
        if self._tokens is None:
            return
        if tokens.shape != self._tokens.shape:
            raise ValueError(
                f"the held-out set must not change; got {len(tokens)} sequences after "
                f"{len(self._tokens)}: evaluate on the same sequences, in the same order"
            )
        same = torch.allclose(tokens, self._tokens, rtol=1e-6)
        if ids is not None and self._ids is not None:
            same = same and torch.equal(ids.detach().cpu().flatten(), self._ids)
        if not same:
            raise ValueError(
                "the held-out set must not change; got sequences of other "
                f"{'ids or ' if ids is not None else ''}numbers of tokens than before: evaluate "
                "on the same sequences, in the same order"
            )
        if measured_with != self._measured_with:
            before, now = self._measured_with or {}, measured_with or {}
            name = next(n for n in {**before, **now} if before.get(n) != now.get(n))
            raise ValueError(
                f"{name} must not change between evaluations, since it changes what the losses "
                f"mean; it was {before.get(name)!r} and is {now.get(name)!r}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for checkpoints; it holds sequences x looks in the window."""
        return {
            "settings": self._settings(),
            "history": [tuple(point) for point in self.history],
            "looks": [tuple(look) for look in self._looks],
            "tokens": self._tokens,
            "ids": self._ids,
            "measured_with": self._measured_with,
            "tested": self._tested,
            "passed": dict(self._passed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: It is that of a monitor with other settings, such as another window.
        """
        mine = self._settings()
        for name, value in state["settings"].items():
            if mine[name] != value:
                raise ValueError(
                    f"{name} must be that of the state, {value!r}; got {mine[name]!r}: resume with "
                    "the same settings, or begin a new monitor"
                )
        self.history = [Point(*point) for point in state["history"]]
        self._looks = [Look(*look) for look in state["looks"]]
        self._tokens, self._ids = state["tokens"], state["ids"]
        self._measured_with = state["measured_with"]
        self._tested, self._passed = state["tested"], dict(state["passed"])

    def _settings(self) -> dict[str, Any]:
        return {
            "hard_delta": self.deltas["hard"],
            "soft_delta": self.deltas["soft"],
            "confidence": self.confidence,
            "window": self.window,
            "patience": self.patience,
            "max_looks": self.max_looks,
        }


def pair_of(hard: str, soft: str) -> str:
    """Return the verdict on both objectives: the first that fits, in the order of PAIRS."""
    both = {hard, soft} - {"off"}
    if both == {"converged"}:
        return "converged"
    if both <= {"converged", "stopped moving"}:
        return "stopped moving"
    if both == {"improving", "worsening"}:
        return "trading off"
    if hard == soft == "improving":
        return "both improving"
    for state in ("improving", "worsening"):
        if state in both:
            return state
    return "undecided"
