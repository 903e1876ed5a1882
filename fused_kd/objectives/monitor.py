"""Say whether both objectives of a run have converged, from evaluations on held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .held_out import NAMES, HeldOut, gathered, repeated
from .statistics import Interval, slope_coefficients, spent_level, t_quantile, trend_error
from .verdict import PAIRS, Objective, Verdict, pair_of

#: The fewest evaluations of a window that is a fraction of the run.
FEWEST_LOOKS = 8


class Settings(NamedTuple):
    """What must be the same when a run is resumed."""

    hard_delta: float | None
    soft_delta: float | None
    confidence: float
    window: float  # an int: evaluations
    patience: int
    max_looks: int | None


class Look(NamedTuple):
    """An evaluation that is in the window."""

    step: float
    lr: float | None
    losses: dict[str, float]  # by objective, a token, of all ranks
    sums: dict[str, Tensor]  # by objective (S,), of the tokens of each sequence of this rank


class Point(NamedTuple):
    """An evaluation in numbers, kept for the whole run."""

    step: float
    hard: float  # loss a token; NaN if the objective is off
    soft: float
    hard_error: float  # standard error of the change since the evaluation before, if any
    soft_error: float
    pair: str  # of PAIRS


class ConvergenceMonitor:
    """An early-stopping rule for two objectives, hard and soft, with a stated error probability.

    At each evaluation it estimates how much either loss improved over a window: minus the slope,
    times the window's length. An objective has converged if a confidence interval of that is
    between -δ and δ, at `patience` evaluations in a row. This is an equivalence test: few data make
    the interval wide, and so never look like convergence. The standard error is the larger one of
    two: over sequences, whose tokens are not independent, and of the evaluations about their trend,
    since the noise of a checkpoint is common to all sequences.

    `improving` and `worsening` are statements about the window, not about the run: the losses of
    neighbouring checkpoints resemble each other, so that a loss which wanders improves and worsens
    by turns. Only `converged` has the error probability of `confidence`.

    Args:
        hard_delta: δ of the hard loss, nats a token: the smallest improvement over a window that is
            worth the compute. None: the objective is off.
        soft_delta: the same for the soft loss, in the units of ``KDLossParts.soft``, c(T) included.
        confidence: the chance that no evaluation of a run says "converged" of an objective whose
            improvement over the window is δ or more. The rest is spent over the evaluations.
        window: a number of evaluations, at least 3; or a fraction of the run so far, then at least
            8 evaluations. A short fixed window stops slow power laws too early.
        patience: evaluations in a row that must agree on "converged".
        max_looks: the number of evaluations with a whole window, among which the error probability
            is divided equally; there is no "converged" afterwards. None: not known.
        check_finite: raise for losses that are not finite; else such an evaluation is skipped.
        stop_on: the pairs of PAIRS that set ``Verdict.stop``.
        group: the ranks that hold the sequences, each its own. All of them call every method, and
            get the same verdict. None: this process has all sequences.

    Raises:
        TypeError: `window` has the wrong type.
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_deltas(hard_delta, soft_delta)
        _check_rule(confidence, window, patience, max_looks)
        if isinstance(stop_on, str) or (unknown := [pair for pair in stop_on if pair not in PAIRS]):
            got = stop_on if isinstance(stop_on, str) else unknown[0]
            raise ValueError(f"stop_on must be a sequence of names in {PAIRS}; got {got!r}")
        self.settings = Settings(hard_delta, soft_delta, confidence, window, patience, max_looks)
        self.deltas = {"hard": hard_delta, "soft": soft_delta}
        self.check_finite, self.stop_on, self.group = check_finite, tuple(stop_on), group
        self.history: list[Point] = []
        self._looks: list[Look] = []
        self._first: HeldOut | None = None  # without the losses
        self._tokens, self._sequences = 0.0, 0  # of all ranks
        self._tested = 0  # evaluations that had a whole window
        self._passed = dict.fromkeys(NAMES, 0)  # in a row

    def update(
        self,
        *,
        hard: Tensor | None,
        soft: Tensor | None,
        tokens: Tensor,
        step: float | None = None,
        lr: float | None = None,
        ids: Tensor | None = None,
        measured_with: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Add an evaluation, and return what is known now.

        :func:`fused_kd.objectives.evaluate` makes the tensors.

        Args:
            hard: (sequences,): of each held-out sequence the sum of the hard loss over its tokens,
                not multiplied by the objective's weight; ignored if the objective is off.
            soft: the same of the soft loss, as in ``KDLossParts.soft``.
            tokens: (sequences,): the sum of the weights of the same tokens.
            step: the number of the update; None: evaluations are counted.
            lr: the learning rate. If it is lower now than at the window's start, "converged"
                becomes "stopped moving": a curve flattens under any decaying rate.
            ids: (sequences,), integers that identify the sequences; if given, they are compared
                with those before, and with those of the other ranks.
            measured_with: what must not change between evaluations: temperature, divergence, ...

        Raises:
            TypeError: The losses of an objective are missing.
            ValueError: Sums are not finite (see `check_finite`); or there are no tokens; or step,
                the held-out set, its order or `measured_with` do not fit the evaluations before; or
                two ranks have the same sequences. On all ranks, and the state is unchanged.
        """
        step = float(len(self.history) if step is None else step)
        new = HeldOut(hard, soft, tokens, ids, measured_with).normalised()
        sums = {
            name: x
            for name, x in zip(NAMES, (new.hard, new.soft), strict=True)
            if x is not None and self.deltas[name] is not None
        }
        totals, count = self._reduced(new, sums, step)
        total = totals.pop("tokens")
        bad = [name for name, value in totals.items() if not math.isfinite(value)]
        if bad and self.check_finite:
            raise ValueError(
                f"{bad[0]} must be finite; got a sum of {totals[bad[0]]} at step {step:g}. The "
                "monitor keeps its state; with check_finite=False it skips such an evaluation"
            )
        if bad:
            return self._verdict({}, f"skipped, since {bad[0]} is not finite")
        self._first = new._replace(hard=None, soft=None)
        self._tokens, self._sequences = total, count
        losses = {name: value / total for name, value in totals.items()}
        lr = None if lr is None else float(lr)  # a copy: an optimizer may hold it as a tensor
        self._looks.append(Look(step, lr, losses, sums))
        self._looks = self._looks[self._begin() :]
        verdict = self._test()
        self.history.append(self._point(verdict.pair))
        return verdict

    def _reduced(
        self, new: HeldOut, sums: dict[str, Tensor], step: float
    ) -> tuple[dict[str, float], int]:
        """Return the sums of all ranks, that of the tokens too, and their number of sequences.

        Raises:
            TypeError, ValueError: As update(), on all ranks if on one.
        """
        fault = self._fault(new, sums, step)
        own = {name: float(x.sum()) for name, x in {**sums, "tokens": new.tokens}.items()}
        ids = new.ids if self._first is None else None  # later they are compared with the first
        ranks = gathered((fault, own, len(new.tokens), ids), self.group)
        if fault is not None:
            raise fault
        for rank, (found, *_) in enumerate(ranks):
            if found is not None:
                raise type(found)(f"on rank {rank}: {found}")
        if self._first is None:
            _check_repeats([(values, count, ids) for _, values, count, ids in ranks])
        totals = {name: math.fsum(values[name] for _, values, *_ in ranks) for name in own}
        if not totals["tokens"] > 0:
            raise ValueError("tokens must not all be 0: there are no losses to test")
        return totals, sum(count for *_, count, _ in ranks)

    def _fault(self, new: HeldOut, sums: dict[str, Tensor], step: float) -> Exception | None:
        """Return the error of this rank's sums, if any."""
        for name, delta in self.deltas.items():
            if delta is not None and name not in sums:
                return TypeError(
                    f"{name} must be given, since {name}_delta is {delta:g}; got None: for an "
                    f"objective whose weight is 0 pass {name}_delta=None"
                )
        if not math.isfinite(step):
            return ValueError(f"step must be finite; got {step}")
        if self.history and step <= self.history[-1].step:
            return ValueError(
                f"step must grow; got {step:g} after {self.history[-1].step:g}: a run that was "
                "resumed needs the state_dict of the monitor at that point"
            )
        text = new.fault(self._first)
        return None if text is None else ValueError(text)

    # ------------------------------------------------------------------------------- the window

    def _begin(self) -> int:
        """Return the first of the kept evaluations that is in the window."""
        looks, window = self._looks, self.settings.window
        if isinstance(window, int):
            return max(0, len(looks) - window)
        last = looks[-1].step
        first = self.history[0].step if self.history else last
        start = last - window * (last - first)
        inside = next(i for i, look in enumerate(looks) if look.step >= start)
        return max(0, min(inside, len(looks) - FEWEST_LOOKS))

    # --------------------------------------------------------------------------------- the test

    def _test(self) -> Verdict:
        """Return the verdict on the looks of the window."""
        window = self.settings.window
        missing = (window if isinstance(window, int) else FEWEST_LOOKS) - len(self._looks)
        if missing > 0:
            return self._verdict({}, f"{missing} more evaluations make a window")
        self._tested += 1
        level = spent_level(1 - self.settings.confidence, self._tested, self.settings.max_looks)
        objectives = {}
        first, last = self._looks[0].lr, self._looks[-1].lr
        for name, interval in self._intervals(level).items():
            delta = self.deltas[name]
            assert delta is not None
            inside = -delta < interval.low and interval.high < delta
            self._passed[name] = self._passed[name] + 1 if inside else 0
            objectives[name] = Objective(
                delta,
                interval,
                self._passed[name],
                self.settings.patience,
                len(self._looks),
                self._sequences,
                first is not None and last is not None and last < first,
            )
        return self._verdict(objectives, "")

    def _intervals(self, level: float) -> dict[str, Interval]:
        """Return the improvements over the window, with bounds that miss them with `level` each."""
        looks = self._looks
        positions = torch.tensor([look.step for look in looks], dtype=torch.float64)
        c = slope_coefficients(positions)
        spreads = self._spreads(c, looks)
        intervals = {}
        for name, spread in spreads.items():
            losses = _losses(name, looks)
            improvement = float(c @ losses)
            if level <= 0 or self._sequences < 2:
                intervals[name] = Interval(improvement, -math.inf, math.inf, math.inf)
                continue
            by_sequences = t_quantile(1 - level, self._sequences - 1) * spread
            by_looks = t_quantile(1 - level, len(looks) - 2) * trend_error(losses, positions)
            half = max(by_sequences, by_looks)
            intervals[name] = Interval(
                improvement, improvement - half, improvement + half, by_sequences
            )
        return intervals

    def _spreads(self, c: Tensor, looks: list[Look]) -> dict[str, float]:
        """Return the standard error of Σ c·L over the sequences of all ranks, by objective.

        Of the ratio of sums, linearised: sequence s contributes Σ_k c_k·(h_ks - L_k·n_s)/Σn, and
        the contributions add up to 0.
        """
        assert self._first is not None
        n, squares = self._first.tokens, {}
        for name in looks[-1].losses:
            sums = torch.stack([look.sums[name] for look in looks])  # (K, S)
            d = c @ sums - float(c @ _losses(name, looks)) * n
            squares[name] = float(d.square().sum()) / self._tokens**2
        ranks = gathered(squares, self.group)
        count = max(self._sequences, 2)
        return {
            name: math.sqrt(math.fsum(rank[name] for rank in ranks) * count / (count - 1))
            for name in squares
        }

    # -------------------------------------------------------------------------- verdict and state

    def _verdict(self, objectives: dict[str, Objective], why: str) -> Verdict:
        """Return the verdict; `why` there is none of an objective that is not in `objectives`."""
        states: dict[str, str] = {}
        reasons = []
        for name in NAMES:
            known = objectives.get(name)
            if self.deltas[name] is None:
                states[name] = "off"
                continue
            states[name] = known.state if known else "undecided"
            reasons.append(f"{name}: {known.sentence if known else why}")
        pair = pair_of(**states)
        hard, soft = (objectives[name].interval if name in objectives else None for name in NAMES)
        stop = pair in self.stop_on
        return Verdict(
            **states,
            pair=pair,
            reason="; ".join(reasons),
            stop=stop,
            hard_interval=hard,
            soft_interval=soft,
        )

    def _point(self, pair: str) -> Point:
        looks = self._looks[-2:]
        change = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        errors = (
            self._spreads(change, looks)
            if len(looks) == 2
            else dict.fromkeys(looks[-1].losses, 0.0)
        )
        hard, soft = (looks[-1].losses.get(name, math.nan) for name in NAMES)
        hard_error, soft_error = (errors.get(name, math.nan) for name in NAMES)
        return Point(looks[-1].step, hard, soft, hard_error, soft_error, pair)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks, sequences × looks in the window; every rank calls it."""
        own = {
            "sums": [look.sums for look in self._looks],
            "first": None if self._first is None else tuple(self._first),
        }
        return {
            "settings": self.settings._asdict(),
            "history": [tuple(point) for point in self.history],
            "looks": [(look.step, look.lr, look.losses) for look in self._looks],
            "ranks": gathered(own, self.group),
            "tokens": self._tokens,
            "sequences": self._sequences,
            "tested": self._tested,
            "passed": dict(self._passed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: It is that of a monitor with other settings, such as another window, or with
                another number of ranks.
        """
        for name, value in state["settings"].items():
            mine = getattr(self.settings, name)
            if mine != value:
                raise ValueError(
                    f"{name} must be that of the state, {value!r}; got {mine!r}: resume with the "
                    "same settings, or begin without the state"
                )
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        if len(state["ranks"]) != ranks:
            raise ValueError(
                f"the number of ranks must be that of the state, {len(state['ranks'])}, since each "
                f"has its own sequences; got {ranks}"
            )
        own = state["ranks"][0 if self.group is None else dist.get_rank(self.group)]
        self.history = [Point(*point) for point in state["history"]]
        self._looks = [
            Look(step, lr, losses, sums)
            for (step, lr, losses), sums in zip(state["looks"], own["sums"], strict=True)
        ]
        self._first = None if own["first"] is None else HeldOut(*own["first"])
        self._tokens, self._sequences = state["tokens"], state["sequences"]
        self._tested, self._passed = state["tested"], dict(state["passed"])


def _check_repeats(ranks: list[tuple[dict[str, float], int, Tensor | None]]) -> None:
    """Refuse a sequence that is there twice: by ids, else a rank with the sums of another one.

    Args:
        ranks: of each its sums, the number of its sequences and their ids.

    Raises:
        ValueError: An id is there twice, or two ranks have the same sums.
    """
    twice = repeated([ids for *_, ids in ranks])
    if twice is not None:
        raise ValueError(
            f"ids must differ; got {twice} twice: a sampler that fills up the ranks repeats "
            "sequences; choose a number of sequences that the number of ranks divides"
        )
    seen = [(count, *values.values()) for values, count, ids in ranks if count and ids is None]
    seen = [sums for sums in seen if all(math.isfinite(x) for x in sums)]  # infinity equals itself
    if len(set(seen)) < len(seen):
        raise ValueError(
            "each rank must have its own sequences; got the same sums on two ranks: use a "
            "DistributedSampler(shuffle=False, drop_last=True); if ranks share their batches, as "
            "with tensor parallelism, a group without the others; or ids, if they do differ"
        )


def _losses(name: str, looks: list[Look]) -> Tensor:
    return torch.tensor([look.losses[name] for look in looks], dtype=torch.float64)


def _check_deltas(hard_delta: float | None, soft_delta: float | None) -> None:
    for name, delta in (("hard_delta", hard_delta), ("soft_delta", soft_delta)):
        if delta is not None and not 0 < delta < math.inf:
            raise ValueError(
                f"{name} must be positive and finite, or None for an objective that is off; got "
                f"{delta}: 0.01 nats a token are 1 % of the perplexity, 0.002 to 0.02 are usual"
            )
    if hard_delta is None and soft_delta is None:
        raise ValueError("hard_delta and soft_delta must not both be None: nothing is left to test")


def _check_rule(confidence: float, window: float, patience: int, max_looks: int | None) -> None:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1); got {confidence}")
    if isinstance(window, bool) or not isinstance(window, (int, float)):
        raise TypeError(f"window must be an int or a float; got {type(window).__name__}")
    if not (window >= 3 if isinstance(window, int) else 0 < window <= 1):
        raise ValueError(
            "window must be a number of evaluations, an int of at least 3, or a fraction of the "
            f"run, a float in (0, 1]; got {window!r}"
        )
    if patience < 1:
        raise ValueError(f"patience must be at least 1; got {patience}")
    if max_looks is not None and max_looks < patience:
        raise ValueError(f"max_looks must be at least patience, {patience}; got {max_looks}")
