"""Threads, seeds, and the backends that this machine can run."""

from __future__ import annotations

import os

os.environ.pop("FUSED_KD_BACKEND", None)  # the tests choose

import pytest
import torch

if os.environ.get("FUSED_KD_EMULATED_CUDA"):  # see test_cuda_kernels.py: the suite on its kernels
    from support import emulated_cuda

    emulated_cuda.install_from_environment()

from support.backends import HERE

torch.set_num_threads(2)  # few rows: the vocabulary is split over threads too


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run is skipped with its reason."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
