"""Train the teacher, distil the students from it, measure the loss inside each step."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from demo.corpus import Corpus
from demo.models import FrequentVocabulary
from demo.progress import Progress
from fused_kd import Head, TopK, kd_loss
from fused_kd.options import MIB
from fused_kd.sides import Teacher
from fused_kd.testing import cpu_peak

TEMPERATURE = 2.0
WINDOW = 64  # tokens in a sequence
TEACHER_ROWS, TEACHER_RATE, TEACHER_STEPS = 8, 2e-3, 8  # steps for each step of the students
STUDENT_ROWS, STUDENT_RATE = 4, 1e-3
HELD_OUT_TOKENS = 4096
MEMORY_BUDGET = 64 * MIB  # of KDLoss with heads: a quarter of the step's logits


def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the logits of a model, (B, S, V)."""
    result: Tensor = model(input_ids=ids).logits
    return result


def head(model: LlamaForCausalLM, ids: Tensor) -> Head:
    """Return the hidden states of a model, (B, S, H), with its lm_head, (V, H).

    The weight is a view of the parameter: the parameter is also the tied embedding, and its
    gradient would contain the embedding's part, which the model's backward computes.
    """
    weight = model.lm_head.weight
    return Head(model.model(input_ids=ids).last_hidden_state, weight.view_as(weight))


def tensors(side: Tensor | Head) -> tuple[Tensor, ...]:
    """Return the tensors of a student's side that get a gradient from the loss."""
    return (side.hidden, side.weight) if isinstance(side, Head) else (side,)


@dataclass(frozen=True)
class Method:
    """A loss, and the function that makes its sides, logits or Heads, from a model and ids.

    With a cache, the teacher's side of ids is read from it, and no teacher runs.
    """

    side: Callable[[LlamaForCausalLM, Tensor], Tensor | Head]
    loss: Callable[..., Tensor]
    cache: Callable[[Tensor], TopK] | None = None


@dataclass(frozen=True)
class Scores:
    """Mean hard and soft loss over the tokens of the held-out windows."""

    hard: float
    soft: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.hard, 700.0))


@dataclass
class Student:
    """A model, its method, and the losses, times and memory measured in its training."""

    name: str
    model: LlamaForCausalLM
    method: Method
    losses: list[float] = field(default_factory=list)
    loss_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    loss_bytes: int = 0
    step_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = optimizer_of(self.model, STUDENT_RATE)

    def forward(self, teacher: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor | Head, Teacher]:
        """Run both models, or read the cache; return the loss's sides, the student's first."""
        if self.method.cache is not None:
            return self.method.side(self.model, ids), self.method.cache(ids)
        with torch.no_grad():
            teacher_side = self.method.side(teacher, ids)
        return self.method.side(self.model, ids), teacher_side

    def loss_and_gradients(
        self, student: Tensor | Head, teacher: Teacher, labels: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and its gradients by `tensors(student)`, without the model's backward."""
        loss = self.method.loss(student, teacher, labels)
        return loss.detach(), torch.autograd.grad(loss, tensors(student))

    def forward_and_backward(
        self, teacher: LlamaForCausalLM, ids: Tensor, labels: Tensor
    ) -> tuple[float, float]:
        """Run a step but for the update; return the loss, and the milliseconds of loss alone."""
        student, teacher_side = self.forward(teacher, ids)
        start = time.perf_counter()
        loss, gradients = self.loss_and_gradients(student, teacher_side, labels)
        end = time.perf_counter()
        torch.autograd.backward(tensors(student), gradients)
        return loss.item(), 1e3 * (end - start)

    def measure_memory(self, teacher: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> None:
        """Set loss_bytes, the loss's peak beyond its inputs, and step_bytes, the step's peak."""
        inputs = self.forward(teacher, ids)
        self.loss_bytes = cpu_peak(partial(self.loss_and_gradients, *inputs, labels)).highest
        del inputs
        step = partial(self.forward_and_backward, teacher, ids, labels)
        self.step_bytes = cpu_peak(step).highest
        self.optimizer.zero_grad()

    def step(self, teacher: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> None:
        """Train one step, and append its loss and times to the lists."""
        start = time.perf_counter()
        loss, loss_ms = self.forward_and_backward(teacher, ids, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss)
        self.loss_ms.append(loss_ms)


def optimizer_of(model: LlamaForCausalLM, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with the same settings for every model."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Set the optimizer's rate in a step: a short warm-up, then a cosine to a tenth of the peak."""
    warm = min(1.0, (step + 1) / max(1.0, 0.08 * steps))
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * cosine


def train_teacher(corpus: Corpus, steps: int, seed: int) -> LlamaForCausalLM:
    """Return a teacher over the full vocabulary, trained from scratch on the corpus."""
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


def student_batches(corpus: Corpus, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return the students' batches (ids, labels): one to measure memory, and one per step."""
    return list(islice(corpus.batches(STUDENT_ROWS, WINDOW, seed + 1), steps + 1))


def distil(
    teacher: LlamaForCausalLM,
    start: LlamaForCausalLM,
    methods: dict[str, Method],
    batches: list[tuple[Tensor, Tensor]],
    after_step: Callable[[int, Student, LlamaForCausalLM], None] = lambda *_: None,
) -> list[Student]:
    """Train and return a student per method, from the weights of `start`, on the same batches.

    `after_step` is called with the number of steps, from 1 on, each student and the teacher.
    """
    students = [Student(name, deepcopy(start), method) for name, method in methods.items()]
    first, *batches = batches
    for student in students:
        student.measure_memory(teacher, *first)
    steps = len(batches)
    with Progress("students", steps) as progress:
        for step, batch in enumerate(batches):
            for student in students:
                set_rate(student.optimizer, STUDENT_RATE, step, steps)
                student.step(teacher, *batch)
                after_step(step + 1, student, teacher)
            shown = (f"{s.name} {s.losses[-1]:.4f} in {s.step_ms[-1]:.0f} ms" for s in students)
            progress.advance(", ".join(shown))
    return students


@torch.no_grad()
def evaluate(models: dict[str, LlamaForCausalLM], corpus: Corpus) -> dict[str, Scores]:
    """Return each model's scores on held-out text; the soft loss's teacher is the first model."""
    batches = corpus.held_out_batches(STUDENT_ROWS, WINDOW, HELD_OUT_TOKENS)
    sums = torch.zeros(len(models), 2, dtype=torch.float64)
    with Progress("held-out", len(batches)) as progress:
        for ids, labels in batches:
            target = None  # the teacher's logits
            for total, model in zip(sums, models.values(), strict=True):
                logits = model(input_ids=ids).logits
                target = logits if target is None else target
                parts = kd_loss(logits, target, labels, temperature=TEMPERATURE, return_parts=True)
                total += torch.stack([parts.hard, parts.soft])
            progress.advance()
    means = (sums / len(batches)).tolist()
    return {name: Scores(*row) for name, row in zip(models, means, strict=True)}
