"""The compiled modules, each imported at most once; the reason is kept if that fails.

``import fused_kd`` works without them; ``python -m fused_kd.env`` prints the reasons.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from fused_kd import ops  # noqa: F401  schemas must be defined before their implementations


class Compiled:
    """A compiled module, whose import registers operators.

    Args:
        name: "_C" or "_cuda", a submodule of the package.
        note: a file in the package's folder; the build writes to it why the module is missing.
    """

    def __init__(self, name: str, note: str) -> None:
        self._name, self._note = name, note
        self._module: ModuleType | None = None
        self._reason: str | None = None
        self._tried = False

    def load(self) -> ModuleType | None:
        """Return the module, or None if it cannot be imported; only the first call tries."""
        if not self._tried:
            self._tried = True
            try:
                self._module = import_module(f"fused_kd.{self._name}")
            except Exception as error:  # any: the package works without the module
                self._reason = self._why_missing(error)
        return self._module

    def why_not(self) -> str | None:
        """Return None if the module can be imported, else the reason, one sentence."""
        self.load()
        return self._reason

    def build_info(self) -> dict[str, object] | None:
        """Return the build's versions and instruction sets as a dict; None without the module.

        Raises:
            RuntimeError: FUSED_KD_CPU names an unknown instruction set, or one that this processor
                lacks.
        """
        module = self.load()
        return None if module is None else module.build_info()

    def _why_missing(self, error: Exception) -> str:
        folder = Path(__file__).parent
        note = folder / self._note
        if note.exists():
            return f"the compiled module is not there: {note.read_text().strip()}"
        built = any(folder.glob(f"{self._name}.*"))
        what = "does not load" if built else "was not built"
        return f"the compiled module {what}: {error}"


cpu = Compiled("_C", "_not_built.txt")
cuda = Compiled("_cuda", "_cuda_not_built.txt")
