"""A whole training step of a small decoder, with any loss at its end."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES, LOGITS, Case
from .methods.base import Loss
from .problems import CHECKED_ROWS, CHECKED_VOCABULARY, Problem

#: Tokens of a sequence, entries of an attention head, layers of student and teacher.
LENGTH, HEAD, STUDENT_LAYERS, TEACHER_LAYERS = 128, 64, 1, 2
LEARNING_RATE = 1e-5


def whole_sequences(tokens: int) -> int:
    """Return the next number of tokens that makes whole sequences."""
    return tokens if tokens <= LENGTH else LENGTH * -(-tokens // LENGTH)


class Decoder(nn.Module):
    """Embedding, causal transformer layers, and a head that the loss applies, or the step."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        # as many attention heads as divide the hidden size, of HEAD entries or a few more
        heads = next(n for n in range(max(1, hidden // HEAD), 0, -1) if hidden % n == 0)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the hidden states (N, H) of ids (B, S), N = B·S."""
        x, length = self.embedding(ids), ids.shape[1]
        make_mask = nn.Transformer.generate_square_subsequent_mask
        mask = make_mask(length, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.norm(x).flatten(0, 1)


class StepProblem(Problem):
    """Student, frozen teacher, one batch, and AdamW; a loss takes hidden states and weights."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case)
        torch.manual_seed(seed)
        sizes = (case.student_hidden, STUDENT_LAYERS), (case.teacher_hidden, TEACHER_LAYERS)
        models = (Decoder(case.v, *size).to(case.device, DTYPES[case.dtype]) for size in sizes)
        self._student, self._teacher = models
        self._teacher.requires_grad_(False).eval()
        length = min(LENGTH, case.n)
        self._ids = torch.randint(case.v, (case.n // length, length), device=case.device)
        self._labels = self._ids.roll(-1, 1).flatten()
        parameters = self._student.parameters()
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def call(self, loss: Loss, rows: int | None = None) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                teacher_hidden = self._teacher(self._ids)
            hidden = self._student(self._ids)
            heads = self._student.head.weight, self._teacher.head.weight
            loss(hidden, heads[0], teacher_hidden, heads[1], self._labels).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        return run

    def few(self) -> tuple[Tensor, ...]:
        labels = self._labels[:CHECKED_ROWS] % min(CHECKED_VOCABULARY, self.case.v)
        with torch.no_grad():
            pairs = [
                (model(self._ids[:1])[:CHECKED_ROWS], model.head.weight[:CHECKED_VOCABULARY])
                for model in (self._student, self._teacher)
            ]
        return (*pairs[0], *pairs[1], labels)


def after_heads(loss: Loss, level: str) -> Loss:
    """Return a loss of logits as one of hidden states and weights; others unchanged."""
    if level != LOGITS:
        return loss
    return lambda hidden, weight, teacher, head, labels: loss(
        F.linear(hidden, weight), F.linear(teacher, head), labels
    )
