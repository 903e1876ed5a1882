"""The C++ kernels on CPU tensors: float32, bfloat16, float16, every divergence."""

from __future__ import annotations

from fused_kd import extension

from .registered import registered

extension.cpu.load()  # registers the implementations, if the module is installed
functions = registered(prefix="")
forward, forward_backward, backward = functions[:3]
rescale, multiply, measure, measure_support = functions[3:]


def why_not(device_type: str | None = None) -> str | None:
    """Return None if this backend can run, else the reason; for one type of device if given.

    FUSED_KD_CPU is not checked: with a wrong value, the calls raise RuntimeError.
    """
    if device_type not in (None, "cpu"):
        return f"the cpu backend runs on CPU tensors, not on {device_type}"
    return extension.cpu.why_not()
