"""Run the examples with each framework's own loss and with ours: ``python examples/measure.py``.

Each example runs unchanged, but with a vocabulary of 131,072 entries. For the framework's own loss,
the one name in it that calls fused_kd is replaced. Frameworks without a distillation loss (Trainer,
Lightning, Accelerate) get a composition of torch operations, ``fused_kd.testing.eager_kd_loss``.
Every run is a process, whose peak memory and seconds of training are printed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fused_kd import KDLossParts
from fused_kd.integrations._common import parts
from fused_kd.testing import eager_kd_loss

VOCABULARY = 131_072
#: Each way runs this many times, in turns; the fastest counts.
REPEATS = 3


def compose() -> None:
    """Make the adapters of Trainer, Lightning and Accelerate call torch operations on logits.

    This lasts until the process ends. It suits the examples, which pass Heads and set the
    temperature alone: other keywords of the loss are ignored, and both parts are the loss.
    """

    def loss(options: Any, *sides: Any) -> KDLossParts:
        student, teacher = (F.linear(side.hidden, side.weight, side.bias) for side in sides[:2])
        labels, _, num_items = sides[2:]
        value = eager_kd_loss(
            student, teacher, labels, temperature=options.temperature, num_items=num_items
        )
        return KDLossParts(value, value.detach(), value.detach())

    parts.kd_loss_with = loss


def leave(trainer: Any, **options: Any) -> Any:
    """Return the trainer unchanged, so that TRL computes its own loss; `options` are ignored."""
    return trainer


def liger(**options: Any) -> Callable[..., Tensor]:
    """Return Liger's loss for hidden states (B, S, H); compiled, it would take longer to start.

    `options` are its keywords except `compiled`.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(**options, compiled=False)
    return lambda s, w_s, t, w_t, y: loss(s.flatten(0, 1), w_s, t.flatten(0, 1), w_t, y.flatten())


def model_optimizer(inplace: bool, **options: Any) -> Any:
    """Return modelopt's own criterion; `inplace` is ignored, which it does not have."""
    from modelopt.torch.distill import LogitsDistillationLoss

    return LogitsDistillationLoss(**options)


#: Example: the name in it that is replaced, and the replacement; None: compose().
OWN: dict[str, tuple[str, Any] | None] = {
    "transformers_trainer": None,
    "lightning_module": None,
    "accelerate_loop": None,
    "trl_gkd": ("use_fused_kd", leave),
    "trl_distillation": ("use_fused_kd", leave),
    "liger": ("LigerFusedLinearJSDLoss", liger),
    "model_optimizer": ("LogitsDistillationLoss", model_optimizer),
}


def run_one(name: str, is_own: bool) -> None:
    """Run an example in this process, with the framework's own loss or ours; print its seconds.

    It changes the example's module, so it is to be called once in a process.
    """
    module = importlib.import_module(name)
    if hasattr(module, "WORDS"):
        module.WORDS += [f"x{i}" for i in range(VOCABULARY - len(module.WORDS))]
    else:
        module.VOCABULARY = VOCABULARY
    replaced = OWN[name]
    if is_own and replaced is not None:
        setattr(module, *replaced)
    elif is_own:
        compose()
    start = time.perf_counter()
    module.main()
    print(f"seconds {time.perf_counter() - start:.2f}")


def measure(name: str, way: str) -> tuple[float, float, str]:
    """Run an example in a separate process; return seconds, peak resident MiB and its losses.

    Raises SystemExit if the example fails.
    """
    command = [sys.executable, __file__, name, "--way", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} --way {way} failed with status {process.returncode}, see above")
    losses = re.findall(r"loss (\S+) -> (\S+)", text)[0]
    seconds = float(re.findall(r"seconds (\S+)", text)[0])
    return seconds, usage.ru_maxrss / 1024, " to ".join(losses)


def main() -> None:
    """Print a table with a row for each example."""
    parser = argparse.ArgumentParser(
        description="Run the examples with each framework's own loss and with fused_kd; print "
        "losses, seconds and peak memory of both."
    )
    names = f"examples to run: {', '.join(OWN)}; all of them without a name"
    parser.add_argument("names", nargs="*", default=[*OWN], metavar="NAME", help=names)
    parser.add_argument(
        "--way",
        choices=["own", "ours"],
        help="run one example in this process, with the framework's loss (own) or fused_kd (ours)",
    )
    options = parser.parse_args()
    if options.way:
        return run_one(options.names[0], options.way == "own")
    print("| example | losses, own | ours | seconds, own / ours | peak MiB, own / ours |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.names:
        runs = [(measure(name, "own"), measure(name, "ours")) for _ in range(REPEATS)]
        own, ours = (min(way) for way in zip(*runs, strict=True))
        figures = f"{own[0]:.1f} / {ours[0]:.1f} | {own[1]:.0f} / {ours[1]:.0f}"
        print(f"| {Path(name).name} | {own[2]} | {ours[2]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
