"""Every instruction set that this processor runs: error rule, choice, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.logits import DTYPES
from torch import Tensor

from fused_kd import extension, kd_loss
from fused_kd.divergences import DIVERGENCES
from fused_kd.testing import assert_obeys_error_rule, make_inputs

_module = extension.cpu.load()
pytestmark = pytest.mark.skipif(_module is None, reason=str(extension.cpu.why_not()))


def _sets() -> list[Any]:
    """Those compiled in; one that this processor lacks is skipped with its name."""
    if _module is None:
        return ["generic"]
    found: dict[str, bool] = _module.build_info()["instruction_sets"]
    return [
        name if runs else pytest.param(name, marks=pytest.mark.skip(reason=f"no {name} here"))
        for name, runs in found.items()
    ]


@pytest.fixture(params=_sets())
def native(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The compiled module, computing with one instruction set after the other."""
    assert _module is not None
    _module.choose_instruction_set(request.param)
    assert _module.build_info()["instruction_set"] == request.param
    yield _module
    _module.choose_instruction_set("")


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
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_error_rule(
    native: ModuleType, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
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
def test_a_low_temperature_does_not_overflow(native: ModuleType, divergence: str) -> None:
    """A later block whose maximum is a little above the first's: e^(4/T) is beyond float32."""
    student, teacher = 0.1 * torch.randn(2, 2, 6016)
    student[:, 3000], teacher[:, 3000], student[:, 3001] = 3.5, 3.4, 3.45
    labels = torch.tensor([3000, 5])
    options: dict[str, Any] = {"divergence": divergence, "temperature": 0.02, "reduction": "none"}
    got = kd_loss(student, teacher, labels, backend="cpu", **options)
    want = kd_loss(student.double(), teacher.double(), labels, backend="reference", **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("logit", [-2000.0, -1e4, -float("inf")])
@pytest.mark.parametrize("divergence", DIVERGENCES[:4])
def test_the_gradient_at_a_label_of_probability_zero(
    native: ModuleType, divergence: str, logit: float
) -> None:
    student, teacher = torch.randn(2, 1, 50)
    student[0, 3] = logit
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaf = student.to(dtype, copy=True).requires_grad_()
        options: dict[str, Any] = {"divergence": divergence, "backend": backend}
        loss = kd_loss(leaf, teacher.to(dtype), torch.tensor([3]), **options)
        grads.append(torch.autograd.grad(loss, leaf)[0].float())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_by_the_definitions(native: ModuleType, divergence: str) -> None:
    """Losses and gradients by numpy alone: no reference backend, no autograd."""
    generator = np.random.default_rng(0)
    student, teacher = generator.standard_normal((2, 4, 77)).astype(np.float32)
    labels = np.array([0, 76, 31, 5])
    leaf = torch.from_numpy(student).requires_grad_()
    parts = kd_loss(
        leaf, torch.from_numpy(teacher), torch.from_numpy(labels), divergence=divergence,
        temperature=2.0, beta=0.3, hard_weight=1.0, soft_weight=1.0, reduction="none",
        return_parts=True, backend="cpu",
    )  # fmt: skip
    (got,) = torch.autograd.grad(parts.loss.sum(), leaf)
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    pi = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    np.testing.assert_allclose(parts.hard.numpy(), -np.log(pi[range(4), labels]), rtol=1e-6)
    want = 4.0 * _divergence(divergence, s, t, 2.0, 0.3)  # times the temperature squared
    np.testing.assert_allclose(parts.soft.numpy(), want, rtol=1e-5)
    # the gradient by central differences of the definitions
    step = 1e-6 * np.eye(77)[:, None]
    up, down = (_divergence(divergence, (s + d).reshape(-1, 77), np.tile(t, (77, 1)), 2.0, 0.3)
                for d in (step, -step))  # fmt: skip
    grad = 4.0 * ((up - down) / 2e-6).reshape(77, 4).T + pi - np.eye(77)[labels]
    np.testing.assert_allclose(got.numpy(), grad, atol=1e-6)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _module is not None
    found = _module.build_info()["instruction_sets"]
    try:
        for name, runs in found.items():
            monkeypatch.setenv("FUSED_KD_CPU", name)
            if runs:
                _module.choose_instruction_set("")
                assert _module.build_info()["instruction_set"] == name
            else:
                with pytest.raises(RuntimeError, match=f"FUSED_KD_CPU={name}: this processor has"):
                    _module.choose_instruction_set("")
        monkeypatch.setenv("FUSED_KD_CPU", "sse9")
        known = ", ".join(found)
        with pytest.raises(RuntimeError, match=f"expected one of {known}, got 'sse9'"):
            _module.choose_instruction_set("")
        monkeypatch.delenv("FUSED_KD_CPU")
        _module.choose_instruction_set("")  # the best
        best = next(name for name, runs in found.items() if runs)
        assert _module.build_info()["instruction_set"] == best
    finally:
        monkeypatch.undo()
        _module.choose_instruction_set("")


@pytest.mark.parametrize("name", ["generic", "sse9"])
def test_the_environment_of_a_new_process(name: str) -> None:
    """A wrong name fails at the first loss, by name; the report still comes out."""
    code = (
        "import torch, json, fused_kd; from fused_kd import env\n"
        "found = env.report()['compiled_module']\n"
        "x = torch.zeros(2, 5)\n"
        "try: loss = str(float(fused_kd.kd_loss(x, x, hard_weight=0)))\n"
        "except RuntimeError as error: loss = str(error)\n"
        "print(json.dumps([found, loss]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSED_KD_CPU": name, "FUSED_KD_BACKEND": "cpu"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, loss = json.loads(done.stdout)
    if name == "generic":
        assert found["instruction_set"] == "generic"
        assert loss == "0.0"
    else:
        assert "expected one of" in found
        assert "got 'sse9'" in found
        assert "got 'sse9'" in loss


def _everything(inputs: tuple[Tensor, Tensor, Tensor], threads: int, divergence: str) -> Any:
    """Loss rows, and gradients made in the forward and in the backward."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        student, teacher, labels = inputs
        results = []
        for reduction in ("none", "sum"):
            leaf = student.clone().requires_grad_()
            options: dict[str, Any] = {"divergence": divergence, "reduction": reduction}
            loss = kd_loss(leaf, teacher, labels, backend="cpu", temperature=2.0, **options)
            results += [loss, *torch.autograd.grad(loss.sum(), leaf)]
        return results
    finally:
        torch.set_num_threads(before)


# (N, V): the vocabulary split (one segment is 32768); the same, more rows; rows split; one thread's
@pytest.mark.parametrize("shape", [(1, 70_001), (3, 32_800), (9, 4_100), (2, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threads_change_no_bit(
    native: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = make_inputs("language_model", *shape, dtype)
    for divergence in ("forward_kl", "jsd"):
        one = _everything(inputs, 1, divergence)
        for threads in (2, 3):
            for got, want in zip(_everything(inputs, threads, divergence), one, strict=True):
                assert torch.equal(got, want), (divergence, threads)


def test_a_row_has_the_same_bits_alone(native: ModuleType) -> None:
    student, teacher, labels = make_inputs("language_model", 16, 40_000, torch.bfloat16)
    batch = _everything((student, teacher, labels), 2, "forward_kl")
    for row in (0, 7, 15):
        one = slice(row, row + 1)
        alone = _everything((student[one], teacher[one], labels[one]), 2, "forward_kl")
        assert torch.equal(batch[0][one], alone[0])
        for index in (1, 3):
            assert torch.equal(batch[index][one], alone[index])
