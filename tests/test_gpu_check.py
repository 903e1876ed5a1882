"""The check of a GPU machine, as far as it runs without one: on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_smoke, gpu_times
from benchmarks.gpu_check import FIRST, PARTS, ROOT, SECOND, Part
from fused_kd.divergences import DIVERGENCES

PAGE = ROOT / "docs" / "internals" / "gpu_check.md"


def _run(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)  # this test's; not that of a pytest started here
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "results.jsonl"
    monkeypatch.setenv("GPU_CHECK_DEVICE", "cpu")
    monkeypatch.setenv("GPU_CHECK_OUTPUT", str(path))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    return path


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {
        "bad": 'print("LEFT OUT x"); exit(7)',
        "hangs": 'import subprocess; print("begun"); subprocess.run(["sleep", "99"])',
        "tool": "import nothing",
        "good": "0",
    }
    parts = [Part(name, FIRST, 1, "", f"{{python}} -c '{code}'") for name, code in codes.items()]
    monkeypatch.setattr(gpu_check, "TOOLS", ("import nothing",))
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "ENVIRONMENT", ())
    monkeypatch.setattr(gpu_check, "LEAST", 3.0)
    options = ["--device", "cpu", "--output", str(tmp_path)]
    assert gpu_check.main(options) == 1
    log = (tmp_path / "gpu_check.log").read_text()
    assert "begun\n" in log
    report = [re.sub(r", \d+ s of \d+", "", line) for line in log.splitlines()[-5:]]
    bad = ["bad: failed with 7", "    LEFT OUT x", "hangs: failed, it had to be ended"]
    assert report == [*bad, "tool: skipped, there is no import nothing", "good: passed"]
    assert gpu_check.main([*options, "--part", "good"]) == 0


def test_the_plan() -> None:
    for run, minutes in ((FIRST, 4), (SECOND, 5)):
        assert sum(part.seconds for part in PARTS if part.run == run) <= 60 * minutes
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) s \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [(part.name, str(part.seconds)) for part in PARTS]
    tests = {
        x.stem for x in (ROOT / "tests").glob("test_gpu*.py") if "pytest.mark.gpu" in x.read_text()
    }
    assert tests - {Path(__file__).stem} == set(gpu_check.TESTS)


# objects have their architecture in a stamp
@pytest.mark.parametrize(
    ("objects", "architecture"), [({}, "9.0"), ({"FUSED_KD_CUDA_OBJECTS": "x"}, None)]
)
def test_the_build_is_of_the_cuda_module_for_this_card(
    objects: dict[str, str], architecture: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.os, "environ", {**os.environ, **objects})
    environment = gpu_check._environment(PARTS[0], "cuda", 1.0, Path())
    names = ("FUSED_KD_BUILD", "FUSED_KD_CUDA", "TORCH_CUDA_ARCH_LIST")
    assert [environment.get(name) for name in names] == ["0", "1", architecture]


@pytest.mark.parametrize("status", [("0", "97"), ("0", "0"), ("97", "97")])
def test_a_sanitizer_that_finds_nothing_is_noticed(
    status: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Exit status 0 for the cases and 97 for the planted write, or the part has failed
    tool = tmp_path / "compute-sanitizer"
    code = f"case $* in *planted) exit {status[1]};; *) exit {status[0]};; esac"
    tool.write_text(f"#!/bin/sh\n{code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, right in (("memcheck", status[0] == "0"), ("planted", status[1] == "97")):
        (part,) = (part for part in PARTS if part.name == name)
        summary, *_ = gpu_check.run_part(part, "cuda", 60, tmp_path / "log")
        assert (": passed" in summary) == right


@pytest.mark.parametrize("extra", [0, 800])  # bytes of a block besides its slice
def test_the_cases_reach_each_size_of_a_cluster(extra: int) -> None:
    # By the rule of csrc/cuda/launch.cu, on a multiprocessor with 228 KiB of shared memory
    of_three, of_two = 233472 // 3 - 1024, 233472 // 2 - 1024
    limits = {1: of_three, 2: of_three, 4: of_three, 8: of_three, 16: of_two}
    every = gpu_smoke.cases("cuda")
    assert {case.divergence for case in every[:20]} == {DIVERGENCES[0]}
    assert len({case[:3] for case in every}) == 9 * len(DIVERGENCES)
    for dtype, ladder in gpu_smoke.LADDER.items():
        group = 2 * 8 * gpu_smoke.DTYPES[dtype].itemsize
        for blocks, v in ladder.items():
            sizes = {n: -(-v // 8 // n) * group + extra for n in limits}
            assert next((n for n in limits if sizes[n] <= limits[n]), 0) == blocks, (dtype, v)
            assert {(name, dtype, dtype, v) for name in DIVERGENCES} <= set(every)


WRONG = {
    "gradient": "gradient of rows: error 0.0",
    "loss": "losses: error 0.001",
    "nan": "losses: error nan",
    "raises": "RuntimeError: no such kernel",
    "margin": "entries written outside of the rows: error 1",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_smoke_finds_what_is_wrong(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu_smoke.kd_loss

    def broken(student: Any, *rest: Any, **keywords: Any) -> Any:
        loss = right(student, *rest, **keywords)
        if keywords["backend"] == "reference" or keywords["divergence"] != "jsd":
            return loss
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        if wrong == "margin" and student._base is not None:
            student._base[-1] = 0.0
        scale = {"nan": float("nan"), "loss": 1.001}.get(wrong, 1.0)
        return scale * loss + (0.02 if wrong == "gradient" else 0.0) * (loss - loss.detach())

    monkeypatch.setattr(gpu_smoke, "kd_loss", broken)
    assert gpu_smoke.main(["--slice", "0", "4"]) == 1
    failures = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")]
    assert all("'jsd'" in line for line in failures)
    assert any(WRONG[wrong] in line for line in failures)
    monkeypatch.setenv("GPU_CHECK_UNTIL", "1")
    assert gpu_smoke.main([]) == 0
    assert "LEFT OUT cpu: 75 of 75 cases" in capsys.readouterr().out


GUARDED = """
import threading
from benchmarks import gpu_session
gpu_session.PATIENCE, session = 1, gpu_session.Session()
def fail(): raise RuntimeError("a trap")
session.call("first", fail)
{code}
print("went on", session.status)
"""
ENDS = {
    "session.call('second', fail)": "went on 1",
    "session.synchronize = fail; session.call('second', int)": "RuntimeError: a trap",
    "session.call('second', threading.Event().wait)": "Timeout",
}


@pytest.mark.parametrize("code", ENDS)
def test_a_lost_context_and_a_hang_end_a_script(code: str, results: Path) -> None:
    done = _run("-c", GUARDED.format(code=code))
    assert ENDS[code] in done.stdout + done.stderr
    assert ("went on" in done.stdout) == ("went on" in ENDS[code]) == (done.returncode == 0)
    assert json.loads(results.read_text().splitlines()[-1]) == {"begins": "second"}


def test_every_operator_is_timed_and_a_failure_does_not_stop_the_next(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = gpu_times.whole_calls
    bad = {"fails": (3, lambda: 1 / 0)}
    monkeypatch.setattr(gpu_times, "whole_calls", lambda *x: {**bad, **calls(*x)})
    assert gpu_times.main(["operators"]) == 1
    assert "FAILED cpu bf16 V=33 fails: ZeroDivisionError" in capsys.readouterr().out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    timed = {x["what"]: x for x in lines if "bf16" in x.get("what", "")}
    copy = timed.pop("bf16 V=33 copy of a matrix")["seconds"]
    assert len(timed) == 1 + 6 + 2 + 4
    bounds = {"forward_kl forward": 1, "mse forward_backward": 1.5, "KDLoss in place": 1.5}
    for name, factor in bounds.items():
        assert timed[f"cpu bf16 V=33 {name}"]["bound"] == pytest.approx(factor * copy)
        assert timed[f"cpu bf16 V=33 {name}"]["seconds"] > 0


SUITE = """
import os, threading, torch
torch.cuda.empty_cache = torch.cuda.synchronize = lambda: None

def test_compiled(): pass
def test_bad():
    if "LOSE" in os.environ: torch.cuda.synchronize = lambda: int("no device")
    assert 1 + 1 == 3, "arithmetic"
def test_after():
    if "HANG" in os.environ: threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("variable", "options", "status", "words"),
    [
        ("HANG", "-o faulthandler_timeout=3", 1, "in test_after"),
        ("LOSE", "", 3, "the device's context is lost"),
        ("LOSE", "-n1", 1, "PASSED test_them.py::test_after"),
        ("GPU_CHECK_UNTIL", "-rs", 0, "LEFT OUT"),
    ],
)
def test_the_plugin_shows_a_failure_at_once_and_ends_what_cannot_go_on(
    variable: str, options: str, status: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "test_them.py").write_text(SUITE)
    options += " -o faulthandler_exit_on_timeout=true"
    command = ("-m", "pytest", "-p", "gpu_plugin", "-v", *options.split())
    done = _run(*command, folder=tmp_path, **{variable: "1", "GPU_CHECK_DEVICE": "cuda"})
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert status == 0 or "FAILED test_them.py::test_bad (call)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run", [FIRST, SECOND])
def test_every_part(run: str, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--run", run, "--minutes", "12", "--output", str(tmp_path))
    done = _run("-m", "benchmarks.gpu_check", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    for part in PARTS:
        if part.run == run:
            went = "skipped" if "{gpu}" in part.command else "passed"
            assert f"\n{part.name}: {went}" in done.stdout
            if went == "passed" and "tests" not in part.name:
                assert (tmp_path / f"{part.name}.jsonl").read_text().endswith("}\n")


COMPILE = """
from pathlib import Path
from benchmarks import gpu_cache, gpu_smoke
with gpu_cache.filling(Path(gpu_cache.CACHE), {capability!r}):
    gpu_cache.launch(gpu_smoke.Case("mse", "fp32", "fp32", {vocabulary}))
"""


def _compile(folder: Path, capability: str = "9.0", vocabulary: int = 7) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    code = COMPILE.format(capability=capability, vocabulary=vocabulary)
    done = _run("-c", code, folder=folder, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    paths = (folder / gpu_check.CACHE).glob("*/*.cubin")
    return {path.parent.name: path.stat().st_mtime_ns for path in paths}


@pytest.mark.slow
def test_what_was_compiled_is_found_by_another_process_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kernels = _compile(tmp_path / "made")
    assert len(kernels) >= 3  # forward, forward and backward, from statistics
    shutil.move(tmp_path / "made", tmp_path / "used")
    assert _compile(tmp_path / "used") == kernels
    assert len(_compile(tmp_path / "used", vocabulary=20_001)) > len(kernels)
    other = _compile(tmp_path / "other", capability="8.0")
    assert len(other) == len(kernels)
    assert not set(other) & set(kernels)  # a binary for another GPU is another one
