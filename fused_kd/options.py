"""Every keyword of the loss that is not a tensor: type, default, range and documentation.

A keyword is declared twice in this file and nowhere else: in :class:`KDOptions`, which stores and
checks it, and in :class:`Keywords`, for editors and type checkers. The signatures and the ``Args``
sections of :func:`fused_kd.kd_loss` and :class:`fused_kd.KDLoss` are generated from KDOptions.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from .divergences import DIVERGENCES, NEEDS_BETA, TABLE
from .sides import Head

#: Bounds of a temperature or denominator: its square and its inverse stay normal in float32.
SMALLEST, LARGEST = 2.0**-60, 2.0**60
#: The same for messages.
BOUNDS = "in [2**-60, 2**60] (about 1e-18 to 1e18)"
REDUCTIONS = ("mean", "sum", "none")
SOFT_SCALES = ("t2", "none")
#: All backends; "auto" chooses one of them.
BACKENDS = ("reference", "cpu", "triton", "cuda")
#: Bytes of a mebibyte.
MIB = 2**20


# ------------------------------------------------------------------------------ types and ranges
# A check takes the name of a keyword, for messages, and its value. It returns the value, numbers as
# float, or raises TypeError for a wrong type and ValueError for a wrong value.


def real_number(name: str, value: Any) -> float:
    """Return a Python number, which may be infinite or NaN, as a float.

    Args:
        name: the argument's name, for messages.
        value: the argument.

    Raises:
        TypeError: The value is not a number, or a bool.
        ValueError: The value is beyond float64.
    """
    if isinstance(value, float):
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        hint = ": pass its .item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a Python number; got {type(value).__name__}{hint}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; got a number beyond float64") from None


def _temperature(name: str, value: Any) -> float:
    number = real_number(name, value)
    if not SMALLEST <= number <= LARGEST:
        expected = BOUNDS if 0 < number < math.inf else "positive and finite"
        raise ValueError(f"{name} must be {expected}; got {number}")
    return number


def _weight(name: str, value: Any) -> float:
    number = real_number(name, value)
    if not (number == 0.0 or 2.0**-126 <= number <= LARGEST):  # a float32 that is not 0
        bounds = "0 or in [2**-126, 2**60] (about 1e-38 to 1e18)"
        expected = bounds if 0 < number < math.inf else "at least 0 and finite"
        raise ValueError(f"{name} must be {expected}; got {number}")
    return number


def _smoothing(name: str, value: Any) -> float:
    number = real_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {number}")
    return number


def _label(name: str, value: Any) -> Any:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"{name} must fit in 64 bits; got {value}")
    return value


def _switch(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def _dtype(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None; got {value!r}")
    return value


def check_count(name: str, value: Any, least: int = 1) -> Any:
    """Return `value`, which must be None or a 64-bit int of at least `least`.

    A trace's SymInt is not checked. Messages call the argument `name`.

    Raises:
        TypeError: The value is not an int.
        ValueError: The value is below `least`, or beyond 64 bits.
    """
    if value is None or isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if int(value) >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits; got {value}")
    return value


def _one_of(*known: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            listed = ", ".join(repr(k) for k in known)
            got = repr(value) if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{name} must be one of {listed}; got {got}")
        return value

    return check


def _reduction(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "batchmean":
        raise ValueError(
            "reduction='batchmean' is not offered: use reduction='mean', which divides the sum of "
            "the rows by the number of kept rows (what batchmean does for N rows)"
        )
    return _one_of(*REDUCTIONS)(name, value)


# ---------------------------------------------------------------------------------- the keywords


def _keyword(default: Any, check: Callable[[str, Any], Any], meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "meaning": meaning})


@dataclass(frozen=True)
class KDOptions:
    """The keywords of :func:`fused_kd.kd_loss` that are not tensors, checked at construction.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is outside its range or none of the allowed names, or two keywords
            exclude each other.
    """

    temperature: float = _keyword(
        1.0, _temperature, "T > 0 of the soft term; H is always at T = 1."
    )
    hard_weight: float = _keyword(
        0.5, _weight, "factor ≥ 0 of H; a term of weight 0 is not computed, and reported as 0."
    )
    soft_weight: float = _keyword(0.5, _weight, "factor ≥ 0 of c(T)·D.")
    divergence: str = _keyword(
        "forward_kl",
        _one_of(*DIVERGENCES),
        "D(q, p): " + "; ".join(f'"{name}" {entry.meaning}' for name, entry in TABLE.items()) + ".",
    )
    beta: float = _keyword(
        0.5,
        real_number,
        f"β of {' and '.join(sorted(NEEDS_BETA))}, the teacher's weight, in (0, 1).",
    )
    soft_scale: str = _keyword(
        "t2", _one_of(*SOFT_SCALES), 'factor c(T) of D: "t2" for T², "none" for 1.'
    )
    label_smoothing: float = _keyword(0.0, _smoothing, "ε of H, in [0, 1).")
    ignore_index: int = _keyword(-100, _label, "rows with this label are left out of both terms.")
    reduction: str = _keyword(
        "mean",
        _reduction,
        '"mean": Σ w·row / Σ w over the rows that are not ignored, or Σ w·row / num_items; "sum": '
        'Σ w·row; "none": w·row, shaped like the labels. w is token_weight, or 1. If all rows are '
        "ignored, or the denominator is a zero tensor, the loss is 0 with zero gradients.",
    )
    return_parts: bool = _keyword(
        False,
        _switch,
        "return ``KDLossParts(loss, hard, soft)``; hard and soft are detached, not multiplied by "
        "hard_weight and soft_weight, and reduced like the loss; soft includes c(T).",
    )
    inplace: bool = _keyword(
        False,
        _switch,
        "write the gradient over the memory of the student's logits (in the forward; for float16 "
        "in the backward). A later read of the logits returns the gradient; an earlier operation "
        "that saved them raises in its backward, as does a second backward of the loss. Refused "
        'for a Head, with reduction "none", for leaf tensors, and for views that cannot be written '
        "to or that share memory. Without gradients, and under ``torch.compile``, the logits are "
        "not overwritten.",
    )
    backend: str = _keyword(
        "auto",
        _one_of("auto", *BACKENDS),
        '"auto" (FUSED_KD_BACKEND if that is set, else by device and dtype), "reference", "cpu", '
        '"triton" or "cuda"; see ``python -m fused_kd.env``. A named one that cannot run raises.',
    )
    memory_budget: int | None = _keyword(
        None,
        check_count,
        "bytes for a chunk of rows if a side is a Head (see ``python -m fused_kd.plan``). None: "
        "256 MiB on a CPU; on a GPU enough for 2048 rows, at most 1/16 of its memory; in any case "
        "enough for 64 rows. Less than one row needs is refused. Small chunks read and write the "
        "weight gradient more often. The reference backend uses several times as much.",
    )
    chunk_rows: int | None = _keyword(
        None, check_count, "rows of a chunk if a side is a Head, instead of memory_budget."
    )
    grad_accum_dtype: torch.dtype | None = _keyword(
        None,
        _dtype,
        "dtype in which a student Head's weight and bias gradients are summed over the chunks: "
        "None for float32, or the weight's dtype, which saves a buffer and rounds once a chunk.",
    )

    @property
    def soft_factor(self) -> float:
        """Return c(T), by which the divergence is multiplied."""
        return self.temperature * self.temperature if self.soft_scale == "t2" else 1.0

    def __post_init__(self) -> None:
        """Check every keyword, convert numbers to float, check pairs that exclude each other."""
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is _FIELDS[name].default and not torch.compiler.is_compiling():
                continue
            kept = check(name, value)
            if type(kept) is not type(value):
                object.__setattr__(self, name, kept)
        if self.divergence in NEEDS_BETA and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must be in (0, 1) for divergence={self.divergence!r}; got {self.beta} "
                "(the two ends are divergence='forward_kl' and divergence='reverse_kl')"
            )
        if self.inplace and self.reduction == "none":
            raise ValueError(
                "inplace=True needs reduction='mean' or 'sum'; got reduction='none', whose "
                "gradient is known only in the backward: pass inplace=False"
            )
        if self.chunk_rows is not None and self.memory_budget is not None:
            raise ValueError(
                "chunk_rows and memory_budget both set the number of rows of a chunk; got "
                f"{self.chunk_rows} and {self.memory_budget}: leave one of the two out"
            )


class Keywords(TypedDict, total=False):
    """The fields of KDOptions for type checkers, except return_parts, which overloads need."""

    temperature: float
    hard_weight: float
    soft_weight: float
    divergence: str
    beta: float
    soft_scale: str
    label_smoothing: float
    ignore_index: int
    reduction: str
    inplace: bool
    backend: str
    memory_budget: int | None
    chunk_rows: int | None
    grad_accum_dtype: torch.dtype | None


_FIELDS = {field.name: field for field in dataclasses.fields(KDOptions)}
_CHECKS = {name: field.metadata["check"] for name, field in _FIELDS.items()}
#: The names of all keywords, in the order of their declaration.
NAMES = tuple(_FIELDS)
#: The keywords of a call, which the constructor of KDLoss does not take.
OF_A_CALL = ("token_weight", "num_items", "kept_rows")


def options_of(function: str, keywords: Mapping[str, Any]) -> KDOptions:
    """Return the options of a caller's keywords; messages call the caller `function`.

    Raises:
        TypeError: A keyword is unknown, or a value has the wrong type.
        ValueError: A value is outside its range, or two keywords exclude each other.
    """
    for name in keywords:
        if name not in _CHECKS:
            hint = did_you_mean(name, (*NAMES, *OF_A_CALL)) or f": help({function}) lists all"
            if name in OF_A_CALL:
                hint = ": it belongs to the call, with the student and the teacher"
            elif name in Head._fields:
                hint = ": it is a field of Head, which a side may be"
            raise TypeError(f"{function}() has no keyword {name!r}{hint}")
    return KDOptions(**keywords)


def did_you_mean(name: str, known: tuple[str, ...] = NAMES, cutoff: float = 0.6) -> str:
    """Return ": did you mean ...?" with the most similar known name.

    Empty if the similarity of all, from 0 to 1, is below `cutoff`.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f": did you mean {near[0]!r}?" if near else ""


# --------------------------------------------------------------------------- for the row kernels


class Formula(NamedTuple):
    """The options of a row kernel, as in :class:`KDOptions`."""

    divergence: str
    temperature: Tensor  # 0-d CPU float64, since a compiler would specialise on a number
    beta: float
    soft_scale: str
    label_smoothing: float

    def soft_factor(self) -> Tensor:
        """Return c(T), by which the divergence is multiplied, as a 0-d CPU float64 tensor."""
        t = self.temperature
        return t * t if self.soft_scale == "t2" else torch.ones_like(t)


def temperature_tensor(options: KDOptions) -> Tensor:
    """Return T as a 0-d CPU float64 tensor, regardless of the default device.

    In a trace it is formed by multiplication: any other tensor made from a number compiles again
    for each value, and fails under ``fullgraph=True`` at the ninth.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device="cpu") * options.temperature
    return torch.scalar_tensor(options.temperature, dtype=torch.float64, device="cpu")


# ------------------------------------------------------------------- signature and documentation

_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_keywords(function: _Function) -> _Function:
    """Replace ``**keywords`` in a function's shown signature, and ``{keywords}`` in its docstring.

    A decorator: both show the fields of KDOptions; the function is modified and returned.
    """
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    explicit = inspect.signature(function).parameters
    positional = [p for p in explicit.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in explicit.values() if p.kind is keyword_only and p.name not in _FIELDS]
    options = [
        inspect.Parameter(name, keyword_only, default=field.default, annotation=field.type)
        for name, field in _FIELDS.items()
    ]
    shown = inspect.signature(function).replace(parameters=[*positional, *options, *named])
    function.__signature__ = shown  # type: ignore[attr-defined]
    function.__doc__ = documented(function.__doc__)
    return function


def documented(docstring: str | None) -> str | None:
    """Return a docstring with ``{keywords}`` filled in; None stays None (``python -OO``)."""
    return docstring and docstring.replace("{keywords}", _documentation())


def _documentation() -> str:
    entries = (
        textwrap.fill(
            f"{name}: {field.metadata['meaning']}",
            width=100,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for name, field in _FIELDS.items()
    )
    return "\n".join(entries).lstrip()
