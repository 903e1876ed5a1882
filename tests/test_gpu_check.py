"""The check of a GPU machine, as far as it runs without one: on the CPU, at tiny sizes."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_smoke, gpu_times
from benchmarks.gpu_check import FIRST, PARTS, ROOT, SECOND, Part
from fused_kd.divergences import DIVERGENCES


def _run(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)  # this test's; not that of a pytest started here
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


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
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
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


SIGNALLED = """
import sys
from benchmarks import gpu_check
assert "fused_kd" not in sys.modules  # this process builds its modules
sleep = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
gpu_check.ENVIRONMENT = ()
gpu_check.PARTS = [gpu_check.Part("sleep", gpu_check.FIRST, 600, "", f'{{python}} -c "{sleep}"')]
sys.exit(gpu_check.main(["--device", "cpu", "--output", sys.argv[1]]))
"""


def test_a_signal_ends_the_part_and_keeps_what_it_printed(tmp_path: Path) -> None:
    log, pid = tmp_path / "gpu_check.log", None
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, str(tmp_path)], cwd=ROOT)
    while pid is None and process.poll() is None:
        text = log.read_text() if log.exists() else ""
        pid = re.search(r"^pid (\d+)$", text, re.MULTILINE)
        time.sleep(0.05)
    assert pid is not None
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # the part is not left behind
        os.kill(int(pid[1]), 0)


def test_the_plan() -> None:
    for run, minutes in ((FIRST, 4), (SECOND, 5)):
        assert sum(part.seconds for part in PARTS if part.run == run) <= 60 * minutes
    page = (ROOT / "docs/internals/gpu_check.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) s \|", page, re.MULTILINE)
    assert rows == [(part.name, str(part.seconds)) for part in PARTS]
    files = set((ROOT / "tests").glob("test_gpu*.py")) - {Path(__file__)}
    assert {path.stem for path in files} == {*gpu_check.TESTS, "test_gpu_smoke"}


ECHO = "echo FAILED $FUSED_KD_BUILD $FUSED_KD_CUDA $TORCH_CUDA_ARCH_LIST"


@pytest.mark.parametrize(
    ("name", "variable", "tool", "code", "report"),
    [
        ("build", "X", "python", ECHO, "    FAILED 0 1 9.0"),
        # objects have their architecture in a stamp
        ("build", "FUSED_KD_CUDA_OBJECTS", "python", ECHO, "    FAILED 0 1"),
        ("memcheck", "X", "compute-sanitizer", "exit 0", ": passed"),
        ("memcheck", "X", "compute-sanitizer", "exit 97", ": failed with 123"),
        ("planted", "X", "compute-sanitizer", "exit 97", ": passed"),
        ("planted", "X", "compute-sanitizer", "exit 0", ": failed with 1"),
    ],
)
def test_the_module_is_built_for_this_card_and_what_a_sanitizer_finds_is_noticed(
    name: str,
    variable: str,
    tool: str,
    code: str,
    report: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for unset in ("TORCH_CUDA_ARCH_LIST", "FUSED_KD_CUDA_OBJECTS"):
        monkeypatch.delenv(unset, raising=False)
    monkeypatch.setenv(variable, "x")
    (tmp_path / tool).write_text(f"#!/bin/sh\n{code}\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", "python")
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    (part,) = (part for part in PARTS if part.name == name)
    lines = gpu_check.run_part(part, "cuda", 60, tmp_path / "log")
    assert report in (lines[-1], lines[0][len(name) : lines[0].rindex(", ")])


@pytest.mark.parametrize("extra", [0, 800])  # bytes that a block needs besides its slice
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


def _overwrite(student: Any, loss: Any) -> Any:
    if student._base is not None:
        student._base[-1] = 0.0
    return loss


#: What the smoke test must report, and a function of the student and the loss that makes it wrong.
WRONG: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("gradient of rows", lambda _, loss: loss + 0.02 * (loss - loss.detach())),
    ("losses", lambda _, loss: 1.001 * loss),
    ("losses", lambda _, loss: math.nan * loss),
    ("margins", _overwrite),
]


@pytest.mark.parametrize(("what", "wrong"), WRONG)
def test_the_smoke_finds_what_is_wrong(
    what: str, wrong: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, case = gpu_smoke.kd_loss, gpu_smoke.Case("jsd", "bf16", "fp32", 41)

    def broken(student: Any, *rest: Any, backend: str, **keywords: Any) -> Any:
        loss = right(student, *rest, backend=backend, **keywords)
        return loss if backend == "reference" else wrong(student, loss)

    assert max(gpu_smoke.measure(case, "cpu", "cpu").values()) < 1
    monkeypatch.setattr(gpu_smoke, "kd_loss", broken)
    assert not gpu_smoke.measure(case, "cpu", "cpu")[what] <= 1


def test_every_operator_is_timed_and_a_failure_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operators, bad = gpu_times.operators, {gpu_times.BOTH: (3, lambda: 1 / 0)}
    monkeypatch.setenv("GPU_CHECK_DEVICE", "cpu")
    monkeypatch.setattr(gpu_times, "operators", lambda *x: bad if x[-1] == "jsd" else operators(*x))
    assert gpu_times.main(["operators"]) == 1
    output = capsys.readouterr().out
    assert "FAILED cpu bf16 V=33 jsd forward_backward: ZeroDivisionError" in output
    found = re.findall(r"^cpu bf16 V=33 (.+?) +([\d.]+) ms +([\d.]+) x", output, re.MULTILINE)
    timed = {name: float(ms) / float(ratio) for name, ms, ratio in found}
    assert len(timed) == 1 + 2 + 6 + 3
    bounds = {"forward_kl forward": 1, "mse forward_backward": 1.5, "KDLoss in place": 1.5}
    for name, factor in bounds.items():  # five decimals of a millisecond are printed
        assert timed[name] == pytest.approx(factor * timed[gpu_times.COPY], rel=0.2)
    monkeypatch.setenv("GPU_CHECK_UNTIL", "1")
    assert gpu_times.main(["operators"]) == 0
    assert "LEFT OUT cpu bf16 V=33 KDLoss: the time is up" in capsys.readouterr().out


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
        ("GPU_CHECK_SLICE", "", 0, "1 passed"),
    ],
)
def test_the_plugin_shows_a_failure_at_once_and_ends_what_cannot_go_on(
    variable: str, options: str, status: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "test_them.py").write_text(SUITE)
    options += " -o faulthandler_exit_on_timeout=true"
    command = ("-m", "pytest", "-p", "gpu_plugin", "-v", *options.split())
    value = "1/3" if "SLICE" in variable else "1"
    done = _run(*command, folder=tmp_path, **{variable: value, "GPU_CHECK_DEVICE": "cuda"})
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
            if "{output}" in part.command:
                assert (tmp_path / f"{part.name}.jsonl").read_text().endswith("}\n")


COMPILE = """
from pathlib import Path
from benchmarks import gpu_cache, gpu_smoke
with gpu_cache.filling(Path(gpu_cache.CACHE), "{capability}"):
    gpu_cache.launch(gpu_smoke.Case("mse", "fp32", "fp32", {vocabulary}))
"""


def _compile(folder: Path, capability: str = "9.0", vocabulary: int = 7) -> dict[str, int]:
    """Compile kernels into the cache of `folder`; return the time of each kernel's last write."""
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
