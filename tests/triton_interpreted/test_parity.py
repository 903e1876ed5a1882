"""The error rule: every divergence, dtype and way through the kernels, small shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import CONFIGURATIONS, DTYPES, V, configured

from fused_kd import kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import REGIMES, assert_obeys_error_rule, make_inputs

#: The hard term's exponential is a power of the softened one (T = 1, 2), or a separate one.
TEMPERATURES = (1.0, 2.0, 1.7, 0.6)
#: exponentials in range; absent columns; exact zeros; a peak: all in the default run
SOME_REGIMES = ["language_model", "inf_columns", "equal", "confident"]


def _check(
    divergence: str, dtypes: tuple[torch.dtype, torch.dtype], regime: str, name: str, i: int
) -> None:
    if divergence == "mse" and regime == "finite_mask":
        pytest.skip("the square of 1e30 is no float32")
    inputs = make_inputs(regime, 2, V, *dtypes, seed=i)
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": TEMPERATURES[i % 4],
        "label_smoothing": (0.0, 0.1)[i // 4 % 2],
        "beta": 0.3,
    }
    with configured(**CONFIGURATIONS[name]):
        assert_obeys_error_rule(inputs, torch.tensor([1.0, -0.7]), backend="triton", **options)


# each divergence with each regime and configuration, each in two dtypes at least
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_error_rule(divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    first = DTYPES.index(dtypes) + 5 * DIVERGENCES.index(divergence)
    for i in (first, first + 1):
        _check(divergence, dtypes, SOME_REGIMES[i % 4], list(CONFIGURATIONS)[i % 3], i)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_error_rule_of_every_regime(
    regime: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype], configuration: str
) -> None:
    _check(divergence, dtypes, regime, configuration, list(REGIMES).index(regime))


# gradient in the forward, out of place and over the logits; float16: in the backward
@pytest.mark.parametrize("name", ["one part", "two parts"])
@pytest.mark.parametrize(("dtype", "inplace"), list(itertools.product(DTYPES[:3], (False, True))))
def test_scalar_loss(dtype: tuple[torch.dtype, torch.dtype], inplace: bool, name: str) -> None:
    inputs = make_inputs("language_model", 3, V, *dtype)
    labels = inputs.labels.clone()
    labels[1] = -100
    options: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0}
    grads = []
    for backend in ("triton", "reference"):
        leaf = inputs.student.clone().requires_grad_()
        logits = leaf * 1.0
        options["inplace"] = inplace and backend == "triton"
        with configured(**CONFIGURATIONS[name]):
            loss = kd_loss(logits, inputs.teacher, labels, backend=backend, **options)
            (3.0 * loss).backward()
        assert leaf.grad is not None
        grads.append((loss.detach(), leaf.grad))
    (loss, grad), (expected_loss, expected_grad) = grads
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype[0]]
    torch.testing.assert_close(grad, expected_grad, rtol=4 * tolerance, atol=tolerance)
    assert not grad[1].any()


# one entry: a tail alone, softmax 1; and a row that is one tile exactly
@pytest.mark.parametrize("vocabulary", [1, 16, 17])
def test_short_rows(divergence: str, vocabulary: int) -> None:
    inputs = make_inputs("randn", 2, vocabulary)
    with configured(**CONFIGURATIONS["one part"]):
        assert_obeys_error_rule(inputs, backend="triton", divergence=divergence, temperature=2.0)


# the table's own choice: vectors, several warps; a V that is no multiple of 16
@pytest.mark.parametrize("vocabulary", [4096 + 32, 1001])
def test_real_configurations(vocabulary: int) -> None:
    inputs = make_inputs("language_model", 1, vocabulary, torch.bfloat16)
    assert_obeys_error_rule(inputs, backend="triton", divergence="tvd", temperature=2.0)
