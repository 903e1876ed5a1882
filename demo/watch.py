"""Watch a student's two losses on held-out text while it learns, and say whether they converged."""

from pathlib import Path

from transformers import LlamaForCausalLM

from demo.corpus import Corpus
from demo.train import STUDENT_ROWS, WINDOW, Student
from fused_kd import KDLoss
from fused_kd.objectives import ConvergenceMonitor, Verdict, draw, evaluate

DELTA = 0.01  # nats a token, of each loss: 1 % of the perplexity
LOOKS = 12
HELD_OUT_TOKENS = 2048


class Watch:
    """A monitor of the student `name`, which it evaluates about LOOKS times in a run."""

    def __init__(self, name: str, loss: KDLoss, corpus: Corpus, steps: int) -> None:
        self.name, self.loss, self.every = name, loss, max(1, steps // LOOKS)
        batches = corpus.held_out_batches(STUDENT_ROWS, WINDOW, HELD_OUT_TOKENS)
        self.batches = [{"input_ids": ids, "labels": labels} for ids, labels in batches]
        self.monitor = ConvergenceMonitor(DELTA, DELTA)
        self.verdict: Verdict | None = None

    def look(self, step: int, student: Student, teacher: LlamaForCausalLM) -> None:
        """Evaluate the student after a step, if it is the one to watch and the time for it."""
        if student.name != self.name or step % self.every != 0:
            return
        held_out = evaluate(
            self.loss, student.model, teacher, self.batches, heads=True, shift=False
        )
        rate = student.optimizer.param_groups[0]["lr"]
        self.verdict = self.monitor.update(**held_out._asdict(), step=step, lr=rate)

    def report(self, picture: Path) -> str:
        """Draw the picture; return the verdict as lines of text."""
        assert self.verdict is not None
        draw(self.monitor, picture)
        hard, soft = self.verdict.reason.split("; soft: ")
        return (
            f"Have both objectives converged? {self.name}: {self.verdict.pair}\n"
            f"  {hard}\n  soft: {soft}\n  "
            "The rate falls, so that no run as short as this one can be said to have converged."
        )
