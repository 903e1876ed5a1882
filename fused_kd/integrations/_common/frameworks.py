"""The supported frameworks: tested and installed versions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType


@dataclass(frozen=True)
class Framework:
    """A framework that the tests compare with: a row of ``python -m fused_kd.env``."""

    package: str  # as imported
    distribution: str  # as installed
    module: str  # of fused_kd.integrations; "" if none is needed
    tested: str  # version that the tests install
    loss_only: bool = False  # whether only the file of its loss is loaded, without dependencies

    @property
    def installed(self) -> str | None:
        """Return the installed version, without an import; None if it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    @property
    def status(self) -> str:
        """Return the installed and the tested version as text: "1.14.0; tested with 1.16.0"."""
        installed = self.installed
        version = "this version" if installed == self.tested else self.tested
        what = "loss tested" if self.loss_only else "tested"
        return f"{installed or 'not installed'}; {what} with {version}"


FRAMEWORKS = {
    framework.package: framework
    for framework in (
        Framework("transformers", "transformers", "transformers", "5.24.0"),
        Framework("trl", "trl", "trl", "1.16.0"),
        Framework("liger_kernel", "liger-kernel", "liger", "0.8.5"),
        Framework("modelopt", "nvidia-modelopt", "model_optimizer", "0.47.0"),
        Framework("lightning", "lightning", "lightning", "2.6.6"),
        Framework("accelerate", "accelerate", "", "1.15.0"),
        Framework("nemo_automodel", "nemo-automodel", "automodel", "0.7.0", loss_only=True),
        Framework("axolotl", "axolotl", "axolotl", "0.19.0", loss_only=True),
        Framework("verl", "verl", "verl", "0.9.1", loss_only=True),
    )
}


def need(package: str) -> ModuleType:
    """Import and return the package of this name, a key of FRAMEWORKS.

    Raises:
        ImportError: The package is not installed or fails to import; the message names what to
            install, and the cause.
    """
    framework = FRAMEWORKS[package]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        module = f"fused_kd.integrations.{framework.module}".rstrip(".")
        raise ImportError(
            f"{module} needs {framework.distribution}: "
            f"pip install {framework.distribution} ({error})"
        ) from error
