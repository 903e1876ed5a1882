"""How the benchmarks measure, what they hold a loss to, and the table that accuracy writes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import NEEDS_CPU, quickly
from torch import Tensor

from benchmarks import accuracy, errors, floors, guard, measuring, one_case, report
from benchmarks.cases import HEADS, LOGITS, STEP, Case
from benchmarks.entrants import ENTRANTS
from benchmarks.entrants.compositions import eager
from benchmarks.problems import HeadsProblem, LogitsProblem

pytestmark = NEEDS_CPU
BEGIN, END = report.markers(accuracy.NAME)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quickly():
        yield


def test_contestants_take_turns_and_restore_before_each_call() -> None:
    seen: list[str] = []

    def note(word: str) -> Callable[[], None]:
        return lambda: seen.append(word)

    pair = [
        measuring.Contestant("a", note("a"), note("ra")),
        measuring.Contestant("b", note("b"), note("rb"), repeats=1),
    ]
    timings = measuring.interleave(pair, 3)
    warm_up = measuring.WARM_UP
    start = ["ra", "a"] * warm_up + ["rb", "b"] * warm_up
    turns = ["ra", "a", "ra", "a", "rb", "b", "ra", "a"]  # one repeat of three: in the middle
    assert seen[: len(start) + 8] == [*start, *turns]
    assert len(timings["a"].samples) == 3
    assert len(timings["b"].samples) == 1


def test_disturbed_repetitions_count_only_where_others_lack() -> None:
    timing = measuring.Timing("x", clean=[2.0, 1.0], disturbed=[9.0, 5.0], wanted=3)
    assert timing.samples == [2.0, 1.0, 5.0]
    assert timing.median == 2.0
    assert timing.noisy
    enough = measuring.Timing("x", clean=[2.0, 1.0, 3.0], disturbed=[9.0], wanted=3)
    assert enough.samples == [2.0, 1.0, 3.0]
    assert not enough.noisy
    assert enough.quartiles == (1.5, 2.5)


def test_in_place_is_really_in_place_and_restored() -> None:
    case = Case(4, 50, "fp32")
    problem = LogitsProblem(case)
    student = problem._student
    before = student.clone()
    problem.call(ENTRANTS["logits/kdloss"].build(case))()
    assert torch.equal(student, before)
    problem.call(ENTRANTS["logits/kdloss-inplace"].build(case))()
    assert not torch.equal(student, before)
    assert student.sum(1).abs().max() < 1e-5  # a gradient: its rows add up to zero
    problem.restore()
    assert torch.equal(student, before)


@pytest.mark.parametrize("level", [LOGITS, HEADS, STEP])
def test_errors_are_those_against_float64(level: str) -> None:
    hidden = (0, 0) if level == LOGITS else (64, 64)
    case = Case(6, 50, "fp32", 2.0, "forward_kl", level, *hidden)
    problem = one_case.PROBLEMS[level](case)
    entrant = ENTRANTS[f"{LOGITS if level == LOGITS else HEADS}/eager"]
    right = eager(case.with_(level=entrant.level))
    found = errors.of(problem, entrant, right)
    assert all(x is not None and x < 1e-6 for x in found.values())

    class Off(torch.autograd.Function):
        """The right value with a gradient that is 1 % too large."""

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return 1.01 * gradients[0]

    off = errors.of(problem, entrant, lambda *tensors: Off.apply(right(*tensors)))  # type: ignore[no-untyped-call]
    assert off["loss"] is not None
    assert off["loss"] < 1e-6
    assert off["gradients"] == pytest.approx(0.01, rel=1e-3)


def test_the_floor_of_heads_is_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = HeadsProblem(Case(8, 40, "bf16", level=HEADS, student_hidden=8, teacher_hidden=12))
    monkeypatch.setattr(floors, "fastest", lambda call, seconds, where="cpu": 1.0)
    found = floors.floor(problem, 60.0)
    assert found is not None
    assert (found.why, found.is_slow) == ("", False)
    times = iter([100.0, 1.0, 8.0])
    monkeypatch.setattr(floors, "fastest", lambda call, seconds, where="cpu": next(times))
    found = floors.floor(problem, 60.0)
    assert found is not None
    assert found.why == "in float32; in bf16 they take 100 times as long"
    assert found.is_slow


@pytest.mark.parametrize(("seconds", "most"), [(60.0, floors.MOST_CALLS), (0.0, 1)])
def test_short_calls_are_repeated_a_limited_number_of_times(
    seconds: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the clock measures nothing, so that no sum of measurements is ever reached."""
    calls: list[None] = []

    def nothing(call: Callable[[], object]) -> tuple[float, bool]:
        call()
        assert len(calls) <= most
        return 0.0, False

    monkeypatch.setattr(floors.device, "clock", lambda where: nothing)
    assert floors.fastest(lambda: calls.append(None), seconds) == 0.0
    assert len(calls) == most


def test_repeated_calls_end_with_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of it is in the calls: here half a second passes between two of them."""
    now = iter(range(100))
    monkeypatch.setattr(floors.device.time, "monotonic", lambda: 0.5 * next(now))
    monkeypatch.setattr(floors.device, "clock", lambda where: lambda call: (call(), False))
    left = iter((1e-6, 3e-6, 2e-6, 5e-6))
    assert floors.fastest(lambda: next(left), 1.5) == 1e-6
    assert next(left) == 5e-6  # three calls: at 0, 0.5 and 1 of 1.5 seconds


def test_who_computes_something_else_is_held_to_no_floor() -> None:
    case = Case(4, 40, "fp32", level=HEADS, student_hidden=8, teacher_hidden=12)
    assert floors.work(case, ENTRANTS["heads/eager"]) == {"flops": 2 * 4 * 40 * (3 * 8 + 12)}
    alone = ENTRANTS["heads/torch-linear-ce"]  # it has no teacher
    assert floors.work(case, alone) == {"flops": 2 * 4 * 40 * 3 * 8}
    lines: list[dict[str, Any]] = []
    task = one_case.Task("heads", case, ("heads/eager", "heads/torch-linear-ce"), repeats=1)
    one_case.run_task(task, lambda kind, **more: lines.append({"kind": kind, **more}))
    shares = {x["entrant"]: x["floor_share"] for x in lines if x["kind"] == "result"}
    assert shares["eager"] > 0
    assert shares["torch-linear-ce"] is None


def test_an_error_that_is_no_number_is_the_worst() -> None:
    nan = float("nan")
    for every in ([1.0, nan, 2.0], [nan, 1.0], [None, nan]):
        found = errors.worst(every)
        assert found is not None
        assert found != found
    assert errors.worst([None, 1.0, 2.0]) == 2.0
    assert errors.worst([None]) is None


def test_garbage_is_collected_again_after_a_call_that_raises() -> None:
    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measuring.time_once(fails)
    assert gc.isenabled()


def test_every_guard_has_a_baseline() -> None:
    names = {one.name for one in guard.GUARDS}
    for found in guard.read_baseline().values():
        assert set(found["ratios"]) == names


def test_a_guard_compares_with_what_it_names() -> None:
    for one in guard.GUARDS:
        small = replace(one, case=one.case.with_(n=2, v=16))
        assert guard.measure(small, LogitsProblem(small.case), repeats=1) > 0


# ------------------------------------------------------------------------------- documents


def test_accuracy_writes_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "numerics.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--quick", "--write", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "REGIMES", {"randn": None})
        patch.setattr(accuracy, "SHAPES", ((3, 17),))
        assert accuracy.main(arguments) == 0
        first = file.read_text()
        assert accuracy.main(arguments) == 0
    assert file.read_text() == first
    assert first.startswith(f"before\n{BEGIN}\n| dtype |")
    assert first.endswith(f"{END}\nafter\n")
    assert "old" not in first
    assert first.count("`jsd`") == 3  # dtypes


def test_markers_are_appended_where_there_are_none() -> None:
    made = report.between_markers("", "x", accuracy.NAME)
    assert made == f"{BEGIN}\nx\n{END}\n"
    assert report.between_markers(made, "y", accuracy.NAME) == made.replace("x", "y")


def test_one_marker_alone_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numerics.md"
    file.write_text(BEGIN)
    with pytest.raises(SystemExit) as raised:
        accuracy.main(["--write", str(file)])
    assert raised.value.code == 2
    assert "expected one" in capsys.readouterr().err
    assert file.read_text() == BEGIN
