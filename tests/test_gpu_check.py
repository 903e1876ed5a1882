"""The command for a GPU machine, as far as it runs without one: on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import one_thread

from fused_kd.backends import why_not

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    __main__ as cli,
)
from benchmarks import (  # noqa: E402
    cases,
    device,
    gpu_check,
    gpu_memory_check,
    gpu_sanitizer,
    records,
)

needs_cpu = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


# ------------------------------------------------------------------------------ all of it, tiny


@needs_cpu
def test_the_tests_for_a_gpu_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_environment", lambda device: {"device": device})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--device", "cpu", "--part", "tests", "--output", str(tmp_path), "--minutes", "3"]
    assert gpu_check.main(options) == 0, capsys.readouterr().out[-3000:]
    (part,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert (part["name"], part["status"]) == ("tests", "passed")
    log = (tmp_path / "gpu_check.log").read_text()
    for name in ("test_gpu.py", "test_gpu_linear.py", "test_gpu_running.py", "test_gpu_machine.py"):
        assert f"tests/{name} ." in log
    # nothing was left out on the way
    assert not [note for note in part["notes"] if not note.startswith("SKIPPED")]


@needs_cpu
@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    done = _run("--device", "cpu", "--output", str(tmp_path), "--minutes", "8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["environment"]["backends"] == {"cpu": "available"}
    names = {part["name"]: part["status"] for part in found["parts"]}
    assert names == {"build": "skipped", "tests": "passed", "sanitizer": "passed",
                     "logits": "passed", "linear": "passed"}  # fmt: skip
    for suite in gpu_check.SUITES:
        assert {line["kind"] for line in found[suite]} == {"run", "floor", "result", "done"}


@needs_cpu
@pytest.mark.parametrize("suite", gpu_check.SUITES)
def test_the_suites_run_as_they_are_called(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu_check, "_script", lambda run, part, *words: commands.append(words))
    for where in ("cuda", "cpu"):
        with (tmp_path / "log").open("w") as log:
            run = gpu_check.Run(where, tmp_path, log, {})
            gpu_check._suite(run, gpu_check.Part(suite))
    (module, *real), (_, *tiny) = commands
    assert module == "benchmarks"
    parsed = cli.make_parser().parse_args([*real, "--device", "cuda", "--seconds", "60"])
    assert parsed.n == [8192]
    assert cli.main([*tiny, "--device", "cpu", "--seconds", "600"]) == 0
    found = records.read([tmp_path / f"{suite}.jsonl"])
    assert {line["status"] for line in found.results.values()} <= {"measured", "skipped"}
    assert found.floors


@needs_cpu
def test_the_memory_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_memory_check.main(["--device", "cpu", "--slice", "0/4"]) == 0
    assert "cpu: 25 cases" in capsys.readouterr().out
    assert gpu_memory_check.main(["--device", "cpu", "--seconds", "1e-9"]) == 0
    assert "LEFT OUT cpu: 98 of 98 cases" in capsys.readouterr().out


def test_the_memory_check_covers_what_it_should() -> None:
    for backend in ("cuda", "triton"):
        every = gpu_memory_check.cases(backend, "cuda")
        assert len({case.divergence for case in every}) == 5
        assert {case.student for case in every} == set(cases.DTYPES)
        assert {case.offset for case in every} == {0, 1}
        assert set(gpu_memory_check.LADDER) <= {case.v for case in every}
    assert len({(c.divergence, c.student, c.teacher) for c in every}) >= 20


# --------------------------------------------------------------------- what it must not let pass


@needs_cpu
def test_a_wrong_gradient_fails_the_memory_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu_memory_check.kd_loss

    def wrong(student: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        if keywords["backend"] == "reference":
            return right(student, *rest, **keywords)
        if keywords.get("inplace"):
            base = student._base if student._base is not None else student
            base.untyped_storage()[0] = 0  # the first entry of all: a margin, where there is one
        return 1.1 * right(student, *rest, **keywords)

    monkeypatch.setattr(gpu_memory_check, "kd_loss", wrong)
    assert gpu_memory_check.main(["--device", "cpu", "--slice", "0/30"]) == 1
    shown = capsys.readouterr().out
    for words in ("times 2.0: error", "none: error", "a second backward: error", "in place"):
        assert words in shown


# a part's processes: whether they ended, what the tool said, whether it found something
VERDICTS = [
    (0, "========= ERROR SUMMARY: 0 errors", "memcheck", None),
    (0, "", "", None),
    (0, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "racecheck", None),
    (97, "========= ERROR SUMMARY: 3 errors", "memcheck", "3 found"),
    (0, "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", "racecheck", "2 found"),
    (1, "========= ERROR SUMMARY: 0 errors", "initcheck", "exit status 1"),
    (0, "nothing", "synccheck", "the sanitizer gave no summary"),
    (None, "", "memcheck", "not finished in its time"),
    (-11, "", "", "exit status -11"),
]


@pytest.mark.parametrize(("status", "text", "tool", "why"), VERDICTS)
def test_verdicts(status: int | None, text: str, tool: str, why: str | None) -> None:
    assert gpu_sanitizer.verdict(status, text, tool) == why


FAKE = """#!/bin/sh
case "$*" in *--version) echo "version 1"; exit 0;; esac
while [ "$1" != "--target-processes" ]; do shift; done
shift 2
case "$*" in *--planted*) echo "========= ERROR SUMMARY: {planted} errors"; exit {status};; esac
"$@" || exit 1
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize(
    ("backends", "planted", "status"),
    [
        ([], 1, 97),
        ([], 0, 0),
        pytest.param(["cpu"], 1, 97, marks=[needs_cpu, pytest.mark.slow]),
    ],
    ids=["sees", "sees nothing", "with cases"],
)
def test_a_sanitizer_that_sees_nothing_is_found_out(
    backends: list[str],
    planted: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE.format(planted=planted, status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_sanitizer, "TOOLS", ("memcheck",))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert gpu_sanitizer.find() == str(tool)
    assert gpu_sanitizer._under(str(tool), backends, "cpu", 60) == 1 - planted
    shown = capsys.readouterr().out
    assert f"a planted write outside was {'' if planted else 'not '}found" in shown
    for name in backends:
        assert f"memcheck {name} 0/1: {name}: 98 cases, nothing found" in shown


# --------------------------------------------------------------------------------- the driver


def _fake_parts(monkeypatch: pytest.MonkeyPatch, **codes: str) -> None:
    def call(code: str) -> Any:
        return lambda run, part: gpu_check._call(run, part, [sys.executable, "-c", code], {})

    monkeypatch.setattr(gpu_check, "PARTS", {name: call(code) for name, code in codes.items()})
    monkeypatch.setattr(gpu_check, "_environment", lambda device: {"device": "a card"})


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '99'])"
    _fake_parts(monkeypatch, build="print('LEFT OUT x: y'); raise SystemExit(3)", tests=hang,
                sanitizer="print('FAILED z')", logits="print('done')",
                linear="print('done')")  # fmt: skip
    monkeypatch.setattr(gpu_check, "SHARES", {**gpu_check.SHARES, "tests": 1})
    monkeypatch.setattr(gpu_check, "LEAST", 1.5)
    begin = time.monotonic()
    assert gpu_check.main(["--output", str(tmp_path), "--minutes", "0.01"]) == 1
    assert time.monotonic() - begin < 60
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    statuses = {part["name"]: part["status"] for part in found["parts"]}
    assert statuses == {"build": "failed", "tests": "failed", "sanitizer": "passed",
                        "logits": "passed", "linear": "passed"}  # fmt: skip
    notes = {part["name"]: part["notes"] for part in found["parts"]}
    assert notes["build"] == ["LEFT OUT x: y"]
    assert notes["tests"] == ["FAILED tests: ended after 2 s, unfinished"]
    assert "build: LEFT OUT x: y" in capsys.readouterr().out
    assert "begun\n" in (tmp_path / "gpu_check.log").read_text()


def test_all_well_is_exit_status_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_parts(monkeypatch, build="", tests="print('x' * 2000000)")
    assert gpu_check.main(["--output", str(tmp_path), "--part", "tests", "build"]) == 0
    assert (tmp_path / "gpu_check.log").stat().st_size < 10**5
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["build", "tests"]


def test_without_pytest_the_tests_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "_environment", lambda device: {"device": "a card"})
    assert gpu_check.main(["--output", str(tmp_path), "--part", "tests"]) == 0
    (part,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert (part["status"], part["notes"]) == ("skipped", ["SKIPPED pytest is not installed"])


# with nvcc, the CUDA backend must be there after the build; without, its reason is enough
@pytest.mark.parametrize(("nvcc", "status"), [("13.0", "failed"), (None, "passed")])
def test_a_build_without_the_module_fails_only_where_it_could_be(
    nvcc: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"device": "a card", "capability": "9.0", "nvcc": nvcc,
             "backends": {"cuda": "was not built", "triton": "available"}}  # fmt: skip
    monkeypatch.setattr(gpu_check, "_environment", lambda device: found)
    commands: list[list[str]] = []

    def call(run: Any, part: Any, command: list[str], environment: dict[str, str]) -> None:
        commands.append(command)
        assert environment.get("TORCH_CUDA_ARCH_LIST", "9.0") == "9.0"
        part.status = "passed"

    monkeypatch.setattr(gpu_check, "_call", call)
    code = gpu_check.main(["--output", str(tmp_path), "--part", "build"])
    (part,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert (part["status"], code) == (status, int(status == "failed"))
    assert part["notes"][0].endswith("backend cuda: was not built")
    assert commands == [[sys.executable, "setup.py", "build_ext", "--inplace"]]


@no_gpu
def test_without_a_gpu_the_environment_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main([]) == 1
    assert "finds no CUDA device" in capsys.readouterr().err


@no_gpu
@pytest.mark.slow
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = _run("--output", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "finds no CUDA device; --device cpu tries everything at tiny sizes" in line
