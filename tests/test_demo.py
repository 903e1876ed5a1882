"""The demo: it runs, the curves coincide, the picture is there; bad options cost nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.processes import run_python

from fused_kd import KDLoss
from fused_kd.options import MIB
from fused_kd.testing import eager_kd_loss

if TYPE_CHECKING:
    from demo import train

HEADS = "KDLoss, heads"


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    for name in ("transformers", "mistral_common", "matplotlib"):
        pytest.importorskip(name, reason=f"the demo needs {name} (demo/requirements.txt)")


@pytest.mark.slow
# Out of place (the default) · the gradient over the student's own logits.
@pytest.mark.parametrize("inplace", [False, True])
def test_curves_coincide(tmp_path: Path, inplace: bool) -> None:
    picture = tmp_path / "curves.png"
    options = ["--inplace"] if inplace else []
    done = run_python("-m", "demo", "--steps", 3, "--output", picture, *options)
    assert done.returncode == 0, done.stderr
    difference = re.search(r"curves differ by at most (\S+)\.\n", done.stdout)
    assert difference, done.stdout
    assert float(difference[1]) < 2e-3
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    # MiB of the loss (heads: 64 of logits, 64 of the lm_head's gradient), and of a step.
    row = re.compile(r"^(\w+(?:, heads)?) +[\d.]+[ *] +\d+ +([\d.]+)[ *] +([\d.]+)  ", re.M)
    loss, step = ({row[0]: float(row[i]) for row in row.findall(done.stdout)} for i in (1, 2))
    assert loss["KDLoss"] < (1 if inplace else 129)
    assert loss["eager"] > 500
    assert loss[HEADS] < 64 + 64 + 8
    assert step[HEADS] < 0.5 * step["KDLoss"] < 0.5 * step["eager"]


VOCABULARY, STEPS = 61, 3


@pytest.fixture(scope="module")
def students() -> list[train.Student]:
    """Return three tiny students of a tiny teacher, trained by the demo's loop for STEPS steps."""
    from demo import corpus, models, train

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (400,))
    text = corpus.Corpus(tokens[:300], tokens[300:], VOCABULARY, files=1, characters=400)
    teacher = models.build(VOCABULARY, models.TEACHER_LAYERS).requires_grad_(False)
    # several chunks of rows, the last one smaller
    by_chunks = KDLoss(temperature=2.0, chunk_rows=100)
    methods = {
        "eager": train.Method(train.logits, partial(eager_kd_loss, temperature=2.0)),
        "KDLoss": train.Method(train.logits, KDLoss(temperature=2.0)),
        HEADS: train.Method(train.head, by_chunks),
    }
    return train.distil(teacher, models.student_of(teacher), methods, text, STEPS, seed=0)


def test_students_learn_the_same(students: list[train.Student]) -> None:
    eager, *fused = students
    assert eager.losses[0] != eager.losses[-1]
    for student in fused:
        assert student.losses == pytest.approx(eager.losses, rel=1e-5), student.name


def test_step_is_an_ordinary_backward(students: list[train.Student]) -> None:
    # Measuring the loss separately changes no gradient, the tied embedding's included
    from demo import corpus, models

    ids, labels = corpus.with_labels(torch.randint(VOCABULARY, (2, 9)))
    teacher = models.build(VOCABULARY, models.TEACHER_LAYERS).requires_grad_(False)
    for student in students:
        student.method.loss(*student.forward(teacher, ids), labels).backward()
        wanted = [parameter.grad for parameter in student.model.parameters()]
        student.model.zero_grad()
        student.forward_and_backward(teacher, ids, labels)
        for parameter, gradient in zip(student.model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        student.model.zero_grad()


def test_report(students: list[train.Student]) -> None:
    from demo import report, train

    scores = {name: train.Scores(1.0, 0.5) for name in ("teacher", *(s.name for s in students))}
    figures = (
        {"loss_ms": [800.0], "step_ms": [1300.0], "losses": [1.0, 2.0]},
        {"loss_ms": [40.0], "step_ms": [500.0], "losses": [1.0, 2.25]},
        {"loss_ms": [300.0], "step_ms": [520.0], "losses": [1.5, 2.0]},
    )
    memory = {"loss_bytes": 8 * MIB, "step_bytes": 16 * MIB}
    students = [replace(s, **f, **memory) for s, f in zip(students, figures, strict=True)]
    lines = [line.split() for line in report.table(students, scores).splitlines()]
    scored = ["1.0000", "0.5000", "2.7"]
    assert lines[3:] == [
        ["eager", "800.0", "1300", "8.0", "16.0", *scored],
        ["KDLoss", "40.0", "500", "8.0", "16.0", *scored],
        ["KDLoss,", "heads", "300.0*", "520", "8.0*", "16.0", *scored],
        ["eager", "/", "KDLoss", "20×", "2.6×", "1.0×", "1.0×"],
        ["eager", "/", "KDLoss,", "heads", "2.5×", "1.0×"],  # its loss contains more
        ["teacher", *scored],
    ]
    assert report.largest_difference(students) == 0.5


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
    done = run_python("-m", "demo", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"demo: {message}")
    assert done.stderr.count("\n") == 1
