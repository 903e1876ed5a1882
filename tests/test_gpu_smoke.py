"""The first tests on a GPU: every kernel at every size of a cluster (benchmarks/gpu_smoke.py)."""

from __future__ import annotations

import pytest
from gpu_device import BACKENDS, DEVICE, WANTED

from benchmarks import gpu_smoke
from fused_kd.backends import why_not

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", WANTED)
def test_the_backend_can_run(name: str) -> None:
    assert why_not(name, DEVICE) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", gpu_smoke.cases(DEVICE), ids=lambda x: "-".join(map(str, x)))
def test_case(case: gpu_smoke.Case, backend: str) -> None:
    shares = gpu_smoke.measure(case, backend, DEVICE)
    assert all(share <= 1 for share in shares.values()), shares  # a NaN is below nothing
