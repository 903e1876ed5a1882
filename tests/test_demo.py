"""The demo: it runs, both curves coincide, the picture is there; bad options cost nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(autouse=True)
def packages() -> None:
    for name in ("transformers", "mistral_common", "matplotlib"):
        pytest.importorskip(name, reason=f"the demo needs {name} (demo/requirements.txt)")


@pytest.mark.slow
# Out of place (the default) · the gradient over the student's own logits.
@pytest.mark.parametrize("inplace", [False, True])
def test_curves_coincide(tmp_path: Path, inplace: bool) -> None:
    picture = tmp_path / "curves.png"
    done = run("--steps", 3, "--output", picture, *(["--inplace"] if inplace else []))
    assert done.returncode == 0, done.stderr
    difference = re.search(r"curves differ by at most (\S+)\.\n", done.stdout)
    assert difference, done.stdout
    assert float(difference[1]) < 2e-3
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    memory = {
        name: float(mib) for name, mib in re.findall(r"^(\w+) .* ([\d.]+) MiB", done.stdout, re.M)
    }
    assert memory["KDLoss"] < (1 if inplace else 129)
    assert memory["eager"] > 500


@pytest.mark.slow
# Out of range · not a number · a folder that is not there · no picture format · unknown.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--output", "missing/a.png"], "--output cannot be written: 'missing/a.png'"),
        (["--output", "a.txt"], "--output must end in .png, .pdf or .svg; got 'a.txt'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"demo: {message}")
    assert done.stderr.count("\n") == 1
