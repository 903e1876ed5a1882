"""Train the teacher, distil the students from it, measure the loss inside each step."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from demo.corpus import Corpus
from demo.models import FrequentVocabulary
from demo.progress import Progress
from fused_kd import kd_loss
from fused_kd.testing import cpu_peak

TEMPERATURE = 2.0
WINDOW = 64  # tokens in a sequence
TEACHER_ROWS, TEACHER_RATE, TEACHER_STEPS = 8, 2e-3, 8  # steps for each step of the students
STUDENT_ROWS, STUDENT_RATE = 4, 1e-3
HELD_OUT_TOKENS = 4096

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """Means over the tokens of the held-out windows."""

    hard: float
    soft: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.hard, 700.0))


@dataclass
class Student:
    """A model, the loss it learns from, and what was measured while it learned."""

    name: str
    model: LlamaForCausalLM
    loss: LossFunction
    losses: list[float] = field(default_factory=list)
    loss_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = optimizer_of(self.model, STUDENT_RATE)

    def loss_and_gradient(
        self, logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient by the logits: the graph behind the logits is not entered."""
        loss = self.loss(logits, teacher_logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    def measure_peak(self, ids: Tensor, labels: Tensor, teacher_logits: Tensor) -> None:
        """The memory that the loss needs beyond the logits, its gradient included."""
        logits = self.model(input_ids=ids).logits
        peak = cpu_peak(lambda: self.loss_and_gradient(logits, teacher_logits, labels))
        self.peak_bytes = peak.highest

    def step(self, ids: Tensor, labels: Tensor, teacher_logits: Tensor, teacher_ms: float) -> None:
        """One step of training. The teacher's forward, shared here, counts in the step's time."""
        start = time.perf_counter()
        logits = self.model(input_ids=ids).logits
        before = time.perf_counter()
        loss, gradient = self.loss_and_gradient(logits, teacher_logits, labels)
        after = time.perf_counter()
        logits.backward(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.loss_ms.append(1e3 * (after - before))
        self.step_ms.append(1e3 * (end - start) + teacher_ms)


def optimizer_of(model: LlamaForCausalLM, rate: float) -> torch.optim.Optimizer:
    """AdamW, the same for every model here."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """A short warm-up, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(1.0, 0.08 * steps))
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * cosine


def train_teacher(corpus: Corpus, steps: int, seed: int) -> LlamaForCausalLM:
    """A teacher over the full vocabulary, trained on the corpus from nothing."""
    vocabulary = FrequentVocabulary(corpus.train, corpus.vocab_size)
    teacher = vocabulary.build_teacher()
    optimizer = optimizer_of(teacher, TEACHER_RATE)
    batches = corpus.batches(TEACHER_ROWS, WINDOW, seed)
    with Progress("teacher", steps) as progress:
        for step in range(steps):
            set_rate(optimizer, TEACHER_RATE, step, steps)
            loss = vocabulary.loss(teacher, *next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(f"loss {loss.item():.2f}")
    return vocabulary.expand(teacher)


def distil(
    teacher: LlamaForCausalLM,
    start: LlamaForCausalLM,
    losses: dict[str, LossFunction],
    corpus: Corpus,
    steps: int,
    seed: int,
) -> list[Student]:
    """One student per loss, side by side: all from the weights of `start`, on the same batches."""
    students = [Student(name, deepcopy(start), loss) for name, loss in losses.items()]
    batches = corpus.batches(STUDENT_ROWS, WINDOW, seed + 1)
    ids, labels = next(batches)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids).logits
    for student in students:
        student.measure_peak(ids, labels, teacher_logits)
    with Progress("students", steps) as progress:
        for step in range(steps):
            ids, labels = next(batches)
            before = time.perf_counter()
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids).logits
            teacher_ms = 1e3 * (time.perf_counter() - before)
            for student in students:
                set_rate(student.optimizer, STUDENT_RATE, step, steps)
                student.step(ids, labels, teacher_logits, teacher_ms)
            shown = (f"{s.name} {s.losses[-1]:.4f} in {s.loss_ms[-1]:.0f} ms" for s in students)
            progress.advance("loss: " + ", ".join(shown))
    return students


@torch.no_grad()
def evaluate(models: dict[str, LlamaForCausalLM], corpus: Corpus) -> dict[str, Scores]:
    """Score models on the held-out text; the first one is the teacher of the soft loss."""
    batches = corpus.held_out_batches(STUDENT_ROWS, WINDOW, HELD_OUT_TOKENS)
    sums = torch.zeros(len(models), 2, dtype=torch.float64)
    with Progress("held-out", len(batches)) as progress:
        for ids, labels in batches:
            teacher_logits = None
            for total, model in zip(sums, models.values(), strict=True):
                logits = model(input_ids=ids).logits
                teacher_logits = logits if teacher_logits is None else teacher_logits
                parts = kd_loss(
                    logits, teacher_logits, labels, temperature=TEMPERATURE, return_parts=True
                )
                total += torch.stack([parts.hard, parts.soft])
            progress.advance()
    means = (sums / len(batches)).tolist()
    return {name: Scores(*row) for name, row in zip(models, means, strict=True)}
