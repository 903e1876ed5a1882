"""Every keyword as editors, type checkers and help() see it."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fused_kd import KDLoss, kd_loss
from fused_kd.options import OF_A_CALL, KDOptions, Keywords

FIELDS = {field.name: field for field in dataclasses.fields(KDOptions)}


def test_type_checkers_see_the_fields_of_the_options() -> None:
    hints = get_type_hints(KDOptions)
    assert hints.keys() == FIELDS.keys()
    del hints["return_parts"]  # explicit in the signatures: it decides the type of the result
    assert get_type_hints(Keywords) == hints
    assert list(get_type_hints(Keywords)) == list(hints)
    assert Keywords.__required_keys__ == frozenset()


@pytest.mark.parametrize("function", [kd_loss, KDLoss, KDLoss.__init__])
def test_a_signature_shows_every_keyword(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    shown = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    expected = [*FIELDS, *(OF_A_CALL if function is kd_loss else ())]
    assert list(shown) == expected
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
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls", str(snippet)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    found = re.findall(r"snippet\.py:(\d+): error: ", done.stdout)
    expected = [i for i, line in enumerate(CHECKED.splitlines(), 1) if line.endswith("# error")]
    assert {int(line) for line in found} == set(expected), done.stdout + done.stderr
