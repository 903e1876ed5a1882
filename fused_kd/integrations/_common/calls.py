"""The arguments of a student's calls, recorded by hooks and looked up by the logits returned."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .heads import output_of, passes_on
from .models import CACHES, names_of_arguments
from .outputs import logits_in


@dataclass
class Call:
    """The arguments of one call of the student, and what the hooks recorded in it."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    autocast: torch.dtype | None = None  # in force when the lm_head was reached
    is_headless: bool = False  # whether the lm_head returned its input, if it is bypassed
    logits: Callable[[], Tensor | None] = lambda: None  # a weak reference to the logits returned

    def again(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context with the call's autocast, which ended with the student's forward.

        It changes nothing if the call had none, or if the student names no lm_head.
        """
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def named(self, student: nn.Module) -> dict[str, Any]:
        """Return the call's arguments that are not None, by their names in the student's forward.

        Raises:
            TypeError: The call had more positional arguments than the forward has names.
        """
        names = names_of_arguments(student)
        if len(self.arguments) > len(names):
            raise TypeError(
                "the student must be called with arguments that its forward names, since the "
                f"teacher is called with them by name; it was called with {len(self.arguments)} "
                f"positional arguments, and its forward names {len(names)}: call it with keywords"
            )
        inputs = {**dict(zip(names, self.arguments, strict=False)), **self.keywords}
        return {name: value for name, value in inputs.items() if value is not None}


@dataclass
class _Last:
    """The calls since the last loss, either those with gradients enabled or those without."""

    count: int = 0  # of all calls
    call: Call | None = None  # the last one without a cache


class Calls:
    """A recorder of the student's last call with gradients enabled, and of its last one without.

    A copy of the student, deep or unpickled, has a copy of the recorder, which records nothing.
    """

    def __init__(self, is_recording: bool = True) -> None:
        self._is_recording = is_recording
        self._last: dict[bool, _Last] = {}
        self._current: Call | None = None
        self._taken: Callable[[], Tensor | None] = lambda: None  # the logits of the last loss

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the constructor and its argument for a copy, which records nothing."""
        return Calls, (False,)

    def listen(self, student: nn.Module) -> list[Callable[[], None]]:
        """Register hooks on the student and any lm_head; return functions that remove them."""
        hooks = [
            student.register_forward_pre_hook(self.before_student, with_kwargs=True),
            student.register_forward_hook(self.after_student),
        ]
        head = output_of(student)
        if head is not None:
            hooks.append(head.register_forward_pre_hook(self.before_head))
        return [hook.remove for hook in hooks]

    def before_student(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        """Start a call; one with a cache, as generate() makes, is counted but not kept."""
        is_generation = any(keywords.get(name) is not None for name in CACHES)
        self._current = None
        if self._is_recording and not is_generation:
            self._current = Call(arguments, keywords)

    def before_head(self, module: nn.Module, arguments: Any) -> None:
        """Record the autocast, and whether a bypassed lm_head returns its input."""
        if self._current is None:
            return
        kind = arguments[0].device.type
        enabled = torch.is_autocast_enabled(kind)
        self._current.autocast = torch.get_autocast_dtype(kind) if enabled else None
        self._current.is_headless = passes_on(module)

    def after_student(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Count the call, and keep it with a weak reference to its logits if it had no cache."""
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
        """Return the call that returned these logits, and drop all calls, also if this raises.

        Wrappers may replace the student's output (DistributedDataParallel does), so logits that
        are not known by identity are taken to be those of the only call since the last loss.

        Raises:
            RuntimeError: The student was not called, was called more than once, or with a cache;
                the loss of these logits was already computed; or this recorder is a copy.
        """
        seen, self._last = self._last, {}
        taken, self._taken = self._taken, weakref.ref(logits)
        for last in seen.values():
            if last.call is not None and last.call.logits() is logits:
                return last.call
        last = seen.get(torch.is_grad_enabled(), _Last())
        if last.count == 1 and last.call is not None:
            return last.call
        raise RuntimeError(self._why_not(last, taken() is logits))

    def _why_not(self, last: _Last, is_taken: bool) -> str:
        """Return the error message of take(); `is_taken`: the last loss was of the same logits."""
        if not self._is_recording:
            return (
                "this DistillationLoss is a copy, which does not record the student's calls: make "
                "another DistillationLoss of the student and the teacher"
            )
        if is_taken:
            return (
                "the loss of these outputs was computed already, and the student's inputs are not "
                "kept: call the student again for another loss"
            )
        if last.count == 0:
            return (
                "the student of this DistillationLoss has not been called since the last loss: "
                "create the DistillationLoss with the model that the Trainer trains"
            )
        if last.call is None:
            return (
                f"the student was called with a cache ({' or '.join(CACHES)}), as generate() does; "
                "its keys and values are not the teacher's: call the student with whole sequences"
            )
        return (
            f"the student was called {last.count} times since the last loss, and these outputs are "
            "not those of its last call, so the teacher would be called with other inputs: compute "
            "the loss of each call before the next one"
        )
