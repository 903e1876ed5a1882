"""``python -m benchmarks``: results are right, kept after any failure, compared and published."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import needs_cpu, one_thread
from support.processes import passes, run_python

from benchmarks import __main__ as cli
from benchmarks import one_case, runner, tables
from benchmarks.cases import HEADS, LOGITS, STEP, SUITES, TOPK, Case
from benchmarks.methods import METHODS, taking_part
from benchmarks.one_case import Task, Turn, in_turns
from benchmarks.problems import LogitsProblem, LowerBound

pytestmark = needs_cpu
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--dtype", "fp32", "--n", "4", "--v", "60", "--hidden", "8", "12", "--repeats", "2"]
TINY += ["--k", "5", "70"]  # V has no 70 entries: left out
QUICK = ["kdloss", "kdloss-inplace", "kdloss-heads", "eager"]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu_avx2_logits.jsonl"
SMALL = Task("logits", Case(5, 40, "fp32"), ("logits/eager", "logits/kdloss-inplace"), repeats=2)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # measurements collect garbage, and need not search what other tests have left
    with one_thread():
        yield


def _run(path: Path, *words: str, peers: list[str] = QUICK) -> int:
    return cli.main(["run", *words, "--in-process", *TINY, f"--output={path}", "--peers", *peers])


def _results(records: Any) -> dict[str, dict[str, Any]]:
    return {x["method"]: x for x in records if isinstance(x, dict) and x["kind"] == "result"}


def _replace(monkeypatch: Any, name: str, loss: Callable[..., Any]) -> None:
    """Replace the loss of a method by `loss(right, *tensors)`, in which `right` is its own."""
    right = METHODS[name]
    build = lambda case: partial(loss, right.build(case))  # noqa: E731
    monkeypatch.setitem(METHODS, name, replace(right, build=build))


def test_every_suite_measures_its_cases(tmp_path: Path) -> None:
    assert _run(tmp_path / "r.jsonl") == 0
    records = runner.read(tmp_path / "r.jsonl")
    assert {x["suite"] for x in records if x["kind"] == "done"} == {*SUITES} - {"guard"}
    for result in (x for x in records if x["kind"] == "result"):
        assert (result["status"], result["time"] is None) == ("measured", False), result
        assert (result["bound_share"] is None) == (result["suite"] == "training-step")
    logits = _results(x for x in records if x.get("suite") == "logits")
    assert all(x["error"]["loss"] < 1e-5 for x in logits.values())
    peaks = {key: x["memory"]["allocator_bytes"] for key, x in logits.items()}
    gradient = 4 * 60 * 4  # allocated out of place, next to nothing in place
    assert gradient <= peaks["kdloss"] < gradient + 4096 > peaks["kdloss-inplace"] + gradient


# a wrong value; a wrong gradient, and one that is no number, with a right value
@pytest.mark.parametrize(("value", "factor"), [(1.01, 1.0), (1.0, 1.01), (1.0, float("nan"))])
@pytest.mark.parametrize("level", [LOGITS, HEADS, STEP])
def test_a_wrong_method_gets_no_time(
    level: str, value: float, factor: float, monkeypatch: Any
) -> None:
    def wrong(right: Any, student: Any, *rest: Any) -> Any:
        tensor = student if isinstance(student, torch.Tensor) else student.hidden
        tensor.register_hook(lambda gradient: factor * gradient)
        return value * right(student, *rest)

    name = f"{LOGITS if level == LOGITS else HEADS}/eager"
    _replace(monkeypatch, name, wrong)
    task = Task(level, Case(6, 40, "fp32", 2.0, "forward_kl", level, 8, 8), (name,), repeats=1)
    result = _results(one_case.measure(task))["eager"]
    assert (result["status"], result["time"]) == ("wrong", None)
    assert result["error"]["loss"] == pytest.approx(value - 1, abs=1e-6)


# the first call checks, the next ones measure memory and the limit, the fourth is a repetition
@pytest.mark.parametrize(
    ("call", "error", "status"),
    [(4, RuntimeError("no"), "failed"), (1, torch.OutOfMemoryError("no"), "no memory")],
)
def test_a_method_that_raises_does_not_stop_the_others(
    call: int, error: Exception, status: str, monkeypatch: Any
) -> None:
    calls = count(1)

    def fails(right: Any, *tensors: Any) -> Any:
        if next(calls) == call:
            raise error
        return right(*tensors)

    _replace(monkeypatch, "logits/eager", fails)
    results = _results(one_case.measure(SMALL))
    assert [results[x]["status"] for x in ("eager", "kdloss-inplace")] == [status, "measured"]


def test_a_lower_bound_that_raises_costs_no_method_its_time(monkeypatch: Any) -> None:
    bound = LowerBound("copy", lambda: int("no"))
    monkeypatch.setattr(LogitsProblem, "lower_bound", lambda problem: bound)
    results = _results(one_case.measure(SMALL))
    assert [(x["status"], x["bound_share"]) for x in results.values()] == [("measured", None)] * 2


def test_calls_take_turns_and_are_restored(monkeypatch: Any) -> None:
    turns = [Turn(name, repeats=repeats) for name, repeats in (("a", 4), ("b", 2), ("c", 4))]
    assert "".join(turn.name for turn in in_turns(turns)) == "acbacacbac"
    seen: set[float] = set()  # in turns with a method that writes over the student's logits
    look = lambda right, *x: (seen.add(x[0].sum().item()), right(*x))[1]  # noqa: E731
    _replace(monkeypatch, "logits/eager", look)
    assert {x["status"] for x in _results(one_case.measure(SMALL)).values()} == {"measured"}
    assert len(seen) == 1


def test_resume_loses_and_repeats_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file, right, begun = tmp_path / "r.jsonl", runner.measure, []

    def interrupted(task: Task) -> Iterator[Any]:
        begun.append(task.case.level)
        if len(begun) == 2:
            raise KeyboardInterrupt
        yield from right(task)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert _run(file, "logits", "heads") == runner.INTERRUPTED
    kept = file.read_text()
    file.write_text(kept + '{"schema": 5, "kind": "res')  # the line it was about to write
    assert _run(file, "logits", "heads") == 2  # nothing is overwritten
    assert _run(file, "logits", "heads", "--resume") == 0
    assert begun == [LOGITS, HEADS, HEADS]
    assert file.read_text().startswith(kept)
    # a method that was not there is measured with those that were: times of two runs differ
    assert _run(file, "logits", "--resume", peers=["checkpoint"]) == 0
    last = file.read_text().split('"kind": "run"')[-1]
    assert set(re.findall(r'"method": "([^"]*)"', last)) == {*QUICK[:2], "eager", "checkpoint"}
    # results of another machine are not mixed with these
    file.write_text(changed := file.read_text().replace('"threads": 1', '"threads": 99'))
    assert _run(file, "logits", "--resume") == 2
    assert "was made elsewhere: threads was 99 and is 1" in capsys.readouterr().err
    assert file.read_text() == changed


def test_what_is_too_slow_has_no_time_and_resume_completes_what_the_clock_cut(
    tmp_path: Path, monkeypatch: Any
) -> None:
    results = _results(one_case.measure(replace(SMALL, limit_seconds=1e-9)))  # of a call
    assert {(x["status"], x["time"]) for x in results.values()} == {("no time", None)}
    file, right = tmp_path / "r.jsonl", runner.measure
    with monkeypatch.context() as patch:  # begun, and then there was no time
        patch.setattr(runner, "measure", lambda task: right(replace(task, end=0.0)))
        assert _run(file, "logits") == 0
    assert {x["status"] for x in _results(runner.read(file)).values()} == {"no time"}
    assert _run(file, "logits", "--resume") == 0
    assert {x["status"] for x in _results(runner.read(file)).values()} == {"measured"}


def _crashing_child(task: Task, sender: Any) -> None:
    eager = METHODS["logits/eager"]
    METHODS["logits/eager"] = replace(eager, build=lambda case: lambda *tensors: os.abort())
    runner.send(task, sender)


def test_a_crash_ends_no_more_than_its_method(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(runner, "send", _crashing_child)
    file = tmp_path / "r.jsonl"
    assert cli.main(["run", "logits", *TINY, f"--output={file}", "--peers", "kdloss", "eager"]) == 1
    results = _results(records := runner.read(file))
    assert [results[x]["status"] for x in ("kdloss", "eager")] == ["measured", "failed"]
    assert [x["kind"] for x in records].count("done") == 1


def test_with_a_top_k_teacher_only_ours_run_at_another_temperature_unless_chosen() -> None:
    case = Case(4, 60, "fp32", 2.0, level=TOPK, k=5)
    names = taking_part(TOPK, case, ())
    assert names
    assert all(METHODS[name].is_ours for name in names)
    assert taking_part(TOPK, case, ["eager"]) == ("topk/eager",)
    assert "topk/eager" in taking_part(TOPK, replace(case, temperature=1.0), ())


def test_a_peer_that_is_not_in_both_is_no_difference() -> None:
    before, now = ({"torch": "2", "packages": x} for x in ({"trl": "1", "fla": "3"}, {"trl": "2"}))
    assert runner.differences(before, now) == ["trl was '1' and is '2'"]


def test_list_names_every_method_and_why_it_cannot_run(monkeypatch: Any, capsys: Any) -> None:
    gone = replace(METHODS["logits/eager"], why_not=lambda case: "it is gone")
    monkeypatch.setitem(METHODS, "logits/eager", gone)
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(x.split()[:2]) for x in lines] == [(x.key, x.level) for x in METHODS.values()]
    ends = {tuple(x.split()[:2]): x.split()[-2:] for x in lines}
    assert ends["eager", "logits"] == ["is", "gone"]
    assert ends["kdloss", "logits"] == ["runs", "here"]


# slower, without its time, with a larger error, with one that is no number; of a peer too
@pytest.mark.parametrize(
    ("method", "change", "regressions"),
    [
        ("kdloss", lambda x: {"bound_share": x["bound_share"] / 1.2}, 6),
        ("kdloss", lambda x: {"bound_share": x["bound_share"] / 1.05}, 0),
        ("trl-gkd", lambda x: {"bound_share": x["bound_share"] / 1.2}, 0),
        ("trl-gkd", lambda x: {"time": None, "status": "wrong"}, 6),
        ("kdloss", lambda x: {"error": {"loss": 1e-5}}, 6),
        ("eager", lambda x: {"error": {"gradients": float("inf")}}, 6),
    ],
)
def test_compare_fails_on_a_regression(method: str, change: Any, regressions: int) -> None:
    before = runner.read(COMMITTED)
    after = [x | change(x) if x.get("method") == method else x for x in before]
    table, *counts = tables.compare(tables.frame(before), tables.frame(after), 0.1)
    assert (counts[0] > 0, counts[1]) == (True, regressions), table.to_string()


def test_compare_needs_something_and_takes_the_best_run(tmp_path: Path) -> None:
    text, slow = COMMITTED.read_text(), str(tmp_path / "slow.jsonl")
    Path(slow).write_text(text.replace('"bound_share": 0.', '"bound_share": 0.0'))
    same, heads = str(COMMITTED), str(COMMITTED).replace("logits", "heads")
    for after, status in ([slow], 1), ([same, slow], 0), ([slow, same], 0), ([heads], 1):
        assert cli.main(["compare", same, *after]) == status


def test_the_documents_are_what_the_results_give(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from benchmarks import publish

    files = [publish.README, publish.DOCUMENT, publish.PICTURE]
    shutil.copytree(COMMITTED.parent, tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    for name in files:
        shutil.copy(ROOT / name, tmp_path / name)
    publish.publish(tmp_path)
    assert all((tmp_path / name).read_text() == (ROOT / name).read_text() for name in files)
    results = tmp_path / "benchmarks" / "results" / "cpu_avx512_bf16_logits.jsonl"
    results.write_text(re.sub(r'"median_s": \d+\.', '"median_s": 77.', results.read_text()))
    publish.publish(tmp_path)
    assert "\n| KDLoss(inplace=True) | 77" in (tmp_path / publish.README).read_text()
    assert all((tmp_path / name).read_text() != (ROOT / name).read_text() for name in files)
    assert publish.plot([results], tmp_path) == 0
    for picture in re.findall(r"\((.*svg)\)", (tmp_path / "report.md").read_text()):
        assert "KDLoss(inplace=True)" in (tmp_path / picture).read_text()


def test_pytest_benchmark_times_the_methods() -> None:
    ran = run_python("-m", "pytest", "-q", "--benchmark-disable", ROOT / "benchmarks")
    assert "10 passed" in passes(ran)
