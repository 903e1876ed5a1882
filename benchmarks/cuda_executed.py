"""``python -m benchmarks.cuda_executed``: what the CUDA kernel that reads each logit once executes.

The compiler's machine code of rows_cluster is run (see :mod:`.sass_machine`) on rows of a training
step, with the parameters and the grid that launch.cu chooses, and every instruction that a warp
executes is counted: prologue, new maxima, merges, exchange, gradient, ends. The losses and
gradients that come out are compared with float64: code that is read wrongly gives wrong ones.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import numpy as np
import torch

from fused_kd import kd_loss
from fused_kd.ops import STATS

from .cuda_resources import DIVERGENCES, compile_with_nvcc, instantiate
from .sass import disassemble, usage
from .sass_machine import GLOBAL_BASE, Launch, Machine

V, ROWS, SEED, SPREAD = 151936, 2, 0, 3.0
#: By the way in which the hard term's exponential is computed.
TEMPERATURES = {"1": 1.0, "2": 2.0, "another": 3.0}


class Rows:
    """Rows of logits as an ordinary step has them, in one piece of memory, and what comes out."""

    def __init__(self, divergence: str, temperature: float) -> None:
        self.divergence, self.temperature = divergence, temperature
        random = np.random.default_rng(SEED)
        student, teacher = (
            torch.from_numpy((SPREAD * random.standard_normal((ROWS, V))).astype(np.float32))
            for _ in range(2)
        )
        weights, losses = torch.full((ROWS,), 0.5 / ROWS), torch.zeros(ROWS)
        #: In the order of captured_launch.cu.
        self.tensors = {
            "student": student.bfloat16(),
            "teacher": teacher.bfloat16(),
            "grad": torch.zeros(ROWS, V, dtype=torch.bfloat16),
            "labels": torch.from_numpy(random.integers(0, V, ROWS)),
            "w_hard": weights,
            "w_soft": weights,
            "hard": losses,
            "soft": losses,
            "stats": torch.zeros(ROWS, STATS),
        }
        self.memory = torch.zeros(4 * student.nbytes, dtype=torch.uint8)
        self.places: list[int] = []
        begin = 0
        for name, tensor in self.tensors.items():
            stored = self.memory[begin : begin + tensor.nbytes].view(tensor.dtype)
            self.tensors[name] = stored.view(tensor.shape).copy_(tensor)
            self.places.append(
                GLOBAL_BASE + begin if (name, divergence) != ("w_soft", "none") else 0
            )
            begin += -(-tensor.nbytes // 256) * 256

    def plan(self, library: ctypes.CDLL) -> Launch:
        """Return what launch.cu launches for them."""
        params, shape = ctypes.create_string_buffer(4096), (ctypes.c_int64 * 4)()
        number, temperature = DIVERGENCES.index(self.divergence), ctypes.c_double(self.temperature)
        places = map(ctypes.c_void_p, self.places)
        sizes = ctypes.c_int64(ROWS), ctypes.c_int64(V)
        size = library.capture(*sizes, number, temperature, *places, params, shape)
        if not size:
            raise RuntimeError("launch.cu does not launch rows_cluster once")
        return Launch(*shape, params.raw[:size])

    def check(self) -> None:
        """Raise unless losses and gradients are those of float64: code was read wrongly."""
        student, labels = self.tensors["student"].double().requires_grad_(), self.tensors["labels"]
        teacher, options = self.tensors["teacher"].double(), {"divergence": self.divergence}
        if self.divergence == "none":
            options = {"soft_weight": 0.0}
        options |= {"temperature": self.temperature, "reduction": "none", "return_parts": True}
        true = kd_loss(student, teacher, labels, **options)
        (gradient,) = torch.autograd.grad(true.loss.mean(), student)
        for name, expected in (("hard", true.hard), ("soft", true.soft)):
            found = self.tensors[name].double()
            if not torch.allclose(found, expected.detach(), rtol=1e-4, atol=1e-6):
                raise RuntimeError(f"the {name} loss comes out wrong: {found}, {expected}")
        # the label's entry is larger than all others together
        is_label = torch.nn.functional.one_hot(labels, V).bool()
        error = self.tensors["grad"].double() - gradient
        for part in (is_label, ~is_label):
            share = (error * part).norm(dim=1) / (gradient * part).norm(dim=1)
            if not (share < 0.01).all():
                raise RuntimeError(f"the gradient comes out wrong, by {share}")


def compile_launcher(folder: Path) -> ctypes.CDLL:
    """Return captured_launch.cu, compiled for the host."""
    source, library = Path(__file__).with_name("captured_launch.cu"), folder / "captured_launch.so"
    flags = ("-shared", "-Xcompiler=-fPIC")
    return ctypes.CDLL(str(compile_with_nvcc(source, library, "90a", *flags)))


def compile_cluster(divergence: str, folder: Path) -> Path:
    """Return the cubin of rows_cluster for bfloat16 on both sides and sm_90a."""
    kernel = ("rows_cluster", f"Divergence::{divergence}", "Dtype::bf16", "true")
    source = instantiate(folder / f"{divergence}.cu", [kernel])
    return compile_with_nvcc(source, folder / f"{divergence}.cubin", "90a", "-cubin")


def execute(
    divergence: str, temperature: float, cubin: Path, library: ctypes.CDLL
) -> tuple[float, float]:
    """Run a kernel on rows; return its warp instructions per element, times 32 lanes.

    Then of these exponentials, logarithms and reciprocals: one kind of unit does them all.
    """
    (code,) = disassemble(cubin).values()
    rows = Rows(divergence, temperature)
    counts = Machine(code, rows.plan(library), rows.memory.numpy()).run() * 32 / (ROWS * V)
    rows.check()
    special = [one.opcode.startswith("MUFU") for one in code.instructions]
    return counts.sum(), counts[special].sum()


def main() -> None:
    """Print the table."""
    print("| divergence | hard term at T = | instructions | special | registers |")
    print("| :--- | :--- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        library = compile_launcher(Path(name))
        for divergence in DIVERGENCES:
            cubin = compile_cluster(divergence, Path(name))
            (used,) = usage(cubin).values()
            matters = divergence not in ("mse", "none")
            for label, temperature in (TEMPERATURES if matters else {"any": 1.0}).items():
                found, special = execute(divergence, temperature, cubin, library)
                cells = f"{found:.1f} | {special:.1f} | {used.registers}"
                print(f"| {divergence} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
