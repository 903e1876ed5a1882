"""KDLoss and every keyword: for users, editors, type checkers and help(); the package."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import pydoc
import re
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from support.heads import make_heads
from support.logits import N, check, make
from support.processes import passes, run_python
from torch import nn

import fused_kd
from fused_kd import KDLoss, env, kd_loss
from fused_kd.options import BACKENDS, OF_A_CALL, KDOptions, Keywords

# ------------------------------------------------------------------------------------ the module

FIELDS = {field.name: field for field in dataclasses.fields(KDOptions)}
#: Every option: its default, another value.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "temperature": (1.0, 2.0),
    "hard_weight": (0.5, 0.25),
    "soft_weight": (0.5, 0.75),
    "divergence": ("forward_kl", "jsd"),
    "beta": (0.5, 0.1),
    "soft_scale": ("t2", "none"),
    "label_smoothing": (0.0, 0.1),
    "ignore_index": (-100, -1),
    "reduction": ("mean", "sum"),
    "inplace": (False, True),
    "return_parts": (False, True),
    "backend": ("auto", "reference"),
    "memory_budget": (None, 2**28),
    "chunk_rows": (None, 3),
    "grad_accum_dtype": (None, torch.bfloat16),
}


def test_the_defaults() -> None:
    expected = {name: default for name, (default, _) in OPTIONS.items()}
    assert dataclasses.asdict(KDLoss().options) == expected


def test_every_option_is_an_attribute() -> None:
    for name, (default, value) in OPTIONS.items():
        loss = KDLoss()
        assert getattr(loss, name) == default
        setattr(loss, name, value)
        assert getattr(loss, name) == value
        assert repr(loss) == repr(KDLoss(**{name: value}))


def test_the_module_is_the_function(backend: str) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "backend": backend}
    weights: dict[str, Any] = {"token_weight": torch.rand(N), "num_items": 5}
    module = KDLoss(**keywords)(student, teacher, labels, **weights)
    assert torch.equal(module, kd_loss(student, teacher, labels, **keywords, **weights))


def test_the_module_holds_no_state_and_copies() -> None:
    module = KDLoss(temperature=3.0, divergence="tvd", return_parts=True, memory_budget=2**20)
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == module.options
        other.temperature = 4.0
        assert (other.temperature, module.temperature) == (4.0, 3.0)


def test_repr_shows_what_matters() -> None:
    assert repr(KDLoss(temperature=2)) == (
        "KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5, divergence='forward_kl', "
        "backend='auto')"
    )
    shown = repr(KDLoss(memory_budget=2**20, grad_accum_dtype=torch.bfloat16))
    assert "memory_budget=1048576" in shown
    assert "grad_accum_dtype=torch.bfloat16" in shown
    shown = repr(KDLoss(divergence="jsd", beta=0.1, label_smoothing=0.2, ignore_index=0))
    assert "beta=0.1, label_smoothing=0.2, ignore_index=0, backend='auto'" in shown


def test_options_are_frozen_and_replaceable() -> None:
    module = KDLoss()
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.options.temperature = 2.0
    module.options = dataclasses.replace(module.options, temperature=2.0)
    inputs = make()
    assert torch.equal(module(*inputs), kd_loss(*inputs, temperature=2.0))
    with pytest.raises(ValueError, match="temperature must be positive"):
        dataclasses.replace(module.options, temperature=0)


def test_an_assigned_option_is_the_one_that_counts() -> None:
    student, teacher, labels = make()
    loss = KDLoss()
    loss.temperature = 8.0
    assert torch.equal(
        loss(student, teacher, labels), kd_loss(student, teacher, labels, temperature=8.0)
    )
    heads = make_heads()
    inputs = (heads.student_side, heads.teacher_side, heads.labels)
    loss.chunk_rows = 5
    assert torch.equal(loss(*inputs), kd_loss(*inputs, temperature=8.0, chunk_rows=5))
    with pytest.raises(ValueError, match="chunk_rows is for a student or teacher given as a Head"):
        loss(student, teacher, labels)


def test_an_assignment_is_checked_and_a_refused_one_changes_nothing() -> None:
    loss = KDLoss(chunk_rows=3)
    before = repr(loss)
    with pytest.raises(ValueError, match="temperature must be positive and finite; got 0"):
        loss.temperature = 0
    with pytest.raises(TypeError, match="return_parts must be True or False"):
        loss.return_parts = 1
    with pytest.raises(ValueError, match="chunk_rows and memory_budget both set the number"):
        loss.memory_budget = 2**28
    with pytest.raises(TypeError, match="options must be a KDOptions; got dict"):
        loss.options = {"temperature": 2.0}
    assert repr(loss) == before


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temperatur", "temperature"),
        ("Temperature", "temperature"),
        ("soft_weigth", "soft_weight"),
        ("chunk_row", "chunk_rows"),
    ],
)
def test_a_misspelt_option_is_refused(name: str, meant: str) -> None:
    with pytest.raises(
        AttributeError, match=f"KDLoss has no option {name!r}: did you mean {meant!r}"
    ):
        setattr(KDLoss(), name, 1.0)


def test_all_else_is_as_in_any_module() -> None:
    loss = KDLoss()
    for name in dir(nn.Module()):
        if not name.startswith("__"):
            setattr(loss, name, getattr(loss, name))  # none is taken for a misspelt option
    loss.teacher, loss.log, loss._temperatur = nn.Linear(2, 2), [1.0], 3
    assert list(loss.children()) == [loss.teacher]
    assert not loss.eval().training
    with pytest.raises(AttributeError, match="no attribute 'tau'"):
        _ = loss.tau


def test_the_docstrings_equivalent_block_is_true(backend: str) -> None:
    assert kd_loss.__doc__ is not None
    block = re.search(r"Equivalent to::\n\n(.*?)\n\n    Each side", kd_loss.__doc__, re.DOTALL)
    assert block is not None
    student, teacher, labels = make(2, 3)
    labels[0, 1] = -100
    keywords: dict[str, Any] = {
        "temperature": 2.0,
        "hard_weight": 0.3,
        "soft_weight": 0.9,
        "label_smoothing": 0.1,
        "ignore_index": -100,
    }
    sides = {"student": student, "teacher": teacher, "labels": labels}
    names: dict[str, Any] = {"F": F, **sides, **keywords}
    exec(textwrap.dedent(block.group(1)), names)
    check(kd_loss(student, teacher, labels, backend=backend, **keywords), names["loss"], student)


# --------------------------------------------------------------------- every keyword as it is shown


def test_type_checkers_see_the_fields_of_the_options() -> None:
    hints = get_type_hints(KDOptions)
    assert hints.keys() == FIELDS.keys()
    del hints["return_parts"]  # explicit in the signatures: the type of the result depends on it
    assert get_type_hints(Keywords) == hints
    assert list(get_type_hints(Keywords)) == list(hints)
    assert Keywords.__required_keys__ == frozenset()


@pytest.mark.parametrize("function", [kd_loss, KDLoss, KDLoss.__init__])
def test_a_signature_shows_every_keyword(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    shown = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert list(shown) == [*FIELDS, *(OF_A_CALL if function is kd_loss else ())]
    for name, field in FIELDS.items():
        assert shown[name].default == field.default
        assert shown[name].annotation == field.type
    if function is kd_loss:
        assert list(parameters)[:3] == ["student", "teacher", "labels"]
        assert parameters["teacher"].default is inspect.Parameter.empty
        assert parameters["labels"].default is None


@pytest.mark.parametrize("shown", [kd_loss, KDLoss])
def test_help_has_a_line_for_every_keyword(shown: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(shown))
    assert "{keywords}" not in text
    for name in (*FIELDS, *(OF_A_CALL if shown is kd_loss else ())):
        (line,) = re.findall(rf"^[ |]*{name}: (\w.*|\(.*|\".*|[ετβTD(].*)$", text, re.MULTILINE)
        if name in FIELDS:
            assert FIELDS[name].metadata["meaning"].startswith(line.split(maxsplit=1)[0])


CHECKED = """
import torch
from torch import Tensor

from fused_kd import Head, KDLoss, KDLossParts, kd_loss

s, t, y = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
head = Head(torch.zeros(2, 4), torch.zeros(3, 4), scale=2)
kd_loss(s, t, y).backward()
kd_loss(head, t, y, chunk_rows=4, temperature=2, num_items=3).backward()
kd_loss(s, head.to("cpu").rows(slice(2)), y, inplace=True).backward()
kd_loss(s, None, y, soft_weight=0.0).backward()
kd_loss(s, t, y, return_parts=True).soft.item()
either: Tensor | KDLossParts = kd_loss(s, t, y, return_parts=bool(y.any()))
either = KDLoss(temperature=2.0, return_parts=True, grad_accum_dtype=torch.float32)(head, head, y)
kd_loss(s, t, y, return_parts=True).backward()  # error
kd_loss(s, t, y).soft  # error
kd_loss(s, t, y, temprature=2.0)  # error
kd_loss(s, t, y, temperature="hot")  # error
kd_loss(s, t, y, num_items="many")  # error
kd_loss((s, t), t, y)  # error
KDLoss(temprature=2.0)  # error
KDLoss(temperature="hot")  # error
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_result_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(CHECKED)
    # Tensor.backward has no annotations
    done = run_python("-m", "mypy", "--strict", "--allow-untyped-calls", snippet)
    reported = re.findall(r"snippet\.py:(\d+): error: ", done.stdout)
    expected = [i for i, line in enumerate(CHECKED.splitlines(), 1) if line.endswith("# error")]
    assert {int(line) for line in reported} == set(expected), done.stdout + done.stderr


def test_a_call_takes_its_own_keywords_alone() -> None:
    parameters = inspect.signature(KDLoss.forward).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == dict.fromkeys(("token_weight", "num_items", "kept_rows"))


# --------------------------------------------------------------------------- the package and env


def test_public_names() -> None:
    names = {"Head", "KDLoss", "KDLossParts", "TopK", "kd_loss", "__version__"}
    names |= {"KDMetrics", "kd_metrics"}
    assert set(fused_kd.__all__) == names
    assert fused_kd.__version__ == "0.1.0"


def test_the_environment_report_prints_every_backend_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = env.report()
    assert set(environment["backends"]) == set(BACKENDS)
    assert environment["backends"]["reference"] == "available"
    printed = json.loads(passes(run_python("-m", "fused_kd.env", "--json")))
    assert printed["versions"]["fused_kd"] == fused_kd.__version__
    assert env.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name, _ in env.VARIABLES)
