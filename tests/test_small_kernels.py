"""The kernels around the row kernel: on a GPU each launch takes the time of many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import needs_cpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import kd_loss
from fused_kd.checks import call

pytestmark = needs_cpu

FREE = ("view", "detach", "empty", "unsqueeze", "reshape", "alias", "expand")


class _Count(TorchDispatchMode):
    """Record the names of operators that compute, but for the temperature's, always on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_temperature = isinstance(result, Tensor) and result.dtype == torch.float64
        if not is_temperature and not any(part in name for part in FREE):
            self.names.append(name)
        return result


# which rows are kept, as numbers; their sum, at least 1, and the quotient; the weight of both
# terms; the sum of both losses. Then ones, and the factor of the gradient
ORDINARY = ["ne", "_to_copy", "sum", "clamp_", "div", "mul", "forward_backward", "mul", "addcmul"]
ORDINARY += ["sum", "ones_like", "rescale_"]
PARTS = ["mul", "sum", "mul", "sum"]


@pytest.mark.parametrize("return_parts", [False, True])
def test_an_ordinary_step(return_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "may_read_values", lambda tensor: False)  # as on a GPU
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    labels = torch.tensor([[0, 1, 2], [3, 4, -100]])
    with _Count() as counted:
        result = kd_loss(student, teacher, labels, return_parts=return_parts)
        loss = result.loss if return_parts else result
        loss.backward()
    at = ORDINARY.index("ones_like")
    assert counted.names == [*ORDINARY[:at], *(PARTS if return_parts else []), *ORDINARY[at:]]
