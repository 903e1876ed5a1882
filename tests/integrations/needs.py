"""Skip tests of a missing framework; with FUSED_KD_ALL_FRAMEWORKS=1, as in CI, they fail."""

from __future__ import annotations

import ast
import importlib
import os
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


def need_functions(package: str, path: str, *names: str, **used: Any) -> dict[str, Any]:
    """Return functions of one file of a package, methods included, by name.

    Only these definitions are executed, without their decorators, so that the file's imports are
    not needed; without the package skip the calling module, or fail.

    Args:
        package: the distribution.
        path: of the file in it.
        names: of the functions.
        used: the global names that they use.
    """
    try:
        source = Path(str(distribution(package).locate_file(path))).read_text()
    except ImportError as error:
        missing(error)
        raise
    found = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)]
    chosen = [next(x for x in found if x.name == name) for name in names]
    for function in chosen:
        function.decorator_list = []
    module = ast.Module(body=list(chosen), type_ignores=[])
    lazy = annotations.compiler_flag  # the annotations' names need not exist
    space = {"torch": torch, **used}
    exec(compile(module, path, "exec", flags=lazy, dont_inherit=True), space)
    return {name: space[name] for name in names}


def missing(error: ImportError) -> None:
    """Skip the module that is being collected, or the test; return if FUSED_KD_ALL_FRAMEWORKS=1.

    The caller then raises the error.
    """
    if os.environ.get("FUSED_KD_ALL_FRAMEWORKS") != "1":
        pytest.skip(str(error), allow_module_level=True)
