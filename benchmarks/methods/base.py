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
    """One loss that can be measured.

    Args:
        key: its name in options and results.
        title: its name in tables and pictures.
        level: of its arguments: "logits" or "heads".
        build: makes the loss of a case; called only if `why_not` returns None.
        why_not: the reason why it cannot run a case (not installed, no such divergence, no GPU).
        package: the distribution that it comes from; None: torch or ours.
        computes: the keywords of eager_kd_loss for what it computes; None: exactly the case's.
        nearest: if that is not what the case asks for, what it is, in a few words.
        compared: what is compared with the float64 reference: "loss", "gradients", or both.
        is_ours: it must be right, and others are compared with it.
        compiles: its first call on a size takes seconds.
        most_rows: of the (rows, V) matrices that it holds at a time; None: all rows.
        matrices: about how many float32 (rows, V) it holds at its peak.
    """

    key: str
    title: str
    level: str
    build: Callable[[Case], Loss]
    why_not: Callable[[Case], str | None] = lambda case: None
    package: str | None = None
    computes: Callable[[Case], dict[str, Any]] | None = None
    nearest: str = ""
    compared: tuple[str, ...] = ("loss", "gradients")
    is_ours: bool = False
    compiles: bool = False
    most_rows: int | None = None
    matrices: float = 9.0

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
