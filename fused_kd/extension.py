"""Loads the compiled module once, and keeps the reason where it can't.

``import fused_kd`` works without it; ``python -m fused_kd.env`` prints the reason.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from fused_kd import ops  # noqa: F401  the schemas come before their implementations

_module: ModuleType | None = None
_reason: str | None = None
_tried = False


def load() -> ModuleType | None:
    """The module ``fused_kd._C``, whose import registers the operators, or None."""
    global _module, _reason, _tried
    if not _tried:
        _tried = True
        try:
            _module = import_module("fused_kd._C")
        except ImportError as error:
            _reason = _why_missing(error)
    return _module


def why_not() -> str | None:
    """None if the compiled module is loaded, else one sentence that says why it is not."""
    load()
    return _reason


def build_info() -> dict[str, object] | None:
    """Compiler, torch at build time, instruction sets and the one in use; None without the module.

    Raises:
        RuntimeError: FUSED_KD_CPU names an instruction set that this processor lacks.
    """
    module = load()
    return None if module is None else module.build_info()


def _why_missing(error: ImportError) -> str:
    note = Path(__file__).with_name("_not_built.txt")
    if note.exists():
        return f"the compiled module is not there: {note.read_text().strip()}"
    built = any(Path(__file__).parent.glob("_C.*"))
    what = "does not load" if built else "was not built"
    return f"the compiled module {what}: {error}"
