"""``python -m demo``: distil a small model on real text, with the eager loss and with fused_kd."""

import argparse
import os
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

STEPS = 50
TRAIN_TOKENS, HELD_OUT_TOKENS = 1_000_000, 100_000
NEEDED = ("torch", "transformers", "mistral_common", "matplotlib", "fused_kd")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"demo: {message}\n")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line before any work; exit with status 2 on an error."""
    parser = Parser(
        prog="python -m demo",
        description="Train a small teacher on the text of Python's standard library with a real "
        "131,072-entry vocabulary; distil four students from it, with the eager loss, KDLoss on "
        "logits, KDLoss on heads and KDLoss on a cache of the teacher's top 64 on disk, from the "
        "same weights and batches; compare curves, time and memory. Takes about 4 minutes on two "
        "CPU cores; needs `pip install -r demo/requirements.txt`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="steps of the students; the teacher takes 8 times as many",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and batches")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        help="file to save the picture in: .png, .pdf or .svg",
    )
    parser.add_argument(
        "--inplace",
        action="store_true",
        help="let KDLoss write its gradient over the student's logits",
    )
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps must be at least 1; got {chosen.steps}")
    if not 0 <= chosen.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1; got {chosen.seed}")
    if chosen.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output must end in .png, .pdf or .svg; got '{chosen.output}'")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(f"missing {', '.join(missing)}: pip install -r demo/requirements.txt")
    try:
        existed = chosen.output.exists()
        chosen.output.open("ab").close()
        if not existed:
            chosen.output.unlink()
    except OSError as error:
        parser.error(f"--output cannot be written: '{chosen.output}': {error.strerror}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print the table and save the picture, as the command line says."""
    chosen = options(arguments)
    started = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    import torch

    from demo import cache, corpus, models, report, train, watch
    from fused_kd import KDLoss
    from fused_kd.backends import why_not
    from fused_kd.testing import eager_kd_loss

    torch.manual_seed(chosen.seed)
    reason = why_not("cpu", "cpu")
    backend = f"slow reference backend: {reason}" if reason else "compiled CPU kernels"
    print(f"fused_kd   {backend}, {torch.get_num_threads()} threads")
    text = corpus.load(TRAIN_TOKENS, HELD_OUT_TOKENS)
    print(
        f"text       {len(text.train) + len(text.held_out):,} tokens from {text.files} files of "
        f"Python {sys.version.split()[0]}'s standard library, {text.vocab_size:,} in the vocabulary"
    )
    teacher = train.train_teacher(text, train.TEACHER_STEPS * chosen.steps, chosen.seed)

    weights: dict[str, Any] = {
        "temperature": train.TEMPERATURE,
        "hard_weight": 0.5,
        "soft_weight": 0.5,
    }
    by_logits = KDLoss(**weights, inplace=chosen.inplace)
    by_chunks = KDLoss(**weights, memory_budget=train.MEMORY_BUDGET)
    batches = train.student_batches(text, chosen.steps, chosen.seed)
    start = models.student_of(teacher)
    with TemporaryDirectory(prefix="fused_kd_demo_") as folder:
        top_k = cache.write(teacher, batches, Path(folder))
        methods = {
            "eager": train.Method(train.logits, partial(eager_kd_loss, **weights)),
            "KDLoss": train.Method(train.logits, by_logits),
            report.HEADS: train.Method(train.head, by_chunks),
            report.TOP_K: train.Method(train.logits, by_logits, top_k),
        }
        watched = watch.Watch(report.HEADS, by_chunks, text, chosen.steps)
        students = train.distil(teacher, start, methods, batches, watched.look)
    trained = {student.name: student.model for student in students}
    judged = train.evaluate({"teacher": teacher, "student before": start, **trained}, text)

    print("\n" + report.table(students, judged))
    print(
        f"\n{report.notes(students, train.MEMORY_BUDGET)}\n"
        f"Perplexity of token frequencies alone: {text.unigram_perplexity():.0f}.\n"
        f"The first three curves differ by at most {report.largest_difference(students):.1e}. That "
        f"of {report.TOP_K}\nis at most {report.top_k_difference(students):.1e} from the eager "
        "one: its divergence has one class for all other tokens."
    )
    report.picture(students, text.vocab_size, chosen.output)
    objectives = chosen.output.with_stem(f"{chosen.output.stem}_objectives")
    print(f"\n{watched.report(objectives)}\n")
    print(f"pictures   {chosen.output.resolve()}, {objectives.name}")
    print(f"time       {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
