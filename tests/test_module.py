"""KDLoss, and what the package shows of itself: defaults, repr, copies, docstring, env."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.logits import N, check, make

import fused_kd
from fused_kd import KDLoss, kd_loss
from fused_kd.env import VARIABLES, report
from fused_kd.options import BACKENDS, KDOptions

# ------------------------------------------------------------------------------------ the module


def test_the_defaults_R_41() -> None:
    assert dataclasses.asdict(KDLoss().options) == {
        "temperature": 1.0,
        "hard_weight": 0.5,
        "soft_weight": 0.5,
        "divergence": "forward_kl",
        "beta": 0.5,
        "soft_scale": "t2",
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "reduction": "mean",
        "inplace": False,
        "return_parts": False,
        "backend": "auto",
        "memory_budget": None,
        "chunk_rows": None,
        "grad_accum_dtype": None,
    }


def test_one_set_of_defaults_and_names_everywhere() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    options = {field.name: field.default for field in dataclasses.fields(KDOptions)}
    of_a_call = dict.fromkeys(("token_weight", "num_items", "kept_rows"))
    assert defaults(KDLoss) == defaults(KDLoss.__init__) == options
    assert defaults(kd_loss) == {**options, **of_a_call}
    assert defaults(KDLoss.forward) == of_a_call


def test_the_module_is_the_function(backend: str) -> None:
    student, teacher, labels = make()
    keywords: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "backend": backend}
    weights: dict[str, Any] = {"token_weight": torch.rand(N), "num_items": 5}
    module = KDLoss(**keywords)(student, teacher, labels, **weights)
    assert torch.equal(module, kd_loss(student, teacher, labels, **keywords, **weights))


def test_the_module_holds_no_state_and_copies() -> None:
    module = KDLoss(temperature=3.0, divergence="tvd", return_parts=True)
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == module.options
        inputs = make()
        torch.testing.assert_close(other(*inputs), module(*inputs), rtol=0, atol=0)


def test_repr_shows_what_matters() -> None:
    assert repr(KDLoss(temperature=2)) == (
        "KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5, divergence='forward_kl', "
        "backend='auto')"
    )
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


def test_the_docstrings_equivalent_block_is_true_R_44(backend: str) -> None:
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
    names: dict[str, Any] = {
        "F": F,
        "student": student,
        "teacher": teacher,
        "labels": labels,
        **keywords,
    }
    exec(textwrap.dedent(block.group(1)), names)
    check(kd_loss(student, teacher, labels, backend=backend, **keywords), names["loss"], student)


# --------------------------------------------------------------------------- the package and env


def test_public_names() -> None:
    assert set(fused_kd.__all__) == {"Head", "KDLoss", "KDLossParts", "kd_loss", "__version__"}
    assert fused_kd.__version__ == "0.1.0"


def test_the_environment_report_prints_every_backend_and_variable() -> None:
    found = report()
    assert set(found["backends"]) == set(BACKENDS)
    assert found["backends"]["reference"] == "available"
    run = subprocess.run(
        [sys.executable, "-m", "fused_kd.env", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["versions"]["fused_kd"] == fused_kd.__version__
    run = subprocess.run(
        [sys.executable, "-m", "fused_kd.env"], capture_output=True, text=True, check=True
    )
    for name, _ in VARIABLES:
        assert name in run.stdout
