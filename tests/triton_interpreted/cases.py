"""Small configurations, and inputs in the shapes of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.triton.configuration import overridden

#: With V = 45: 2 whole tiles of 16 entries and a tail of two sub-blocks, the last one masked.
#: In two parts: slices of 32 and 13; the second has no whole tile. In four: the last is empty.
#: Its lanes take one entry each, as for any V that is not a multiple of 16.
CONFIGURATIONS: dict[str, dict[str, int]] = {
    "one part": {"warps": 1, "lanes": 4, "vector": 2, "unroll": 2, "parts": 1},
    "two parts": {"warps": 1, "lanes": 4, "vector": 2, "unroll": 2, "parts": 2},
    "four parts": {"warps": 1, "lanes": 8, "vector": 1, "unroll": 2, "parts": 4},
}
V = 45
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
#: What the operators take after the rows; a divergence is an integer there.
NUMBERS = {"divergence": 0, "temperature": 2.0, "beta": 0.3, "scale_t2": True, "smoothing": 0.0}

configured = overridden


class _Dense:
    """The registered operators with the prefix triton_, for a teacher that is not a TopK."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.fused_kd, name)
        if name == "triton_scale_":
            return operator
        return lambda student, teacher, *rest: operator(student, teacher, None, *rest)


dense = _Dense()


def numbers(**changes: Any) -> tuple[Any, ...]:
    """Return the values of NUMBERS, some of them changed, as operators take them."""
    values: dict[str, Any] = {**NUMBERS, **changes}
    values["temperature"] = torch.tensor(values["temperature"], dtype=torch.float64)
    return tuple(values.values())


def rows(n: int = 3, v: int = V, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return student and teacher (1, n, v), labels, w_hard, w_soft."""
    student, teacher = (torch.randn(1, n, v).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(v, (n,)), torch.rand(n) + 0.5, torch.rand(n) + 0.5
