"""What the pictures of a suite are made of: one for each group of cases that differ in one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fused_kd.options import MIB

from .. import reading
from ..cases import LOGITS, STEP, Case
from ..cells import unit_of
from ..entrants.ours import BUDGETED, FORWARD
from ..reading import GRADIENTS, GROWTH, LOSS
from ..records import Line, Report
from . import panels, style
from .panels import Guide, Series

#: Draws one panel on matplotlib axes.
Panel = Callable[[Any], None]
#: What a group of cases may differ in from another, and its file name then says.
NAMED = ("n", "v", "divergence", "temperature", "student_hidden", "teacher_hidden", "device")
SIZES = {"n": "rows, N", "v": "vocabulary, V"}


@dataclass(frozen=True)
class Description:
    """Of a picture: its file, its heading, and its panels by their titles."""

    name: str
    title: str
    panels: dict[str, Panel]


class SuitePictures:
    """The pictures of one suite.

    Args:
        report: where the figures are.
        suite: of it.
        keys: of the entrants to show; none: all that compute a gradient, ours with its automatic
            memory budget.
    """

    def __init__(self, report: Report, suite: str, keys: Collection[str] = ()) -> None:
        self.report, self.suite, self._keys = report, suite, keys
        self.looks = style.looks(report)

    def described(self) -> Iterator[Description]:
        """In the order of the file."""
        fixed: dict[str, Any]
        if self.suite == GROWTH:
            fixed, make = {"n": 0, "v": 0}, self._growth
        elif any(reading.seconds(x) is not None for x in self._lines()):
            fixed, make = {"v": 0}, self._by_vocabulary
        else:
            fixed, make = {"regime": ""}, self._accuracy
        groups: dict[Case, list[Case]] = {}
        for case in self.report.cases(self.suite):
            groups.setdefault(case.with_(**fixed), []).append(case)
        for one, cases in groups.items():
            cases.sort(key=lambda case: (case.v, case.n))
            title, made = make(cases)
            if not made:  # of growth with one size alone
                continue
            yield Description(self._name(one, list(groups)), title, made)

    def _lines(self) -> Iterator[Line]:
        return (x for (suite, _, _), x in self.report.results.items() if suite == self.suite)

    def _name(self, one: Case, every: Sequence[Case]) -> str:
        alike = [case for case in every if case.level == one.level]
        more = [] if len(alike) == len(every) else [one.level]
        for name in NAMED:
            if len({getattr(case, name) for case in alike}) > 1:
                value = getattr(one, name)
                more.append(f"{value:g}" if name == "temperature" else str(value))
        return "-".join([self.suite, *more, one.dtype])

    def _by_vocabulary(self, cases: list[Case]) -> tuple[str, dict[str, Panel]]:
        """Time, memory, errors, and what a memory budget costs."""
        level, fullest = cases[0].level, self._fullest(cases)
        drawn = {
            "Time": self.times(cases, "v"),
            "Memory at its peak, beyond the inputs": self.peaks(cases, "v"),
        }
        if level != STEP:
            drawn[f"Error of the gradients against time, V = {fullest.v}"] = self._errors(
                fullest, GRADIENTS
            )
            curves = self._budgets(cases)
            if curves:
                look = self.looks[next(key for key in BUDGETED if key in self.looks)]
                drawn["Time against the memory budget of KDLoss with heads"] = lambda axis: (
                    panels.budgets(axis, curves, look)
                )
            else:
                drawn[f"Error of the loss against time, V = {fullest.v}"] = self._errors(
                    fullest, LOSS
                )
        what = {STEP: "A whole training step", LOGITS: "Distillation loss on logits"}
        title = what.get(level, "Distillation loss from hidden states and lm_heads")
        call = "" if level == STEP else ", forward + backward"
        return f"{title}: {reading.setting(cases[0], 'v', 'level')}{call}", drawn

    def _growth(self, cases: list[Case]) -> tuple[str, dict[str, Panel]]:
        """Time and memory as N and V double."""
        one, drawn = cases[0], {}
        for size in ("n", "v"):
            for sweep in reading.sweeps(self.report, GROWTH, size):
                if sweep[0].with_(n=one.n, v=one.v) == one:
                    rest = reading.setting(sweep[0], "level", "dtype", "hidden", "divergence",
                                           "temperature", "device", size)  # fmt: skip
                    drawn[f"Time as {size.upper()} doubles, {rest}"] = self.times(sweep, size, True)
                    drawn[f"Memory as {size.upper()} doubles, {rest}"] = self.peaks(sweep, size)
        return f"Growth: {reading.setting(one, 'n', 'v')}, forward + backward", drawn

    def _accuracy(self, cases: list[Case]) -> tuple[str, dict[str, Panel]]:
        """The errors on all kinds of inputs, a dot for each."""

        def panel(of: str) -> Panel:
            series = self.series(cases, lambda case: 0.0, lambda line: reading.error(line, of))
            return lambda axis: panels.strips(axis, series, f"relative error of the {of}")

        title = (f"Errors against float64, a dot for each of {len(cases)} kinds of inputs: "
                 f"{reading.setting(cases[0])}")  # fmt: skip
        return title, {"Loss": panel(LOSS), "Gradients": panel(GRADIENTS)}

    # ------------------------------------------------------------------------------- panels

    def times(self, cases: Sequence[Case], size: str, doubling: bool = False) -> Panel:
        """Against a size; bars where there is only one of it."""
        every = [reading.seconds(x) for case in cases
                 for x in reading.taking_part(self.report, self.suite, case)]  # fmt: skip
        unit, scale = unit_of(every)
        series = self.series(cases, lambda case: getattr(case, size),
                             lambda line: _over(reading.seconds(line), scale))  # fmt: skip
        guides = []
        floors = [(getattr(case, size), floor / scale) for case in cases
                  if (floor := reading.floor(self.report, self.suite, case))]  # fmt: skip
        if doubling and series:
            (x, y), (last, _) = series[0].points[0], series[0].points[-1]
            guides.append(Guide("twice the size, twice the time", [(x, y), (last, y * last / x)]))
        elif floors:
            guides.append(Guide(self._floor_title(cases), floors))
        return _panel(series, SIZES[size], f"time, {unit}", guides)

    def peaks(self, cases: Sequence[Case], size: str) -> Panel:
        """Against a size; bars where there is only one of it."""
        series = self.series(
            cases, lambda case: getattr(case, size),
            lambda line: _over(reading.memory(line), MIB, panels.LEAST_MEMORY),
        )  # fmt: skip
        guides = []
        if cases[0].level != STEP:
            points = [(float(getattr(case, size)), case.gradient_bytes / MIB) for case in cases]
            guides.append(Guide("the gradients themselves", points))
        return _panel(series, SIZES[size], "peak memory, MiB", guides)

    def _errors(self, case: Case, of: str) -> Panel:
        unit, scale = unit_of([reading.seconds(x) for x in self._drawn(case)])
        series = []
        for line in self._drawn(case):
            time, error = reading.seconds(line), reading.error(line, of)
            if time is not None and error is not None and math.isfinite(error):
                point = time / scale, max(error, panels.LEAST_ERROR)
                look = self.looks[line["entrant"]]
                series.append(Series(_name(line), look, [point]))
        if not series:
            return lambda axis: panels.empty(axis, "nothing was compared")
        return lambda axis: panels.scatter(
            axis, series, f"time, {unit}", f"relative error of the {of}"
        )

    def _budgets(self, cases: Sequence[Case]) -> dict[str, list[tuple[float, float]]]:
        """Time over the floor by budget in MiB, for each size that has two of them."""
        curves = {}
        for case in cases:
            floor = reading.floor(self.report, self.suite, case)
            times = {b: reading.seconds(reading.entrant(self.report, self.suite, case, key))
                     for key, b in BUDGETED.items()}  # fmt: skip
            points = [(float(b), time / floor) for b, time in sorted(times.items())
                      if time is not None and floor]  # fmt: skip
            if len(points) > 1:
                curves[f"V = {case.v}"] = points
        return curves

    def series(
        self,
        cases: Sequence[Case],
        x: Callable[[Case], float],
        y: Callable[[Line], float | None],
    ) -> list[Series]:
        """A line for each entrant that is shown and has a figure, ours first."""
        found: dict[str, Series] = {}
        for case in cases:
            for line in self._drawn(case):
                value, key = y(line), line["entrant"]
                if value is None:
                    continue
                one = found.setdefault(key, Series(_name(line), self.looks[key], []))
                one.points.append((float(x(case)), value))
        return list(found.values())

    def _drawn(self, case: Case) -> list[Line]:
        return [x for x in reading.taking_part(self.report, self.suite, case)
                if self._is_drawn(x["entrant"])]  # fmt: skip

    def _is_drawn(self, key: str) -> bool:
        if self._keys:
            return key in self._keys
        return key not in BUDGETED and not key.startswith(FORWARD)

    def _floor_title(self, cases: Sequence[Case]) -> str:
        titles = (reading.floor_title(self.report, self.suite, case) for case in cases)
        return next(filter(None, titles), "floor")

    def _fullest(self, cases: Sequence[Case]) -> Case:
        """Where most have a time; the largest of those."""

        def count(case: Case) -> int:
            return sum(reading.seconds(x) is not None for x in self._drawn(case))

        return max(cases, key=lambda case: (count(case), case.v))


def _name(line: Line) -> str:
    return f"{line['title']} †" if line["nearest"] else str(line["title"])


def _over(value: float | None, scale: float, least: float = 0.0) -> float | None:
    return None if value is None else max(value / scale, least)


def _panel(series: list[Series], xlabel: str, ylabel: str, guides: Sequence[Guide]) -> Panel:
    """Lines; bars where there is one size alone."""
    if not series:
        return lambda axis: panels.empty(axis, "nothing was measured")
    if len({x for one in series for x, _ in one.points}) == 1:
        return lambda axis: panels.bars(axis, series, ylabel, guides)
    return lambda axis: panels.lines(axis, series, xlabel, ylabel, guides)
