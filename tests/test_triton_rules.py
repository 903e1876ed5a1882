"""The Triton kernels' divergences: one class each, and nothing else distinguishes them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fused_kd.backends.triton import classes, elements, formulas, kernels, launch, rules
from fused_kd.divergences import DIVERGENCES

MODULES = (classes, elements, formulas, kernels, launch, rules)
#: The most parameters of a function. Only the kernels have more: a launch passes single values.
MOST_PARAMETERS = 8


def _tree(module: ModuleType) -> ast.Module:
    assert module.__file__ is not None
    return ast.parse(Path(module.__file__).read_text(encoding="utf-8"))


def _functions() -> Iterator[Any]:
    """Yield the syntax trees of the functions that Triton compiles."""
    for module in MODULES:
        for node in ast.walk(_tree(module)):
            decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            if any("triton.jit" in ast.unparse(decorator) for decorator in decorators):
                yield node


def test_every_divergence_has_its_rule() -> None:
    assert [rules.rule_of(code).name for code in range(len(DIVERGENCES))] == list(DIVERGENCES)
    assert not rules.rule_of(rules.NONE).soft


def test_a_divergence_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "DIVERGENCES", (*DIVERGENCES, "toy"))
    with pytest.raises(ImportError, match="have no rule for toy"):
        rules._in_order()


@pytest.mark.parametrize("module", [classes, elements, formulas, kernels, launch])
def test_only_rules_know_divergences_by_name(module: ModuleType) -> None:
    names_of_rules = [type(rules.rule_of(code)).__name__ for code in range(rules.NONE + 1)]
    known = {*DIVERGENCES, *names_of_rules, "DIVERGENCES"}
    for node in ast.walk(_tree(module)):
        names = [node.id] if isinstance(node, ast.Name) else []
        names += [node.value] if isinstance(node, ast.Constant) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        assert not known & {name for name in names if isinstance(name, str)}, ast.unparse(node)
        is_rule = isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("rule")
        assert not (is_rule and node.attr == "name"), ast.unparse(node)


def test_functions_take_few_parameters() -> None:
    functions = list(_functions())
    assert len(functions) > 50
    many = {f.name for f in functions if len(f.args.args) > MOST_PARAMETERS}
    assert many == {"_kd_rows_kernel", "_kd_scale_kernel"}


# ------------------------------------------------------------- what is compiled is found by its key


def _key() -> str:
    """Return the kernel's key, computed again, by which Triton finds what it compiled."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "hash") and hasattr(value, "cache_key"):
                value.hash = None
    return str(kernels._kd_rows_kernel.cache_key)


@pytest.mark.parametrize(
    ("member", "other"),
    [("add", rules.ReverseKL.add), ("gradient", rules.TVD.gradient), ("infinite", rules.NO)],
)
def test_a_changed_rule_is_compiled_again(
    member: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Formulas are values to Triton, which hashes only the text of the rule.
    before = _key()
    with monkeypatch.context() as patch:
        patch.setattr(rules.ForwardKL, member, other)
        assert _key() != before
    assert _key() == before
