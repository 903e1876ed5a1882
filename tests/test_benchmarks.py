"""The command lines of benchmarks/: they run at tiny sizes, and bad options end in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_kd.backends import why_not

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    accuracy,
    cases,
    cpu_linear,
    cpu_logits,
    guard,
    measuring,
    report,
)

BEGIN, END = report.markers(accuracy.NAME)
needs_cpu = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)
TINY = ["--n", "4", "--v", "60", "--repeats", "2", "--skip", "compile"]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_cpu
def test_cpu_logits_prints_every_section_and_writes_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    assert cpu_logits.main([*TINY, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    for dtype in ("bf16", "fp32"):
        for section in cpu_logits.SECTIONS:
            assert f"{section}: {dtype}, N = 4, V = 60, T = 2" in shown
    for words in ("processor", "instruction set", "huge pages", "eager / in place", "V 30 → 60"):
        assert words in shown
    assert "torch.compile / in place" not in shown  # left out
    lines = _lines(file)
    assert all(line["schema"] == 1 for line in lines)
    kinds = [line["kind"] for line in lines]
    # per dtype: 5 + 15 times, 4 + 4 ratios, 2 peaks
    wanted = {"environment": 1, "time": 40, "ratio": 16, "memory": 4}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == wanted
    assert all(line["reached"] for line in lines if line["kind"] == "memory")


@needs_cpu
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


# each reaches another check: type, range, name, list of names, file, directory, unknown option
BAD: list[tuple[ModuleType, list[str], str]] = [
    (cpu_logits, ["--n", "ten"], "--n: must be a whole number of at least 1; got 'ten'"),
    (cpu_logits, ["--v", "0"], "--v: must be a whole number of at least 1; got '0'"),
    (cpu_logits, ["--temperature", "nan"], "--temperature: must be a finite number above 0"),
    (cpu_logits, ["--temperature", "-1"], "--temperature: must be a finite number above 0"),
    (cpu_logits, ["--dtypes", "bf16", "int8"], "--dtypes: invalid choice: 'int8'"),
    (cpu_logits, ["--skip", "liger"], "--skip: invalid choice: 'liger'"),
    (cpu_logits, ["--json", "no/such/folder/file"], "--json: cannot write 'no/such/folder/file'"),
    (cpu_linear, ["--part", "all"], "--part: invalid choice: 'all'"),
    (cpu_linear, ["--n", "8", "0"], "--n: must be a whole number of at least 1; got '0'"),
    (cpu_linear, ["--limit-seconds", "0"], "--limit-seconds: must be a finite number above 0"),
    (accuracy, ["--write", "."], "--write: '.' is a directory, not a file"),
    (accuracy, ["--backend", "gpu"], "--backend: invalid choice: 'gpu'"),
    (guard, ["--what"], "unrecognized arguments: --what"),
]


@needs_cpu
@pytest.mark.parametrize(("module", "arguments", "message"), BAD)
def test_bad_option_is_one_line_and_exit_code_2(
    module: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        module.main(arguments)
    assert raised.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


@needs_cpu
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


@needs_cpu
def test_the_module_runs_from_the_command_line() -> None:
    command = [sys.executable, "-m", "benchmarks.cpu_logits", "--sections", "main", "--quick"]
    result = subprocess.run(
        [*command, "--n", "2", "--v", "8", "--dtypes", "fp32", "--skip", "compile"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "KDLoss, in place" in result.stdout


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
    assert seen[: len(start) + 4] == [*start, "ra", "a", "rb", "b"]
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


@needs_cpu
def test_in_place_is_really_in_place_and_restored() -> None:
    case = cases.Case(4, 50, "fp32")
    bench = cases.Bench(200, "fp32", rows=4)
    student, _, _ = bench.views(case)
    before = student.clone()
    bench.step(cases.fused(case, inplace=False), case)()
    assert torch.equal(student, before)
    bench.step(cases.fused(case, inplace=True), case)()
    assert not torch.equal(student, before)
    assert student.sum(1).abs().max() < 1e-5  # a gradient: its rows add up to zero
    bench.restore(case)()
    assert torch.equal(student, before)


def test_every_guard_has_a_baseline() -> None:
    names = {one.name for one in guard.GUARDS}
    for found in guard.read_baseline().values():
        assert set(found["ratios"]) == names
