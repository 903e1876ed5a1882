"""Every instruction set that this processor runs: error rule, choice, threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.backends import threads
from support.logits import (
    identical,
    rows_and_gradient,
    scalar_and_gradient,
    truth,
)
from support.processes import run_python
from torch import Tensor

from fused_kd import extension, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import assert_obeys_error_rule, make_inputs

_module = extension.cpu.load()
pytestmark = pytest.mark.skipif(_module is None, reason=str(extension.cpu.why_not()))


# read in place (float32, bfloat16), and through copies (half, and a teacher of another dtype)
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
# exponentials in range; a peak; far out of range; -inf; finite masks
SOME_REGIMES = ["language_model", "confident", "range_400", "inf_columns", "finite_mask"]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_error_rule(isa: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for i, regime in enumerate(SOME_REGIMES):
        if divergence == "mse" and regime == "finite_mask":
            continue  # the square of 1e30 is no float32
        # a whole block, pairs of vectors, single entries; powers of the softened exponential or not
        inputs = make_inputs(regime, 3, 2048 + 64 + 5, *dtypes, seed=i)
        temperature = (1.0, 2.0, 4.0, 1.7, 0.6)[i]
        assert_obeys_error_rule(
            inputs, backend="cpu", divergence=divergence, temperature=temperature
        )


@pytest.mark.parametrize("divergence", DIVERGENCES[:4])
def test_a_low_temperature_does_not_overflow(isa: str, divergence: str) -> None:
    # A later block whose maximum is a little above the first's: e^(4/T) is beyond float32.
    student, teacher = 0.1 * torch.randn(2, 2, 6016)
    student[:, 3000], teacher[:, 3000], student[:, 3001] = 3.5, 3.4, 3.45
    labels = torch.tensor([3000, 5])
    options: dict[str, Any] = {"divergence": divergence, "temperature": 0.02}
    got, _ = rows_and_gradient(student, teacher, labels, backend="cpu", **options)
    want, _ = truth(student, teacher, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("logit", [-2000.0, -1e4, -float("inf")])
@pytest.mark.parametrize("divergence", DIVERGENCES[:4])
def test_the_gradient_at_a_label_of_probability_zero(
    isa: str, divergence: str, logit: float
) -> None:
    student, teacher = torch.randn(2, 1, 50)
    student[0, 3] = logit
    inputs = student, teacher, torch.tensor([3])
    _, got = rows_and_gradient(*inputs, divergence=divergence, backend="cpu")
    _, want = truth(*inputs, divergence=divergence)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def _divergence(name: str, s: Any, t: Any, temperature: float, beta: float) -> Any:
    """Return the divergence of each row by its definition, in float64."""
    if name == "mse":
        return ((s - t) ** 2).mean(1) / temperature**2
    p, q = (np.exp(x / temperature) for x in (s, t))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    m = beta * q + (1 - beta) * p
    terms = {
        "forward_kl": q * np.log(q / p),
        "reverse_kl": p * np.log(p / q),
        "jsd": beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m),
        "tvd": np.abs(p - q) / 2,
    }
    return terms[name].sum(1)


def test_rows_by_the_definitions(isa: str, divergence: str) -> None:
    # Losses and gradients by numpy alone: no reference backend, no autograd.
    generator = np.random.default_rng(0)
    student, teacher = generator.standard_normal((2, 4, 77)).astype(np.float32)
    labels = np.array([0, 76, 31, 5])
    leaf = torch.from_numpy(student).requires_grad_()
    options = {"temperature": 2.0, "beta": 0.3, "hard_weight": 1.0, "soft_weight": 1.0}
    options |= {"divergence": divergence, "reduction": "none", "return_parts": True}
    arrays = (torch.from_numpy(x) for x in (teacher, labels))
    parts = kd_loss(leaf, *arrays, backend="cpu", **options)
    (got,) = torch.autograd.grad(parts.loss.sum(), leaf)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    pi = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    np.testing.assert_allclose(parts.hard.numpy(), -np.log(pi[range(4), labels]), rtol=1e-6)
    want = 4.0 * _divergence(divergence, s, t, 2.0, 0.3)  # times the temperature squared
    np.testing.assert_allclose(parts.soft.numpy(), want, rtol=1e-5)
    # the gradient by central differences of the definitions
    step = 1e-6 * np.eye(77)[:, None]
    tiled = np.tile(t, (77, 1))
    up, down = (
        _divergence(divergence, (s + d).reshape(-1, 77), tiled, 2.0, 0.3) for d in (step, -step)
    )
    grad = 4.0 * ((up - down) / 2e-6).reshape(77, 4).T + pi - np.eye(77)[labels]
    np.testing.assert_allclose(got.numpy(), grad, atol=1e-6)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _module is not None
    sets = _module.build_info()["instruction_sets"]
    try:
        for name, runs in sets.items():
            monkeypatch.setenv("FUSED_KD_CPU", name)
            if runs:
                _module.choose_instruction_set("")
                assert _module.build_info()["instruction_set"] == name
            else:
                with pytest.raises(RuntimeError, match=f"FUSED_KD_CPU={name}: this processor has"):
                    _module.choose_instruction_set("")
        monkeypatch.setenv("FUSED_KD_CPU", "sse9")
        known = ", ".join(sets)
        with pytest.raises(RuntimeError, match=f"expected one of {known}, got 'sse9'"):
            _module.choose_instruction_set("")
        monkeypatch.delenv("FUSED_KD_CPU")
        _module.choose_instruction_set("")  # the best
        best = next(name for name, runs in sets.items() if runs)
        assert _module.build_info()["instruction_set"] == best
    finally:
        monkeypatch.undo()
        _module.choose_instruction_set("")


def test_a_wrong_name_in_the_environment_of_a_new_process() -> None:
    # It fails at the first loss, by name; the report still comes out.
    code = """
import torch, fused_kd
from fused_kd import env
env.main([])
x = torch.zeros(2, 5)
fused_kd.kd_loss(x, x, hard_weight=0)
"""
    done = run_python("-c", code, FUSED_KD_CPU="sse9", FUSED_KD_BACKEND="cpu")
    expected = "FUSED_KD_CPU: expected one of "
    assert f"the cpu backend raises: {expected}" in done.stdout
    assert expected in (error := done.stderr.splitlines()[-1])
    assert "got 'sse9'" in error


def _everything(inputs: tuple[Tensor, Tensor, Tensor], number: int, divergence: str) -> Any:
    """Compute on `number` threads; return row losses and gradient, then sum and its gradient."""
    keywords = {"divergence": divergence, "backend": "cpu", "temperature": 2.0}
    with threads(number):
        rows = rows_and_gradient(*inputs, **keywords)
        return *rows, *scalar_and_gradient(*inputs, reduction="sum", **keywords)


# (N, V): the vocabulary split (one segment is 32768); the same, more rows; rows split; one thread's
@pytest.mark.parametrize("shape", [(1, 70_001), (3, 32_800), (9, 4_100), (2, 300)])
def test_the_threads_change_no_bit(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs("language_model", *shape, dtype)
    for divergence in ("forward_kl", "jsd"):
        want = _everything(inputs, 1, divergence)
        for number in (2, 3):
            identical(_everything(inputs, number, divergence), want)


def test_a_row_has_the_same_bits_alone(isa: str) -> None:
    student, teacher, labels = make_inputs("language_model", 16, 40_000, torch.bfloat16)
    batch = _everything((student, teacher, labels), 2, "forward_kl")
    for row in (0, 7, 15):
        part = slice(row, row + 1)
        alone = _everything((student[part], teacher[part], labels[part]), 2, "forward_kl")
        assert torch.equal(batch[0][part], alone[0])
        for index in (1, 3):
            assert torch.equal(batch[index][part], alone[index])
