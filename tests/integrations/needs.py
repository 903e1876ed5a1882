"""Tests of a framework are skipped where it is missing; CI sets a variable, and then they fail."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

from fused_kd.integrations._common import frameworks


def need(package: str) -> ModuleType:
    """Import a framework, or a package that its users have; skip the module that asks."""
    try:
        if package not in frameworks.FRAMEWORKS:
            return importlib.import_module(package)
        return frameworks.need(package)
    except ImportError as error:
        if os.environ.get("FUSED_KD_ALL_FRAMEWORKS") == "1":
            raise
        pytest.skip(str(error), allow_module_level=True)
