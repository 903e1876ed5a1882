"""The choice of a backend: argument over variable over automatic, and why not."""

from __future__ import annotations

import pytest
import torch

from fused_kd import kd_loss
from fused_kd.backends import choose, why_not

S, T, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


def test_a_backend_asked_for_by_name_that_cannot_run_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = S.to("meta")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: "):
        choose("cpu", meta, meta)
    monkeypatch.setenv("FUSED_KD_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="FUSED_KD_BACKEND='cpu' cannot run: "):
        choose("auto", meta, meta)


def test_float64_asked_of_a_float32_backend_raises() -> None:
    if why_not("cpu", "cpu") is not None:
        pytest.skip("the cpu backend cannot run")
    with pytest.raises(RuntimeError, match="float64 logits run on backend='reference' only"):
        kd_loss(S.double(), T, Y, backend="cpu")


def test_the_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FUSED_KD_BACKEND must be 'auto' or one of 'reference'"):
        kd_loss(S, T, Y)


def test_the_argument_wins_over_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_BACKEND", "cpu")
    assert choose("reference", S, T).__name__.endswith("reference")  # type: ignore[attr-defined]
    monkeypatch.setenv("FUSED_KD_BACKEND", "reference")
    assert choose("auto", S, T).__name__.endswith("reference")  # type: ignore[attr-defined]


def test_why_not_of_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'reference', .*; got 'tpu'"):
        why_not("tpu")
