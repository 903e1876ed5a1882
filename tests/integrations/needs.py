"""Skip tests of a missing framework; with FUSED_KD_ALL_FRAMEWORKS=1, as in CI, they fail."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest

from fused_kd.integrations._common import frameworks


def need(package: str) -> ModuleType:
    """Return an imported framework or package; without it skip the calling module, or fail."""
    try:
        if package not in frameworks.FRAMEWORKS:
            return importlib.import_module(package)
        return frameworks.need(package)
    except ImportError as error:
        missing(error)
        raise


def need_file(package: str, path: str) -> ModuleType:
    """Return the module in one file of a package; without it skip the calling module, or fail."""
    try:
        location = distribution(package).locate_file(path)
    except ImportError as error:
        missing(error)
        raise
    spec = spec_from_file_location(f"own_{package.replace('-', '_')}", str(location))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing(error: ImportError) -> None:
    """Skip the module that is being collected, or the test; return if FUSED_KD_ALL_FRAMEWORKS=1.

    The caller then raises the error.
    """
    if os.environ.get("FUSED_KD_ALL_FRAMEWORKS") != "1":
        pytest.skip(str(error), allow_module_level=True)
