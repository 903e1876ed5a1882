"""Write docs/api.md from the docstrings: ``make api``, or ``python docs/make_api.py``.

griffe parses the sources, so no framework has to be installed; fused_kd itself is imported for the
signatures and docstrings that it completes, those with ``**keywords``.
"""

import inspect
import re
import textwrap
from pathlib import Path

import griffe

import fused_kd

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"


def page() -> str:
    """Return the text of the page."""
    package = griffe.load("fused_kd", search_paths=[ROOT])
    lines = ["# API", "Made from the docstrings by `make api`: edit those."]
    adapters = [x for name, x in sorted(package["integrations"].modules.items()) if name[0] != "_"]
    teachers = [package["teachers"], *(package["teachers"][x] for x in ("formats", "servers"))]
    for module in [
        package,
        *teachers,
        package["objectives"],
        package["plan"],
        package["testing"],
        *adapters,
    ]:
        lines += [f"## {module.path}", _prose(module.docstring.value)]
        for item in _public(module):
            lines += _entry(item)
            if item.is_class:
                lines += [line for x in _public(item) for line in _entry(x, f"{item.name}.")]
    return "\n\n".join(lines) + "\n"


def _public(owner: griffe.Object) -> list[griffe.Object]:
    """Return the documented public classes and functions: of `__all__`, or defined there."""
    names = owner.exports or [name for name, x in owner.members.items() if not x.is_alias]
    items = [owner[str(name)] for name in names if str(name)[0] != "_"]
    items = [x.final_target if x.is_alias else x for x in items]
    return [x for x in items if (x.is_class or x.is_function) and x.docstring]


def _entry(item: griffe.Object, owner: str = "") -> list[str]:
    """Return heading, signature and sections of a class, function or method, as Markdown."""
    fields = [x for x in item.attributes.values() if "property" not in x.labels]
    shown = [f"{x.name}: {x.annotation}" + (f" = {x.value}" if x.value else "") for x in fields]
    signature = item.signature() or f"{item.name}({', '.join(shown)})"
    if "{keywords}" in item.docstring.value:
        imported = getattr(fused_kd, item.name)
        item.docstring.value = inspect.cleandoc(imported.__doc__)
        signature = re.sub("(: |-> )'(.+?)'", r"\1\2", f"{item.name}{inspect.signature(imported)}")
    unbroken = re.sub("(?<!,) ", "\0", signature)
    code = textwrap.fill(unbroken, 100, subsequent_indent="    ").replace("\0", " ")
    lines = [f"{'####' if owner else '###'} {owner}{item.name}", f"```python\n{code}\n```"]
    for section in item.docstring.parse("google", warnings=False, returns_multiple_items=False):
        if section.kind.value == "text":
            lines.append(_prose(section.value))
            continue
        terms = [getattr(x, "name", "") or f"{x.annotation or ''}" for x in section.value]
        texts = [_markdown(x.description) for x in section.value]
        items = [f"* `{x}`: {y}" if x else f"* {y}" for x, y in zip(terms, texts, strict=True)]
        items = [textwrap.fill(x, 120, subsequent_indent="  ") for x in items]
        lines += [f"**{section.kind.value.capitalize()}**", "\n".join(items)]
    return lines


def _prose(text: str) -> str:
    """Return reStructuredText as Markdown, with indented blocks as code."""
    blocks = re.split(r"\n\n(?=\S)|(?<=\S)\n\n(?=    )", text)
    return "\n\n".join(
        f"```\n{textwrap.dedent(x)}\n```" if x[0] == " " else _markdown(x) for x in blocks
    )


def _markdown(text: str) -> str:
    """Return reStructuredText's roles and literals as Markdown's code."""
    return re.sub(r"::$", ":", re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", text).replace("``", "`"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
