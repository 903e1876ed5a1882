"""Measure the English of the repository: ``python tests/english.py [commit]``.

Prints for each folder: the share of function docstrings that begin with a verb; homemade words in
docstrings, comments and pages, per 10,000 words; and the number of names in code that do not name
the thing. With a commit, "12.3 > 4.5" is before > now.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from test_docstrings import VERBS  # the only list of verbs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fused_kd", "csrc", "docs", "benchmarks", "demo", "examples", "tests", "other")
WORDS = {  # patterns; the comments say what to write instead
    "beside": r"beside",  # next to, alongside
    "anew": r"anew",  # again
    "lies, stands": r"(?<!not )(lie|lies|stands?(?! (for|in)))",  # is stored, is
    "who, nobody": r"who|nobody|everyone|everybody",  # the function, no term, all threads
    "whatever": r"whatever|wherever|whichever",  # any, regardless of
    "so many": r"(so|as) many(?! as)",  # that many, the number
    "far memory": r"(far|near|other) memory",  # global, shared, separate memory
    "visit": r"visit(s|ed|ing)?",  # a pass, to process
    "where": r"where",  # if, when, for
    "entrant": r"(entrant|contestant)s?",  # method, peer
    "lottery": r"lottery",  # undetermined
    "by itself": r"(by|of) (itself|its own|themselves|their own)",  # separately, its own
    "second-level": r"(second|third)-level cache",  # L2, L3
    "room": r"room",  # space, memory
    "told, asks": r"taught|told|tells?|knows?|asks?|asked|meets?",  # code is not a person
}
PATTERNS = {name: re.compile(rf"\b({pattern})\b", re.I) for name, pattern in WORDS.items()}
NAMES = re.compile(r"\b(found|wide|taught|one|made|told|given|here)\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def files(commit: str | None) -> Iterator[tuple[str, str]]:
    """Yield path and text of a commit's sources and pages; None: those tracked, as they are now."""
    if commit is None:  # the working tree as a commit; "" if nothing was changed
        commit = subprocess.check_output(["git", "stash", "create"], cwd=ROOT, text=True).strip()
    archive = subprocess.check_output(["git", "archive", commit or "HEAD"], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and member.name.endswith((".py", ".md", ".h", ".cpp", ".cu", ".cuh")):
                yield member.name, file.read().decode()


def python_prose(text: str, count: Counter[str]) -> str:
    """Return a Python file's docstrings and comments; count docstrings, verbs and names."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    prose = [x.string.lstrip("#: ") for x in tokens if x.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node) or ""
            prose.append(docstring)
            if docstring and isinstance(node, ast.FunctionDef):
                count["docstrings"] += 1
                count["verbs"] += docstring.split(maxsplit=1)[0].rstrip(".,:") in VERBS
        is_stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        name = node.id if is_stored else getattr(node, "arg", None) or ""
        count["names"] += NAMES.fullmatch(name) is not None
    return "\n".join(prose)


def measure(commit: str | None) -> dict[str, Counter[str]]:
    """Return the counts of every folder and of "all", in a commit; None: in the working tree."""
    counts = {folder: Counter[str]() for folder in (*FOLDERS, "all")}
    for path, text in files(commit):
        folder = "docs" if path == "README.md" else path.partition("/")[0]
        count = counts[folder if folder in FOLDERS else "other"]
        if path.endswith(".py"):
            text = python_prose(text, count)
        elif path.endswith(".md"):
            text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.S | re.M)
        else:
            count["names"] += len(NAMES.findall(COMMENT.sub("", text)))
            text = "\n".join(COMMENT.findall(text))
        count["words"] += len(re.findall(r"[A-Za-z']+", text))
        for name, pattern in PATTERNS.items():
            count[name] += len(pattern.findall(text))
    for folder in FOLDERS:
        counts["all"].update(counts[folder])
    return counts


def figure(count: Counter[str], name: str) -> str:
    """Return one cell of the table: a share, a number, or a rate per 10,000 words."""
    if name == "verbs, %":
        return f"{100 * count['verbs'] / count['docstrings']:.0f}" if count["docstrings"] else "-"
    rate = 1e4 * count[name] / max(count["words"], 1)
    return str(count[name]) if name in ("words", "names") else f"{rate:.1f}"


def main() -> None:
    """Print the table of the working tree; with a commit as argument, its figures first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit", nargs="?", help="a commit to compare with")
    commit = parser.parse_args().commit
    measured = [measure(x) for x in dict.fromkeys((commit, None))]
    print(f"{'':<14}" + "".join(f"{folder:>15}" for folder in measured[0]))
    for name in ("verbs, %", *WORDS, "names", "words"):
        cells = (" > ".join(figure(m[folder], name) for m in measured) for folder in measured[0])
        print(f"{name:<14}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
