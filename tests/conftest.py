"""Threads, seeds, and the backends that this machine can run."""

from __future__ import annotations

import os

os.environ.pop("FUSED_KD_BACKEND", None)  # the tests choose

import pytest
import torch

from fused_kd.backends import why_not
from fused_kd.options import BACKENDS

torch.set_num_threads(2)  # few rows: the vocabulary is split over threads too


def _parameter(name: str) -> object:
    reason = why_not(name, "cpu")
    if reason is None:
        return name
    return pytest.param(name, marks=pytest.mark.skip(reason=f"backend {name}: {reason}"))


@pytest.fixture(params=[_parameter(name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run is skipped with its reason."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
