"""The examples compare two ways to train; a gradient of another size must show in what they print.

Losses of the same value say nothing of it, and an optimizer or a clip that takes the size out of
the gradient would hide it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not installed
need("transformers")
from examples import common  # noqa: E402
from examples.__main__ import EXAMPLES  # noqa: E402

Build = Callable[[Any, nn.Module, list[Tensor]], common.Training]


def nothing(trainer: Any) -> None:
    """What is changed in a trainer for its own loss."""


#: The framework's own way in each example, of (module, teacher, batches).
OWN: dict[str, Build] = {
    "transformers_trainer": lambda m, teacher, ids: partial(
        m.train, partial(m.EagerTrainer, teacher=teacher), ids
    ),
    "trl_gkd": lambda m, teacher, ids: partial(m.train, teacher, ids, nothing),
    "trl_distillation": lambda m, teacher, ids: partial(m.train, teacher, ids, nothing),
    "liger": lambda m, teacher, ids: partial(
        m.train, m.LigersOwn(**m.OPTIONS, compiled=False), teacher, ids
    ),
    "torchtune": lambda m, teacher, ids: partial(
        m.train, m.torchtunes_own.ForwardKLLoss(), m.converted(teacher), ids
    ),
    "model_optimizer": lambda m, teacher, ids: partial(
        m.train, teacher, ids, m.mtd.LogitsDistillationLoss(m.TEMPERATURE, reduction="batchmean")
    ),
    "lightning_module": lambda m, teacher, ids: partial(
        m.train, lambda student: m.EagerModule(student, teacher), ids
    ),
    "accelerate_loop": lambda m, teacher, ids: partial(m.train_own, ids, teacher),
}


def tripled(training: common.Training) -> common.Training:
    """The same with gradients that are three times as large."""

    def train(student: nn.Module) -> list[float]:
        for parameter in student.parameters():
            parameter.register_hook(lambda gradient: 3 * gradient)
        return training(student)

    return train


def test_no_example_is_left_out() -> None:
    assert OWN.keys() == EXAMPLES.keys()


@pytest.mark.parametrize("name", OWN)
def test_a_gradient_of_another_size_shows_in_the_weights(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in EXAMPLES[name]:
        need(package)
    module = importlib.import_module(f"examples.{name}")
    monkeypatch.chdir(tmp_path)  # where the trainers put their files
    monkeypatch.setattr(common, "REPEATS", 1)
    student, teacher = tiny.llama(seed=1), tiny.llama(seed=2, layers=2).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    rows = getattr(module, "ROWS", common.ROWS)
    ids = [torch.randint(3, tiny.VOCABULARY, (rows, 40), generator=draw) for _ in range(2)]
    own = OWN[name](module, teacher, ids)
    if name == "torchtune":
        student = module.converted(student)
    found = common.compare(name, EXAMPLES[name][0], own, tripled(own), student)
    # about twice as much; half as much behind a clip
    assert found.largest_weight_difference > 0.8 * found.largest_weight_change
