"""``python -m demo.conflicts``: a teacher that is wrong on purpose, and the tokens where it is.

A small Llama learns the labels of the demo's text alone. Then it is distilled from a teacher that
is wrong after a third of the tokens: its logits are those of other tokens. The monitor should say
"trading off", and the product of the two gradients by the logits should be negative where the
teacher is wrong: the area under the ROC curve says how well it finds them. About a minute.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from demo.regret import HELD_OUT_WINDOWS, RATE, WINDOW, frequent_text, model, train
from fused_kd import KDLoss, kd_metrics
from fused_kd.objectives import ConvergenceMonitor, evaluate

FIRST_STEPS, MOST_STEPS, DELTA = 2000, 400, 0.02
LOOK_EVERY = 10  # in the warm-up too: the trade begins with the first step
LOSS = KDLoss(temperature=2.0, hard_weight=0.1, soft_weight=0.9)


class WrongTeacher(nn.Module):
    """A teacher whose logits after a third of the tokens are those of other tokens."""

    def __init__(self, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.teacher = teacher

    def is_wrong(self, input_ids: Tensor) -> Tensor:
        """Return True for the tokens after which the prediction is wrong."""
        return input_ids * 2_654_435_761 % 3 == 0

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits: Tensor = self.teacher(input_ids=input_ids).logits
        wrong = logits.roll(logits.shape[-1] // 2, dims=-1)
        is_wrong = self.is_wrong(input_ids)[..., None]
        return SimpleNamespace(logits=torch.where(is_wrong, wrong, logits))


def area(score: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: the share of pairs that the score orders rightly."""
    rank = torch.empty_like(score, dtype=torch.float64)
    rank[score.argsort()] = torch.arange(len(score), dtype=torch.float64)
    count = int(positive.sum())
    below = float(rank[positive].sum()) - count * (count - 1) / 2
    return below / (count * (len(score) - count))


def main() -> None:
    """Train, print each verdict, then the share of conflicts and the area under the ROC curve."""
    text = frequent_text()
    right = model(128, 2, 99)
    for step in train(right, text, None, 0):
        if step == FIRST_STEPS:
            break
    student, teacher = model(64, 1, 0), WrongTeacher(right.eval().requires_grad_(False))
    for step in train(student, text, None, 1):
        if step == FIRST_STEPS:
            break
    windows = text.held_out_batches(32, WINDOW, HELD_OUT_WINDOWS * WINDOW)
    held_out = [{"input_ids": ids, "labels": ids} for ids, _ in windows]
    monitor = ConvergenceMonitor(DELTA, DELTA)
    for step in train(student, text, teacher, 2, LOSS):
        if step % LOOK_EVERY != 0:
            continue
        sums = evaluate(LOSS, student, teacher, held_out)
        verdict = monitor.update(**sums._asdict(), step=step, lr=RATE)
        print(f"step {step}: {verdict.pair}; {verdict.reason}", flush=True)
        if verdict.pair == "trading off" or step == MOST_STEPS:
            break
    products, wrong = [], []
    with torch.no_grad():
        for ids, labels in windows:
            kept = labels != -100
            sides = student(input_ids=ids).logits, teacher(ids).logits
            products.append(kd_metrics(*sides, labels, temperature=2.0).product[kept])
            wrong.append(teacher.is_wrong(ids)[kept])
    product, is_wrong = torch.cat(products), torch.cat(wrong)
    print(
        f"tokens with a negative product: {float((product < 0)[is_wrong].float().mean()):.1%} of "
        f"those with a wrong teacher, {float((product < 0)[~is_wrong].float().mean()):.1%} of the "
        f"others; area under the ROC curve {area(-product, is_wrong):.3f}"
    )


if __name__ == "__main__":
    main()
