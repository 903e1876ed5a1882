"""The CUDA C++ kernels on CUDA tensors: float32, bfloat16, float16, every divergence."""

from __future__ import annotations

import torch

from fused_kd import extension

from .registered import registered

extension.cuda.load()  # registers the implementations, if it can
forward, forward_backward, backward, rescale = registered(prefix="")


def why_not(device_type: str | None = None) -> str | None:
    """None if this backend can run (on that device), else the reason."""
    if device_type not in (None, "cuda"):
        return f"the cuda backend runs on CUDA tensors, not on {device_type}"
    reason = extension.cuda.why_not()
    if reason is None and not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    return reason
