"""fused_kd.env: without torch, with variables that every call refuses, into a closed pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.processes import run_python

from fused_kd import env, extension

#: A first statement, after which torch cannot be imported.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", code)


def test_without_torch() -> None:
    # whether the value of a variable is refused cannot be read either
    code = "import os, runpy; os.environ['FUSED_KD_CPU'] = 'avx2'; sys.argv = ['env', '--json']; "
    done = _run(WITHOUT_TORCH + code + "runpy.run_module('fused_kd.env', {}, '__main__')")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"].startswith("not available: ModuleNotFoundError: ")
    assert report["versions"]["fused_kd"] == "0.1.0"
    assert report["frameworks"]["trl"]
    assert report["backends"].startswith("not available: ")
    assert report["refused_variables"]["FUSED_KD_CPU"].startswith("not available: ")


@pytest.mark.parametrize(
    "code", ["from fused_kd import KDLoss", "import fused_kd; fused_kd.kd_loss"]
)
def test_what_needs_torch_says_so(code: str) -> None:
    done = _run(WITHOUT_TORCH + code)
    assert done.returncode == 1
    expected = "ImportError: fused_kd needs torch>=2.10, and importing torch failed: "
    assert done.stderr.splitlines()[-1].startswith(expected)


def test_without_torch_other_names_are_missing_as_usual() -> None:
    done = _run(WITHOUT_TORCH + "import fused_kd; print(hasattr(fused_kd, 'kdloss'))")
    assert done.stdout == "False\n", done.stderr


def test_variables_that_every_call_refuses_are_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def marked() -> list[str]:
        assert env.main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [" ".join(line.split()) for line in lines if " raises: " in line]

    for accepted in ("", "auto", "reference"):
        monkeypatch.setenv("FUSED_KD_BACKEND", accepted)
        assert marked() == []
    monkeypatch.setenv("FUSED_KD_BACKEND", "foo")
    assert marked() == [
        "every call raises: must be 'auto' or one of 'reference', 'cpu', 'triton', 'cuda'"
    ]
    monkeypatch.setattr(extension.cpu, "_module", None)  # a known backend that cannot run
    monkeypatch.setattr(extension.cpu, "_reason", "no compiler")
    monkeypatch.setattr(extension.cpu, "_tried", True)
    monkeypatch.setenv("FUSED_KD_BACKEND", "cpu")
    assert marked() == ["every call raises: no compiler"]


def test_a_reader_that_stops_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fused_kd.env"]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # as in a terminal
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
