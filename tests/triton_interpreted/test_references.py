"""The references of the sums: they rise with the logits, and nothing may depend on how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CONFIGURATIONS, configured, numbers
from cases import dense as ops
from torch import Tensor

from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import Inputs, assert_obeys_error_rule

INF, NAN = math.inf, math.nan
#: Of 16 entries, four of each lane: four tiles and a ragged end in one part, two in each of two.
TILES, V = 5, 5 * 16 - 3
ONE_PART = CONFIGURATIONS["one part"]


def _normal(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return student and teacher (rows, V), and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, V, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(V, (rows,), generator=generator)


def _rising(step: float) -> Tensor:
    """Return what, added to logits, lifts every tile by `step` above the one before: (V,)."""
    return step * (torch.arange(V) // 16).float()


# by more than an exponential bridges; by about as much as the logits differ
@pytest.mark.parametrize(("step", "name"), [(300.0, "one part"), (3.0, "two parts")])
def test_a_maximum_that_rises_with_every_tile(divergence: str, step: float, name: str) -> None:
    # One side's alone, or one side's while the other's falls.
    student, teacher, labels = _normal(1)
    lift = _rising(step)
    sides = [(student + lift, teacher), (student, teacher + lift), (student - lift, teacher + lift)]
    for i, (s, t) in enumerate(sides):
        options: dict[str, Any] = {"temperature": (2.0, 1.0, 1.7)[i], "label_smoothing": 0.1 * i}
        with configured(**CONFIGURATIONS[name]):
            assert_obeys_error_rule(
                Inputs(s, t, labels), backend="triton", divergence=divergence, beta=0.3, **options
            )


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", range(len(DIVERGENCES)))
def test_an_entry_that_spoils_a_row(divergence: int, side: str) -> None:
    # At any position: the terms that contain it are NaN, in that row alone.
    student, teacher, labels = _normal(7)
    spoilt = student if side == "student" else teacher
    # in the first tile, in one that finds references, at the ragged end
    for row, position in ((0, 2), (1, 41), (2, V - 1)):
        spoilt[row, position], spoilt[row + 4, position] = INF, NAN
    with configured(**ONE_PART):
        hard, soft, _, grad = ops.triton_forward_backward(
            student[None], teacher[None], labels, *torch.ones(2, 7), *numbers(divergence=divergence)
        )
    whole = [row == 3 for row in range(7)]
    assert soft.isfinite().tolist() == whole
    assert soft.isnan().tolist() == [not x for x in whole]
    assert hard.isnan().tolist() == [side == "student" and not x for x in whole]
    assert grad[0].isnan().all(1).tolist() == [not x for x in whole]
    assert grad[0, 3].isfinite().all()


# some lanes' first entries; whole tiles
@pytest.mark.parametrize("absent", [5, 32])
def test_numbers_after_nothing_but_minus_infinity(divergence: str, absent: int) -> None:
    student, teacher, _ = _normal(1)
    labels = torch.tensor([V - 1])
    for x in (student, teacher):
        x[:, :absent] = -INF
    # of the teacher alone: infinite for some
    alone = student.clone()
    alone[:, :absent] = 0.25
    for s, t in ((student, teacher), (alone, teacher)):
        with configured(**ONE_PART):
            assert_obeys_error_rule(
                Inputs(s, t, labels),
                backend="triton",
                divergence=divergence,
                temperature=2.0,
                label_smoothing=0.1,
            )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
def test_a_confident_row_is_never_below_nothing(temperature: float) -> None:
    # Its largest product with k is rounded, up or down; so is what is added to it.
    rows = 16
    student, teacher, labels = _normal(rows)
    student[torch.arange(rows), labels] = torch.linspace(20.0, 21.0, rows)
    student += torch.linspace(-1e4, 1e4, rows)[:, None].round()
    truth = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
    with configured(**ONE_PART):
        inputs = student[None], teacher[None], labels, *torch.ones(2, rows)
        hard, *_ = ops.triton_forward(*inputs, *numbers(temperature=temperature))
    assert (hard >= 0).all()
    assert ((hard - truth).abs() <= 4 * torch.finfo(torch.float32).eps * 30).all()


def test_logits_that_are_masks() -> None:
    # A row may hold any finite number; only one without any other above -7e8·T is no row.
    student, teacher, labels = _normal(4)
    labels[:] = 60
    student[0, :48], teacher[0, :48] = -1e9, -1e30
    student[1], teacher[1] = -1e8, -1e8
    student[2] = -1e10
    with configured(**ONE_PART):
        hard, soft, _, grad = ops.triton_forward_backward(
            student[None], teacher[None], labels, *torch.ones(2, 4), *numbers()
        )
    assert hard.isnan().tolist() == soft.isnan().tolist() == [False, False, True, False]
    assert grad[0].isnan().all(1).tolist() == [False, False, True, False]
    torch.testing.assert_close(hard[1], torch.tensor(math.log(V)), rtol=1e-6, atol=0)
    assert not grad[0, 0, :48].any()
    expected = torch.nn.functional.cross_entropy(student[0:1], labels[0:1])
    torch.testing.assert_close(hard[0], expected, rtol=1e-6, atol=0)
