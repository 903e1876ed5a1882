"""A method: one way to compute the loss, ours, in plain torch, or a peer's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fused_kd import Head
from fused_kd.sides import Side

from ..cases import HEADS, LOGITS, Case

#: Called with student, teacher and labels (N,). Both sides are logits (N, V) at level "logits",
#: and Heads, hidden (N, H) and weight (V, H), at level "heads". Returns the 0-d mean over the rows.
Loss = Callable[..., Tensor]
Build = Callable[[Case], Loss]
#: Returns why a method cannot run a case (not installed, no such divergence, needs a GPU), or None.
WhyNot = Callable[[Case], str | None]


@dataclass(frozen=True)
class Method:
    """One loss that can be measured."""

    build: Build  # called only if `why_not` returns None
    level: str  # of its arguments: "logits" or "heads"
    key: str  # its name in options and results
    title: str  # its name in tables and pictures
    why_not: WhyNot = lambda case: None
    compiles: bool = False  # its first call on a size takes seconds
    is_ours: bool = False  # it must be right, and others are compared with it
    compared: tuple[str, ...] = ("loss", "gradients")  # with the float64 reference
    nearest: str = ""  # what it computes, in words, if that is not the case's loss
    computes: Callable[[Case], dict[str, Any]] = lambda case: case.keywords  # as kd_loss's keywords


#: All methods, by "level/key".
METHODS: dict[str, Method] = {}


def _method(level: str, *fields: Any, **more: Any) -> Callable[[Build], Build]:
    """Return a decorator that adds a function as the `build` of a method with these fields."""

    def add(build: Build) -> Build:
        method = Method(build, level, *fields, **more)
        METHODS[f"{level}/{method.key}"] = method
        return build

    return add


on_logits, on_heads = partial(_method, LOGITS), partial(_method, HEADS)


def logits_of(side: Side) -> Tensor:
    """Return a side's logits; a Head's bias and scale are ignored, since no case has them."""
    return F.linear(side.hidden, side.weight) if isinstance(side, Head) else side


def after_heads(loss: Loss) -> Loss:
    """Return a loss of logits or Heads, which passes the logits of both sides to `loss`."""
    return lambda student, teacher, labels: loss(logits_of(student), logits_of(teacher), labels)


def needs(module: str, *divergences: str, gpu: bool = False) -> WhyNot:
    """Return the `why_not` of a loss that needs a module and has these divergences; none: any."""

    def why_not(case: Case) -> str | None:
        if divergences and case.divergence not in divergences:
            return f"it has no {case.divergence}"
        if gpu and case.device != "cuda":
            return "its kernels need a GPU"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"not installed (no module named {error.name!r})"
        except Exception as error:  # what is installed may fail on this machine
            return f"cannot be imported: {one_line(error)}"
        return None

    return why_not


def one_line(error: Exception) -> str:
    """Return type and message of an exception without line breaks, cut at 280 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:280]
