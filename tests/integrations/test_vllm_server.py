"""docs/howto/served_teacher.md against a real vLLM server: its losses, positions, temperature."""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from needs import need
from torch import Tensor, nn
from vllm_server import ROOT, module, served

from fused_kd import TopK, kd_loss
from fused_kd.teachers.servers import from_trl, from_vllm

transformers = need("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

PAGE = (ROOT / "docs" / "howto" / "served_teacher.md").read_text()
(COMMAND,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
ASK, TRAIN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
V = tiny.VOCABULARY
#: vLLM's kernels for CPUs need heads of at least 32 entries.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
ON_A_CPU = ("--dtype", "float32", "--max-model-len", "64", "--enforce-eager")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    teacher = tiny.of("Llama", 1, num_hidden_layers=2, **SIZES)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(0.5)  # uncertain: each row has a tail
    return teacher


@pytest.fixture(scope="module")
def names(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield the names of the page's code, whose server runs."""
    folder = tmp_path_factory.mktemp("vllm")
    teacher.save_pretrained(folder / "teacher")
    # the vocabulary is larger than the default of 20 too: all of it is asked for below
    command = COMMAND.replace("--max-logprobs 64", f"--max-logprobs {V}")
    assert command != COMMAND
    with served(command, folder / "teacher", folder / "log", *ON_A_CPU) as address:
        space: dict[str, Any] = {}
        exec(ASK, space)
        space["SERVER"] = address
        yield space


def batches() -> list[dict[str, Tensor]]:
    rows = tiny.ragged(80)
    return [tiny.padded(rows[i : i + 4]) for i in range(0, 80, 4)]


def in_memory(teacher: Any, batch: dict[str, Tensor]) -> TopK:
    """Return the teacher's top 8 and the next token of each row, with the exact tail."""
    inputs, _ = tiny.split(batch)
    with torch.no_grad():
        logprobs = teacher(**inputs).logits.log_softmax(-1)
    own = F.pad(batch["input_ids"][:, 1:], (0, 1))[..., None]
    support = torch.zeros_like(logprobs).scatter(-1, logprobs.topk(8).indices, 1.0)
    support.scatter_(-1, own, 1.0)
    inside = logprobs.masked_fill(support == 0, -torch.inf).topk(9)
    outside = logprobs.masked_fill(support != 0, -torch.inf).logsumexp(-1)
    return TopK(inside.indices, inside.values, outside)


def train(names: dict[str, Any], teacher_of: Any = None) -> list[float]:
    """Return the losses of the page's loop, with the page's teacher or another."""
    space = {**names, "student": tiny.llama(0), "loader": []}
    space["optimizer"] = torch.optim.SGD(space["student"].parameters(), lr=0.1)
    exec(TRAIN, space)
    space["teacher_of"] = teacher_of or space["teacher_of"]
    return [space["step"](batch) for batch in batches()]


def test_the_page_trains_as_with_the_teacher_in_memory(names: dict[str, Any], teacher: Any) -> None:
    served = train(names)
    memory = train(names, lambda batch: in_memory(teacher, batch))
    assert len(served) == 20
    assert abs(served[0] - served[-1]) > 0.1  # it trained
    torch.testing.assert_close(served, memory, rtol=0, atol=1e-4)


def ask(names: dict[str, Any], prompts: list[list[int]], k: int, **more: Any) -> list[Any]:
    """Return the page's answer with more keys in the request."""
    dumps = json.dumps
    names["json"] = type("Json", (), {"load": json.load, "dumps": lambda x: dumps({**x, **more})})
    try:
        return list(names["prompt_logprobs"](prompts, k))
    finally:
        names["json"] = json


def test_the_temperature_is_ignored_and_the_vocabulary_may_be_whole(
    names: dict[str, Any], teacher: Any
) -> None:
    ids = [row["input_ids"] for row in tiny.ragged(3)]
    prompts = [row.tolist() for row in ids]
    assert ask(names, prompts, 8, temperature=2.0) == ask(names, prompts, 8, temperature=0.5)
    whole = from_vllm(ask(names, prompts, -1), tail="renormalize")
    for row, tokens in enumerate(ids):
        with torch.no_grad():
            logits = teacher(tokens[None]).logits[0]
        got, student = whole.rows(row).rows(slice(len(tokens) - 1)), torch.randn(len(tokens) - 1, V)
        torch.testing.assert_close(
            torch.zeros(len(student), V).scatter(-1, got.token_ids, got.logprobs),
            logits[:-1].log_softmax(-1),
            rtol=0,
            atol=2e-5,
        )
        options = {"hard_weight": 0.0, "soft_weight": 1.0, "temperature": 2.0}
        losses = kd_loss(student, got, **options), kd_loss(student, logits[:-1], **options)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_python_interface_of_the_same_vllm(names: dict[str, Any]) -> None:
    logprobs = module("logprobs")
    prompts = [row["input_ids"].tolist() for row in tiny.ragged(3)]
    answers = ask(names, prompts, 4)
    for is_flat in (False, True):
        python = [logprobs.create_prompt_logprobs(is_flat) for _ in answers]
        for answer, entries in zip(python, answers, strict=True):
            for entry in entries[1:]:
                answer.append({int(i): logprobs.Logprob(**value) for i, value in entry.items()})
        got, want = from_vllm(python), from_vllm(answers)
        assert all(map(torch.equal, got[:2], want[:2]))


def test_more_than_max_logprobs_is_refused_by_the_server(names: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        names["prompt_logprobs"]([[3, 4]], V + 1)


def test_the_client_of_trl(names: dict[str, Any]) -> None:
    need("trl")
    import requests
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient.__new__(VLLMClient)  # its constructor wants vLLM in this environment
    client.base_url, client.session, client.model = names["SERVER"], requests.Session(), "teacher"
    batch = tiny.padded(tiny.ragged(3))
    mask = batch["attention_mask"]
    prompts = [row[kept != 0].tolist() for row, kept in zip(batch["input_ids"], mask, strict=True)]
    answer = client.get_sequence_logprobs(prompts, [2, 1, 3], top_logprobs=4, temperature=2.0)
    got, want = from_trl(answer, [2, 1, 3], mask), from_vllm(ask(names, prompts, 4), mask, k=4)
    for row, length in enumerate([2, 1, 3]):
        assert bool((got.logprobs[row, : length - 1] == -torch.inf).all())
        assert torch.equal(got.logprobs[row, length - 1 :], want.logprobs[row, length - 1 :])
        assert torch.equal(got.token_ids[row, length - 1 :], want.token_ids[row, length - 1 :])
