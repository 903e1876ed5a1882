"""The command for a GPU machine, as far as it runs without one: on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import needs_cpu, one_thread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    __main__ as cli,
)
from benchmarks import (  # noqa: E402
    device,
    gpu_check,
    gpu_guard,
    gpu_parts,
    gpu_process,
    records,
)
from benchmarks.gpu_parts import FIRST, SECOND, Plan  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    """The command takes the signal for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu_check.json").read_text())
    return found


# ------------------------------------------------------------------------------ all of it, tiny


@needs_cpu
def test_the_tests_for_a_gpu_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_process, "environment", lambda device: {"device": device})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--device", "cpu", "--part", "cuda-tests", "--output", str(tmp_path)]
    assert gpu_check.main(options) == 0, capsys.readouterr().out[-3000:]
    (part,) = _report(tmp_path)["parts"]
    assert (part["name"], part["status"]) == ("cuda-tests", "passed")
    log = (tmp_path / "gpu_check.log").read_text()
    for name in gpu_parts.TESTS:
        assert f"tests/{name} ." in log
    # nothing was left out on the way
    assert not [note for note in part["notes"] if not note.startswith("SKIPPED")]


def test_every_file_of_tests_for_a_gpu_is_run() -> None:
    marked = [
        path.name
        for path in (ROOT / "tests").glob("test_gpu*.py")
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name
    ]
    assert sorted(marked) == sorted(gpu_parts.TESTS)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("which", [FIRST, SECOND])
def test_every_part(which: str, tmp_path: Path) -> None:
    done = _run("--device", "cpu", "--run", which, "--output", str(tmp_path), "--minutes", "12")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = _report(tmp_path)
    assert found["environment"]["backends"] == {"cpu": "available"}
    statuses = {part["name"]: part["status"] for part in found["parts"]}
    wanted = {name: "passed" for name in gpu_parts.names([which])}
    assert statuses == ({**wanted, "build": "skipped"} if which == FIRST else wanted)
    for name in {"smoke", "operators", "heads-times", "triton", *gpu_parts.SUITES} & set(wanted):
        assert found[name], name
    for suite in set(gpu_parts.SUITES) & set(wanted):
        assert {line["kind"] for line in found[suite]} == {"run", "floor", "result", "done"}


@needs_cpu
@pytest.mark.parametrize("suite", gpu_parts.SUITES)
def test_the_suites_run_as_they_are_called(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu_parts, "script", lambda run, part, *words: commands.append(words))
    for where in ("cuda", "cpu"):
        with (tmp_path / "log").open("w") as log:
            run = gpu_process.Run(where, tmp_path, log, {})
            gpu_parts.PARTS[suite].action(run, gpu_process.Part(suite))
    (module, *real), (_, *tiny) = commands
    assert module == "benchmarks"
    parser = cli.make_parser()
    parsed = parser.parse_args([*real, "--device", "cuda", "--seconds", "60"])
    assert parsed.n == [8192]
    assert set(parsed.peers) <= {entrant.key for entrant in cli.ENTRANTS.values()}
    assert cli.main([*tiny, "--device", "cpu", "--seconds", "600"]) == 0
    found = records.read([tmp_path / f"{suite}.jsonl"])
    assert {line["status"] for line in found.results.values()} <= {"measured", "skipped"}
    assert found.floors


# --------------------------------------------------------------------------------- the plan


def test_the_runs_have_their_minutes_and_their_order() -> None:
    for run, minutes in gpu_parts.MINUTES.items():
        shares = [plan.share for plan in gpu_parts.PARTS.values() if plan.run == run]
        assert sum(shares) <= 60 * minutes
    first, second = (gpu_parts.names([run]) for run in (FIRST, SECOND))
    assert [*first, *second] == list(gpu_parts.PARTS)
    # whether it is right before how fast it is; what can hang, and what tells least, last
    assert first[:3] == ["build", "smoke", "operators"]
    assert second[0] == "triton"
    assert second[-2:] == ["peers", "memory"]
    assert gpu_parts.PARTS["triton"].most <= 40
    assert gpu_parts.minutes(["smoke"]) == 4
    assert gpu_parts.minutes(["smoke", "memory"]) == 9


def test_the_page_has_the_plan() -> None:
    page = (ROOT / "docs" / "backends.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) s \|", page, re.MULTILINE)
    assert rows == [(name, f"{plan.share:.0f}") for name, plan in gpu_parts.PARTS.items()]


def test_a_run_or_parts_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake_parts(monkeypatch, smoke="", memory="")
    for options, names in (
        (["--run", "first"], ["smoke"]),
        (["--run", "second"], ["memory"]),
        (["--part", "memory", "smoke"], ["smoke", "memory"]),
        ([], ["smoke", "memory"]),
    ):
        assert gpu_check.main([*options, "--output", str(tmp_path)]) == 0
        assert [part["name"] for part in _report(tmp_path)["parts"]] == names
    with pytest.raises(SystemExit):
        gpu_check.main(["--run", "first", "--part", "smoke"])
    assert "give one of them" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the driver


def _fake_parts(monkeypatch: pytest.MonkeyPatch, **codes: str) -> None:
    """Parts of these names that run a piece of Python."""

    def call(code: str) -> Any:
        return lambda run, part: gpu_process.call(run, part, [sys.executable, "-c", code], {})

    plans = {
        name: Plan(gpu_parts.PARTS[name].run, 50.0, call(code)) for name, code in codes.items()
    }
    for module in (gpu_check, gpu_parts):
        monkeypatch.setattr(module, "PARTS", plans)
    monkeypatch.setattr(gpu_process, "environment", lambda device: {"device": "a card"})


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '99'])"
    _fake_parts(monkeypatch, build="print('LEFT OUT x: y'); raise SystemExit(7)", smoke=hang,
                operators=f"raise SystemExit({gpu_guard.LOST})",
                ncu=f"raise SystemExit({gpu_guard.HUNG})", logits="print('done')")  # fmt: skip
    monkeypatch.setattr(gpu_check, "LEAST", 1.5)
    begin = time.monotonic()
    assert gpu_check.main(["--output", str(tmp_path), "--minutes", "0.01"]) == 1
    assert time.monotonic() - begin < 60
    parts = {part["name"]: part for part in _report(tmp_path)["parts"]}
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses == {"build": "failed", "smoke": "failed", "operators": "failed",
                        "ncu": "failed", "logits": "passed"}  # fmt: skip
    assert parts["build"]["notes"] == ["LEFT OUT x: y"]
    assert parts["smoke"]["notes"] == ["FAILED smoke: ended after 2 s, unfinished"]
    assert "context was lost" in parts["operators"]["notes"][0]
    assert "did not return" in parts["ncu"]["notes"][0]
    assert "build: LEFT OUT x: y" in capsys.readouterr().out
    assert "begun\n" in (tmp_path / "gpu_check.log").read_text()


def test_all_well_is_exit_status_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_parts(monkeypatch, smoke="", operators="print('x' * 2000000)")
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert (tmp_path / "gpu_check.log").stat().st_size < 10**5
    assert [part["name"] for part in _report(tmp_path)["parts"]] == ["smoke", "operators"]


def test_the_parts_take_binaries_from_a_cache_that_was_made_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "HASH").mkdir(parents=True)
    (tmp_path / "cache" / "HASH" / "kernel.cubin").write_text("binary")
    monkeypatch.setenv("FUSED_KD_TRITON_CACHE", str(tmp_path / "cache"))
    _fake_parts(monkeypatch, triton="import os; print('in', os.environ['TRITON_CACHE_DIR'])")
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 0
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert f"begins with 1 binaries of {tmp_path / 'cache'}\n" in log
    assert f"\nin {tmp_path / 'out' / 'triton_cache'}\n" in log


TERMINATED = """
import sys
from pathlib import Path
from benchmarks import gpu_check, gpu_parts, gpu_process
from benchmarks.gpu_parts import Plan

def part(code):
    return lambda run, part: gpu_process.call(run, part, [sys.executable, "-c", code], {})

sleep = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
plans = {"smoke": Plan("first", 1.0, part("print('first')")), "memory": Plan("second", 9.0, part(sleep))}
gpu_check.PARTS = gpu_parts.PARTS = plans
gpu_process.environment = lambda device: {"device": "a card"}
sys.exit(gpu_check.main(["--output", sys.argv[1]]))
"""  # noqa: E501


def test_what_was_printed_and_measured_survives_a_signal(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, str(tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    while not (lines and lines[-1].startswith("pid ")):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    # as a kill would leave it
    statuses = {part["name"]: part["status"] for part in _report(tmp_path)["parts"]}
    assert statuses == {"smoke": "passed", "memory": "running"}
    assert lines[-1] in (tmp_path / "gpu_check.log").read_text()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # it did not leave the part behind
        os.kill(int(lines[-1].split()[1]), 0)


def test_without_pytest_the_tests_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_process, "environment", lambda device: {"device": "a card"})
    assert gpu_check.main(["--output", str(tmp_path), "--part", "cuda-tests"]) == 0
    (part,) = _report(tmp_path)["parts"]
    assert (part["status"], part["notes"]) == ("skipped", ["SKIPPED pytest is not installed"])


# with nvcc or objects, the CUDA backend must be there after the build; without, there is no build
@pytest.mark.parametrize(
    ("nvcc", "objects", "state", "status"),
    [
        ("13.0", None, "was not built", "failed"),
        ("13.0", None, "available", "passed"),
        (None, "/objects", "was not built", "failed"),
        (None, None, "was not built", "skipped"),
    ],
)
def test_the_build_is_of_the_cuda_module_alone(
    nvcc: str | None, objects: str | None, state: str, status: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = {"device": "a card", "capability": "9.0", "nvcc": nvcc,
             "backends": {"cuda": state, "triton": "available"}}  # fmt: skip
    monkeypatch.setattr(gpu_process, "environment", lambda device: found)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("FUSED_KD_CUDA_OBJECTS", raising=False)
    if objects:
        monkeypatch.setenv("FUSED_KD_CUDA_OBJECTS", objects)
    calls: list[tuple[list[str], dict[str, str]]] = []

    def call(run: Any, part: Any, command: list[str], environment: dict[str, str]) -> None:
        calls.append((command, environment))
        part.status = "passed"

    monkeypatch.setattr(gpu_parts, "call", call)
    code = gpu_check.main(["--output", str(tmp_path), "--part", "build"])
    (part,) = _report(tmp_path)["parts"]
    assert (part["status"], code) == (status, int(status == "failed"))
    assert bool(part["notes"]) == (status != "passed")
    if status == "skipped":
        assert not calls
        return
    ((command, environment),) = calls
    assert command == [sys.executable, "setup.py", "build_ext", "--inplace"]
    assert (environment["FUSED_KD_BUILD"], environment["FUSED_KD_CUDA"]) == ("0", "1")
    # what the objects are for is for their stamp to say
    assert environment.get("TORCH_CUDA_ARCH_LIST") == (None if objects else "9.0")


def test_the_process_that_builds_does_not_load_the_modules() -> None:
    code = "import sys, benchmarks.gpu_check; sys.exit('fused_kd' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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
