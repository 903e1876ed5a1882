"""Threads, seeds, and the backends that this machine can run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("FUSED_KD_BACKEND", None)  # tests choose the backend

import pytest
import torch

if os.environ.get("FUSED_KD_EMULATED_CUDA"):  # test_cuda_kernels.py runs the suite so
    from support import emulated_cuda

    emulated_cuda.install_from_environment()

from support.backends import FAST, HERE, instruction_sets, one_thread
from support.emulated_cuda import EmulatedCUDA, build, installed
from support.logits import DTYPES
from support.native_build import need_compiler

from fused_kd import extension
from fused_kd.divergences import DIVERGENCES

_module = extension.cpu.load()

torch.set_num_threads(2)  # few rows: the vocabulary is split over threads too


def pytest_collection_finish() -> None:
    # cpu_peak collects garbage: 0.2 s at every call, if modules and tests are searched for it.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else extension modules report leaks at exit


# Values that tests are repeated for. Session scope: hypothesis refuses function-scoped fixtures.


@pytest.fixture(params=HERE, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend for CPU tensors.

    If cpu cannot run it is skipped with its reason; others that cannot run are left out.
    """
    return str(request.param)


@pytest.fixture(params=FAST, scope="session")
def fast(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend to compare with the reference: any but the reference."""
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=str, scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=DIVERGENCES, scope="session")
def divergence(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of the instruction set that the compiled module uses during the test."""
    assert _module is not None
    _module.choose_instruction_set(request.param)
    assert _module.build_info()["instruction_set"] == request.param
    yield request.param
    _module.choose_instruction_set("")


@pytest.fixture
def no_fsync() -> Iterator[None]:
    """Skip what takes most of the time of small files, and matters after a power failure only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the CUDA kernels and launchers, compiled for the CPU."""
    need_compiler()
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(params=[80, 90], ids=["general", "cluster"])
def cuda(request: pytest.FixtureRequest, emulated_library: Path) -> Iterator[EmulatedCUDA]:
    """Yield the emulated CUDA backend, which is ``backend="cuda"`` during the test.

    Capability 80 takes the general kernel, 90 the one for clusters.
    """
    backend = EmulatedCUDA(emulated_library, request.param)
    backend.seed(1)
    with installed(backend), one_thread():
        yield backend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
