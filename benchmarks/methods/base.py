"""A method: one way to compute the loss, ours, in plain torch, or a peer's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fused_kd import Head, TopK
from fused_kd.sides import Teacher

from ..cases import HEADS, LOGITS, TOPK, Case

#: Called with student, teacher and labels (N,). Both sides are logits (N, V) at level "logits",
#: and Heads, hidden (N, H) and weight (V, H), at level "heads"; at level "topk" the student's are
#: logits, the teacher is a TopK (N, K). Returns the 0-d mean over the rows.
Loss = Callable[..., Tensor]
Build = Callable[[Case], Loss]
#: What a method at level "topk" does with the teacher's other entries: the tail of its TopK, or
#: DENSE: there is no TopK, it is called with all logits.
BUCKET, RENORMALIZE, ZERO, DENSE = "bucket", "renormalize", "zero", "dense"
#: Returns why a method cannot run a case (not installed, no such divergence, needs a GPU), or None.
WhyNot = Callable[[Case], str | None]


@dataclass(frozen=True)
class Method:
    """One loss that can be measured."""

    build: Build  # called only if `why_not` returns None
    level: str  # of its arguments: "logits", "heads" or "topk"
    key: str  # its name in options and results
    title: str  # its name in tables and pictures
    why_not: WhyNot = lambda case: None
    compiles: bool = False  # its first call on a size takes seconds
    is_ours: bool = False  # it must be right, and others are compared with it
    compared: tuple[str, ...] = ("loss", "gradients")  # with the float64 reference
    nearest: str = ""  # what it computes, in words, if that is not the case's loss
    computes: Callable[[Case], dict[str, Any]] = lambda case: case.keywords  # as kd_loss's keywords
    tail: str = BUCKET  # at level "topk", and what float64 is computed with


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
on_topk = partial(_method, TOPK)


def logits_of(side: Teacher) -> Tensor | TopK:
    """Return a side's logits, or the TopK that it is.

    A Head's bias and scale are ignored, since no case has them.
    """
    return F.linear(side.hidden, side.weight) if isinstance(side, Head) else side


def after_heads(loss: Loss) -> Loss:
    """Return a loss of logits or Heads, which passes the logits of both sides to `loss`."""
    return lambda student, teacher, labels: loss(logits_of(student), logits_of(teacher), labels)


def load(module: str) -> Any:
    """Import a module by its name, or, as "distribution:path", one file of a distribution.

    A file is loaded without its package, which may need what is not installed.
    """
    package, _, path = module.partition(":")
    if not path:
        return importlib.import_module(module)
    location = distribution(package).locate_file(path)
    spec: Any = spec_from_file_location(f"{package.replace('-', '_')}_file", str(location))
    spec.loader.exec_module(loaded := module_from_spec(spec))
    return loaded


def needs(module: str, *divergences: str, gpu: bool = False) -> WhyNot:
    """Return the `why_not` of a loss that needs a module and has these divergences; none: any.

    module: as for `load`.
    """

    def why_not(case: Case) -> str | None:
        if divergences and case.divergence not in divergences:
            return f"it has no {case.divergence}"
        if gpu and case.device != "cuda":
            return "its kernels need a GPU"
        try:
            load(module)
        except ModuleNotFoundError as error:
            return f"not installed (no module named {error.name!r})"
        except Exception as error:  # what is installed may fail on this machine
            return f"cannot be imported: {one_line(error)}"
        return None

    return why_not


def one_line(error: Exception) -> str:
    """Return type and message of an exception without line breaks, cut at 280 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:280]
