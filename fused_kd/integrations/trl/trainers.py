"""Checks of a trainer of TRL before its attributes are replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .._common.frameworks import FRAMEWORKS

#: The oldest version of TRL with the functions that are replaced.
OLDEST = "1.10.0"


def class_of(trainer: object, name: str) -> Any:
    """Return the class `name` of TRL from which the trainer inherits; None if there is none.

    The class is looked up by name, since TRL has moved its classes between modules.
    """
    classes = (c for c in type(trainer).__mro__ if c.__module__.split(".")[0] == "trl")
    return next((c for c in classes if c.__name__ == name), None)


def models_of(trainer: Any) -> tuple[nn.Module, nn.Module]:
    """Return a trainer's student and teacher, without wrappers for DDP, FSDP1 and DeepSpeed."""
    teacher: nn.Module = trainer.accelerator.unwrap_model(trainer.teacher_model)
    return student_of(trainer), teacher


def student_of(trainer: Any) -> nn.Module:
    """Return a trainer's student, as :func:`models_of`."""
    student: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    return student


def check_inherited(trainer: object, kind: str, method: str) -> None:
    """Refuse a subclass that overrides a method, which would no longer be called.

    Raises:
        TypeError: The trainer's class overrides `method`; or TRL's class `kind` has no such method,
            as in other versions.
    """
    if not hasattr(class_of(trainer, kind), method):
        raise TypeError(f"{kind} has no {method} {unknown_version()}")
    if getattr(type(trainer), method) is not getattr(class_of(trainer, kind), method):
        raise TypeError(
            f"trainer must not override {kind}.{method}, which fused_kd replaces; got "
            f"{type(trainer).__name__}.{method}: remove it, or call KDLoss in it"
        )


def check_arguments(
    function: str, names: Iterable[str], required: set[str], optional: set[str]
) -> None:
    """Refuse a function of TRL whose arguments are not those of the known versions.

    Args:
        function: its name, for the message.
        names: its arguments.
        required: the arguments that it must have.
        optional: the arguments that it may have.

    Raises:
        TypeError: The function has an argument that is neither, or lacks a required one.
    """
    actual = set(names)
    has, lacks = sorted(actual - required - optional), sorted(required - actual)
    wrong = [f"{verb} {what}" for verb, what in (("has", has), ("lacks", lacks)) if what]
    if wrong:
        raise TypeError(f"{function} {' and '.join(wrong)} {unknown_version()}")


def unknown_version() -> str:
    """Return the end of a message: the installed and the supported versions of TRL."""
    trl = FRAMEWORKS["trl"]
    return f"in trl {trl.installed}; fused_kd works with trl {OLDEST} to {trl.tested}: install one"
