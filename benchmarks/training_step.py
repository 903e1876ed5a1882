"""A whole training step of a small decoder, with any loss at its end."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES, LOGITS, Case
from .entrants.base import Loss
from .problems import CHECKED_ROWS, CHECKED_VOCABULARY, Problem

#: Tokens of a sequence, entries of an attention head, layers of student and teacher.
LENGTH, HEAD, STUDENT_LAYERS, TEACHER_LAYERS = 128, 64, 1, 2
LEARNING_RATE = 1e-5


def whole_sequences(tokens: int) -> int:
    """So many tokens, or the next number of them that makes whole sequences."""
    return tokens if tokens <= LENGTH else LENGTH * -(-tokens // LENGTH)


class Decoder(nn.Module):
    """Embedding, causal transformer layers, and a head that the loss applies, or the step."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, _heads(hidden), 4 * hidden, dropout=0.0,
                                       batch_first=True, norm_first=True)
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states (N, H) of ids (B, S), N = B·S."""
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(
            ids.shape[1], device=x.device, dtype=x.dtype
        )
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        result: Tensor = self.norm(x).flatten(0, 1)
        return result


def _heads(hidden: int) -> int:
    """As many as divide the hidden size, of HEAD entries or a few more."""
    return next(n for n in range(max(1, hidden // HEAD), 0, -1) if hidden % n == 0)


class StepProblem(Problem):
    """Student, frozen teacher, one batch, and AdamW.

    A loss is called with hidden states and weights; :func:`after_heads` converts a loss of
    logits to that.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case)
        if whole_sequences(case.n) != case.n:
            raise ValueError(f"N must be up to {LENGTH} or a multiple of it; got {case.n}")
        torch.manual_seed(seed)
        dtype, device = DTYPES[case.dtype], case.device
        self._student, self._teacher = (
            Decoder(case.v, hidden, layers).to(device, dtype)
            for hidden, layers in ((case.student_hidden, STUDENT_LAYERS),
                                   (case.teacher_hidden, TEACHER_LAYERS))
        )  # fmt: skip
        self._teacher.requires_grad_(False).eval()
        length = min(LENGTH, case.n)
        self._ids = torch.randint(case.v, (case.n // length, length), device=device)
        self._labels = self._ids.roll(-1, 1).flatten()
        self._optimizer = torch.optim.AdamW(
            self._student.parameters(), lr=LEARNING_RATE, fused=True
        )

    def call(self, loss: Loss, rows: int | None = None) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                teacher_hidden = self._teacher(self._ids)
            hidden = self._student(self._ids)
            heads = self._student.head.weight, self._teacher.head.weight
            value = loss(hidden, heads[0], teacher_hidden, heads[1], self._labels)
            value.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()

        return run

    def few(self) -> tuple[Tensor, ...]:
        models = self._student, self._teacher
        with torch.no_grad():
            pairs = [
                (model(self._ids[:1])[:CHECKED_ROWS], model.head.weight[:CHECKED_VOCABULARY])
                for model in models
            ]
        labels = self._labels[:CHECKED_ROWS] % min(CHECKED_VOCABULARY, self.case.v)
        return (*pairs[0], *pairs[1], labels)

    def leaves(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
        return (0, 1)


def after_heads(loss: Loss, level: str) -> Loss:
    """Return a loss of logits as one of hidden states and weights; others unchanged."""
    if level != LOGITS:
        return loss

    def whole(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:
        return loss(F.linear(hidden, weight), F.linear(teacher, head), labels)

    return whole
