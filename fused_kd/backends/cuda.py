"""The CUDA C++ kernels on CUDA tensors: float32, bfloat16, float16, every divergence."""

from __future__ import annotations

from functools import cache

import torch

from fused_kd import extension

from .registered import registered

extension.cuda.load()  # registers the implementations, if the module is installed
functions = registered(prefix="")
forward, forward_backward, backward = functions[:3]
rescale, multiply, measure, measure_support = functions[3:]


def why_not(device_type: str | None = None) -> str | None:
    """Return None if this backend can run, else the reason; for one type of device if given.

    Of several CUDA devices, only the current one is checked.
    """
    if device_type not in (None, "cuda"):
        return f"the cuda backend runs on CUDA tensors, not on {device_type}"
    reason = extension.cuda.why_not()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    return _why_not_here(torch.cuda.current_device())


@cache
def _why_not_here(device: int) -> str | None:
    """Return None if the module, which must load, has kernels for this device, else the reason."""
    module = extension.cuda.load()
    assert module is not None
    torch.cuda.init()  # type: ignore[no-untyped-call]
    try:
        module.device(device)
    except RuntimeError as error:
        return f"{error}; it was built for {module.build_info()['architectures']}"
    return None
