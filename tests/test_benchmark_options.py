"""``python -m benchmarks``: bad options are one line and exit status 2, before any measurement."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_lines import LOGITS_CASE, result_line, run_line, write_lines
from benchmark_runs import NEEDS_CPU, ROOT

from benchmarks import __main__ as cli
from benchmarks import accuracy, guard, runner
from benchmarks.cases import LOGITS
from benchmarks.entrants import ENTRANTS
from benchmarks.one_case import Task

pytestmark = NEEDS_CPU

# each reaches another check: type, range, names, file, conflicting options
BAD: list[tuple[list[str], str]] = [
    (["run", "--n", "ten"], "--n: must be a whole number of at least 1; got 'ten'"),
    (["run", "--v", "-1"], "--v: must be a whole number of at least 1; got '-1'"),
    (["run", "--temperature", "nan"], "--temperature: must be a finite number above 0"),
    (["run", "--temperature", "1e-30"], "--temperature: temperature must be positive and finite"),
    (["run", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["run", "speed"], "unknown suite 'speed'; there are logits heads training-step growth"),
    (["run", "--peers", "kdloss", "ligre"], "--peers: unknown loss 'ligre'; there are kdloss"),
    (["run", "--skip", "nobody"], "--skip: unknown loss 'nobody'"),
    (["run", "--model", "gpt-9"], "--model: unknown model 'gpt-9'"),
    (["run", "--teacher-model", "gpt2"], "--teacher-model needs --model"),
    (["run", "--resume", "--overwrite"], "give one of them"),
    (["run", "--output", "/proc/no/such/folder"], "--output: cannot write"),
    (["run", "--output", "tests"], "--output: cannot write 'tests': it is no file"),
    (["run", "--output", "/dev/null"], "--output: cannot write '/dev/null': it is no file"),
    (["run", "--output", "x" * 300], "': File name too long"),
    (
        ["plot", "benchmarks/results/cpu_avx2_training_step.jsonl", "--output", "x" * 300],
        "File name too long",
    ),
    (["run", "--output", "setup.py"], "setup.py is not empty; --resume, --overwrite, or another"),
    (["run", "--output", "setup.py", "--resume"], "setup.py:1: no line of results"),
    (["run", "--output", "setup.py", "--overwrite"], "setup.py:1: no line of results"),
    (["run", "logits", "--peers", "kdloss-heads"], "no method left to measure"),
    (["plot", "no-such-file"], "no-such-file: cannot be read"),
    (["compare", "README.md", "setup.py"], "README.md:1: no line of results"),
    (["compare", "a"], "the following arguments are required: FILE"),
    (["draw"], "invalid choice: 'draw'"),
    ([], "required"),
]


#: Fields of a line of results that are taken away, or are something else.
SPOILT: list[tuple[dict[str, Any], str]] = [
    ({"nearest": None}, "result without nearest"),
    ({"floor_share": None}, "result without floor_share"),
    ({"time": {"median_s": 1.0}}, "time without quartiles_s"),
    ({"error": "large"}, "error of result is 'large'"),
    ({"error": {"loss": "large"}}, "loss of error is 'large'"),
    ({"case": {"n": 4}}, "case without v"),
    ({"case": {**LOGITS_CASE.sizes, "height": 4}}, "unexpected keyword argument 'height'"),
]


@pytest.mark.parametrize(("spoilt", "message"), SPOILT)
@pytest.mark.parametrize("command", ["plot", "compare", "run"])
def test_a_line_without_its_fields_is_one_line_too(
    spoilt: dict[str, Any], message: str, command: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = result_line(LOGITS, LOGITS_CASE, "kdloss", 1.0)
    ((name, value),) = spoilt.items()
    if value is None:
        del line[name]
    else:
        line[name] = value
    file = str(write_lines([run_line(), line], tmp_path / "results.jsonl"))
    more = {"plot": [file], "compare": [file, file], "run": ["--resume", "--output", file]}
    with pytest.raises(SystemExit) as raised:
        cli.main([command, *more[command]])
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert "results.jsonl:2: no line of results (" in shown
    assert message in shown
    assert len(shown.splitlines()) == 1


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
    arguments = ["run", "heads", *names, "--in-process", "--output", str(tmp_path / "r.jsonl")]
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
