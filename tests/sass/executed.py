"""``python -m tests.sass.executed``: instructions of the CUDA kernel that reads logits once.

The compiler's machine code of rows_cluster is run (see :mod:`.machine`) on rows of a training
step, with the parameters and the grid that launch.cu chooses, and every instruction that a warp
executes is counted: prologue, new maxima, merges, exchange, gradient, ends. The resulting losses
and gradients are compared with float64, since misread instructions would make them wrong.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cuda_resources import DIVERGENCES, compile_with_nvcc, instantiate
from benchmarks.sass import disassemble, usage
from fused_kd import kd_loss
from fused_kd.ops import STATS

from .machine import GLOBAL_BASE, Launch, Machine

V, ROWS, SEED, SPREAD = 151936, 2, 0, 3.0
#: The arrays that a launch reads and writes, in the order of captured_launch.cu.
NAMES = ("student", "teacher", "grad", "labels", "w_hard", "w_soft", "hard", "soft", "stats")
LAUNCH_SHAPE = struct.Struct("qiii4x")  # that of launching.h, without its last field
#: One for each way in which the hard term's exponential is computed, by label.
TEMPERATURES = {"1": 1.0, "2": 2.0, "another": 3.0}


def make_rows() -> tuple[Tensor, dict[str, Tensor]]:
    """Return a buffer of bytes, a row for each of NAMES, and typed views of it by name."""
    random = np.random.default_rng(SEED)
    sides = torch.from_numpy(SPREAD * random.standard_normal((2, ROWS, V))).float().bfloat16()
    labels = torch.from_numpy(random.integers(0, V, ROWS))
    weights, losses = torch.full((2, ROWS), 0.5 / ROWS), torch.zeros(2, ROWS)
    given = *sides, torch.zeros_like(sides[0]), labels, *weights, *losses, torch.zeros(ROWS, STATS)
    memory = torch.zeros(len(NAMES), sides[0].nbytes, dtype=torch.uint8)
    places = zip(NAMES, memory, given, strict=True)
    return memory, {
        name: place[: x.nbytes].view(x.dtype).view(x.shape).copy_(x) for name, place, x in places
    }


def plan(divergence: str, temperature: float, memory: Tensor, library: ctypes.CDLL) -> Launch:
    """Return how launch.cu launches a buffer's rows; RuntimeError unless by one rows_cluster."""
    addresses = {name: GLOBAL_BASE + i * memory.shape[1] for i, name in enumerate(NAMES)}
    if divergence == "none":
        addresses["w_soft"] = 0
    at = (ctypes.c_void_p * len(NAMES))(*addresses.values())
    params, shape = (ctypes.create_string_buffer(size) for size in (4096, LAUNCH_SHAPE.size))
    code = DIVERGENCES.index(divergence)
    size = library.capture(ROWS, V, code, ctypes.c_double(temperature), at, params, shape)
    if not size:
        raise RuntimeError("launch.cu does not launch rows_cluster once")
    return Launch(*LAUNCH_SHAPE.unpack(shape.raw), params.raw[:size])


def check(divergence: str, temperature: float, rows: dict[str, Tensor]) -> None:
    """Raise AssertionError if the results in `rows` differ from float64: code was misread."""
    student, teacher = rows["student"].double().requires_grad_(), rows["teacher"].double()
    soft = {"soft_weight": 0.0} if divergence == "none" else {"divergence": divergence}
    options = {"temperature": temperature, "reduction": "none", "return_parts": True, **soft}
    true = kd_loss(student, teacher, rows["labels"], **options)
    (gradient,) = torch.autograd.grad(true.loss.mean(), student)
    close = partial(torch.testing.assert_close, check_dtype=False)
    close(rows["hard"], true.hard.detach(), rtol=1e-4, atol=1e-6)
    close(rows["soft"], true.soft.detach(), rtol=1e-4, atol=1e-6)
    # the label's entry is larger than all others together
    is_label = torch.nn.functional.one_hot(rows["labels"], V).bool()
    for part in (is_label, ~is_label):
        error = ((rows["grad"].double() - gradient) * part).norm(dim=1)
        close(error / (gradient * part).norm(dim=1), torch.zeros(ROWS), rtol=0, atol=0.01)


def compile_launcher(folder: Path) -> ctypes.CDLL:
    """Compile captured_launch.cu for the host into a folder; return the loaded library."""
    source, library = Path(__file__).with_name("captured_launch.cu"), folder / "captured_launch.so"
    compile_with_nvcc(source, library, "90a", "-shared", "-Xcompiler=-fPIC")
    return ctypes.CDLL(str(library))


def compile_cluster(divergence: str, folder: Path) -> Path:
    """Compile rows_cluster for sm_90a and bf16 sides into a folder; return the cubin's path."""
    kernel = ("rows_cluster", f"Divergence::{divergence}", "Dtype::bf16", "true")
    source = instantiate(folder / f"{divergence}.cu", [kernel])
    return compile_with_nvcc(source, folder / f"{divergence}.cubin", "90a", "-cubin")


def execute(
    divergence: str, temperature: float, cubin: Path, library: ctypes.CDLL
) -> tuple[float, float]:
    """Run and check a kernel; return its instructions per element, and those of the MUFU unit.

    A warp's instruction counts 32 times. MUFU: exponentials, logarithms and reciprocals.
    """
    (code,) = disassemble(cubin).values()
    memory, rows = make_rows()
    launch = plan(divergence, temperature, memory, library)
    counts = Machine(code, launch, memory.view(-1).numpy()).run() * 32 / (ROWS * V)
    check(divergence, temperature, rows)
    special = [line.opcode.startswith("MUFU") for line in code.instructions]
    return counts.sum(), counts[special].sum()


def main() -> None:
    """Print a table of the divergences and TEMPERATURES."""
    print("| divergence | hard term at T = | instructions | special | registers |")
    print("| :--- | :--- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        library = compile_launcher(Path(name))
        for divergence in DIVERGENCES:
            cubin = compile_cluster(divergence, Path(name))
            (resources,) = usage(cubin).values()
            matters = divergence not in ("mse", "none")
            for label, temperature in (TEMPERATURES if matters else {"any": 1.0}).items():
                total, special = execute(divergence, temperature, cubin, library)
                cells = f"{total:.1f} | {special:.1f} | {resources.registers}"
                print(f"| {divergence} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
