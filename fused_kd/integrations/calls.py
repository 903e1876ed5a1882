"""What a student was called with, recorded by hooks and found again by the logits it returned."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .heads import output_of, passes_on
from .models import unwrapped

#: What a model that generates is called with, under its names in versions of transformers.
CACHES = ("past_key_values", "cache", "cache_params")


@dataclass
class Call:
    """One call of the student."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    autocast: torch.dtype | None = None  # in force when the lm_head was reached
    is_headless: bool = False  # whether an lm_head that is left out passed its input on
    logits: Callable[[], Tensor | None] = lambda: None  # a weak reference to what it returned

    def again(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Enter the same autocast: Trainer's mixed precision ends with the student's forward."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def named(self, model: nn.Module) -> dict[str, Any]:
        """Return all arguments by the names that the model's forward gives them."""
        names = inspect.signature(unwrapped(model).forward).parameters
        return {**dict(zip(names, self.arguments, strict=False)), **self.keywords}


@dataclass
class _Last:
    """Calls since the last loss, in one gradient mode."""

    count: int = 0
    call: Call | None = None


class Calls:
    """The student's last call with gradients enabled and its last one without.

    Copies of the student, deep or unpickled, have these hooks too: their recorder records nothing.
    """

    def __init__(self, is_recording: bool = True) -> None:
        self._is_recording = is_recording
        self._last: dict[bool, _Last] = {}
        self._current: Call | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (False,)

    def listen(self, student: nn.Module) -> list[Callable[[], None]]:
        """Register the hooks; return what removes them."""
        hooks = [
            student.register_forward_pre_hook(self.before_student, with_kwargs=True),
            student.register_forward_hook(self.after_student),
        ]
        head = output_of(student)
        if head is not None:
            hooks.append(head.register_forward_pre_hook(self.before_head))
        return [hook.remove for hook in hooks]

    def before_student(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        """Begin a call; one with a cache belongs to generation, and to no loss."""
        is_generation = any(keywords.get(name) is not None for name in CACHES)
        self._current = None
        if self._is_recording and not is_generation:
            self._current = Call(arguments, keywords)

    def before_head(self, module: nn.Module, arguments: Any) -> None:
        """Record the autocast, and whether the head will pass its input on."""
        if self._current is None:
            return
        kind = arguments[0].device.type
        enabled = torch.is_autocast_enabled(kind)
        self._current.autocast = torch.get_autocast_dtype(kind) if enabled else None
        self._current.is_headless = passes_on(module)

    def after_student(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """End a call."""
        if not self._is_recording:
            return
        last = self._last.setdefault(torch.is_grad_enabled(), _Last())
        last.count += 1
        if self._current is not None:
            logits = logits_in(output)
            if isinstance(logits, Tensor):
                self._current.logits = weakref.ref(logits)
            last.call, self._current = self._current, None

    def take(self, logits: Tensor) -> Call:
        """Return the call that gave these logits, and forget all.

        Wrappers may replace what the student returned (DistributedDataParallel does), so logits
        that are not known by identity are those of the only call since the last loss.

        Raises:
            RuntimeError: The student was not called, or more than once.
        """
        seen, self._last = self._last, {}
        for last in seen.values():
            if last.call is not None and last.call.logits() is logits:
                return last.call
        last = seen.get(torch.is_grad_enabled(), _Last())
        if last.call is None:
            raise RuntimeError(
                "the student that this DistillationLoss was given has not been called: give it the "
                "model that the Trainer trains"
            )
        if last.count > 1:
            raise RuntimeError(
                f"the student was called {last.count} times since the last loss, and these outputs "
                "are not those of its last call: the teacher would be called with other inputs; "
                "compute the loss of each call before the next one"
            )
        return last.call


def logits_in(output: Any) -> Any:
    """Return a model's logits; None if its output has none."""
    return output.get("logits") if isinstance(output, dict) else output[0]
