"""The GPU check's scripts that compare and measure: on the CPU, and what they must not miss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import needs_cpu, one_thread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    cases,
    gpu_counters,
    gpu_guard,
    gpu_heads,
    gpu_operators,
    gpu_smoke,
    one_case,
)
from fused_kd.divergences import DIVERGENCES  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- smoke


def test_the_smoke_covers_what_it_should() -> None:
    every = gpu_smoke.cases("cuda")
    assert {case.divergence for case in every} == set(DIVERGENCES)
    pairs = {(case.student, case.teacher) for case in every}
    assert pairs == {(s, t) for s in cases.DTYPES for t in cases.DTYPES}
    for divergence in DIVERGENCES:
        for dtype in ("bf16", "fp32"):
            blocks = {c.blocks for c in every if (c.divergence, c.student) == (divergence, dtype)}
            assert {0, 1, 2, 4, 8, 16} <= blocks
    # a kernel that is wrong at one size shows before the time is up
    assert {case.divergence for case in every[:20]} == {DIVERGENCES[0]}


# what a block's memory holds besides its slice, at least and at most
@pytest.mark.parametrize("besides", [0, 800])
def test_the_ladder_reaches_each_size_of_a_cluster(besides: int) -> None:
    """By the rule of csrc/cuda/launch.cu, on a multiprocessor with 228 KiB of shared memory."""
    of_three, of_two = 233472 // 3 - 1024, 233472 // 2 - 1024
    for dtype, ladder in gpu_smoke.LADDER.items():
        group = 2 * 8 * cases.DTYPES[dtype].itemsize
        for blocks, v in ladder.items():
            groups = -(-v // 8)
            limits = {1: of_three, 2: of_three, 4: of_three, 8: of_three, 16: of_two}
            bytes_of = {n: -(-groups // n) * group + besides for n in limits}
            fitting = [n for n, limit in limits.items() if bytes_of[n] <= limit]
            assert (fitting or [0])[0] == blocks, (dtype, v)


@needs_cpu
def test_the_smoke_finds_nothing_where_nothing_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "smoke.jsonl"
    assert gpu_smoke.main(["--device", "cpu", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "cpu: 75 cases, worst errors: bf16 gradients" in shown
    assert len(_lines(output)) == 75
    options = ["--device", "cpu", "--seconds", "1e-9", "--output", str(output)]
    assert gpu_smoke.main(options) == 0
    assert "LEFT OUT cpu: 75 of 75 cases" in capsys.readouterr().out


@needs_cpu
@pytest.mark.parametrize("wrong", ["gradient", "loss", "nan", "raises"])
def test_the_smoke_finds_what_is_wrong(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu_smoke.kd_loss

    def broken(student: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        loss = right(student, *rest, **keywords)
        if keywords["backend"] == "reference" or keywords["divergence"] != "jsd":
            return loss
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        if wrong == "gradient":  # the same value
            return loss + 0.02 * (loss - loss.detach())
        return loss * (float("nan") if wrong == "nan" else 1.001)

    monkeypatch.setattr(gpu_smoke, "kd_loss", broken)
    options = ["--device", "cpu", "--output", str(tmp_path / "smoke.jsonl")]
    assert gpu_smoke.main(options) == 1
    failures = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")]
    assert failures
    assert all(" jsd " in line for line in failures)
    words = {"gradient": "gradient of rows: error 0.0", "loss": "losses: error 0.001",
             "nan": "losses: error nan", "raises": "RuntimeError: no such kernel"}  # fmt: skip
    assert any(words[wrong] in line for line in failures)


GUARDED = """
import sys, threading
from benchmarks import gpu_guard

guard = gpu_guard.Guard("cpu", float(sys.argv[2]))
def fail(): raise RuntimeError("an illegal memory access")
if sys.argv[1] == "lost":
    gpu_guard.lost = lambda device: "every call fails"
    guard("one", fail)
elif sys.argv[1] == "hung":
    guard("one", threading.Event().wait)
else:
    assert guard("one", fail) is None and guard("two", lambda: 2) == 2
    sys.exit(guard.failed)
print("went on")
"""


@pytest.mark.parametrize(
    ("what", "seconds", "status", "words"),
    [
        ("lost", "600", gpu_guard.LOST, ["FAILED one: RuntimeError: an illegal memory access",
                                        "FAILED the device's context is lost: every call fails"]),
        ("hung", "0.2", gpu_guard.HUNG, ["FAILED one: no end within 0.2 s"]),
        ("fails", "600", 1, ["FAILED one: RuntimeError: an illegal memory access"]),
    ],
)  # fmt: skip
def test_a_lost_context_and_a_hang_end_the_process(
    what: str, seconds: str, status: int, words: list[str]
) -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED, what, seconds], cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == words


# ---------------------------------------------------------------------------------------- times


@needs_cpu
def test_every_operator_is_timed_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "operators.jsonl"
    assert gpu_operators.main(["--device", "cpu", "--output", str(output)]) == 0
    found = _lines(output)
    names = {line["what"].split(",")[0].split(" (")[0] for line in found}
    assert names == {"copy of a matrix", "forward", "forward_backward", "backward",
                     "rescale_ by 1", "rescale_ by 0.3", "scale_ by 1", "KDLoss",
                     "KDLoss in place"}  # fmt: skip
    copy = next(line["seconds"] for line in found if line["what"].startswith("copy"))
    floors = {line["what"]: line["floor"] for line in found if "bf16" in line["group"]}
    assert floors["forward_backward"] == pytest.approx(1.5 * copy)
    assert floors["forward"] == pytest.approx(copy)
    timed = {line["what"] for line in found}
    assert {f"forward_backward, {name}" for name in DIVERGENCES[1:]} <= timed
    assert "x floor" in capsys.readouterr().out


@needs_cpu
def test_an_operator_that_fails_is_a_line_and_the_next_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("not launched")

    monkeypatch.setattr(gpu_operators.Operators, "backward", fail)
    output = tmp_path / "operators.jsonl"
    assert gpu_operators.main(["--device", "cpu", "--output", str(output)]) == 1
    assert "FAILED cpu bf16 V=33 backward: RuntimeError: not launched" in capsys.readouterr().out
    found = {line["what"]: line["seconds"] for line in _lines(output)}
    assert found["backward"] is None
    assert found["KDLoss, forward and backward"] > 0


@needs_cpu
def test_the_loss_of_heads_is_timed_by_rows_of_a_chunk(tmp_path: Path) -> None:
    output = tmp_path / "heads.jsonl"
    assert gpu_heads.main(["--device", "cpu", "--output", str(output)]) == 0
    floor, *chunks = _lines(output)
    assert floor["what"] == "four products"
    assert [line["what"] for line in chunks] == ["cpu, 2 rows a chunk", "cpu, 5 rows a chunk"]
    assert all(line["floor"] == floor["seconds"] for line in chunks)


@needs_cpu
@pytest.mark.parametrize(("peers", "resets"), [(("kdloss", "eager"), 0), (("compile",), 1)])
def test_the_compiler_is_imported_only_for_who_compiles(
    peers: tuple[str, ...], resets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes seconds that a short run on a card does not have."""
    called: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: called.append(1))
    case = cases.Case(2, 33, "fp32")
    task = one_case.Task("logits", case, tuple(f"logits/{x}" for x in peers), times=False)
    one_case._Run(task, lambda kind, **content: None)
    assert len(called) == resets


# ------------------------------------------------------------------------------------- counters

NCU = """#!/bin/sh
case "$*" in *--launch*) ;; *) exit 9;; esac
cat <<'END'
==PROF== Connected to process 1
cuda: 3 calls
==PROF== Disconnected from process 1
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","rows_cluster<forward_kl>","gpu__time_duration.sum","ns","1,900,000"
"0","1","python","rows_cluster<forward_kl>","dram__bytes.sum.per_second","byte/second","3900000000000"
"0","1","python","rows_cluster<forward_kl>","launch__registers_per_thread","register/thread","80"
"1","1","python","rows_general<forward_kl>","gpu__time_duration.sum","ns","2500000"
"1","1","python","rows_general<forward_kl>","dram__bytes.sum.per_second","byte/second","n/a"
END
exit {status}
"""


def _profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> bool:
    tool = tmp_path / "ncu"
    tool.write_text(script)
    tool.chmod(0o755)
    with (tmp_path / "ncu.jsonl").open("w") as file:
        writer = gpu_counters.records.Writer(file)
        return gpu_counters._profile(str(tool), "cuda", 60.0, writer)


def test_counters_of_kernels_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not _profile(tmp_path, monkeypatch, NCU.replace("{status}", "0"))
    first, second = _lines(tmp_path / "ncu.jsonl")
    assert (first["kernel"], first["ms"], first["TB/s"]) == ("rows_cluster<forward_kl>", 1.9, 3.9)
    assert first["registers"] == 80
    assert (second["ms"], second["TB/s"]) == (2.5, None)
    assert "rows_general<forward_kl>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "failed", "words"),
    [
        (NCU.replace("{status}", "5"), True, "FAILED counters of cuda: ncu ended with 5"),
        ("#!/bin/sh\necho nothing\n", True, "FAILED counters of cuda: ncu ended with 0: nothing"),
        ("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n", False, "keeps them from users"),
    ],
)
def test_counters_that_are_not_there(
    script: str, failed: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert _profile(tmp_path, monkeypatch, script) == failed
    assert words in capsys.readouterr().out


@needs_cpu
def test_what_is_profiled_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_operators.main(["--device", "cpu", "--launch"]) == 0
    assert capsys.readouterr().out == "cpu: 3 calls\n"
