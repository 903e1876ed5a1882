"""The demo: it runs, the curves coincide, the picture is there; bad options cost nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.processes import run_python
from torch import Tensor

from fused_kd import KDLoss
from fused_kd.options import MIB
from fused_kd.testing import eager_kd_loss

if TYPE_CHECKING:
    from demo import train

HEADS, TOP_K = "KDLoss, heads", "KDLoss, top 64"


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
    differences = r"three curves differ by at most (\S+)\. That of {}\nis at most (\S+) from"
    difference = re.search(differences.format(TOP_K), done.stdout)
    assert difference, done.stdout
    assert float(difference[1]) < 2e-3
    assert 2e-3 < float(difference[2]) < 0.3
    assert re.search(r"^cache +4/4 .* top 64 of 1,024 tokens: 0\.3 MiB$", done.stdout, re.M)
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    # MiB of the loss (heads: 64 of logits, 64 of the lm_head's gradient), and of a step.
    row = re.compile(r"^(\w+(?:, \w+(?: \d+)?)?) +[\d.]+[ *] +\d+ +([\d.]+)[ *] +([\d.]+)  ", re.M)
    loss, step = ({row[0]: float(row[i]) for row in row.findall(done.stdout)} for i in (1, 2))
    assert max(loss["KDLoss"], loss[TOP_K]) < (1 if inplace else 129)
    assert loss["eager"] > 500
    assert loss[HEADS] < 64 + 64 + 8
    assert step[HEADS] < 0.5 * step["KDLoss"] < 0.5 * step["eager"]
    assert step[TOP_K] < step["KDLoss"] - 100  # 128 of the teacher's logits


VOCABULARY, STEPS = 61, 3


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    from demo import corpus, train

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (400,))
    text = corpus.Corpus(tokens[:300], tokens[300:], VOCABULARY, files=1, characters=400)
    return train.student_batches(text, STEPS, seed=0)


@pytest.fixture(scope="module")
def students(
    batches: list[tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> list[train.Student]:
    """Return four tiny students of a tiny teacher, trained by the demo's loop for STEPS steps."""
    from demo import cache, models, train

    teacher = models.build(VOCABULARY, models.TEACHER_LAYERS).requires_grad_(False)
    # all but one token: the tail is a token, and the loss that of the whole teacher
    top_k = cache.write(teacher, batches, tmp_path_factory.mktemp("cache"), VOCABULARY - 1)
    # several chunks of rows, the last one smaller
    by_chunks = KDLoss(temperature=2.0, chunk_rows=100)
    methods = {
        "eager": train.Method(train.logits, partial(eager_kd_loss, temperature=2.0)),
        "KDLoss": train.Method(train.logits, KDLoss(temperature=2.0)),
        HEADS: train.Method(train.head, by_chunks),
        TOP_K: train.Method(train.logits, KDLoss(temperature=2.0), top_k),
    }
    return train.distil(teacher, models.student_of(teacher), methods, batches)


def test_students_learn_the_same(students: list[train.Student]) -> None:
    eager, *fused = students
    assert eager.losses[0] != eager.losses[-1]
    for student in fused:
        assert student.losses == pytest.approx(eager.losses, rel=1e-5), student.name


def test_cache_replaces_the_teacher(
    students: list[train.Student], batches: list[tuple[Tensor, Tensor]]
) -> None:
    no_teacher: Any = None
    loss, _ = students[-1].forward_and_backward(no_teacher, *batches[0])
    students[-1].model.zero_grad()
    assert loss > 0


def test_step_is_an_ordinary_backward(
    students: list[train.Student], batches: list[tuple[Tensor, Tensor]]
) -> None:
    # Measuring the loss separately changes no gradient, the tied embedding's included
    from demo import models

    ids, labels = batches[0]
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
        {"loss_ms": [32.0], "step_ms": [325.0], "losses": [1.75, 3.0]},
    )
    memory = {"loss_bytes": 8 * MIB, "step_bytes": 16 * MIB}
    students = [replace(s, **f, **memory) for s, f in zip(students, figures, strict=True)]
    lines = [line.split() for line in report.table(students, scores).splitlines()]
    scored = ["1.0000", "0.5000", "2.7"]
    assert lines[3:] == [
        ["eager", "800.0", "1300", "8.0", "16.0", *scored],
        ["KDLoss", "40.0", "500", "8.0", "16.0", *scored],
        ["KDLoss,", "heads", "300.0*", "520", "8.0*", "16.0", *scored],
        ["KDLoss,", "top", "64", "32.0", "325", "8.0", "16.0", *scored],
        ["eager", "/", "KDLoss", "20×", "2.6×", "1.0×", "1.0×"],
        ["eager", "/", "KDLoss,", "heads", "2.5×", "1.0×"],  # its loss contains more
        ["eager", "/", "KDLoss,", "top", "64", "25×", "4.0×", "1.0×", "1.0×"],
        ["teacher", *scored],
    ]
    assert report.largest_difference(students) == 0.5
    assert report.top_k_difference(students) == 1.0


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


@pytest.mark.parametrize(("scores", "want"), [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], 0.0)])
def test_the_area_under_the_curve(scores: list[float], want: float) -> None:
    from demo.conflicts import area

    positive = torch.tensor([False, False, True, True])
    assert area(torch.tensor(scores), positive) == want
    assert area(torch.tensor([1.0, 3.0, 2.0, 4.0]), positive) == 0.75
