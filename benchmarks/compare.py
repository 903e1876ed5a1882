"""Whether two files of results agree: by ratios, which do not move with the machine's speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import reading
from .cases import Case
from .cells import Table, figure, mebibytes, scientific
from .goals import ERROR_SLACK
from .reading import EAGER, GRADIENTS, LOSS
from .records import Line, Report
from .runner import differences

TOLERANCE = 0.10
#: How far an error may grow, besides what rounding alone may cost: the order of sums differs
#: between machines.
ERROR_GROWTH = 2.0


@dataclass(frozen=True)
class Pair:
    """One entrant of one case, in both files."""

    suite: str
    case: Case
    before: Line
    after: Line
    against: str  # what its time is a multiple of
    ratios: tuple[float, float] | None  # None: it has no time in both

    @property
    def change(self) -> float:
        """Of the ratio, relative to the one before."""
        return 0.0 if self.ratios is None else self.ratios[1] / self.ratios[0] - 1

    @property
    def name(self) -> str:
        return f"{reading.name(self.suite, self.case)}: {self.before['title']}"

    @property
    def errors(self) -> list[tuple[str, float, float]]:
        """What was compared with float64 in both files, and how far it was off."""
        found = ((of, reading.error(self.before, of), reading.error(self.after, of))
                 for of in (LOSS, GRADIENTS))  # fmt: skip
        return [(of, a, b) for of, a, b in found if a is not None and b is not None]

    @property
    def worse(self) -> list[str]:
        """A line for each error that grew too far, or is no finite number any more."""
        return [f"{self.name}: error of the {of} was {scientific(a)}, is {scientific(b)}"
                for of, a, b in self.errors
                if math.isfinite(a) and not b <= ERROR_GROWTH * a + ERROR_SLACK]  # fmt: skip

    @property
    def differs(self) -> bool:
        """In more than its name."""
        return self.ratios is not None or any(" → " in cell for cell in self.cells())

    def cells(self) -> list[str]:
        lines = self.before, self.after
        before, after = ("", "") if self.ratios is None else map(figure, self.ratios)
        change = "" if self.ratios is None else f"{100 * self.change:+.1f} %"
        return [
            reading.name(self.suite, self.case), self.before["title"], self.against, before, after,
            change, _both([mebibytes(reading.memory(x)) for x in lines]),
            *(_both([scientific(reading.error(x, of)) for x in lines])
              for of in (LOSS, GRADIENTS)),
        ]  # fmt: skip


def _has_time(line: Line) -> bool:
    return bool(line["status"] == "measured")


def compare(before: Report, after: Report, tolerance: float = TOLERANCE) -> tuple[str, bool]:
    """What changed, the worst first, and whether the two agree.

    Times are compared as multiples of that of ours in the same case and file; ours as multiples of
    the floor, or of eager where there is none. They agree if no such ratio differs by more than
    the tolerance, no method lost or gained a time, and no error became more
    than twice as large, or not finite. What is in one file alone is said, and no disagreement, but
    there must be something to compare. Memory is shown.
    """
    pairs = sorted(_pairs(before, after), key=lambda pair: -abs(pair.change))
    timed = [pair for pair in pairs if pair.ratios is not None]
    far = [pair for pair in timed if not abs(pair.change) <= tolerance]
    turned = [pair for pair in pairs if _has_time(pair.before) != _has_time(pair.after)]
    errors, worse = sum(len(p.errors) for p in pairs), [line for p in pairs for line in p.worse]
    text = [
        *(f"not the same: {what}" for what in differences(before.runs[-1], after.runs[-1])),
        *_table(pairs),
        *worse,
        *(f"{pair.name}: was {_said(pair.before)}, is {_said(pair.after)}" for pair in turned),
        *_alone(before, after, "before"),
        *_alone(after, before, "after"),
    ]
    if not pairs:
        return "\n".join([*text, "the files have nothing in common"]), False
    if not timed and not errors:
        return "\n".join([*text, "nothing to compare: no ratio and no error in both"]), False
    ok = not far and not turned and not worse
    text.append(
        f"{len(timed)} ratios compared, {len(far)} of them differ by more than "
        f"{100 * tolerance:g} %; {errors} errors compared, {len(worse)} of them grew: "
        f"{'the files agree' if ok else 'the files DISAGREE'}"
    )
    return "\n".join(text), ok


def _pairs(before: Report, after: Report) -> Iterator[Pair]:
    for suite in before.suites:
        for case in before.cases(suite):
            for line in before.of(suite, case):
                other = reading.entrant(after, suite, case, line["entrant"])
                if other is not None and "skipped" not in (line["status"], other["status"]):
                    against, ratios = _ratios(before, after, suite, case, line, other)
                    yield Pair(suite, case, line, other, against, ratios)


def _ratios(
    before: Report, after: Report, suite: str, case: Case, line: Line, other: Line
) -> tuple[str, tuple[float, float] | None]:
    """What a time is compared with, and as which multiple of it in both files."""
    for against, bases in _bases(before, after, suite, case, bool(line["is_ours"])):
        times = reading.seconds(line), reading.seconds(other)
        if times[0] and times[1] and bases[0] and bases[1]:
            return against, (times[0] / bases[0], times[1] / bases[1])
    return "", None


def _bases(
    before: Report, after: Report, suite: str, case: Case, is_ours: bool
) -> Iterator[tuple[str, list[float | None]]]:
    reports = before, after
    if not is_ours:
        ours = [reading.reference(report, suite, case) for report in reports]
        if ours[0] and ours[1] and ours[0]["entrant"] == ours[1]["entrant"]:
            yield f"/ {ours[0]['title']}", [reading.seconds(x) for x in ours]
        return
    yield "/ floor", [reading.floor(report, suite, case) for report in reports]
    yield "/ eager", [reading.seconds(reading.entrant(report, suite, case, EAGER))
                      for report in reports]  # fmt: skip


def _table(pairs: list[Pair]) -> list[str]:
    rows = [pair.cells() for pair in pairs if pair.differs]
    head = ["", "", "time", "before", "after", "change", "peak MiB", "loss error", "gradient error"]
    return [Table(head, rows, left=3).without_empty().text()] if rows else []


def _both(cells: list[str]) -> str:
    """Both figures, or the one that did not change."""
    return cells[0] if cells[0] == cells[1] else " → ".join(cell or "none" for cell in cells)


def _said(line: Line) -> str:
    return f"{line['status']} ({line['why']})" if line["why"] else str(line["status"])


def _alone(one: Report, other: Report, name: str) -> Iterator[str]:
    """What only one of the files has: whole cases in a line, entrants in one each."""
    for suite in one.suites:
        others = set(other.cases(suite))
        for case in one.cases(suite):
            if case not in others:
                yield f"only {name}: {reading.name(suite, case)}"
                continue
            for line in reading.taking_part(one, suite, case):
                there = reading.entrant(other, suite, case, line["entrant"])
                if there is None or there["status"] == "skipped":
                    why = "" if there is None else f" (elsewhere: {there['why']})"
                    yield f"only {name}: {reading.name(suite, case)}: {line['title']}{why}"
