"""What is measured: one loss on one size, and the suites of such cases."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from fused_kd.divergences import DIVERGENCES

#: The levels: a loss of logits, of heads (hidden states and lm_heads), of logits and a top-k
#: teacher; or a training step.
LOGITS, HEADS, TOPK, STEP = "logits", "heads", "topk", "step"
LEVEL_WORDS = {HEADS: "hidden states", TOPK: "top-k teacher", STEP: "training step"}


@dataclass(frozen=True)
class Case:
    """One loss on one size; both sides have one dtype and no bias, both terms weigh 0.5."""

    n: int  # rows
    v: int  # vocabulary entries
    dtype: str  # a key of fused_kd.testing.DTYPES
    temperature: float = 2.0
    divergence: str = "forward_kl"
    level: str = LOGITS  # or HEADS, TOPK, STEP
    student_hidden: int = 0  # hidden size; 0 at levels LOGITS and TOPK
    teacher_hidden: int = 0
    device: str = "cpu"
    k: int = 0  # entries of the teacher's rows; 0 but at level TOPK

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of KDLoss for this case."""
        return {"temperature": self.temperature, "divergence": self.divergence}

    @property
    def name(self) -> str:
        """Return a readable name that no other case has."""
        return self.setting()

    def setting(self, *without: str) -> str:
        """Return the case in words without these parts ("level", "n", ...); nor a device "cpu"."""
        hidden = f"H={self.student_hidden} (student) / {self.teacher_hidden} (teacher)"
        words = {
            "level": LEVEL_WORDS.get(self.level, self.level),
            "dtype": self.dtype,
            "n": f"N={self.n}",
            "v": f"V={self.v}",
            "k": f"K={self.k}" if self.k else "",
            "hidden": hidden if self.student_hidden else "",
            "temperature": f"T={self.temperature:g}",
            "divergence": self.divergence,
            "device": self.device if self.device != "cpu" else "",
        }
        return ", ".join(word for key, word in words.items() if word and key not in without)


#: Sizes unless options or a suite give others: real vocabularies, and heads of small models.
USUAL: dict[str, Any] = {
    "dtype": ("bf16", "fp32"),
    "v": (32000, 128256, 262144),
    "n": (512,),
    "divergence": ("forward_kl",),
    "temperature": (2.0,),
    "hidden": (1024, 2048),
}
#: The numbers of the teacher's entries at level TOPK.
KS = 16, 64, 256


def logits(options: Namespace, level: str = LOGITS, **own: Any) -> Iterator[Case]:
    """Yield every combination of sizes: each from the options, else from `own`, else from USUAL."""
    *sizes, hidden = (getattr(options, name) or own.get(name, USUAL[name]) for name in USUAL)
    for dtype, v, n, divergence, t in product(*sizes):
        heads = hidden if level in (HEADS, STEP) else (0, 0)
        yield Case(n, v, dtype, t, divergence, level, *heads, options.device)


def top_k(options: Namespace) -> Iterator[Case]:
    """Yield cases at the temperature of servers, and at 2; a K above the vocabulary is left out."""
    for case in logits(options, TOPK, v=(128256,), temperature=(1.0, 2.0)):
        yield from (replace(case, k=k) for k in options.k or KS if k <= case.v)


def guard(options: Namespace) -> Iterator[Case]:
    """Yield cases far larger than the caches, and small ones of every divergence."""
    yield from logits(options, n=[128], v=[128256])
    yield from logits(options, dtype=["bf16"], n=[64], v=[32768], divergence=DIVERGENCES)


STEPS = partial(logits, level=STEP, dtype=["fp32"], v=[32000], hidden=(512, 1024))
GUARD = "guard"
#: By suite: a function that yields the cases for given options, and a line of help.
SUITES = {
    "logits": (logits, "losses on logits, over dtype and vocabulary"),
    "heads": (partial(logits, level=HEADS), "losses on hidden states and lm_heads"),
    "topk": (top_k, "losses on logits with a teacher's k largest log-probabilities"),
    "training-step": (STEPS, "a step of a small model: forward, loss, backward, AdamW"),
    GUARD: (guard, "what `make bench-guard` compares with a baseline; only if named"),
}
