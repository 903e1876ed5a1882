"""The benchmarks of the linear level run at tiny sizes, on the CPU and as for a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fast import one_thread

from fused_kd.backends import why_not

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import (
    cases,
    cpu_linear,
    gpu_linear,
    gpu_results,
    linear_cases,
    linear_speed,
    peers,
)
from benchmarks.measuring import Contestant, Timing

needs_cpu = pytest.mark.skipif(
    why_not("cpu", "cpu") is not None, reason=f"backend cpu: {why_not('cpu', 'cpu')}"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear_speed, "SHORT", 0.0)
    monkeypatch.setattr(linear_speed, "SECONDS_EACH", 0.0)
    with one_thread():
        yield


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TINY = ["--n", "3", "6", "--v", "60", "--hidden", "8", "12", "--skip", "compile"]


@needs_cpu
def test_cpu_linear_prints_every_part_and_writes_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "results.jsonl", tmp_path / "curve.png"
    options = [*TINY, "--json", str(file), "--plot", str(picture)]
    assert cpu_linear.main(options) == 0
    shown = capsys.readouterr().out
    for dtype in ("fp32", "bf16"):
        for part in cpu_linear.PARTS:
            assert f"\n{part}: {dtype}, N = " in shown
    for words in ("instruction set", "four products, fp32", "LinearKDLoss, 64 MiB", "6 → 12"):
        assert words in shown
    assert picture.exists() or "LEFT OUT the picture" in shown
    lines = _lines(file)
    kinds = [(line["kind"], line.get("section")) for line in lines]
    liger = int(peers.liger_linear_why_not() is None)
    # two sizes of ours, products and eager (bf16: products in float32 too); budgets; heights
    wanted = {("environment", None): 1, ("time", "speed"): 14 + 4 * liger, ("time", "curve"): 10,
              ("memory", "memory"): 8 + 2 * liger, ("accuracy", "error"): 4 + 2 * liger,
              ("accuracy", "heights"): 8, ("ratio", "growth"): 4}  # fmt: skip
    assert {kind: kinds.count(kind) for kind in set(kinds)} == wanted
    assert all(line["reached"] in (True, None) for line in lines if line["kind"] == "memory")


@needs_cpu
def test_what_takes_too_long_is_extrapolated_and_what_is_too_large_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--part", "speed", "--dtypes", "fp32", "--n", "64", *TINY[3:]]
    assert cpu_linear.main([*options, "--limit-seconds", "1e-9"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("extrapolated from N = 4, 16") >= 3
    assert "~ reached" in shown or "~ NOT reached" in shown
    monkeypatch.setattr(linear_speed, "available_memory", lambda: 2**10)
    assert cpu_linear.main(options) == 0
    assert "left out: needs 0.0 GiB" in capsys.readouterr().out


def test_predictions_lie_on_the_line_through_the_probes() -> None:
    assert linear_speed.predict([(16, 2.0)], 64) == 8.0
    assert linear_speed.predict([(16, 2.0), (32, 3.0)], 64) == 5.0
    assert linear_speed.predict([(16, 3.0), (32, 2.0)], 64) == 2.0  # disturbed: not less


def test_contestants_of_the_linear_level_compute_the_same() -> None:
    case = linear_cases.LinearCase(7, 60, 8, 12, "fp32")
    heads = linear_cases.make_heads(case)
    heads.labels[2] = -100
    want = linear_cases.outcome(linear_cases.eager(case), heads.to(torch.float64))
    contestants = [linear_cases.ours(case), linear_cases.eager(case)]
    if peers.liger_linear_why_not() is None:
        contestants.append(peers.liger_linear(case, compiled=False))
    for loss in contestants:
        for mine, exact in zip(linear_cases.outcome(loss, heads), want, strict=True):
            assert linear_cases.distance(mine, exact) < 1e-6
    few = heads.first(3)
    assert few.hidden.is_leaf
    assert few.hidden.requires_grad
    assert few.weight is heads.weight


def test_torch_linear_is_the_hard_term() -> None:
    why = peers.torch_linear_why_not()
    if why is not None:
        pytest.skip(why)
    case = linear_cases.LinearCase(7, 60, 8, 12, "fp32")
    heads = linear_cases.make_heads(case)
    hidden, weight, *_, labels = heads
    want = 0.5 * torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(peers.torch_linear()(*heads), want)


# ------------------------------------------------------------------------------------- GPU


@needs_cpu
def test_the_benchmark_of_the_linear_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_linear.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    times = [line for line in _lines(tmp_path / "gpu_linear.jsonl") if line["kind"] == "time"]
    names = [line["name"] for line in times]
    for name in ("cpu", linear_cases.PRODUCTS, cases.EAGER):
        assert names.count(name) == len(gpu_linear.planned(quick=True))
    for one in times:
        if one["name"] == linear_cases.PRODUCTS:
            assert one["over_products"] == 1
        if one["name"] == "cpu":
            assert one["cpu_over_it"] == 1
    assert "cpu / it" in (tmp_path / "gpu_linear.txt").read_text()
    assert "/ products" in shown


@needs_cpu
def test_a_wrong_linear_loss_is_no_contestant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = linear_cases.ours
    monkeypatch.setattr(
        gpu_linear, "ours", lambda *a, **k: lambda *inputs: 1.05 * right(*a, **k)(*inputs)
    )
    assert gpu_linear.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED cpu, bf16 5x33 hidden 8/12: loss differs by 0.0" in shown


def test_linear_figures_are_set_against_the_goal() -> None:
    case = linear_cases.LinearCase(8192, 151936, 2048, 4096, "bf16")
    measured = gpu_linear.Measured(case, ours=["cuda"])

    def put(name: str, seconds: float, peak: int) -> None:
        line = gpu_results.Line(Contestant(name, int), case, peak)
        timing = Timing(name, [seconds], wanted=1)
        measured.figures[name] = gpu_results.Figure.of(line, timing, case.n)

    put("cuda", 0.042, case.gradient_bytes + case.accumulator_bytes + 5)
    assert measured.as_dict("cuda")["over_products"] is None  # there is no floor
    put(linear_cases.PRODUCTS, 0.035, 0)
    put(cases.EAGER, 0.21, case.gradient_bytes + 7)
    assert measured.over("cuda") == pytest.approx(1.2)
    assert measured.goal("cuda") == ["≤ 1.1", "NOT reached"]
    assert measured.goal(cases.EAGER) == ["", ""]
    assert (measured.beyond("cuda"), measured.beyond(cases.EAGER)) == (5, 7)
    assert measured.as_dict(cases.EAGER)["cuda_over_it"] == pytest.approx(0.2)
    assert case.flops == pytest.approx(25.49e12, rel=1e-3)
