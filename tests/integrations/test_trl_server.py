"""The loss of TRL's ServerDistillationTrainer, with the answers of a server that is a model here.

The trainer and what it makes of an answer are TRL's own; only the client's request is answered in
this process, in the form of vLLM's JSON. test_vllm_server.py has a real server.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import need
from support.losses import refused
from trl_training import models, prompts, same, settings, tokenizer, trained

need("trl")
from trl.experimental.server_distillation import (  # noqa: E402
    ServerDistillationConfig,
    ServerDistillationTrainer,
)
from trl.generation import vllm_client  # noqa: E402

from fused_kd.integrations.trl import restore, use_fused_kd  # noqa: E402

USUAL = {"max_completion_length": 6, "teacher_model_server_url": "http://teacher"}


class Client(vllm_client.VLLMClient):  # type: ignore[misc]
    """TRL's client, whose server is a model; `at` is the temperature that the server applies."""

    at = 1.0
    model_number = 1  # of the teacher; 0: the student before training

    def __init__(self, **_: Any) -> None:
        self.base_url, self.model, self.session = "http://teacher", "teacher", None
        self.teacher: Any = models()[self.model_number]
        with torch.no_grad():
            self.teacher.get_output_embeddings().weight.mul_(0.3)  # with a tail in each row

    def _post(self, url: str, json: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"choices": [self._choice(ids, json["prompt_logprobs"]) for ids in json["prompt"]]}

    def _choice(self, ids: list[int], k: int) -> dict[str, Any]:
        with torch.no_grad():
            logits = self.teacher(torch.tensor([ids])).logits[0]
        rows = (logits / self.at).log_softmax(-1)
        entries: list[Any] = [None]
        for token, row in zip(ids[1:], rows, strict=False):
            top = row.topk(k)
            ranked = {token: int((row > row[token]).sum()) + 1}
            ranked |= {i: r for r, i in enumerate(top.indices.tolist(), 1)}
            entries.append(
                {str(i): {"logprob": row[i].item(), "rank": r} for i, r in ranked.items()}
            )
        return {"prompt_logprobs": entries}


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "VLLMClient", Client)


def server_trainer(folder: Path, **more: Any) -> Any:
    kind = more.pop("kind", ServerDistillationTrainer)
    arguments = ServerDistillationConfig(**settings(folder, **{**USUAL, **more}))
    data = {"train_dataset": prompts(), "eval_dataset": prompts(4)}
    return kind(models()[0], args=arguments, processing_class=tokenizer(), **data)


CASES: list[dict[str, Any]] = [
    {"beta": 0.0, "loss_top_k": 3},
    {"beta": 0.0, "loss_top_k": 3, "loss_add_tail": False},
    {"beta": 0.0, "gradient_accumulation_steps": 4},
    {"beta": 0.1},
    {"beta": 0.5, "loss_add_tail": False},
    {"beta": 1.0},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_training(tmp_path: Path, options: dict[str, Any]) -> None:
    make = partial(server_trainer, tmp_path, **options)
    theirs = trained(make())
    for heads in (False, True):
        same(trained(use_fused_kd(make(), heads=heads, inplace=not heads)), theirs)


@pytest.mark.parametrize("add_tail", [True, False])
def test_the_actual_token_is_the_teachers_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_tail: bool
) -> None:
    monkeypatch.setattr(Client, "model_number", 0)
    options = {"beta": 0.5, "top_k": 1, "loss_add_tail": add_tail, "max_steps": 1}
    losses = [
        use(server_trainer(tmp_path, **options)).train().training_loss
        for use in (use_fused_kd, restore)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-8)
    assert bool(losses[0] > 1e-3) == add_tail  # renormalised, a single token has no divergence


def test_the_temperature_is_that_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with TRL and a server that applies the temperature, which vLLM does not."""
    options = {"beta": 0.0, "loss_top_k": 3, "loss_add_tail": False, "temperature": 0.7}
    ours = trained(use_fused_kd(server_trainer(tmp_path, **options)))
    monkeypatch.setattr(Client, "at", 0.7)
    same(ours, trained(server_trainer(tmp_path, **options)))
    with_tail = server_trainer(tmp_path, **{**options, "loss_add_tail": True})
    message = r"temperature must be 1 with loss_add_tail=True.*got 0\.7: set temperature=1\.0"
    refused(ValueError, message, use_fused_kd, with_tail)


def test_evaluation_and_restore(tmp_path: Path) -> None:
    own, ours = server_trainer(tmp_path, beta=0.0), server_trainer(tmp_path, beta=0.0)
    use_fused_kd(ours, heads=True)
    losses = []
    for trainer in (own, ours):
        torch.manual_seed(0)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batch = next(iter(ours.get_eval_dataloader()))
    loss, outputs = ours.compute_loss(ours.model, ours._prepare_inputs(batch), return_outputs=True)
    assert outputs.logits.shape[-1] == ours.model.config.vocab_size
    assert loss.isfinite()
    assert "compute_loss" in vars(ours)
    assert "compute_loss" not in vars(restore(ours))


class OwnLoss(ServerDistillationTrainer):  # type: ignore[misc]
    def _compute_server_forward_kl_loss(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._compute_server_forward_kl_loss(*arguments, **keywords)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"must not override ServerDistillationTrainer\._compute_server_forward_kl_loss"
    refused(TypeError, message, use_fused_kd, server_trainer(tmp_path, kind=OwnLoss))
    trainer = use_fused_kd(server_trainer(tmp_path, beta=0.5))
    own = Client._choice
    monkeypatch.setattr(Client, "_choice", lambda *x: _without_own_tokens(own(*x), x[1]))
    refused(ValueError, r"must return the log-probability of each completion .*NaN", trainer.train)
    del trainer.loss_top_k
    refused(TypeError, r"lacks \['loss_top_k'\] in trl 1", use_fused_kd, trainer)


def _without_own_tokens(choice: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    for token, entry in zip(ids, choice["prompt_logprobs"], strict=True):
        if entry is not None:
            entry[str(token)]["logprob"] = float("nan")
    return choice
