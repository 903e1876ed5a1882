"""Other people's losses, adapted to ours: each agrees with float64 on what it says it computes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks.cases import HEADS, LOGITS, Case  # noqa: E402
from benchmarks.entrants.base import Entrant  # noqa: E402
from benchmarks.errors import distance  # noqa: E402
from benchmarks.problems import HeadsProblem, LogitsProblem  # noqa: E402
from fused_kd.divergences import DIVERGENCES  # noqa: E402

MODULES = ("liger", "trl", "torchtune", "model_optimizer", "flash_linear_attention",
           "cut_cross_entropy", "torch_native")  # fmt: skip
PEERS: list[Entrant] = [
    entrant
    for module in MODULES
    for entrant in importlib.import_module(f"benchmarks.entrants.{module}").ENTRANTS
]
#: What their modules must not import: it costs seconds, and may fail.
PACKAGES = ("liger_kernel", "trl", "torchtune", "modelopt", "fla", "cut_cross_entropy",
            "transformers")  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Of a loss, and of a gradient in norm, in float32.
RELATIVE = 1e-5


def _case(entrant: Entrant, **changes: object) -> Case:
    return Case(7, 60, "fp32", level=entrant.level, student_hidden=8, teacher_hidden=12).with_(
        **changes
    )


def _marked(entrants: list[Entrant]) -> list[object]:
    return [
        pytest.param(one, id=one.key, marks=[pytest.mark.slow] if one.compiles else [])
        for one in entrants
    ]


def _cases(entrant: Entrant, **changes: object) -> list[Case]:
    """With every divergence that it has; skips where it cannot run."""
    cases = [_case(entrant, divergence=divergence, **changes) for divergence in DIVERGENCES]
    reasons = [entrant.why_not(case) for case in cases]
    found = [case for case, why in zip(cases, reasons, strict=True) if why is None]
    if not found:
        pytest.skip(next(why for why in reasons if why and not why.startswith("it has no")))
    return found


def _problem(case: Case) -> LogitsProblem | HeadsProblem:
    return (LogitsProblem if case.level == LOGITS else HeadsProblem)(case)


# 2: a factor T² that is left out or there twice; 1: where some skip the division
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entrant", _marked(PEERS))
def test_it_computes_what_it_says(entrant: Entrant, device: str, temperature: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for case in _cases(entrant, device=device, temperature=temperature):
        torch.compiler.reset()  # or what compiles would run eagerly after a few cases
        problem = _problem(case)
        got, exact = problem.outcome(entrant.build(case)), problem.exact(entrant.keywords(case))
        assert got.loss.shape == (), case.name
        if "loss" in entrant.compared:
            assert distance(got.loss, exact.loss) < RELATIVE, case.name
        for mine, theirs in zip(got.gradients, exact.gradients, strict=True):
            assert mine.dtype == torch.float32, case.name
            assert distance(mine, theirs) < RELATIVE, case.name


@pytest.mark.parametrize("entrant", _marked(PEERS))
def test_repeats_see_the_same_tensors(entrant: Entrant) -> None:
    """All but the student's logits, which the benchmark puts back as a model makes new ones."""
    case = _cases(entrant)[0]
    problem = _problem(case)
    loss, given = entrant.build(case), problem.few()
    leaves = problem.leaves(given)
    tensors = [x.detach().requires_grad_(i in leaves) for i, x in enumerate(given)]
    kept = [x.detach().clone() for x in tensors]

    def outcome() -> list[Tensor]:
        student = tensors[0] * 1 if case.level == LOGITS else tensors[0]
        value = loss(student, *tensors[1:])
        return [value.detach(), *torch.autograd.grad(value, [tensors[i] for i in leaves])]

    first = [x.clone() for x in outcome()]
    second = outcome()
    for now, before in [*zip(tensors, kept, strict=True), *zip(second, first, strict=True)]:
        assert torch.equal(now, before)


def test_keys_are_unique() -> None:
    names = [(one.level, one.key) for one in PEERS]
    assert len(names) == len(set(names))
    assert {one.level for one in PEERS} == {LOGITS, HEADS}


@pytest.mark.parametrize("entrant", [pytest.param(one, id=one.key) for one in PEERS])
def test_a_reason_is_one_line(entrant: Entrant) -> None:
    for divergence in DIVERGENCES:
        why = entrant.why_not(_case(entrant, divergence=divergence))
        assert why is None or (why and why == " ".join(why.split()) and len(why) <= 300)


@pytest.mark.parametrize("entrant", [pytest.param(one, id=one.key) for one in PEERS])
def test_what_it_computes_is_said(entrant: Entrant) -> None:
    """Where that is not what the case asks for, and in a few words."""
    is_other = entrant.computes is not None or "loss" not in entrant.compared
    assert bool(entrant.nearest) == is_other
    assert len(entrant.nearest.split()) <= 8
    assert "gradients" in entrant.compared


def test_their_packages_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, importlib\n"
        f"for module in {MODULES!r}: importlib.import_module(f'benchmarks.entrants.{{module}}')\n"
        f"print(sorted(set(sys.modules) & set({PACKAGES!r})))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "[]"
