"""The CUDA kernels compiled for GPUs that are not here: spills, registers, vector accesses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.cuda_resources import (
    DIVERGENCES,
    SOURCES,
    compile_with_nvcc,
    describe,
    instantiate,
)
from benchmarks.sass import disassemble, find_tool, usage

#: Kernel: the instructions that move 16 bytes at a time or more, each of which it must have.
VECTORS = {
    "rows_general": (r"LDG\S*\.128\S*", r"STG\S*\.128\S*"),
    # the bulk copy; rows that it can't take
    "rows_cluster": (r"UBLKCP\S*", r"LDG\S*\.128\S*", r"LDS\S*\.128\S*", r"STG\S*\.128\S*"),
    "scale_rows": (r"LDG\S*\.128\S*", r"STG\S*\.128\S*"),
}
VECTORS |= {name: (r"LDG\S*\.128\S*",) for name in ("measure_rows", "measure_support")}
VECTORS |= {f"{name}_classes": VECTORS[name] for name in ("rows_general", "rows_cluster")}
#: Instructions of float64, and of local memory, which holds what does not fit in registers.
FORBIDDEN = r"D(ADD|MUL|FMA|SETP|MNMX)\b.*|\S*\.F64\b.*|MUFU\.\w*64\w*|(LDL|STL)\b.*"


def _faults(cubin: Path, target: str) -> dict[str, list[str]]:
    """Return what each faulty kernel uses but must not, or lacks; empty if no kernel is faulty."""
    faults, codes, clusters = {}, disassemble(cubin), int(target.rstrip("a")) >= 90
    for name, used in usage(cubin).items():
        kernel, budget = describe(name)
        # for a GPU without clusters, the kernel for clusters is empty
        needed = VECTORS[kernel] if clusters or not kernel.startswith("rows_cluster") else ()
        opcodes = {x.opcode for x in codes[name].instructions}
        faults[name] = [
            *(opcode for opcode in opcodes if re.fullmatch(FORBIDDEN, opcode)),
            *(form for form in needed if not any(re.fullmatch(form, x) for x in opcodes)),
            *["registers"] * (used.registers > budget),
            *["a stack"] * (used.stack > 0),
            *["static shared memory"] * (used.shared > 1024 * clusters),
        ]
    return {name: kinds for name, kinds in faults.items() if kinds}


@pytest.fixture(autouse=True)
def _need_tools() -> None:
    for tool in ("nvcc", "nvdisasm", "cuobjdump"):
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")


# every divergence that reads both sides; the general kernel with one statistics pass and with two,
# with types known at compile time and not; a top-k teacher; measurements
SOME = [
    *(("rows_cluster", f"Divergence::{d}", "Dtype::bf16", "true") for d in DIVERGENCES[:-1]),
    ("rows_general", "Divergence::forward_kl", "Dtype::bf16", "true"),
    ("rows_general", "Divergence::jsd", "Dtype::f32", "false"),
    ("rows_cluster_classes", "Dtype::bf16"),
    ("scale_rows", "Dtype::f16"),
    ("measure_rows", "Dtype::f32", "false"),
    ("measure_rows", "Dtype::bf16", "true"),
    ("measure_support", "Dtype::bf16"),
]


def test_some_kernels(tmp_path: Path) -> None:
    source = instantiate(tmp_path / "some.cu", SOME)
    cubin = compile_with_nvcc(source, tmp_path / "some.cubin", "90a", "-cubin")
    assert len(usage(cubin)) == len(SOME)
    assert _faults(cubin, "90a") == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("target", ["75", "80", "90a", "100"])
def test_every_kernel(target: str, dtype: str, tmp_path: Path) -> None:
    source = SOURCES / f"rows_{dtype}.cu"
    cubin = compile_with_nvcc(source, tmp_path / "rows.cubin", target, "-cubin")
    assert len(usage(cubin)) == 2 * 2 * len(DIVERGENCES) + 2 + 1 + 3
    assert _faults(cubin, target) == {}


# a kernel in float64, with an array that does not fit in registers, and static shared memory
BAD = """
namespace fused_kd {
enum class Dtype : int { f32, bf16 };
template <Dtype> __global__ void scale_rows(double* x, int n) {
  __shared__ double shared[32];
  double local[64];
  for (int i = 0; i < n; ++i) local[i * n % 64] = x[i] * x[i + 1] + x[i];
  shared[threadIdx.x] = local[n];
  __syncthreads();
  x[0] = shared[31 - threadIdx.x] + 1.0;
}
template __global__ void scale_rows<Dtype::bf16>(double*, int);
}
"""


def test_what_must_not_be_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(BAD)
    cubin = compile_with_nvcc(source, tmp_path / "bad.cubin", "90a", "-cubin")
    (faults,) = _faults(cubin, "90a").values()
    expected = {"DADD", "STL.64", "LDL.64", *VECTORS["scale_rows"]}
    assert expected | {"a stack", "static shared memory"} <= set(faults)
    assert "registers" not in faults
    assert describe("_ZN8fused_kd12rows_clusterILNS_10DivergenceE2ELNS_5DtypeE1ELb1EE")[1] == 128
    assert describe("_ZN8fused_kd12rows_clusterILNS_10DivergenceE3ELNS_5DtypeE1ELb1EE")[1] == 80
