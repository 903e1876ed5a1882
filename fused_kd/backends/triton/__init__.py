"""Triton kernels for CUDA, ROCm and XPU devices.

With ``TRITON_INTERPRET=1`` in the environment before their first use, they run on CPU tensors in
Triton's interpreter, slowly: for tests and debugging.

A backend like any other of :mod:`fused_kd.backends`; importing it needs no triton.

* :mod:`.launch` and :mod:`.measurements` implement the operators, :mod:`.device` lists the devices
  that can run them, :mod:`.configuration` decides how a row is cut.
* Imported together with triton: :mod:`.kernels` and :mod:`.moments`, which load and store;
  :mod:`.formulas`, which all divergences share; :mod:`.rules`, one class for each divergence.
"""

from __future__ import annotations

from ..registered import registered
from . import launch as launch  # registers the operators' implementations, as the next
from . import measurements as measurements
from .device import why_not as why_not

functions = registered(prefix="triton_")
forward, forward_backward, backward = functions[:3]
rescale, multiply, measure, measure_support = functions[3:]
