"""The check of a GPU machine, as far as it runs without one: on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import gpu_check, gpu_smoke, gpu_times  # noqa: E402
from benchmarks.gpu_check import FIRST, PARTS, SECOND, Part  # noqa: E402
from fused_kd.divergences import DIVERGENCES  # noqa: E402

PAGE = "docs/internals/gpu_check.md"
BY_NAME = {part.name: part for part in PARTS}


def _run(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "GPU_CHECK_DEVICE": "cpu", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "results.jsonl"
    monkeypatch.setenv("GPU_CHECK_DEVICE", "cpu")
    monkeypatch.setenv("GPU_CHECK_OUTPUT", str(path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return path


# ----------------------------------------------------------------------------------- the runner


def _check(folder: Path, monkeypatch: pytest.MonkeyPatch, **codes: str) -> int:
    parts = tuple(Part(name, FIRST, 1, "", f"{{python}} -c '{c}'") for name, c in codes.items())
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "ENVIRONMENT", ())
    monkeypatch.setattr(gpu_check, "LEAST", 3.0)
    return gpu_check.main(["--device", "cpu", "--output", str(folder)])


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = 'import subprocess; print("begun"); subprocess.run(["sleep", "99"])'
    bad = 'print("LEFT OUT x"); exit(7)'
    monkeypatch.setattr(gpu_check, "TOOLS", ("import nothing",))
    assert _check(tmp_path, monkeypatch, bad=bad, hangs=hang, tool="import nothing", good="0") == 1
    log = (tmp_path / "gpu_check.log").read_text()
    report = [re.sub(r", \d+ s of \d+", "", line) for line in log.splitlines()[-5:]]
    assert report[:2] == ["bad: failed with 7", "    LEFT OUT x"]
    assert report[2:4] == [
        "hangs: failed, it had to be ended",
        "tool: skipped, there is no import nothing",
    ]
    assert report[4] == "good: passed"
    assert "begun\n" in log
    assert _check(tmp_path, monkeypatch, good="0") == 0


def test_what_was_printed_survives_a_signal(tmp_path: Path) -> None:
    part = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"""
from benchmarks import gpu_check
gpu_check.PARTS = (gpu_check.Part("sleeps", "first", 600, "", "{{python}} -c {part!r}"),)
gpu_check.ENVIRONMENT = ()
gpu_check.main(["--device", "cpu", "--output", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log, found = tmp_path / "gpu_check.log", None
    while not found:  # the test's own limit is that of the run
        assert process.poll() is None
        found = re.search(r"^(\d+)\n", log.read_text() if log.exists() else "", re.MULTILINE)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # the part was ended too
        os.kill(int(found[1]), 0)


def test_the_plan() -> None:
    for run, minutes in ((FIRST, 4), (SECOND, 5)):
        assert sum(part.seconds for part in PARTS if part.run == run) <= 60 * minutes
    assert [part.name for part in PARTS[:3]] == ["build", "smoke", "operators"]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) s \|", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert rows == [(part.name, str(part.seconds)) for part in PARTS]
    tests = (ROOT / "tests").glob("test_gpu*.py")
    marked = {path.stem for path in tests if "pytest.mark.gpu" in path.read_text()}
    assert marked - {Path(__file__).stem} == set(gpu_check.TESTS)


def test_the_build_is_of_the_cuda_module_for_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("TORCH_CUDA_ARCH_LIST", "FUSED_KD_CUDA_OBJECTS"):
        monkeypatch.delenv(name, raising=False)
    names = ("FUSED_KD_BUILD", "FUSED_KD_CUDA", "TORCH_CUDA_ARCH_LIST")

    def read() -> list[str | None]:
        found = gpu_check._environment(BY_NAME["build"], "cuda", 1.0, Path())
        return [found.get(name) for name in names]

    assert read() == ["0", "1", "9.0"]
    monkeypatch.setenv("FUSED_KD_CUDA_OBJECTS", "objects")  # their stamp has the architecture
    assert read() == ["0", "1", None]


@pytest.mark.parametrize("found", [("0", "97"), ("0", "0"), ("97", "97")])
def test_a_sanitizer_that_finds_nothing_is_found_out(
    found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 0 for the cases and 97 for the planted write, or the part has failed."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\ncase $* in *planted) exit {1};; *) exit {0};; esac\n".format(*found)
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, status, right in zip(("memcheck", "planted"), found, ("0", "97"), strict=True):
        part = replace(BY_NAME[name], tiny="")
        summary, *_ = gpu_check.run_part(part, "cpu", 60, tmp_path / "log")
        assert (": passed" in summary) == (status == right)


# ---------------------------------------------------------------------------------- the scripts


def test_the_cases_cover_what_they_should() -> None:
    every = gpu_smoke.cases("cuda")
    assert {case.divergence for case in every[:20]} == {DIVERGENCES[0]}
    for divergence in DIVERGENCES:
        cases = [case for case in every if case.divergence == divergence]
        assert len({(case.student, case.teacher) for case in cases}) == 9
        for dtype, ladder in gpu_smoke.LADDER.items():
            assert {*ladder.values(), 7} <= {c.v for c in cases if c.student == c.teacher == dtype}


@pytest.mark.parametrize("extra", [0, 800])  # bytes of a block besides its slice
def test_the_ladder_reaches_each_size_of_a_cluster(extra: int) -> None:
    """By the rule of csrc/cuda/launch.cu, on a multiprocessor with 228 KiB of shared memory."""
    of_three, of_two = 233472 // 3 - 1024, 233472 // 2 - 1024
    limits = {1: of_three, 2: of_three, 4: of_three, 8: of_three, 16: of_two}
    for dtype, ladder in gpu_smoke.LADDER.items():
        group = 2 * 8 * gpu_smoke.DTYPES[dtype].itemsize
        for blocks, v in ladder.items():
            sizes = {n: -(-v // 8 // n) * group + extra for n in limits}
            assert next((n for n in limits if sizes[n] <= limits[n]), 0) == blocks, (dtype, v)


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


def test_nothing_is_begun_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_CHECK_UNTIL", "1")
    assert gpu_smoke.main([]) == 0
    assert "LEFT OUT cpu: 75 of 75 cases" in capsys.readouterr().out


GUARDED = """
import threading
from benchmarks import gpu_session
gpu_session.PATIENCE, session = 1, gpu_session.Session()
def fail(): raise RuntimeError("an illegal memory access")
session.call("first", fail)
{code}
print("went on", session.failed)
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("session.call('second', fail)", "went on 2"),
        (
            "session.synchronize = fail; session.call('second', int)",
            "Error: an illegal memory access",
        ),
        ("session.call('second', threading.Event().wait)", "Timeout"),
    ],
)
def test_a_lost_context_and_a_hang_end_a_script(code: str, words: str, results: Path) -> None:
    done = _run("-c", GUARDED.format(code=code))
    assert words in done.stdout + done.stderr
    assert ("went on" in done.stdout) == ("went on" in words) == (done.returncode == 0)
    assert json.loads(results.read_text().splitlines()[-1]) == {"begins": "second"}


def test_every_operator_is_timed_and_a_failure_does_not_stop_the_next(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_calls = gpu_times.whole_calls
    monkeypatch.setattr(
        gpu_times, "whole_calls", lambda *x: {"fails": (3, lambda: 1 / 0), **whole_calls(*x)}
    )
    assert gpu_times.main(["operators"]) == 1
    assert "FAILED cpu bf16 V=33 fails: ZeroDivisionError" in capsys.readouterr().out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {
        x["what"].partition("V=33 ")[2]: x for x in lines if "what" in x and "bf16" in x["what"]
    }
    copy = found.pop("copy of a matrix")["seconds"]
    assert len(found) == 1 + 6 + 2 + 4
    bounds = {"forward_kl forward": 1, "forward_kl forward_backward": 1.5, "KDLoss in place": 1.5}
    for name, factor in bounds.items():
        assert found[name]["bound"] == pytest.approx(factor * copy)
        assert found[name]["seconds"] > 0
    assert {f"{name} forward_backward" for name in DIVERGENCES} <= set(found)


# ----------------------------------------------------------------------------------- the plugin

QUIET = "import torch\ntorch.cuda.empty_cache = torch.cuda.synchronize = lambda: None\n"
SUITE = """
import os, threading, torch

def test_compiled(): pass
def test_bad():
    if "LOSE" in os.environ: torch.cuda.synchronize = lambda: int("no device")
    assert 1 + 1 == 3, "arithmetic"
def test_after():
    if "HANG" in os.environ: threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("variables", "options", "status", "words"),
    [
        ({"HANG": "1"}, "", 1, "in test_after"),
        ({"LOSE": "1", "GPU_CHECK_DEVICE": "cuda"}, "", 3, "the device's context is lost"),
        ({"LOSE": "1", "GPU_CHECK_DEVICE": "cuda"}, "-n1", 1, "PASSED test_them.py::test_after"),
        ({"GPU_CHECK_UNTIL": "1"}, "-rs", 0, "LEFT OUT"),
    ],
)
def test_the_plugin_shows_a_failure_at_once_and_ends_what_cannot_go_on(
    variables: dict[str, str], options: str, status: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "test_them.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(QUIET)
    ini = ("-o", "faulthandler_timeout=1", "-o", "faulthandler_exit_on_timeout=true")
    command = ("-m", "pytest", "-p", "gpu_plugin", "-v", *ini, *options.split())
    done = _run(*command, folder=tmp_path, **variables)
    text = done.stdout + done.stderr
    assert done.returncode == status, text
    assert words in text
    if status:
        assert "FAILED test_them.py::test_bad (call)" in done.stderr


# ------------------------------------------------------------------------------------ all of it


@pytest.mark.slow
@pytest.mark.parametrize("run", [FIRST, SECOND])
def test_every_part(run: str, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--run", run, "--minutes", "12", "--output", str(tmp_path))
    done = _run("-m", "benchmarks.gpu_check", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    for part in PARTS:
        if part.run == run and (part.tiny or part.command) != gpu_check._NONE:
            assert f"\n{part.name}: passed" in done.stdout
            if "tests" not in part.name:
                assert (tmp_path / f"{part.name}.jsonl").read_text().endswith("}\n")


COMPILE = """
import sys
from pathlib import Path
from benchmarks import gpu_cache, gpu_smoke
with gpu_cache.filling(Path("out/gpu_cache"), capability=sys.argv[1]):
    gpu_cache.launch(gpu_smoke.Case("mse", "fp32", "fp32", int(sys.argv[2])))
"""


def _compile(folder: Path, capability: str = "9.0", vocabulary: int = 7) -> set[str]:
    folder.mkdir(exist_ok=True)
    done = _run("-c", COMPILE, capability, str(vocabulary), folder=folder, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name for path in (folder / gpu_check.CACHE).glob("*/*.cubin")}


@pytest.mark.slow
def test_what_was_compiled_is_found_by_another_process_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = _compile(tmp_path / "made")
    assert len(found) >= 3  # forward, forward and backward, from statistics
    shutil.move(tmp_path / "made", tmp_path / "used")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "used").glob("out/*/*/*")}
    assert _compile(tmp_path / "used") == found
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "used").glob("out/*/*/*")}
    assert len(_compile(tmp_path / "used", vocabulary=20_001)) > len(found)
    assert len(_compile(tmp_path / "other", capability="8.0")) == len(found)
