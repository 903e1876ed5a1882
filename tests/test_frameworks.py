"""Which frameworks are known, what is said of one that is missing, and the page of their runs."""

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
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples import __main__ as examples  # noqa: E402
from examples.__main__ import EXAMPLES, document_is_right  # noqa: E402


def test_env_lists_every_framework_and_whether_its_version_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frameworks, "version", {"trl": "1.16.0", "torchtune": "0.1"}.__getitem__)
    monkeypatch.setattr(frameworks, "PackageNotFoundError", KeyError)
    found = env.report()["frameworks"]
    assert list(found) == [framework.distribution for framework in FRAMEWORKS.values()]
    assert found["trl"] == "1.16.0; tested with this version"
    assert found["torchtune"] == "0.1; tested with 0.6.1"
    assert found["lightning"].startswith("not installed; tested with ")
    assert found["distillkit"] == "not installed; by signature only, never run with it"


def test_a_missing_framework_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Framework("no_such_package", "no-such-package", "trl", "1.0")
    monkeypatch.setitem(FRAMEWORKS, "no_such_package", missing)
    with pytest.raises(ImportError, match=r"integrations\.trl needs no-such-package: pip install"):
        frameworks.need("no_such_package")


def test_the_tested_versions_are_those_that_ci_installs() -> None:
    text = (ROOT / "requirements" / "frameworks.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))
    tested = {f.distribution: f.tested for f in FRAMEWORKS.values() if f.tested}
    assert {name: pins.get(name) for name in tested} == tested


def test_every_integration_has_its_modules_example_and_page() -> None:
    for framework in FRAMEWORKS.values():
        module = f"fused_kd.integrations.{framework.module}"
        assert not framework.module or find_spec(module) is not None, module
    compared = {package for package, *_ in EXAMPLES.values()}
    assert compared == {package for package, f in FRAMEWORKS.items() if f.tested}
    for name in EXAMPLES:
        assert (ROOT / "examples" / f"{name}.py").is_file(), name
    page = (ROOT / "docs" / "integrations.md").read_text()
    for link in re.findall(r"\]\((howto/[\w.]+)\)", page):
        assert (ROOT / "docs" / link).is_file(), link


def test_there_is_one_module_a_framework_and_the_pages_import_nothing_private() -> None:
    modules = {module.name for module in pkgutil.iter_modules(integrations.__path__)}
    of_frameworks = {framework.module for framework in FRAMEWORKS.values() if framework.module}
    assert modules == of_frameworks | {"_common", "loop", "student_teacher"}
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert "_common" not in page.read_text(), page


def test_the_table_of_runs_is_that_of_the_committed_results() -> None:
    assert document_is_right(), "python -m examples --write"


def test_without_a_framework_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(examples, "find_spec", lambda package: None)
    monkeypatch.setattr(examples, "ROOT", tmp_path)
    assert examples.main(["--write"]) == 1
    out = capsys.readouterr().out
    assert "left out: liger: not installed: liger_kernel, transformers, mistral_common\n" in out
    assert out.endswith("nothing was measured: nothing is written\n")
    assert not list(tmp_path.iterdir())


def test_an_example_is_left_out_if_any_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """transformers alone is not enough for its Trainer."""
    monkeypatch.setattr(examples, "find_spec", lambda package: package != "accelerate" or None)
    monkeypatch.setattr(examples, "ROOT", tmp_path)
    assert examples.main(["transformers_trainer"]) == 0
    assert capsys.readouterr().out == "left out: transformers_trainer: not installed: accelerate\n"


def test_importing_the_package_imports_no_framework() -> None:
    modules = "fused_kd.integrations.liger, fused_kd.integrations.torchtune"
    code = f"import sys, {modules}; print(*({set(FRAMEWORKS)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
