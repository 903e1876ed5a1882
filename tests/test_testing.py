"""fused_kd.testing: a comparator fails on known-bad input, inputs are what they promise to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.logits import identical
from support.topk import with_topk
from torch import Tensor

from fused_kd.testing import (
    REGIMES,
    Result,
    assert_no_worse,
    assert_obeys_error_rule,
    error_rule,
    make_inputs,
)

INF, NAN = math.inf, math.nan

# ---------------------------------------------------------------------------- assert_no_worse

TRUTH = torch.linspace(-1, 1, 101, dtype=torch.float64) / 3


def spoil(position: int, value: float) -> Tensor:
    bad = TRUTH.float()
    bad[position] = value
    return bad


# what is wrong with it → (got, truth)
BAD: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "NaN for a number": lambda: (spoil(5, NAN), TRUTH),
    "all NaN": lambda: (TRUTH.float() * NAN, TRUTH),
    "number for NaN": lambda: (TRUTH.float(), TRUTH * NAN),
    "inf for a number": lambda: (spoil(5, INF), TRUTH),
    "-inf for inf": lambda: (torch.full((3,), -INF), torch.full((3,), INF).double()),
    "NaN for inf": lambda: (torch.full((3,), NAN), torch.full((3,), INF).double()),
    "2 % of one entry": lambda: (spoil(100, 1.02 / 3), TRUTH),
    "the other sign": lambda: (-TRUTH.float(), TRUTH),
    "reversed": lambda: (TRUTH.float().flip(0), TRUTH),
    "moved by one": lambda: (TRUTH.float().roll(1), TRUTH),
    "all zero": lambda: (torch.zeros(101), TRUTH),
    "rounded to bfloat16": lambda: (TRUTH.bfloat16().float(), TRUTH),
    "another shape": lambda: (TRUTH.float()[None], TRUTH),
}


@pytest.mark.parametrize("case", BAD)
def test_the_comparator_fails_on_bad_input(case: str) -> None:
    got, truth = BAD[case]()
    with pytest.raises(AssertionError):
        assert_no_worse(got, truth, truth.float(), 1e-6)


@pytest.mark.parametrize("case", [c for c in BAD if "NaN" in c or "inf" in c])
def test_a_failing_baseline_excuses_nobody(case: str) -> None:
    got, truth = BAD[case]()
    with pytest.raises(AssertionError):
        assert_no_worse(got, truth, got, 1e-6)
    with pytest.raises(AssertionError):
        assert_no_worse(got, truth, torch.full_like(got, NAN), 1e-6)


def test_a_baseline_without_a_number_leaves_only_the_floor() -> None:
    eager = torch.full((101,), NAN)
    assert_no_worse(TRUTH.float(), TRUTH, eager, 1e-7)
    with pytest.raises(AssertionError, match="worst error"):
        assert_no_worse(TRUTH.float() + 1e-6, TRUTH, eager, 1e-7)


def test_a_small_error_everywhere_fails_by_its_spread() -> None:
    eager = spoil(50, 1e-3)  # one bad entry, of 1e-3, in the baseline
    assert_no_worse(eager, TRUTH, eager, 0.0)
    with pytest.raises(AssertionError, match="rms error"):
        assert_no_worse(TRUTH.float() + 1e-3, TRUTH, eager, 1e-6)


def test_the_comparator_passes_what_is_right() -> None:
    assert_no_worse(TRUTH.float(), TRUTH, TRUTH.float(), 0.0)
    special = torch.tensor([NAN, INF, -INF, 1.0])
    assert_no_worse(special, special.double(), special, 0.0)


def test_the_truth_must_be_float64() -> None:
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_no_worse(TRUTH.float(), TRUTH.float(), TRUTH.float(), 1.0)


# -------------------------------------------------------------------- assert_obeys_error_rule


def at_label(result: Result, labels: Tensor, factor: float) -> Result:
    grad = result.grad.clone()
    picked = grad.gather(1, labels[:, None]) * factor
    return Result(result.rows, grad.scatter(1, labels[:, None], picked))


# what a broken backend would do to (result, labels)
BROKEN: dict[str, Callable[[Result, Tensor], Result]] = {
    "2 % at the true class R-25": lambda r, y: at_label(r, y, 1.02),
    "nothing at the true class": lambda r, y: at_label(r, y, 0.0),
    "rows swapped": lambda r, y: Result(r.rows, r.grad.flip(0)),
    "losses swapped": lambda r, y: Result(r.rows.flip(0), r.grad),
    "every row scaled by the first upstream R-23": lambda r, y: Result(r.rows, r.grad / 2),
    "no gradient": lambda r, y: Result(r.rows, torch.zeros_like(r.grad)),
    "NaN in the last column R-08": lambda r, y: Result(
        r.rows, torch.cat([r.grad[:, :-1], r.grad[:, -1:] * NAN], 1)
    ),
    "last column not written": lambda r, y: Result(
        r.rows, torch.cat([r.grad[:, :-1], torch.full_like(r.grad[:, -1:], 0.1)], 1)
    ),
    "loss off by 1e-4": lambda r, y: Result(r.rows * 1.0001, r.grad),
    "gradient off by 1 %": lambda r, y: Result(r.rows, r.grad * 1.01),
    "loss rounded to bfloat16 R-48": lambda r, y: Result(r.rows.bfloat16().float(), r.grad),
    "gradient rounded to 5 bits": lambda r, y: Result(
        r.rows, r.grad.to(torch.float8_e4m3fn).to(r.grad.dtype)
    ),
}


def obey(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Result, Tensor], Result],
    regime: str,
    dtype: torch.dtype,
    k: int | None = None,
) -> None:
    """Assert the error rule on a reference whose results for `dtype` are changed; k: of a TopK."""
    whole = error_rule.evaluate

    def evaluate(loss: Any, inputs: Any, upstream: Tensor, **keywords: Any) -> Result:
        result = whole(loss, inputs, upstream, **keywords)
        tested = keywords.get("backend") == "reference" and inputs.student.dtype == dtype
        return change(result, inputs.labels) if tested else result

    monkeypatch.setattr(error_rule, "evaluate", evaluate)
    inputs = make_inputs(regime, 3, 211, dtype)
    if k is not None:
        inputs = with_topk(inputs, k, temperature=2.0)
    assert_obeys_error_rule(
        inputs, torch.tensor([1.0, 0.5, 2.0]), backend="reference", temperature=2.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["randn", "confident"])
@pytest.mark.parametrize("case", [c for c in BROKEN if "loss" not in c])
def test_the_error_rule_fails_on_broken_results(
    monkeypatch: pytest.MonkeyPatch, case: str, regime: str, dtype: torch.dtype
) -> None:
    with pytest.raises(AssertionError):
        obey(monkeypatch, BROKEN[case], regime, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in BROKEN if "loss" in c])
def test_the_error_rule_fails_on_broken_losses(
    monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype
) -> None:
    with pytest.raises(AssertionError):  # a confident row's loss is below the tolerance
        obey(monkeypatch, BROKEN[case], "randn", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["randn", "confident"])
def test_the_error_rule_passes_the_unchanged(
    monkeypatch: pytest.MonkeyPatch, regime: str, dtype: torch.dtype
) -> None:
    obey(monkeypatch, lambda r, y: r, regime, dtype)


@pytest.mark.parametrize("case", BROKEN)
def test_the_error_rule_of_a_topk_fails_on_broken_results(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    obey(monkeypatch, lambda r, y: r, "randn", torch.float32, k=9)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        obey(monkeypatch, BROKEN[case], "randn", torch.float32, k=9)


# ---------------------------------------------------------------------------------- make_inputs


@pytest.mark.parametrize("regime", REGIMES)
def test_inputs_are_repeatable_and_as_asked(regime: str) -> None:
    first, again = (make_inputs(regime, 3, 40, torch.bfloat16, torch.float16) for _ in range(2))
    assert first.student.dtype == torch.bfloat16
    assert first.teacher.dtype == torch.float16
    assert first.student.shape == first.teacher.shape == (3, 40)
    identical(first, again)
    other = make_inputs(regime, 3, 40, seed=1)
    assert regime == "constant" or not torch.equal(other.student, make_inputs(regime, 3, 40)[0])


def test_regimes_are_what_they_are_called() -> None:
    rows = torch.arange(4)
    confident = make_inputs("confident", 4, 1000)
    assert (confident.student.softmax(1)[rows, confident.labels] > 0.999).all()
    flat = make_inputs("flat", 4, 1000).student.softmax(1)
    assert flat.amax() < 1.01 * flat.amin()
    assert torch.equal(*make_inputs("equal", 4, 1000)[:2])
    assert (make_inputs("huge", 4, 1000).student.abs() > 9e3).all()
    assert (make_inputs("inf_first", 4, 1000).student == -INF).float().mean() > 0.7
    opposed = make_inputs("opposed", 4, 1000)
    assert (opposed.student.argmax(1) != opposed.teacher.argmax(1)).all()
