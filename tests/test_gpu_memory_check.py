"""The memory check of the GPU kernels, and the sanitizer that it runs under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import needs_cpu, one_thread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import cases, gpu_memory_check, gpu_sanitizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


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
