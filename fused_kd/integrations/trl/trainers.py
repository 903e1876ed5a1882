"""What is asked of a trainer of TRL, and refused, before anything in it is replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..frameworks import FRAMEWORKS

#: The oldest version of TRL with the functions that are replaced.
OLDEST = "1.10.0"


def class_of(trainer: object, name: str) -> Any:
    """TRL's class of that name from which the trainer is made; None: it is another trainer.

    By name, since the classes have moved between TRL's modules.
    """
    classes = (c for c in type(trainer).__mro__ if c.__module__.split(".")[0] == "trl")
    return next((c for c in classes if c.__name__ == name), None)


def models_of(trainer: Any) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, without what wraps them."""
    unwrap = trainer.accelerator.unwrap_model
    return unwrap(trainer.model), unwrap(trainer.teacher_model)


def check_inherited(trainer: object, kind: str, method: str) -> None:
    """Refuse a subclass with a `method` of its own, which would no longer be called.

    Raises:
        TypeError: The same; or TRL's own class has no such method, in other versions.
    """
    if not hasattr(class_of(trainer, kind), method):
        raise TypeError(f"{kind} has no {method} {unknown_version()}")
    if getattr(type(trainer), method) is not getattr(class_of(trainer, kind), method):
        raise TypeError(
            f"{type(trainer).__name__}.{method} is not {kind}'s: fused_kd would replace it by "
            f"{kind}'s; call fused_kd in it instead"
        )


def check_arguments(
    function: str, found: Iterable[str], required: set[str], optional: set[str]
) -> None:
    """Refuses a function of TRL with other arguments than ours knows what to do with."""
    names = set(found)
    has, lacks = sorted(names - required - optional), sorted(required - names)
    wrong = [f"{verb} {what}" for verb, what in (("has", has), ("lacks", lacks)) if what]
    if wrong:
        raise TypeError(f"{function} {' and '.join(wrong)} {unknown_version()}")


def unknown_version() -> str:
    """Return the end of a message: the installed version, and those that work."""
    trl = FRAMEWORKS["trl"]
    return f"in trl {trl.installed}; fused_kd works with trl {OLDEST} to {trl.tested}"


def as_tensor(loss: object) -> Tensor:
    """The loss of a call without return_parts."""
    assert isinstance(loss, Tensor)
    return loss
