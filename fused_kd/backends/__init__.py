"""Choose the backend: the argument over ``FUSED_KD_BACKEND`` over the automatic choice.

If a backend requested by name (argument or variable) cannot run, the call raises with the reason.
The automatic choice skips such a backend, and :func:`why_not` returns the reason. Its order:

1. a float64 input: ``reference`` (the others compute in float32);
2. a CPU tensor: ``cpu``, if the compiled module is installed;
3. a CUDA tensor on a device of compute capability 9.0 or later: ``cuda``, if its module is
   installed;
4. any GPU (CUDA, ROCm, XPU): ``triton``, if it can run there;
5. otherwise: ``reference``, with one warning per device type that gives the reasons.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..classes import Classes
from ..options import BACKENDS, Formula
from ..sides import Side, Teacher, rows_tensor
from . import reference

ENVIRONMENT_VARIABLE = "FUSED_KD_BACKEND"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Backend(Protocol):
    """The functions of a backend module.

    :mod:`.reference` documents their arguments, and computes what they must return. The others
    raise RuntimeError for tensors that do not fit each other, and for float64 logits.
    """

    def why_not(self, device_type: str | None = None) -> str | None:
        """Return None if this backend can run, else the reason; for one type of device if given."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        formula: Formula,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hard and soft of every row, (N,) each, and the statistics that `backward` takes.

        The weights do not scale them: a weight of 0, or None for all rows, turns a term off, and
        the loss is then 0.
        """

    def backward(
        self,
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        formula: Formula,
        inplace: bool = False,
    ) -> Tensor:
        """Return the gradient (B, S, V) of Σ (w_hard·hard + w_soft·soft) by the student's logits.

        `stats` are those of a forward with the same logits, labels and formula. The weights may be
        other ones, but must be 0 for the rows that had 0 there. It has the student's dtype; with
        `inplace` it overwrites the student, which is returned.
        """

    def forward_backward(
        self,
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        formula: Formula,
        inplace: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the results of `forward`, and the gradient of `backward`.

        The gradient is `out` if that is set (of the student's dtype, or 16-bit for a float32
        student), the overwritten student with `inplace`, else a new tensor. `out` must not share
        memory with the logits. Raises ValueError if both are set.
        """

    def rescale(
        self,
        grad: Tensor,
        scale: Tensor,
        student: Tensor,
        teacher: Tensor | Classes,
        labels: Tensor | None,
        w_hard: Tensor | None,
        w_soft: Tensor | None,
        stats: Tensor,
        formula: Formula,
    ) -> None:
        """Overwrite the gradient that `forward_backward` returned by `scale` (0-d) times it.

        It is rounded once in all. The other arguments are those of that call, and its statistics;
        the student's logits must still be there, so the gradient may not be in their memory.
        """

    def multiply(self, grad: Tensor, scale: Tensor) -> None:
        """Multiply a gradient by a 0-d scale, in place, rounding it again; 0 stays 0."""

    def measure(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        weight: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return :class:`fused_kd.measures.Sums` as columns (N, MEASURES), and the largest entries.

        These are (N, 2), int64: the first largest entry of each side. Rows of weight 0 may have any
        values.
        """

    def measure_support(
        self,
        student: Tensor,
        token_ids: Tensor,
        labels: Tensor,
        weight: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return :class:`fused_kd.measures.Support` as columns (N, 3), and largest entries (N,).

        token_ids (N, K) is the support of the teacher. Rows of weight 0 may have any values.
        """


def _load(name: str) -> ModuleType | str:
    """Return the module of a backend, or as text the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return f"its module cannot be imported: {error}"


_MODULES: dict[str, ModuleType | str] = {
    name: reference if name == "reference" else _load(name) for name in BACKENDS
}


def _not_traced(function: _Function) -> _Function:
    """Set what torch.compiler.assume_constant_result sets, without importing torch._dynamo.

    That import takes as long as torch's own, and only programs that trace need it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_not_traced
def why_not(name: str, device_type: str | None = None) -> str | None:
    """Return the reason why a backend cannot run, or None if it can.

    Args:
        name: "reference", "cpu", "triton" or "cuda".
        device_type: the type of the tensors' device, such as "cuda"; None: any that it supports.

    Raises:
        ValueError: No backend has this name.
    """
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {_known()}; got {name!r}")
    module = _MODULES[name]
    if isinstance(module, str):
        return module
    return cast(Backend, module).why_not(device_type)


def named(name: str) -> Backend:
    """Return the module of the backend that :func:`choose_name` has chosen."""
    return cast(Backend, _MODULES[name])


def choose_name(requested: str, student: Side, teacher: Teacher | None) -> str:
    """Return the name of the backend for these sides; the module's docstring has the order.

    If "reference" is the automatic choice for lack of another, warn once per device type.

    Args:
        requested: "auto" or the name of a backend.
        student: the side whose device and dtype decide.
        teacher: the other side, whose dtype decides too. None: no term reads it.

    Raises:
        ValueError: `requested`, or the environment variable, is not the name of a backend.
        RuntimeError: A backend requested by name cannot run on this device and dtype.
    """
    source = "backend"
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = ENVIRONMENT_VARIABLE
    x = rows_tensor(student)
    other = x if teacher is None else rows_tensor(teacher)
    device, is_double = x.device, torch.float64 in (x.dtype, other.dtype)
    if requested == "auto":
        return "reference" if is_double else _automatic(device)
    if requested not in _MODULES:
        raise ValueError(f"{source} must be 'auto' or one of {_known()}; got {requested!r}")
    reason = why_not(requested, device.type)
    if reason is None and is_double and requested != "reference":
        reason = "float64 logits run on backend='reference' only"
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} cannot run: {reason}")
    return requested


def _automatic(device: torch.device) -> str:
    """Return the first backend of the order above that can run on this device; may warn."""
    if device.type == "meta":
        return "reference"  # a meta tensor has no values to compute with
    if device.type == "cpu":
        order = ["cpu"]
    elif device.type == "cuda" and torch.version.hip is None:
        has_clusters = torch.cuda.get_device_capability(device) >= (9, 0)
        order = ["cuda", "triton"] if has_clusters else ["triton", "cuda"]
    else:
        order = ["triton"]
    for name in order:
        if why_not(name, device.type) is None:
            return name
    _warn_of_reference(device.type, *order)
    return "reference"


#: The command that installs a fast backend, by device type.
_REMEDIES = {
    # without pip's cache, which keeps the wheel that was built without the kernels
    "cpu": "pip install --force-reinstall --no-deps --no-cache-dir fused_kd  (in a clone: .)",
    "cuda": "pip install 'triton>=3.6'",
    "xpu": "pip install 'triton>=3.6'",
}
_warned = set[str]()  # device types


@_not_traced
def _warn_of_reference(device_type: str, *skipped: str) -> None:
    """Warn that the automatic choice is `reference`, once per device type."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    reasons = "; ".join(f"{name}: {why_not(name, device_type)}" for name in skipped)
    remedy = _REMEDIES.get(device_type)
    warnings.warn(
        f"fused_kd uses backend='reference' for {device_type} tensors, which is slower than eager "
        f"torch. Reasons that no other backend runs: {reasons}. "
        + (f"To get one: {remedy}. " if remedy else "")
        + "`python -m fused_kd.env` lists all backends; backend='reference' runs without warning.",
        stacklevel=2,
    )


def _known() -> str:
    return ", ".join(repr(name) for name in BACKENDS)
