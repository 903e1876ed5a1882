"""``python -m demo.regret``: what is given up by stopping when the monitor says "converged"?

Small Llamas learn the demo's text over its 2,048 most frequent tokens, at a constant rate after a
warm-up, to three times the step at which the monitor stopped them. The losses given up, from there
to the mean of the last quarter, are in units of δ; one line for each seed. About 30 minutes.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo import corpus
from fused_kd import KDLoss
from fused_kd.objectives import ConvergenceMonitor, evaluate

TOKENS, WINDOW, ROWS = 2048, 64, 8
RATE, WARM_UP = 1e-3, 100
TEACHER_STEPS, EVERY, MOST_STEPS = 4000, 100, 12_000
HELD_OUT_WINDOWS = 256
LOSS = KDLoss(temperature=2.0)


def model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a new Llama over the frequent tokens."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=WINDOW,
            use_cache=False,
        )
    )


def frequent_text() -> corpus.Corpus:
    """Return the demo's text with one class for all but the most frequent tokens."""
    text = corpus.load(1_000_000, 100_000)
    frequent = torch.bincount(text.train).argsort(descending=True)[: TOKENS - 1]
    class_of = torch.full((text.vocab_size,), TOKENS - 1)
    class_of[frequent] = torch.arange(TOKENS - 1)
    return corpus.Corpus(
        class_of[text.train], class_of[text.held_out], TOKENS, text.files, text.characters
    )


def train(
    student: LlamaForCausalLM,
    text: corpus.Corpus,
    teacher: Callable[..., Any] | None,
    seed: int,
    loss: KDLoss = LOSS,
) -> Iterator[int]:
    """Train at a constant rate after a warm-up; yield the number of steps after each, endlessly.

    Without a teacher the loss is the cross-entropy.
    """
    if teacher is None:
        loss = KDLoss(hard_weight=1.0, soft_weight=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    for step, (ids, labels) in enumerate(text.batches(ROWS, WINDOW, seed)):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
        target = None
        if teacher is not None:
            with torch.no_grad():
                target = teacher(input_ids=ids).logits
        loss(student(input_ids=ids).logits, target, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def given_up(text: corpus.Corpus, teacher: LlamaForCausalLM, seed: int, delta: float) -> str:
    """Train a student to three times its stopping point; return a line of a table."""
    student, monitor = model(64, 1, seed), ConvergenceMonitor(delta, delta)
    held_out = [
        {"input_ids": ids, "labels": ids}
        for ids, _ in text.held_out_batches(32, WINDOW, HELD_OUT_WINDOWS * WINDOW)
    ]
    stop, points = 0, []
    for step in train(student, text, teacher, seed + 1):
        if step % EVERY != 0 or step < 2 * WARM_UP:
            continue
        sums = evaluate(LOSS, student, teacher, held_out)
        assert sums.hard is not None
        assert sums.soft is not None
        total = sums.tokens.sum()
        points.append((step, float(sums.hard.sum() / total), float(sums.soft.sum() / total)))
        if stop == 0:
            verdict = monitor.update(**sums._asdict(), step=step, lr=RATE)
            stop = step if verdict.stop else 0
        if step >= (3 * stop if stop else MOST_STEPS):
            break
    if stop == 0:
        return f"seed {seed}: not stopped in {MOST_STEPS} steps: {verdict.reason}"
    at_stop = next(point for point in points if point[0] == stop)
    last = [point for point in points if point[0] > 2.25 * stop]
    hard, soft = (
        (at_stop[i] - statistics.fmean(point[i] for point in last)) / delta for i in (1, 2)
    )
    return f"seed {seed}: stopped at step {stop}; given up: hard {hard:+.2f} δ, soft {soft:+.2f} δ"


def main() -> None:
    """Train the teacher, then a student for each seed; print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m demo.regret", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--delta", type=float, default=0.1, help="nats a token, of both losses")
    chosen = parser.parse_args()
    text = frequent_text()
    teacher = model(128, 2, 99)
    for step in train(teacher, text, None, 0):
        if step == TEACHER_STEPS:
            break
    teacher.eval().requires_grad_(False)
    print("the teacher is trained", flush=True)
    for seed in range(chosen.seeds):
        print(given_up(text, teacher, seed, chosen.delta), flush=True)


if __name__ == "__main__":
    main()
