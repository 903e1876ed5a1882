"""What the examples share: text, models, and the comparison of two ways to train.

The text is Python's standard library under a real tokenizer of 131,072 entries, the models are
small Llamas, as in the demo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.measuring import process_peak
from demo import corpus, models, train
from fused_kd.env import report
from fused_kd.integrations._common.frameworks import FRAMEWORKS
from fused_kd.options import MIB

STEPS, ROWS, LENGTH = 20, 2, 128
TRAIN_TOKENS, HELD_OUT_TOKENS = 200_000, 10_000
TEACHER_STEPS = 100
#: Each way is run so many times, in turns; the fastest counts.
REPEATS = 2
#: Plain gradient descent everywhere, PLAIN for a Trainer. Adam makes steps of full size of
#: gradients that are nothing but rounding; of a clipped gradient nobody sees that it was scaled.
RATE = 0.1
PLAIN: dict[str, Any] = {
    "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
}  # fmt: skip
OUTPUT = Path("out/examples")

#: Trains the model that it is given; the loss of every step.
Training = Callable[[nn.Module], list[float]]


@dataclass(frozen=True)
class Comparison:
    """A framework's own loss beside ours."""

    name: str
    framework: str  # with its version
    processor: str
    steps: int
    losses_own: list[float]
    losses_ours: list[float]
    largest_loss_difference: float
    largest_weight_difference: float
    largest_weight_change: float  # by training: what the difference is to be held against
    seconds_own: float  # per step
    seconds_ours: float
    peak_own: int | None  # bytes of resident memory beyond what there was before
    peak_ours: int | None

    def __str__(self) -> str:
        lines = [
            f"{self.name} ({self.framework}), {self.steps} steps",
            f"  loss      own {self.losses_own[0]:.6f} -> {self.losses_own[-1]:.6f}, "
            f"ours {self.losses_ours[0]:.6f} -> {self.losses_ours[-1]:.6f}; "
            f"they differ by at most {self.largest_loss_difference:.1e}",
            f"  weights   differ by at most {self.largest_weight_difference:.1e}; "
            f"training moved one by {self.largest_weight_change:.1e}",
            f"  time      own {self.seconds_own:.2f} s a step, ours {self.seconds_ours:.2f} s: "
            f"{self.seconds_own / self.seconds_ours:.1f} times as fast",
        ]
        if self.peak_own and self.peak_ours:
            lines.append(
                f"  memory    own {self.peak_own / MIB:.0f} MiB, ours "
                f"{self.peak_ours / MIB:.0f} MiB: {self.peak_own / self.peak_ours:.1f} times less"
            )
        return "\n".join(lines)


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    return options


def text() -> corpus.Corpus:
    """Tokens of Python's standard library."""
    return corpus.load(TRAIN_TOKENS, HELD_OUT_TOKENS)


def batches(source: corpus.Corpus, steps: int, rows: int = ROWS) -> list[Tensor]:
    """The same random windows in every call: `steps` of (rows, LENGTH), int64."""
    return [ids for ids, _ in itertools.islice(source.batches(rows, LENGTH, seed=1), steps)]


def student_and_teacher(source: corpus.Corpus) -> tuple[nn.Module, nn.Module]:
    """A teacher that was trained a little, once, and a shallower student that starts from it."""
    kept = OUTPUT / f"teacher_{source.vocab_size}_{TEACHER_STEPS}.pt"
    if kept.exists():
        teacher = models.build(source.vocab_size, models.TEACHER_LAYERS)
        teacher.load_state_dict(torch.load(kept, weights_only=True))
        teacher.eval().requires_grad_(False)
    else:
        torch.manual_seed(0)
        teacher = train.train_teacher(source, TEACHER_STEPS, seed=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), kept)
    return models.student_of(teacher), teacher


def compare(
    name: str, package: str, own: Training, ours: Training, student: nn.Module
) -> Comparison:
    """Trains two copies of the student, one each way, from the same seeds; prints and keeps it.

    Args:
        name: of the trainer or loss that is compared.
        package: a key of FRAMEWORKS.
        own: trains with the framework's own loss.
        ours: trains with fused_kd.
        student: is not changed.
    """
    best: dict[str, tuple[float, int | None, list[float], nn.Module]] = {}
    for _ in range(REPEATS):
        for key, training in (("own", own), ("ours", ours)):
            seconds, peak, losses, model = _trained(training, student)
            if key in best:
                seconds = min(seconds, best[key][0])
            best[key] = seconds, peak, losses, model
    (s_own, p_own, l_own, m_own), (s_ours, p_ours, l_ours, m_ours) = best["own"], best["ours"]
    found = Comparison(
        name, f"{package} {FRAMEWORKS[package].installed}", report()["processor"]["name"],
        len(l_own), l_own, l_ours,
        max(abs(a - b) for a, b in zip(l_own, l_ours, strict=True)),
        difference(m_own.parameters(), m_ours.parameters()),
        difference(m_own.parameters(), student.parameters()),
        s_own / len(l_own), s_ours / len(l_ours), p_own, p_ours,
    )  # fmt: skip
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "results.jsonl").open("a") as file:
        file.write(json.dumps(asdict(found)) + "\n")
    print(found, flush=True)
    return found


def _trained(
    training: Training, student: nn.Module
) -> tuple[float, int | None, list[float], nn.Module]:
    """Seconds, peak, losses and the trained copy."""
    model, losses, seconds = deepcopy(student), list[float](), list[float]()
    random.seed(0)
    torch.manual_seed(0)

    def run() -> None:
        start = time.perf_counter()
        losses.extend(training(model))
        seconds.append(time.perf_counter() - start)

    peak = process_peak(run)
    return seconds[0], peak, losses, model


def difference(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """The largest of any weight."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def logged(trainer: Any) -> list[float]:
    """Trains with a Trainer of transformers or TRL; the losses that it logs, one for each step."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
