"""Other people's losses, adapted to ours: each agrees with float64 on what it says it computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks.cases import HEADS, LOGITS, Case  # noqa: E402
from benchmarks.errors import distance  # noqa: E402
from benchmarks.methods import METHODS, Method  # noqa: E402
from benchmarks.problems import HeadsProblem, LogitsProblem  # noqa: E402
from fused_kd.divergences import DIVERGENCES  # noqa: E402

PROBLEMS = {LOGITS: LogitsProblem, HEADS: HeadsProblem}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PEERS = [
    pytest.param(method, id=method.key, marks=[pytest.mark.slow] if method.compiles else [])
    for method in METHODS.values()
    if not method.is_ours
]
#: What must not be imported before it is used: it costs seconds, and may fail.
PACKAGES = {"liger_kernel", "trl", "torchtune", "modelopt", "fla", "cut_cross_entropy"}
#: Of a loss, and of a gradient in norm, in float32.
RELATIVE = 1e-5


def _cases(method: Method, **changes: object) -> list[Case]:
    """Return a case for each divergence that it has; skip if it cannot run."""
    case = Case(7, 60, "fp32", 2.0, "", method.level, 8, 12).with_(**changes)
    cases = [case.with_(divergence=divergence) for divergence in DIVERGENCES]
    reasons = {case: method.why_not(case) for case in cases}
    assert all(why is None or why == " ".join(why.split())[:300] != "" for why in reasons.values())
    if None not in reasons.values():
        pytest.skip(next(why for why in reasons.values() if not why.startswith("it has no")))
    return [case for case, why in reasons.items() if why is None]


# 2: a factor T² that is left out or there twice; 1: for those that skip the division
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", PEERS)
def test_it_computes_what_it_says(method: Method, device: str, temperature: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for case in _cases(method, device=device, temperature=temperature):
        torch.compiler.reset()  # or what compiles would run eagerly after a few cases
        problem = PROBLEMS[case.level](case)
        got, exact = problem.outcome(method.build(case)), problem.exact(method.keywords(case))
        assert "loss" not in method.compared or distance(got.loss, exact.loss) < RELATIVE, case
        for mine, theirs in zip(got.gradients, exact.gradients, strict=True):
            assert distance(mine, theirs) < RELATIVE, case.name


@pytest.mark.parametrize("method", PEERS)
def test_repeats_see_the_same_tensors(method: Method) -> None:
    """All but the student's logits, which the benchmark restores as a model makes new ones."""
    case = _cases(method)[0]
    problem, loss = PROBLEMS[case.level](case), method.build(case)
    tensors = [x.requires_grad_(i in problem.leaves) for i, x in enumerate(problem.few())]
    kept = [x.detach().clone() for x in tensors]
    outcomes = []
    for _ in range(2):
        student = tensors[0] * 1 if case.level == LOGITS else tensors[0]
        value = loss(student, *tensors[1:])
        gradients = torch.autograd.grad(value, [tensors[i] for i in problem.leaves])
        outcomes.append([value.detach().clone(), *(x.clone() for x in gradients)])
        assert all(map(torch.equal, tensors, kept))
    assert all(map(torch.equal, *outcomes))


def test_a_method_that_computes_something_else_says_so() -> None:
    assert {method.level for method in METHODS.values()} == {LOGITS, HEADS}
    for method in METHODS.values():
        is_other = method.computes is not None or method.compared == ("gradients",)
        assert bool(method.nearest) == is_other, method.key


def test_packages_are_imported_when_they_are_used() -> None:
    code = f"import sys, benchmarks.methods; print(sorted(set(sys.modules) & {PACKAGES!r}))"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
