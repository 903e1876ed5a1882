"""Known frameworks: their tested versions, modules and pages; what is said of a missing one."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fused_kd import env, integrations
from fused_kd.integrations._common import frameworks
from fused_kd.integrations._common.frameworks import FRAMEWORKS, Framework

ROOT = Path(__file__).resolve().parents[1]


def test_env_lists_every_framework_and_whether_its_version_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"trl": "1.16.0", "lightning": "0.1", "axolotl": "0.19.0"}
    monkeypatch.setattr(frameworks, "version", installed.__getitem__)
    monkeypatch.setattr(frameworks, "PackageNotFoundError", KeyError)
    shown = env.report()["frameworks"]
    assert list(shown) == [framework.distribution for framework in FRAMEWORKS.values()]
    assert shown["trl"] == "1.16.0; tested with this version"
    assert shown["lightning"] == "0.1; tested with 2.6.6"
    assert shown["accelerate"].startswith("not installed; tested with ")
    assert shown["axolotl"] == "0.19.0; loss tested with this version"


def test_a_missing_framework_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Framework("no_such_package", "no-such-package", "trl", "1.0")
    monkeypatch.setitem(FRAMEWORKS, "no_such_package", missing)
    with pytest.raises(ImportError, match=r"integrations\.trl needs no-such-package: pip install"):
        frameworks.need("no_such_package")


@pytest.mark.parametrize(("file", "loss_only"), [("frameworks", False), ("losses", True)])
def test_the_tested_versions_are_those_that_ci_installs(file: str, loss_only: bool) -> None:
    text = (ROOT / "requirements" / f"{file}.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))
    tested = {f.distribution: f.tested for f in FRAMEWORKS.values() if f.loss_only == loss_only}
    assert tested.items() <= pins.items()


def test_there_is_one_module_a_framework_and_the_pages_import_nothing_private() -> None:
    modules = {module.name for module in pkgutil.iter_modules(integrations.__path__)}
    of_frameworks = {framework.module for framework in FRAMEWORKS.values() if framework.module}
    assert modules == of_frameworks | {"_common", "loop", "student_teacher"}
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert "_common" not in page.read_text(), page


def test_every_module_of_a_framework_has_a_page() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    links = re.findall(r"\]\(howto/(\w+)\.md\)", page)
    assert all((ROOT / "docs" / "howto" / f"{link}.md").is_file() for link in links)
    for framework in FRAMEWORKS.values():
        name = f"fused_kd.integrations.{framework.module}"
        assert not framework.module or find_spec(name) is not None, name
        assert any(framework.module in (ROOT / f"docs/howto/{x}.md").read_text() for x in links)


def test_importing_the_package_imports_no_framework() -> None:
    modules = "fused_kd.integrations.liger, fused_kd.integrations.model_optimizer"
    code = f"import sys, {modules}; print(*({set(FRAMEWORKS)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
