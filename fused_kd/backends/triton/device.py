"""The devices of the Triton kernels: which can run them, and their properties."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch

from .configuration import AMD, BLACKWELL, NVIDIA, OTHER, Kind, may_wait

#: The oldest supported version of triton.
OLDEST = (3, 6)


def why_not(device_type: str | None = None) -> str | None:
    """Return None if this backend can run, else the reason; for one type of device if given.

    The first answer for a type is kept, one with TRITON_INTERPRET=1 and one without.
    """
    return _why_not(device_type, _interpreted())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _why_not(device_type: str | None, interpreted: bool) -> str | None:
    if device_type == "cpu" and not interpreted:
        return "CPU tensors need TRITON_INTERPRET=1 in the environment, set before the first use"
    if device_type not in (None, "cpu", "cuda", "xpu"):
        return f"the triton backend runs on cuda and xpu devices, not on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = [device_type] if device_type else ["cuda", "xpu"]
    if not interpreted and not any(getattr(torch, name).device_count() for name in names):
        return f"torch finds no {' or '.join(names)} device"
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

    version = _release(triton)
    if interpreted and version < (3, 7):
        import numpy

        if _release(numpy) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} needs numpy < 2.4"
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    try:
        loaded = load_kernels()
        load_moments()
    except Exception as error:  # any: a later version may raise another
        return f"its kernels cannot be imported: {error}"
    if interpreted == isinstance(loaded._kd_rows_kernel, triton.JITFunction):
        return "TRITON_INTERPRET has changed since the kernels were imported"
    return None


def _release(module: ModuleType) -> tuple[int, ...]:
    """Return the first two numbers of a module's version."""
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@cache
def load_kernels() -> ModuleType:
    """Import triton and the kernels; return their module.

    Raises:
        ImportError: triton cannot be imported, or a divergence has no rule.
    """
    from . import kernels

    return kernels


@cache
def load_moments() -> ModuleType:
    """Return the module of the measuring kernels; import it, and triton. Raises as load_kernels."""
    from . import moments

    return moments


@cache
def kind(device: torch.device) -> Kind:
    """Return the kind of GPU, on which the configuration of a row depends; for a CPU NVIDIA."""
    if device.type != "cuda":  # the CPU: interpreted
        return NVIDIA if device.type == "cpu" else OTHER
    if torch.version.hip:
        warp_size = int(torch.cuda.get_device_properties(device).warp_size)
        return replace(AMD, warp_size=warp_size)
    return BLACKWELL if torch.cuda.get_device_capability(device)[0] == 10 else NVIDIA


@cache
def capability(device: torch.device) -> int:
    """Return ten times the compute capability of an NVIDIA GPU; 0 elsewhere and interpreted."""
    if device.type != "cuda" or torch.version.hip or _interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (XPU: of subslices); 1 for a CPU, 64 if unknown."""
    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64


def can_wait(device: torch.device, parts: int) -> bool:
    """Return True if the programs of a row may wait for each other.

    That needs an NVIDIA GPU that can run `parts` programs at once, and :func:`may_wait`. On other
    GPUs the memory order that waiting relies on is untested.
    """
    return bool(capability(device)) and may_wait() and multiprocessors(device) >= parts
