"""KDOptions: everything a loss needs to know besides its tensors, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

#: Position = the integer code that the compiled kernels use.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "mse")
#: Bounds of a temperature or denominator: its square and its inverse stay normal in float32.
SMALLEST, LARGEST = 2.0**-60, 2.0**60
REDUCTIONS = ("mean", "sum", "none")
SOFT_SCALES = ("t2", "none")
#: Bytes.
MIB = 2**20
#: Backends that exist, besides "auto".
BACKENDS = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class KDOptions:
    """The keywords of :func:`fused_kd.kd_loss` that are not tensors, checked at construction.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, or a name that does not exist.
    """

    temperature: float = 1.0
    hard_weight: float = 0.5
    soft_weight: float = 0.5
    divergence: str = "forward_kl"
    beta: float = 0.5
    soft_scale: str = "t2"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    inplace: bool = False
    return_parts: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("temperature", "hard_weight", "soft_weight", "beta", "label_smoothing"):
            self._make_float(name)
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index must be an int; got {self.ignore_index!r}")
        for name in ("inplace", "return_parts"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        self._check_names()
        self._check_ranges()

    @property
    def soft_factor(self) -> float:
        """c(T): what the divergence is multiplied by."""
        return self.temperature * self.temperature if self.soft_scale == "t2" else 1.0

    @property
    def divergence_code(self) -> int:
        """The integer that names the divergence to a compiled kernel."""
        return DIVERGENCES.index(self.divergence)

    def _make_float(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, float):
            return
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a Python number; got {type(value).__name__}")
        try:
            object.__setattr__(self, name, float(value))
        except OverflowError:
            raise ValueError(f"{name} must be finite; got a number beyond float64") from None

    def _check_names(self) -> None:
        if self.reduction == "batchmean":
            raise ValueError(
                "reduction='batchmean' is not offered: use reduction='mean', which divides the "
                "sum of the rows by the number of kept rows (what batchmean does for N rows)"
            )
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("soft_scale", self.soft_scale, SOFT_SCALES)
        _one_of("backend", self.backend, ("auto", *BACKENDS))

    def _check_ranges(self) -> None:
        if not SMALLEST <= self.temperature <= LARGEST:
            bounds = (
                f", in [{SMALLEST:.0e}, {LARGEST:.0e}]" if 0 < self.temperature < math.inf else ""
            )
            raise ValueError(
                f"temperature must be positive and finite{bounds}; got {self.temperature}"
            )
        for name in ("hard_weight", "soft_weight"):
            weight = getattr(self, name)
            if not (weight == 0.0 or 2.0**-126 <= weight <= LARGEST):  # a float32 that isn't 0
                bounds = f" (0 or in [1e-38, {LARGEST:.0e}])" if 0 < weight < math.inf else ""
                raise ValueError(f"{name} must be at least 0 and finite{bounds}; got {weight}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit in 64 bits; got {self.ignore_index}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.divergence == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must be in (0, 1) for divergence='jsd'; got {self.beta} "
                "(the two ends are divergence='forward_kl' and divergence='reverse_kl')"
            )
        if self.inplace and self.reduction == "none":
            raise ValueError(
                "inplace=True needs reduction='mean' or 'sum': with reduction='none' the gradient "
                "is known only in the backward"
            )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(repr(k) for k in known)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")
