"""The loops of the how-to pages run, and train a student that is in training mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from needs import need
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

Accelerator = need("accelerate").Accelerator

from fused_kd.integrations.loop import global_num_items  # noqa: E402
from fused_kd.integrations.transformers import KDTrainer  # noqa: E402
from fused_kd.teachers import TopKDataset  # noqa: E402

FLOAT16 = {"rtol": 2**-10, "atol": 1e-3}
HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def _block(page: str, beginning: str) -> str:
    """Return the only code block of a page that contains the text `beginning`."""
    blocks = re.findall(r"```python\n(.*?)```", (HOWTO / page).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if beginning in block)
    return str(block)


@pytest.fixture
def names(one_process: None) -> dict[str, Any]:
    """Return the names that the pages' code uses; models are as from_pretrained leaves them."""
    return {
        "torch": torch,
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))),
        "global_num_items": global_num_items,
        "device": torch.device("cpu"),
        "student": tiny.llama(0),
        "teacher": tiny.llama(1, layers=2),
        "loader": [tiny.padded(tiny.ragged(4))] * 2,
    }


def test_cached_teacher(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run all blocks of the page, in order: write a cache, measure a Head, train."""
    monkeypatch.chdir(tmp_path)
    rows = tiny.ragged(10)
    names["texts"] = [{**row, "attention_mask": torch.ones_like(row["labels"])} for row in rows]
    names["tokenizer"] = {str(i): i for i in range(tiny.VOCABULARY)}
    write, measure, train, by_trainer = re.findall(
        r"```python\n(.*?)```", (HOWTO / "cached_teacher.md").read_text(), re.DOTALL
    )
    exec(write + measure, names)
    cached = names["collate"]([x["teacher"] for x in TopKDataset("cache")][8:])
    measured = names["topk"]  # of the last batch: what the page writes from logits
    present = cached.logprobs > -torch.inf
    assert torch.equal(cached.token_ids[present].long(), measured.token_ids[present])
    torch.testing.assert_close(cached.logprobs[present], measured.logprobs[present], **FLOAT16)
    _trained(names, train)
    names["args"] = tiny.transformers.TrainingArguments(**tiny.settings(tmp_path))
    _trained({**names, "student": tiny.llama(0)}, by_trainer)


def _trained(names: dict[str, Any], run: str) -> None:
    student = names["student"]
    exec(run, names)
    assert student.training
    assert not names["teacher"].training
    weight, before = student.lm_head.weight, tiny.llama(0).lm_head.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    assert (whole - before).abs().max() > 1e-5


def test_accelerate(names: dict[str, Any]) -> None:
    names["accelerator"] = Accelerator(cpu=True)
    _trained(names, _block("accelerate.md", "accelerator.prepare(model, optimizer, loader)"))


@pytest.mark.parametrize("wrap", ["ddp = Dist", "fully_shard(block)", "auto_wrap_policy"])
def test_distributed(names: dict[str, Any], wrap: str) -> None:
    page = "distributed.md"
    exec(_block(page, "model = StudentTeacherLoss"), names)
    loop = _block(page, "ddp = Dist")
    if wrap not in loop:  # "the loop is the same"
        exec(_block(page, wrap), names)
        names["DistributedDataParallel"] = lambda model: model
    _trained(names, loop)


def test_converged(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all blocks of the page, in order: a loop, a callback, the probe, a schedule."""
    monkeypatch.chdir(tmp_path)
    loop, callback, conflicts, probe, schedule = re.findall(
        r"```python\n(.*?)```", (HOWTO / "converged.md").read_text(), re.DOTALL
    )
    held_out = [tiny.padded(tiny.ragged(4, seed=1))]
    names |= {
        "batches": names["loader"] * 300,
        "train_step": lambda *_: None,  # so that nothing moves
        "learning_rate": lambda: 0.1,
        "held_out_loader": held_out,
        "pairs_of_batches": [(batch, batch) for batch in (*names["loader"], *held_out)],
    }
    monkeypatch.setitem(names, "print", lambda text: names.setdefault("printed", []).append(text))
    exec(loop, names)
    assert "more evaluations make a window" in names["printed"][6]
    assert names["verdict"].pair == "converged"
    assert len(names["printed"]) == 9  # of 12 evaluations in 600 steps
    assert Path("objectives.png").exists()
    names["trainer"] = KDTrainer(
        names["student"],
        tiny.transformers.TrainingArguments(
            **tiny.settings(tmp_path, eval_strategy="steps", eval_steps=1)
        ),
        teacher=names["teacher"],
        loss=names["loss"],
        train_dataset=tiny.ragged(),
        eval_dataset=tiny.ragged(4),
        data_collator=tiny.padded,
    )
    names["monitor"] = names["ConvergenceMonitor"](0.01, 0.01)
    exec(callback, names)
    names["trainer"].train()
    assert len(names["monitor"].history) == 3
    exec(conflicts, {**names, "ids": torch.randint(3, tiny.VOCABULARY, (2, 7))})
    assert "of the tokens; agreement" in names["printed"][-1]
    exec(probe, names)
    assert -1 <= names["probe"].cosine <= 1
    assert "cosine" in names["printed"][-1]
    exec(schedule, names)
    assert names["loss"].temperature == pytest.approx(4.0, abs=1e-3)
