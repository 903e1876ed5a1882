"""The backends and instruction sets that are tested, and the number of threads."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from fused_kd import extension
from fused_kd.backends import why_not
from fused_kd.options import BACKENDS, Formula, KDOptions, temperature_tensor


def _parameter(name: str, reason: str | None) -> Any:
    return pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])


_REASONS = {name: why_not(name, "cpu") for name in BACKENDS}
#: The backends to compare with the reference on CPU tensors: "cpu", skipped with the reason if it
#: cannot run, and those of a GPU that run here, in an interpreter or emulator.
FAST = [
    _parameter(name, reason and f"backend {name}: {reason}")
    for name, reason in _REASONS.items()
    if name == "cpu" or (name != "reference" and reason is None)
]
HERE = ["reference", *FAST]
needs_cpu = pytest.mark.skipif(
    _REASONS["cpu"] is not None, reason=f"backend cpu: {_REASONS['cpu']}"
)


def instruction_sets(among: Container[str] | None = None) -> list[Any]:
    """Return the compiled instruction sets as parameters; one that this CPU lacks is skipped.

    Without the compiled module: "generic" alone. `among`: leave out the others.
    """
    info: Any = extension.cpu.build_info() or {"instruction_sets": {"generic": True}}
    return [
        _parameter(name, None if runs else f"no {name} here")
        for name, runs in info["instruction_sets"].items()
        if among is None or name in among
    ]


def formula_of(**keywords: Any) -> Formula:
    """Return the Formula that kd_loss passes to row kernels for these keywords."""
    options = KDOptions(**keywords)
    temperature = temperature_tensor(options)
    return Formula(
        options.divergence, temperature, options.beta, options.soft_scale, options.label_smoothing
    )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set torch's number of threads within the context; restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Set one thread within the context, which is fastest for small tensors."""
    return threads(1)
