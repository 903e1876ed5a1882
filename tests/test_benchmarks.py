"""``python -m benchmarks``: suites run at tiny sizes, keep what they measure, and end clearly."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fast import one_thread
from torch import Tensor

from fused_kd.backends import why_not

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    __main__ as cli,
)
from benchmarks import (  # noqa: E402
    accuracy,
    errors,
    floors,
    guard,
    measuring,
    one_case,
    records,
    report,
    runner,
)
from benchmarks.cases import LINEAR, LOGITS, STEP, Case  # noqa: E402
from benchmarks.entrants import ENTRANTS  # noqa: E402
from benchmarks.entrants.compositions import eager  # noqa: E402
from benchmarks.one_case import Task  # noqa: E402
from benchmarks.problems import LinearProblem, LogitsProblem  # noqa: E402

pytestmark = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)
BEGIN, END = report.markers(accuracy.NAME)
#: Who is quick enough for a test.
QUICK = ["--peers", "kdloss", "kdloss-inplace", "linearkdloss", "eager", "checkpoint"]
TINY = ["--n", "4", "--v", "60", "--hidden", "8", "12", "--repeats", "2", "--in-process", *QUICK]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(floors, "SHORT", 0.0)
    gc.freeze()  # or every measurement would search all that the other tests have left
    with one_thread():
        yield
    gc.unfreeze()


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
    assert found.suites == ["logits", "linear", "training-step", "growth", "accuracy"]
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
    for words in ("processor", "KDLoss, in place", "LinearKDLoss", f"written to {file}"):
        assert words in shown


def test_both_dtypes_at_both_levels_by_default(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "logits", "linear") == 0
    found = records.read([file])
    for suite in ("logits", "linear"):
        assert [case.dtype for case in found.cases(suite)] == ["bf16", "fp32"]


def test_lines_of_results_have_what_the_schema_says(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert _run(file, "linear", "--dtype", "fp32") == 0
    lines = _lines(file)
    assert [line["kind"] for line in lines] == ["run", "floor", *["result"] * 3, "done"]
    assert {line["schema"] for line in lines} == {records.SCHEMA}
    text = " ".join((records.__doc__ or "").split())
    for line in lines:
        for key in {*line, *(line.get("time") or {})} - {"schema", "kind"}:
            assert f'"{key}"' in text, key


def test_the_growth_suite_doubles_one_size_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    arguments = ["run", "growth", *TINY, "--peers", "kdloss", "linearkdloss"]
    assert cli.main([*arguments, "--n", "2", "8", "--v", "16", "64", "--output", str(file)]) == 0
    sizes = [(c.level, c.n, c.v) for c in records.read([file]).cases("growth")]
    assert sizes == [(level, n, v) for level in (LOGITS, LINEAR)
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
        stream.write('{"schema": 2, "kind": "res')  # the line it was about to write
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
    case = Case(64, 40, "bf16", level=LINEAR, student_hidden=8, teacher_hidden=12)
    slow = floors.Floor("products", lambda: None, 1.0, is_slow=True)
    monkeypatch.setattr(floors, "floor", lambda problem, limit: slow)
    task = Task("linear", case, ("linear/eager",))
    assert _results(task)["eager"]["status"] == "measured"  # it was tried, and is fast enough
    line = _results(replace(task, limit_seconds=1e-9))["eager"]
    assert (line["status"], line["time"]) == ("no time", None)
    assert line["why"].startswith("8 rows alone took ")


# --------------------------------------------------------------------------------- bad options

# each reaches another check: type, range, names, file, conflicting options
BAD: list[tuple[list[str], str]] = [
    (["run", "--n", "ten"], "--n: must be a whole number of at least 1; got 'ten'"),
    (["run", "--v", "-1"], "--v: must be a whole number of at least 1; got '-1'"),
    (["run", "--temperature", "nan"], "--temperature: must be a finite number above 0"),
    (["run", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["run", "speed"], "unknown suite 'speed'; there are logits linear training-step growth"),
    (["run", "--peers", "kdloss", "ligre"], "--peers: unknown loss 'ligre'; there are kdloss"),
    (["run", "--skip", "nobody"], "--skip: unknown loss 'nobody'"),
    (["run", "--model", "gpt-9"], "--model: unknown model 'gpt-9'"),
    (["run", "--teacher-model", "gpt2"], "--teacher-model needs --model"),
    (["run", "--resume", "--overwrite"], "give one of them"),
    (["run", "--output", "/proc/no/such/folder"], "--output: cannot write"),
    (["run", "--output", "tests"], "--output: cannot write 'tests': it is no file"),
    (["run", "--output", "/dev/null"], "--output: cannot write '/dev/null': it is no file"),
    (["run", "--output", "setup.py"], "setup.py is not empty; --resume, --overwrite, or another"),
    (["run", "--output", "setup.py", "--resume"], "setup.py:1: no line of results"),
    (["run", "--output", "setup.py", "--overwrite"], "setup.py:1: no line of results"),
    (["run", "logits", "--peers", "linearkdloss"], "nobody is left to be measured"),
    (["plot", "no-such-file"], "no-such-file: cannot be read"),
    (["compare", "README.md", "setup.py"], "README.md:1: no line of results"),
    (["compare", "a"], "the following arguments are required: FILE"),
    (["draw"], "invalid choice: 'draw'"),
    ([], "required"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_option_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


BAD_SCRIPTS: list[tuple[ModuleType, list[str], str]] = [
    (accuracy, ["--write", "."], "--write: '.' is a directory, not a file"),
    (accuracy, ["--backend", "gpu"], "--backend: invalid choice: 'gpu'"),
    (guard, ["--what"], "unrecognized arguments: --what"),
]


@pytest.mark.parametrize(("module", "arguments", "message"), BAD_SCRIPTS)
def test_the_other_scripts_refuse_alike(
    module: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        module.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_by_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Task] = []
    monkeypatch.setattr(runner, "run_task", lambda task, emit: seen.append(task))
    names = ["--model", "qwen3-0.6b", "--teacher-model", "qwen3-4b"]
    arguments = ["run", "linear", *names, "--in-process", "--output", str(tmp_path / "r.jsonl")]
    cli.main(arguments)
    assert len(seen) == 2  # dtypes
    for task in seen:
        sizes = task.case.v, task.case.student_hidden, task.case.teacher_hidden
        assert sizes == (151936, 1024, 2560)


def test_list_names_everything_and_why_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for words in (*ENTRANTS, "training-step", "qwen3-0.6b"):
        assert words.split("/")[-1] in shown
    assert "a backend for GPUs" in shown or torch.cuda.is_available()


# ------------------------------------------------------------------------------- the measuring


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


@pytest.mark.parametrize("level", [LOGITS, LINEAR, STEP])
def test_errors_are_those_against_float64(level: str) -> None:
    hidden = (0, 0) if level == LOGITS else (64, 64)
    case = Case(6, 50, "fp32", 2.0, "forward_kl", level, *hidden)
    problem = one_case.PROBLEMS[level](case)
    entrant = ENTRANTS[f"{LOGITS if level == LOGITS else LINEAR}/eager"]
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


def test_the_floor_of_the_linear_level_is_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = LinearProblem(Case(8, 40, "bf16", level=LINEAR, student_hidden=8, teacher_hidden=12))
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
