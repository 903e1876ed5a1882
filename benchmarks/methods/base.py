"""A method: one way to compute the loss, ours, in plain torch, or a peer's."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..cases import Case

#: At level "logits" called with student (N, V), teacher (N, V), labels (N,); at level "heads" with
#: student hidden (N, H_s), weight (V, H_s), teacher hidden (N, H_t), weight (V, H_t), labels (N,).
#: Returns the 0-d mean over the rows, attached to the graph.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """One loss that can be measured."""

    key: str  # its name in options and results
    title: str  # its name in tables and pictures
    level: str  # of its arguments: "logits" or "heads"
    build: Callable[[Case], Loss]  # called only if `why_not` returns None
    #: Returns why it cannot run a case: it is not installed, has no such divergence, needs a GPU.
    why_not: Callable[[Case], str | None] = lambda case: None
    package: str | None = None  # the distribution that it comes from; None: torch or ours
    #: Returns the keywords of eager_kd_loss for what it computes; None: exactly the case's.
    computes: Callable[[Case], dict[str, Any]] | None = None
    nearest: str = ""  # if that is not what the case asks for, what it is, in a few words
    compared: tuple[str, ...] = ("loss", "gradients")  # with the float64 reference
    is_ours: bool = False  # it must be right, and others are compared with it
    compiles: bool = False  # its first call on a size takes seconds
    most_rows: int | None = None  # of the (rows, V) matrices that it holds at a time; None: all
    matrices: float = 9.0  # about how many float32 (rows, V) it holds at its peak

    def keywords(self, case: Case) -> dict[str, Any]:
        """Return the keywords of eager_kd_loss for what it computes."""
        return case.keywords if self.computes is None else self.computes(case)

    def version(self) -> str | None:
        """Return the version of its distribution; None if there is none."""
        try:
            return None if self.package is None else importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def needs(module: str, *divergences: str, gpu: bool = False) -> Callable[[Case], str | None]:
    """Return a `why_not` for a loss of this module, with these divergences; none: any."""

    def why_not(case: Case) -> str | None:
        if divergences and case.divergence not in divergences:
            return f"it has no {case.divergence}"
        if gpu and case.device != "cuda":
            return "its kernels need a GPU"
        return cannot_import(module)

    return why_not


def cannot_import(module: str) -> str | None:
    """Return why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed (no module named {error.name!r})"
    except Exception as error:  # what is installed may fail on this machine
        return " ".join(f"cannot be imported: {type(error).__name__}: {error}".split())[:300]
    return None


def with_cross_entropy(soft: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Add half the cross-entropy to half a peer's divergence on logits, T² included.

    It is the cross-entropy of transformers, which converts the logits to float32 first.
    """
    return lambda student, teacher, labels: (
        0.5 * F.cross_entropy(student.float(), labels) + 0.5 * soft(student, teacher, labels)
    )
