"""What takes part in a benchmark: ours, the compositions of plain torch, and the peers."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..cases import Case

#: At level "logits" called with student (N, V), teacher (N, V), labels (N,); at level "heads" with
#: student hidden (N, H_s), weight (V, H_s), teacher hidden (N, H_t), weight (V, H_t), labels (N,).
#: Returns the 0-d mean over the rows, attached to the graph.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Entrant:
    """One loss that can be measured.

    Args:
        key: how options and results call it.
        title: how tables and pictures call it.
        level: of its arguments: "logits" or "heads".
        build: makes the loss of a case; called only where `why_not` finds nothing.
        why_not: why it cannot take part in a case (not installed, no such divergence, no GPU).
        package: the distribution that it comes from; None: torch or ours.
        computes: the keywords of eager_kd_loss for what it computes; None: exactly the case's.
        nearest: where that is not what the case asks for, what it is, in a few words.
        compared: what is held to the float64 reference: "loss", "gradients", or both.
        is_ours: whether it must be right, and is what others are compared with.
        compiles: its first call on a size takes seconds.
        most_rows: of the (rows, V) matrices that it holds at a time; None: all rows.
        matrices: about how many float32 (rows, V) it holds at its peak: is there memory for it?
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
        """Of eager_kd_loss: what it computes."""
        return case.keywords if self.computes is None else self.computes(case)

    def version(self) -> str | None:
        """Of the distribution that it comes from."""
        try:
            return None if self.package is None else importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def cannot_import(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed (no module named {error.name!r})"
    except Exception as error:  # what is installed may fail on this machine
        return " ".join(f"cannot be imported: {type(error).__name__}: {error}".split())[:300]
    return None


def needs_gpu(case: Case) -> str | None:
    """For a loss that is a Triton or CUDA kernel."""
    return None if case.device == "cuda" else "its kernels need a GPU"


def only(case: Case, *divergences: str) -> str | None:
    """For a loss that has not all of them."""
    return None if case.divergence in divergences else f"it has no {case.divergence}"
