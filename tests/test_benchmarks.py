"""``python -m benchmarks run``: suites at tiny sizes keep what they measure, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_lines import result_line, run_line, write_lines
from benchmark_runs import NEEDS_CPU, ROOT, TINY, quickly

from benchmarks import __main__ as cli
from benchmarks import floors, measuring, one_case, records, runner
from benchmarks.cases import HEADS, LOGITS, STEP, Case
from benchmarks.entrants import ENTRANTS
from benchmarks.one_case import Task
from benchmarks.schema import SCHEMA

pytestmark = NEEDS_CPU


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quickly():
        yield


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(path: Path, *arguments: str) -> int:
    return cli.main(["run", *arguments, *TINY, "--output", str(path)])


# -------------------------------------------------------------------------------- what is written


def test_every_suite_measures_its_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.jsonl"
    assert _run(file, "--dtype", "fp32") == 0
    shown = capsys.readouterr().out
    found = records.read([file])
    assert found.suites == ["logits", "heads", "training-step", "growth", "accuracy"]
    for suite in found.suites:
        for case in found.cases(suite):
            assert (suite, case.name) in found.done
            for line in found.of(suite, case):
                assert line["status"] == "measured", line
                assert suite == "accuracy" or line["error"]["loss"] < 1e-5
                assert (line["time"] is None) == (suite == "accuracy")
    one = {line["entrant"]: line for line in found.of("logits", found.cases("logits")[0])}
    assert set(one) == {"kdloss", "kdloss-inplace", "eager", "checkpoint"}
    # one gradient out of place, next to nothing in place
    gradient = 4 * 60 * 4
    assert gradient <= one["kdloss"]["memory"]["allocator_bytes"] < gradient + 4096
    assert one["kdloss-inplace"]["memory"]["allocator_bytes"] < 4096
    for line in one.values():
        floor = found.floors[("logits", line["case_name"])]
        assert line["floor_share"] == pytest.approx(floor["seconds"] / line["time"]["median_s"])
    environment = found.environment
    assert environment["torch"] == torch.__version__
    for words in ("processor", "KDLoss, in place", "KDLoss, heads", f"written to {file}"):
        assert words in shown


def test_both_dtypes_at_both_levels_by_default(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "logits", "heads") == 0
    found = records.read([file])
    for suite in ("logits", "heads"):
        assert [case.dtype for case in found.cases(suite)] == ["bf16", "fp32"]


def test_lines_of_results_have_what_the_schema_says(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "heads", "--dtype", "fp32") == 0
    lines = _lines(file)
    assert [line["kind"] for line in lines] == ["run", "floor", *["result"] * 3, "done"]
    assert {line["schema"] for line in lines} == {SCHEMA}
    text = " ".join((records.__doc__ or "").split())
    for line in lines:
        for key in {*line, *(line.get("time") or {})} - {"schema", "kind"}:
            assert f'"{key}"' in text, key


def test_the_growth_suite_doubles_one_size_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    arguments = ["run", "growth", *TINY, "--peers", "kdloss", "kdloss-heads"]
    assert cli.main([*arguments, "--n", "2", "8", "--v", "16", "64", "--output", str(file)]) == 0
    sizes = [(c.level, c.n, c.v) for c in records.read([file]).cases("growth")]
    assert sizes == [(level, n, v) for level in (LOGITS, HEADS)
                     for n, v in ((2, 32), (4, 32), (8, 32), (4, 16), (4, 64))]  # fmt: skip


# ------------------------------------------------------------------------- interruption and resume


def test_an_interrupted_run_keeps_what_it_has_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, right, begun = tmp_path / "results.jsonl", runner.run_task, []

    def interrupted(task: Task, emit: Any) -> None:
        begun.append(task.case.dtype)
        if len(begun) == 2:
            raise KeyboardInterrupt
        right(task, emit)

    monkeypatch.setattr(runner, "run_task", interrupted)
    assert _run(file, "logits") == cli.INTERRUPTED
    assert f"--resume --output {file}" in capsys.readouterr().out
    kept = _lines(file)
    with file.open("a") as stream:
        stream.write('{"schema": 3, "kind": "res')  # the line it was about to write
    assert _run(file, "logits", "--resume") == 0
    assert begun == ["bf16", "fp32", "fp32"]
    assert "1 of 2 cases are there already" in capsys.readouterr().out
    assert _lines(file)[: len(kept)] == kept
    assert len(records.read([file]).done) == 2


def test_an_interruption_ends_the_child_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "logits", "--n", "64", "--v", "9000",
               "--repeats", "100000", "--seconds-each", "1000", "--peers", "kdloss",
               "--output", str(tmp_path / "results.jsonl")]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        # whoever runs the tests may ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    while "load average" not in process.stdout.readline():
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = Path("/proc/none")

    def measures() -> bool:
        return child.exists() and b"one_case" in (child / "cmdline").read_bytes() and (
            "libtorch" in (child / "maps").read_text()
        )  # fmt: skip

    try:
        while not measures():
            assert process.poll() is None
            child = Path("/proc", next(iter(children.read_text().split()), "none"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == cli.INTERRUPTED
        assert not child.exists()
    finally:
        process.kill()


#: A child in the middle of a call that takes long, and its parent.
CALLS = """
import os, sys, time
from benchmarks import one_case
has_parent = one_case._ends_with(int(sys.argv[1])), not one_case._ends_with(-1)
print(all(has_parent), os.getpid(), flush=True)
time.sleep(100)
"""
STARTS = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no such call")
def test_a_child_ends_with_a_run_that_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS, CALLS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    has_parent, number = parent.stdout.readline().split()
    status = Path("/proc", number, "status")
    assert (has_parent, status.exists()) == ("True", True)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_results_of_another_machine_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "logits", "--dtype", "fp32") == 0
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 99'))
    before = file.read_text()
    with pytest.raises(SystemExit) as raised:
        _run(file, "logits", "--resume")
    assert raised.value.code == 2
    assert "was made elsewhere: threads was 99 and is 1" in capsys.readouterr().err
    assert file.read_text() == before


# ------------------------------------------------------------------------------ what goes wrong


def _task(*entrants: str, **changes: Any) -> Task:
    case = Case(5, 40, "fp32")
    return replace(Task("logits", case, entrants, repeats=2), **changes)


def _results(task: Task) -> dict[str, dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    one_case.run_task(task, lambda kind, **content: lines.append({"kind": kind, **content}))
    return {line["entrant"]: line for line in lines if line["kind"] == "result"}


def test_a_wrong_loss_is_not_timed_and_fails_the_run_if_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ENTRANTS["logits/kdloss"]

    def build(case: Case) -> Any:
        return lambda *tensors: 1.01 * right.build(case)(*tensors)

    monkeypatch.setitem(ENTRANTS, "logits/kdloss", replace(right, build=build))
    file = tmp_path / "results.jsonl"
    assert _run(file, "logits", "--dtype", "fp32") == 1
    assert "FAILED KDLoss, logits fp32" in capsys.readouterr().out
    found = records.read([file])
    line = found.results["logits", found.cases("logits")[0].name, "kdloss"]
    assert (line["status"], line["time"]) == ("wrong", None)
    assert line["error"]["loss"] == pytest.approx(0.01, rel=1e-3)


class _Lost(torch.autograd.Function):
    """The right value with a gradient of NaNs."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * float("nan")


# beside a good loss, and beside a good gradient that is compared before it
@pytest.mark.parametrize(("level", "position"), [(LOGITS, 0), (HEADS, 1)])
def test_a_gradient_that_is_no_number_is_wrong(
    monkeypatch: pytest.MonkeyPatch, level: str, position: int
) -> None:
    right = ENTRANTS[f"{level}/eager"]

    def build(case: Case) -> Any:
        def loss(*tensors: torch.Tensor) -> Any:
            given = list(tensors)
            given[position] = _Lost.apply(given[position])  # type: ignore[no-untyped-call]
            return right.build(case)(*given)

        return loss

    monkeypatch.setitem(ENTRANTS, f"{level}/eager", replace(right, build=build))
    hidden = (0, 0) if level == LOGITS else (8, 12)
    case = Case(5, 40, "fp32", 2.0, "forward_kl", level, *hidden)
    line = _results(Task(level, case, (f"{level}/eager",), repeats=1))["eager"]
    assert (line["status"], line["why"]) == ("wrong", "a relative error of nan")
    assert line["error"]["loss"] < 1e-6


def test_one_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: Case) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(
        ENTRANTS, "logits/checkpoint", replace(ENTRANTS["logits/checkpoint"], build=build)
    )
    found = _results(_task("logits/checkpoint", "logits/kdloss"))
    assert found["checkpoint"]["status"] == "failed"
    assert found["checkpoint"]["why"] == "RuntimeError: no such kernel"
    assert found["kdloss"]["status"] == "measured"


#: A child that crashes while it runs the eager composition, as a peer's kernel would make it.
CRASHES = """
import json, os, sys
line = {"kind": "progress", "share": 0.5, "note": "time of eager", "running": "logits/eager"}
print(json.dumps(line), flush=True)
print("last words", file=sys.stderr, flush=True)
os.abort()
"""


def test_a_crash_costs_no_more_than_the_one_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, children = subprocess.Popen, []

    def popen(command: list[str], **keywords: Any) -> Any:
        if "benchmarks.one_case" in command:
            children.append((command, keywords["env"]))
            if len(children) == 1:
                command = [sys.executable, "-c", CRASHES]
        return real(command, **keywords)

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    file = tmp_path / "results.jsonl"
    arguments = [word for word in TINY if word != "--in-process"]
    options = ["run", "logits", *arguments, "--dtype", "fp32", "--output", str(file)]
    assert cli.main(options) == 1
    assert "time of eager: its process ended with status -6: last words" in capsys.readouterr().out
    found = records.read([file])
    (case,) = found.cases("logits")
    statuses = {line["entrant"]: line["status"] for line in found.of("logits", case)}
    assert statuses == {"kdloss": "measured", "kdloss-inplace": "measured",
                        "checkpoint": "measured", "eager": "failed"}  # fmt: skip
    assert ("logits", case.name) in found.done
    # a thread for each core in the children; not here, or they would all be bound to one
    assert all(environment["OMP_PROC_BIND"] == "spread" for _, environment in children)
    assert "OMP_PROC_BIND" not in os.environ


def test_one_that_raises_while_it_is_timed_does_not_stop_the_others() -> None:
    def fails() -> None:
        raise RuntimeError("the third time")

    calls = [lambda: None, lambda: None, fails]
    pair = [
        measuring.Contestant("a", lambda: calls.pop(0)(), repeats=5),
        measuring.Contestant("b", lambda: None, repeats=5),
    ]
    timings = measuring.interleave(pair, 1, warm_up=0)
    assert str(timings["a"].error) == "the third time"
    assert timings["b"].error is None
    assert len(timings["b"].samples) == 5


def test_resume_measures_who_was_not_there(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    base = ["run", "logits", "--n", "4", "--v", "60", "--dtype", "fp32", "--repeats", "2",
            "--in-process", "--output", str(file)]  # fmt: skip
    assert cli.main([*base, "--peers", "kdloss"]) == 0
    assert cli.main([*base, "--peers", "kdloss", "eager", "--resume"]) == 0
    lines = len(_lines(file))
    assert cli.main([*base, "--peers", "eager", "--resume"]) == 0
    assert len(_lines(file)) == lines + 1  # the line of the run alone
    found = records.read([file])
    assert {key for _, _, key in found.results} == {"kdloss", "eager"}


def test_a_case_is_resumed_with_everyone_whom_it_has(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    base = ["run", "logits", "--n", "4", "--v", "60", "--dtype", "fp32", "--repeats", "2",
            "--in-process", "--output", str(file)]  # fmt: skip
    assert cli.main([*base, "--peers", "kdloss", "checkpoint"]) == 0
    assert cli.main([*base, "--peers", "eager", "--resume"]) == 0
    lines = _lines(file)
    (_, second) = (i for i, line in enumerate(lines) if line["kind"] == "run")
    again = {line["entrant"] for line in lines[second:] if line["kind"] == "result"}
    assert again == {"kdloss", "checkpoint", "eager"}


def test_what_the_clock_cut_is_measured_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, right = tmp_path / "results.jsonl", runner.run_task
    with monkeypatch.context() as patch:  # begun, and then there was no time
        patch.setattr(runner, "run_task", lambda task, emit: right(replace(task, seconds=0), emit))
        assert _run(file, "logits", "--dtype", "fp32") == 0
    found = records.read([file])
    assert {line["status"] for line in found.results.values()} == {"no time"}
    assert found.done == set()
    assert _run(file, "logits", "--dtype", "fp32", "--resume") == 0
    found = records.read([file])
    assert len(found.done) == 1
    assert {line["status"] for line in found.results.values()} == {"measured"}


def test_a_last_line_that_does_not_end_is_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "logits", "--dtype", "fp32") == 0
    file.write_text(file.read_text().removesuffix("\n"))  # the line "done", whole
    assert _run(file, "logits", "--dtype", "fp32", "--resume") == 0
    assert [line["kind"] for line in _lines(file)].count("done") == 1
    assert len(records.read([file]).done) == 1


def test_results_with_another_version_of_a_peer_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(runner, "packages", lambda: {"trl": "1.0", "gone": "3"})
    assert _run(file, "logits", "--dtype", "fp32") == 0
    monkeypatch.setattr(runner, "packages", lambda: {"trl": "2.0", "new": "4"})
    with pytest.raises(SystemExit) as raised:
        _run(file, "logits", "--resume")
    assert raised.value.code == 2
    assert capsys.readouterr().err.endswith("made elsewhere: trl was '1.0' and is '2.0'\n")


def test_when_the_time_is_up_the_rest_is_not_begun() -> None:
    found = _results(_task("logits/kdloss", "logits/eager", seconds=0.0))
    assert {line["status"] for line in found.values()} == {"no time"}


def test_where_the_process_cannot_be_asked_the_call_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    calls: list[int] = []
    assert measuring.process_peak(lambda: calls.append(1)) is None
    assert calls == [1]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_case, "available_memory", lambda: 3 * 4 * 5 * 40)  # the inputs do
    found = _results(_task("logits/eager", "logits/kdloss-inplace"))
    assert found["eager"]["status"] == "no memory"
    assert found["eager"]["why"] == "needs 0.0 GiB, 0.0 GiB are free"
    assert found["kdloss-inplace"]["status"] == "measured"
    monkeypatch.setattr(one_case, "available_memory", lambda: 2**10)
    found = _results(_task("logits/eager", "logits/kdloss-inplace"))
    assert {line["status"] for line in found.values()} == {"no memory"}
    assert found["eager"]["why"] == "the inputs need 0.0 GiB, 0.0 GiB are free"


def test_what_takes_too_long_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(64, 40, "bf16", level=HEADS, student_hidden=8, teacher_hidden=12)
    slow = floors.Floor("products", lambda: None, 1.0, is_slow=True)
    monkeypatch.setattr(floors, "floor", lambda problem, limit: slow)
    task = Task("heads", case, ("heads/eager",))
    assert _results(task)["eager"]["status"] == "measured"  # it was tried, and is fast enough
    line = _results(replace(task, limit_seconds=1e-9))["eager"]
    assert (line["status"], line["time"]) == ("no time", None)
    assert line["why"].startswith("8 rows alone took ")
    assert line["why"].endswith(" s, the limit is 1e-09 s")


def test_fewer_rows_are_held_to_the_limit_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(64, 40, "bf16", level=HEADS, student_hidden=8, teacher_hidden=12)
    slow = floors.Floor("products", lambda: None, 1.0, is_slow=True)
    monkeypatch.setattr(floors, "floor", lambda problem, limit: slow)
    task = Task("heads", case, ("heads/eager",), limit_seconds=30.0, repeats=1)
    times = iter([40.0, 29.0, 29.0])  # 8 rows: the first call, the second; 32 rows
    monkeypatch.setattr(floors, "fastest", lambda *given: next(times))
    assert _results(task)["eager"]["status"] == "measured"
    assert list(times) == []
    times = iter([29.0, 40.0, 31.0])
    assert _results(task)["eager"]["why"] == "32 rows alone took 31 s, the limit is 30 s"


# nobody tries fewer rows there
@pytest.mark.parametrize(("level", "hidden"), [(LOGITS, (0, 0)), (HEADS, (8, 12)), (STEP, (8, 8))])
def test_a_whole_call_is_held_to_the_limit(
    monkeypatch: pytest.MonkeyPatch, level: str, hidden: tuple[int, int]
) -> None:
    monkeypatch.setattr(one_case._Run, "_exceeds", lambda self, line: "")
    case = Case(6, 40, "fp32", 2.0, "forward_kl", level, *hidden)
    task = Task(level, case, (f"{LOGITS if level == LOGITS else HEADS}/eager",), repeats=1)
    assert _results(task)["eager"]["status"] == "measured"
    line = _results(replace(task, limit_seconds=1e-9))["eager"]
    assert (line["status"], line["time"]) == ("no time", None)
    assert line["why"].startswith("a call took ")


def test_a_training_step_is_of_whole_sequences(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    arguments = ["run", "training-step", *TINY, "--peers", "eager", "--n", "4", "200", "--output"]
    assert cli.main([*arguments, str(file)]) == 0
    (few, many) = records.read([file]).cases("training-step")
    assert (few.n, many.n) == (4, 256)
    with pytest.raises(ValueError, match="N must be up to 128 or a multiple of it; got 200"):
        one_case.PROBLEMS[STEP](many.with_(n=200))
    line = _results(Task("training-step", many.with_(n=128 * 10**9), ("heads/eager",)))["eager"]
    assert line["status"] == "no memory"


def test_figures_that_are_not_finite_are_strings_in_the_file(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    file = tmp_path / "results.jsonl"
    error = {"loss": float("nan"), "gradients": float("-inf")}
    line = result_line(LOGITS, Case(5, 40, "fp32"), "eager", None, error=error, why="nan")
    write_lines([run_line(), line], file)
    for text in file.read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    (found,) = records.read([file]).results.values()
    assert [str(x) for x in found["error"].values()] == ["nan", "-inf"]
    assert isinstance(found["error"]["loss"], float)
    assert found["why"] == "nan"
    file.write_text(file.read_text().replace('"loss": "nan"', '"loss": NaN'))  # as it was once
    (found,) = records.read([file]).results.values()
    assert isinstance(found["error"]["loss"], float)
