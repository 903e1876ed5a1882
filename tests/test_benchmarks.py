"""``python -m benchmarks``: results are right, kept after any failure, compared and published."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import needs_cpu, one_thread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed
pytest.importorskip("pandas", reason="tables need pandas")

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import compare, lower_bounds, one_case, publish, records, runner  # noqa: E402
from benchmarks.cases import HEADS, LOGITS, STEP, Case  # noqa: E402
from benchmarks.measuring import Turn, interleave  # noqa: E402
from benchmarks.methods import METHODS  # noqa: E402
from benchmarks.one_case import Task  # noqa: E402
from benchmarks.schema import Result  # noqa: E402

pytestmark = needs_cpu
TINY = ["--dtype", "fp32", "--n", "4", "--v", "60", "--hidden", "8", "12", "--repeats", "2"]
QUICK = ["kdloss", "kdloss-inplace", "kdloss-heads", "eager"]
HEADS_FILE = "cpu_avx2_heads.jsonl"
COMMITTED = ROOT / "benchmarks" / "results" / "cpu_avx2_logits.jsonl"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lower_bounds, "SHORT", 0.0)
    gc.freeze()  # no measurement searches all that other tests have left
    with one_thread():
        yield
    gc.unfreeze()


def _run(path: Path, *words: str, peers: list[str] = QUICK) -> int:
    options = ["--in-process", *TINY, "--peers", *peers, "--output", str(path)]
    return cli.main(["run", *words, *options])


def _results(task: Task) -> dict[str, Any]:
    report = records.Report()
    one_case.run_task(task, report.add)
    return {result.method: result for result in report.results.values()}


# ------------------------------------------------------------------------------------- right?


def test_every_suite_measures_its_cases(tmp_path: Path) -> None:
    assert _run(tmp_path / "r.jsonl") == 0
    report = records.read([tmp_path / "r.jsonl"])
    assert {key[:2] for key in report.results} == report.done
    for (suite, _, _), result in report.results.items():
        assert result.status == "measured", result
        assert suite == "accuracy" or result.error["loss"] < 1e-5
        assert (result.time is None) == (suite == "accuracy")
    assert {suite for suite, _ in report.bounds} == {"logits", "heads", "growth"}
    peaks = {
        x.method: x.memory["allocator_bytes"] for x in report.of("logits", Case(4, 60, "fp32"))
    }
    gradient = 4 * 60 * 4  # allocated out of place, next to nothing in place
    assert gradient <= peaks["kdloss"] < gradient + 4096 > peaks["kdloss-inplace"] + gradient


class _Scaled(torch.autograd.Function):
    """The same value with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return ctx.factor * gradient[0], None


# a wrong value; a wrong gradient, and one that is no number, with a right value
@pytest.mark.parametrize(("value", "gradient"), [(1.01, 1.0), (1.0, 1.01), (1.0, float("nan"))])
@pytest.mark.parametrize("level", [LOGITS, HEADS, STEP])
def test_a_wrong_method_gets_no_time(
    level: str, value: float, gradient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{LOGITS if level == LOGITS else HEADS}/eager"
    right = METHODS[name]

    def build(case: Case) -> Any:
        return lambda *tensors: _Scaled.apply(value * right.build(case)(*tensors), gradient)

    monkeypatch.setitem(METHODS, name, replace(right, build=build))
    hidden = (0, 0) if level == LOGITS else (8, 8)
    task = Task(level, Case(6, 40, "fp32", 2.0, "forward_kl", level, *hidden), (name,), repeats=1)
    result = _results(task)["eager"]
    assert (result.status, result.time) == ("wrong", None)
    assert result.error["loss"] == pytest.approx(value - 1, abs=1e-6)


def test_a_wrong_loss_of_ours_fails_the_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    right = METHODS["logits/kdloss"]
    wrong = replace(right, build=lambda case: lambda *x: 1.01 * right.build(case)(*x))
    monkeypatch.setitem(METHODS, "logits/kdloss", wrong)
    assert _run(tmp_path / "r.jsonl", "logits") == 1
    assert "FAILED KDLoss, logits fp32" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- measuring


def test_calls_take_turns_and_are_restored_before_each() -> None:
    seen: list[str] = []
    turns = [Turn(name, lambda name=name: seen.append(name), lambda: seen.append("-"), wanted, 9)
             for name, wanted in (("a", 3), ("b", 1))]  # fmt: skip
    disturbed = iter([False, False, False, True])
    interleave(turns, lambda call: (call() or 1.0, next(disturbed)), lambda name: None)
    assert "".join(seen) == "-a-a-b-a-a"  # the disturbed one is repeated
    turn = Turn("a", print, print, 3, 9, clean=[2.0, 1.0], disturbed=[9.0, 5.0])
    assert turn.time()["median_s"] == 2.0  # with the faster of the disturbed
    assert (turn.time()["repeats"], turn.time()["undisturbed"]) == (3, 2)


def test_one_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(*tensors: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # checked, and its memory measured
            raise RuntimeError("no such kernel")
        return METHODS["logits/eager"].build(Case(5, 40, "fp32"))(*tensors)

    broken = replace(METHODS["logits/checkpoint"], build=lambda case: fails)
    monkeypatch.setitem(METHODS, "logits/checkpoint", broken)
    names = ("logits/checkpoint", "logits/kdloss")
    found = _results(Task("logits", Case(5, 40, "fp32"), names, repeats=2))
    assert found["checkpoint"].status == "failed"
    assert found["checkpoint"].why == "RuntimeError: no such kernel"
    assert found["kdloss"].status == "measured"


def test_what_is_too_large_or_too_slow_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("logits", Case(64, 40, "fp32"), ("logits/eager", "logits/kdloss-inplace"))
    assert _results(replace(task, limit_seconds=1e-9))["eager"].why.startswith("8 rows alone took")
    monkeypatch.setattr(lower_bounds, "EAGER_COPIES", 0.0)
    found = _results(replace(task, limit_seconds=1e-9))
    assert {(x.status, x.time) for x in found.values()} == {("no time", None)}
    assert found["eager"].why.startswith("a call took ")
    monkeypatch.setattr(one_case.device, "room", lambda where: 3 * 4 * 64 * 40)  # the inputs' own
    found = _results(task)
    assert [found[key].status for key in ("eager", "kdloss-inplace")] == ["no memory", "measured"]


# ------------------------------------------------------------------------- crashes and resume


def test_resume_loses_and_repeats_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file, right, begun = tmp_path / "r.jsonl", runner.run_task, []

    def interrupted(task: Task, emit: Any) -> None:
        begun.append(task.case.level)
        if len(begun) == 2:
            raise KeyboardInterrupt
        right(task, emit)

    monkeypatch.setattr(runner, "run_task", interrupted)
    peers = ["kdloss", "kdloss-heads", "eager"]
    assert _run(file, "logits", "heads", peers=peers) == cli.INTERRUPTED
    assert f"--resume --output {file}" in capsys.readouterr().out
    kept = file.read_text()
    file.write_text(kept + '{"schema": 4, "kind": "res')  # the line it was about to write
    assert _run(file, "logits", "heads", "--resume", peers=peers) == 0
    assert begun == [LOGITS, HEADS, HEADS]
    assert file.read_text().startswith(kept)
    assert len(records.read([file]).done) == 2
    # a method that was not there is measured with those that were: times of two runs differ
    assert _run(file, "logits", "--resume", peers=["checkpoint"]) == 0
    last = file.read_text().split('"kind": "run"')[-1]
    assert set(re.findall(r'"method": "([^"]*)"', last)) == {"kdloss", "eager", "checkpoint"}


def test_resume_completes_what_the_clock_cut_and_mixes_no_machines(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    file, right = tmp_path / "r.jsonl", runner.run_task
    with monkeypatch.context() as patch:  # begun, and then there was no time
        patch.setattr(runner, "run_task", lambda task, emit: right(replace(task, seconds=0), emit))
        assert _run(file, "logits") == 0
    report = records.read([file])
    assert {x.status for x in report.results.values()} == {"no time"}
    assert not report.done
    assert _run(file, "logits", "--resume") == 0
    assert {x.status for x in records.read([file]).results.values()} == {"measured"}
    file.write_text(changed := file.read_text().replace('"threads": 1', '"threads": 99'))
    with pytest.raises(SystemExit):
        _run(file, "logits", "--resume")
    assert "was made elsewhere: threads was 99 and is 1" in capsys.readouterr().err
    assert file.read_text() == changed


def _crash(*tensors: Any) -> Any:
    os.abort()


def _crashing_task(task: Task, sender: Any, parent: int) -> None:
    METHODS["logits/eager"] = replace(METHODS["logits/eager"], build=lambda case: _crash)
    runner.send(task, sender, parent)


def test_a_crash_ends_no_more_than_its_method(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(runner, "TARGET", _crashing_task)
    output = ["--peers", "kdloss", "eager", "--output", str(tmp_path / "r.jsonl")]
    assert cli.main(["run", "logits", *TINY, *output]) == 1
    assert "logits/eager: its process ended with status -6" in capsys.readouterr().out
    report = records.read([tmp_path / "r.jsonl"])
    statuses = {result.method: result.status for result in report.results.values()}
    assert statuses == {"kdloss": "measured", "eager": "failed"}
    assert len(report.done) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    endless = ["--repeats", "100000", "--seconds-each", "1000", "--peers", "kdloss"]
    command = [sys.executable, "-m", "benchmarks", "run", "logits", *TINY, *endless]
    run = subprocess.Popen(
        [*command, "--output", str(tmp_path / "r.jsonl")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    child = None
    while child is None:
        assert run.poll() is None
        words = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        children = [Path("/proc", word) for word in words]
        child = next((path for path in children if "spawn_main" in _text(path / "cmdline")
                      and "libtorch" in _text(path / "maps")), None)  # fmt: skip
    run.kill()
    run.wait()
    while (state := _text(child / "status")) and "State:\tZ" not in state:
        pass


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# ------------------------------------------------------------------------ compare and publish


def _slower(factor: float) -> Callable[[Result], Result]:
    return lambda result: replace(
        result,
        time={**result.time, "median_s": factor * result.time["median_s"]},
        bound_share=result.bound_share / factor,
    )


# slower, without its time, with a larger error, with one that is no number; of a peer too
@pytest.mark.parametrize(
    ("method", "change", "is_good"),
    [
        ("kdloss", _slower(1.2), False),
        ("kdloss", _slower(1.05), True),
        ("kdloss", _slower(0.5), True),
        ("trl-gkd", _slower(1.2), True),
        ("trl-gkd", lambda result: replace(result, time=None, status="wrong"), False),
        ("kdloss", lambda result: replace(result, error={"loss": 1e-5}), False),
        ("eager", lambda result: replace(result, error={"loss": float("nan")}), False),
    ],
)
def test_compare_fails_on_a_regression(method: str, change: Any, is_good: bool) -> None:
    before, after = records.read([COMMITTED]), records.read([COMMITTED])
    for key, result in before.results.items():
        after.results[key] = change(result) if result.method == method else result
    text, found = compare.compare(before, after)
    assert (found, "REGRESSION" not in text) == (is_good, is_good), text


def test_compare_needs_something_to_compare() -> None:
    before, after = records.read([COMMITTED]), records.read([COMMITTED.with_name(HEADS_FILE)])
    assert compare.compare(before, after)[1] is False


@pytest.fixture
def site(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for name in (publish.README, publish.DOCUMENT, publish.PICTURE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_the_documents_are_what_the_results_give(site: Path, capsys: Any) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out
    files = [publish.README, publish.DOCUMENT, publish.PICTURE]
    before = {name: (site / name).read_text() for name in files}
    results = site / "benchmarks" / "results" / "cpu_avx512_bf16_logits.jsonl"
    text = results.read_text()
    results.write_text(re.sub(r'"median_s": \d+\.', '"median_s": 77.', text))
    assert publish.main(["--check"], site) == 1
    assert "+| KDLoss, in place | 77" in capsys.readouterr().out
    assert publish.main([], site) == 0
    assert all((site / name).read_text() != before[name] for name in files)
    results.write_text(text)
    assert publish.main([], site) == 0
    assert all((site / name).read_text() == before[name] for name in files[:2])


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--n", "ten"], "--n: must be a whole number of at least 1; got 'ten'"),
        (["run", "speed"], "unknown suite 'speed'; there are logits heads training-step growth"),
        (["run", "--peers", "ligre"], "--peers: invalid choice: 'ligre'"),
        (["run", "--output", "setup.py"], "setup.py is not empty; --resume, --overwrite, or"),
        (["run", "--output", "setup.py", "--overwrite"], "setup.py:1: no line of results"),
    ],
)
def test_a_bad_option_is_one_line(words: list[str], message: str, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    shown = capsys.readouterr().err
    assert (raised.value.code, len(shown.splitlines())) == (2, 1)
    assert message in shown


def test_plot_and_list(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert cli.main(["plot", str(COMMITTED), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for picture in re.findall(r"\((.*svg)\)", page):
        assert "KDLoss, in place" in (tmp_path / picture).read_text()
    assert "| NVIDIA Model Optimizer | " in page
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(method.key in shown for method in METHODS.values())
