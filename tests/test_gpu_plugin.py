"""The pytest plugin of the GPU check: a failure is shown at once, a lost process ends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))  # benchmarks/ is not installed

from benchmarks.gpu_guard import HUNG, LOST  # noqa: E402

SUITE = """
import os, threading

def test_compiled():
    pass

def test_bad():
    assert 1 + 1 == 3, "arithmetic"

def test_after():
    if "END" in os.environ:
        os._exit(9)

def test_hangs():
    if "HANG" in os.environ:
        threading.Event().wait()
"""


def _pytest(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_them.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "gpu_plugin", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    given = {"PYTHONPATH": path, "GPU_CHECK_DEVICE": "cpu", **environment}
    return subprocess.run([*command, *options], cwd=folder, env={**os.environ, **given},
                          capture_output=True, text=True, check=False, timeout=120)  # fmt: skip


def test_a_failure_is_printed_before_the_next_test_ends_everything(tmp_path: Path) -> None:
    done = _pytest(tmp_path, END="1")
    assert done.returncode == 9
    assert "\nFAILED test_them.py::test_bad (call)\n" in done.stderr
    assert "AssertionError: arithmetic" in done.stderr


def test_what_compiles_is_last(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "-v")
    assert done.returncode == 1
    order = [line.split()[0].partition("::")[2] for line in done.stdout.splitlines()
             if line.startswith("test_them.py::")]  # fmt: skip
    assert order[-1] == "test_compiled"


def test_a_test_that_hangs_is_named_and_ends_the_process(tmp_path: Path) -> None:
    done = _pytest(tmp_path, HANG="1", GPU_CHECK_TEST_SECONDS="1")
    assert done.returncode == HUNG
    assert "FAILED test_them.py::test_hangs: no end within 1 s" in done.stderr
    assert "in test_hangs" in done.stderr  # where it was


LOSES = """
import gpu_plugin

gpu_plugin.lost = lambda device: "an illegal memory access"
"""


def test_a_lost_context_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(LOSES)
    done = _pytest(tmp_path, "-v")
    assert done.returncode == LOST
    assert "test_bad: the device's context is lost: an illegal memory access" in done.stderr
    assert "test_after" not in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is missing")
def test_another_process_takes_the_place_of_one_that_was_lost(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(LOSES)
    done = _pytest(tmp_path, "-n", "1", "-v")
    assert done.returncode == 1
    assert "FAILED test_them.py::test_bad (call)" in done.stderr
    for name in ("test_after", "test_hangs", "test_compiled"):
        assert f"PASSED test_them.py::{name}" in done.stdout
