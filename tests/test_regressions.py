"""The bugs of other projects, R-01 to R-65 and N-01 to N-39: `pytest -k R-01` runs one.

The cases that concern one loss on a CPU are in regression_*.py. Of the other R-cases, it says here
which test they are; of the other N-cases, the test's name ends with the number (`pytest -k N_26`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import regression_heads  # noqa: F401  registers its cases
import regression_masks  # noqa: F401
import regression_numbers  # noqa: F401
import regression_semantics  # noqa: F401
import regression_values  # noqa: F401
import regression_wiring  # noqa: F401
import torch
from fast import one_thread
from regression_registry import CASES

#: Cases of another kind, and the test in this folder that covers each.
ELSEWHERE = {
    "R-13": "test_heads.py::test_rows_at_an_offset_of_2_to_the_31_R_13",
    "R-15": "triton_interpreted/test_edges.py::test_a_row_beyond_2_31_elements",
    "R-30": "test_heads_training.py::test_gradients_only_where_they_are_asked_for",
    "R-37": "test_heads.py::test_same_as_logits",
    "R-46": "test_heads_training.py::test_autocast_of_any_parameters_R_46",
    "R-47": "test_heads.py::test_the_weight_gradient_is_as_exact_in_many_chunks_R_47",
    "R-50": "test_triton_aot.py::test_some_kernels",
    "R-55": "test_gpu_machine.py::test_a_device_that_is_not_the_current_one_R_55",
    "R-56": "test_gpu_machine.py::test_another_stream_R_56",
    "R-59": "test_distributed.py::test_distributed_data_parallel",
    "R-60": "test_automodel.py::test_tensor_parallelism_R_60",  # it is refused
    "R-61": "test_distributed.py::test_distributed_data_parallel",
    "R-64": "test_triton_interpreter.py::test_interpreted_kernels",
}
#: CI installs one version of Triton; the kernels are compiled with that.
NOT_TESTED = ["R-51"]
#: N-cases that no test has, and why.
WITHOUT_A_TEST = {
    "N-35": "a router's auxiliary loss is refused by every adapter",
    "N-36": "a trainer's: pipeline stages and heads of several tokens (docs/howto/automodel.md)",
    "N-38": "shards of a vocabulary: DTensors are refused (N-37)",
    "N-39": "shards of a vocabulary: DTensors are refused (N-37)",
}
HERE = Path(__file__).parent


@pytest.mark.parametrize("number", [pytest.param(n, id=n) for n in sorted(CASES)])
def test_regression(number: str, backend: str) -> None:
    for case in CASES[number]:
        torch.manual_seed(0)
        with one_thread():
            case.test(backend)


def test_all_65_are_accounted_for() -> None:
    numbers = [f"R-{i:02d}" for i in range(1, 66)]
    here = [number for number in CASES if number.startswith("R-")]
    assert sorted([*here, *ELSEWHERE, *NOT_TESTED]) == numbers  # each once
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"\ndef {name}(" in (HERE / file).read_text(), test


def test_all_39_are_accounted_for() -> None:
    sources = (file.read_text() for file in HERE.rglob("test_*.py"))
    named = {f"N-{n}" for text in sources for n in re.findall(r"\ndef test_\w+_N_(\d\d)\(", text)}
    here = {number for number in CASES if number.startswith("N-")}
    missing = {f"N-{i:02d}" for i in range(1, 40)} - named - here - set(WITHOUT_A_TEST)
    assert not missing
