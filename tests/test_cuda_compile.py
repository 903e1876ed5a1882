"""The CUDA kernels compiled for GPUs that are not here: spills, registers, vector accesses."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.cuda_resources import (
    DIVERGENCES,
    DTYPES,
    SOURCES,
    TARGETS,
    Instance,
    compile_cubin,
    describe,
    instantiate,
    parse_log,
)
from benchmarks.sass import Code, disassemble, find_tool

#: Kernel: instructions without which it reads or writes less than 16 bytes at a time.
VECTORS = {
    "rows_general": (r"LDG\S*\.128\S*", r"STG\S*\.128\S*"),
    # the bulk copy; rows that it can't take
    "rows_cluster": (r"UBLKCP\S*", r"LDG\S*\.128\S*", r"LDS\S*\.128\S*", r"STG\S*\.128\S*"),
    "scale_rows": (r"LDG\S*\.128\S*", r"STG\S*\.128\S*"),
}
#: float64, and local memory: what a thread can't hold in registers.
FORBIDDEN = r"D(ADD|MUL|FMA|SETP|MNMX)\b.*|\S*\.F64\b.*|MUFU\.\w*64\w*|(LDL|STL)\b.*"

Kernels = dict[str, Code]


def _need(*tools: str) -> None:
    for tool in tools:
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")


def _faults(one: Instance) -> list[str]:
    """What an instance takes that it must not."""
    found = {"spills": one.spills, "a stack": one.stack, "static shared memory": one.shared}
    over = one.registers - one.budget
    return [what for what, count in found.items() if count] + ["registers"] * (over > 0)


def _forbidden(code: Code) -> list[str]:
    return [opcode for opcode in code.opcodes() if re.fullmatch(FORBIDDEN, opcode)]


def _missing(patterns: Iterable[str], code: Code) -> list[str]:
    return [p for p in patterns if not any(re.fullmatch(p, opcode) for opcode in code.opcodes())]


def _check(kernels: Kernels, instances: list[Instance]) -> None:
    assert {str(one): _faults(one) for one in instances if _faults(one)} == {}
    for mangled, code in kernels.items():
        assert _forbidden(code) == [], mangled
        kernel = describe(mangled)[0]
        if not (kernel == "rows_cluster" and instances[0].target in ("75", "80")):
            assert _missing(VECTORS[kernel], code) == [], mangled


# every divergence that reads both sides; the general kernel with one statistics pass and with two,
# with types known at compile time and not
SOME = [
    *(("rows_cluster", f"Divergence::{d}", "Dtype::bf16", "true") for d in DIVERGENCES[:-1]),
    ("rows_general", "Divergence::forward_kl", "Dtype::bf16", "true"),
    ("rows_general", "Divergence::jsd", "Dtype::f32", "false"),
    ("scale_rows", "Dtype::f16"),
]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernels, list[Instance]]:
    _need("nvcc", "nvdisasm")
    folder = tmp_path_factory.mktemp("kernels")
    cubin, instances = compile_cubin(instantiate(folder, SOME), "90a", folder)
    return disassemble(cubin), instances


def test_some_kernels(some: tuple[Kernels, list[Instance]]) -> None:
    kernels, instances = some
    assert len(kernels) == len(instances) == len(SOME)
    _check(kernels, instances)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target: str, dtype: str, tmp_path: Path) -> None:
    _need("nvcc", "nvdisasm")
    cubin, instances = compile_cubin(SOURCES / f"rows_{dtype}.cu", target, tmp_path)
    assert len(instances) == 2 * 2 * len(DIVERGENCES) + 1
    _check(disassemble(cubin), instances)


# ------------------------------------------------------------------- what is read, read rightly


def test_what_must_not_be_is_seen(tmp_path: Path) -> None:
    """A kernel in float64, with an array that only memory can hold, and static shared memory."""
    _need("nvcc", "nvdisasm")
    source = tmp_path / "bad.cu"
    source.write_text(
        """
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
    )
    cubin, (one,) = compile_cubin(source, "90a", tmp_path)
    assert (one.kernel, one.student, one.target) == ("scale_rows", "bf16", "90a")
    assert _faults(one) == ["a stack", "static shared memory"]
    (code,) = disassemble(cubin).values()
    assert {"DADD", "STL.64", "LDL.64"} <= set(_forbidden(code))
    assert _missing(VECTORS["scale_rows"], code) == list(VECTORS["scale_rows"])


LOG = """
ptxas info    : Compiling entry function '{}' for 'sm_80'
ptxas info    : Function properties for {}
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 81 registers, used 1 barriers, 640 bytes smem, 616 bytes cmem[0]
"""


def test_the_compilers_report() -> None:
    name = "_ZN8fused_kd12rows_clusterILNS_10DivergenceE3ELNS_5DtypeE2ELb0EEEvNS_6ParamsE"
    (one,) = parse_log(LOG.replace("{}", name))
    assert one == Instance("rows_cluster", "tvd", "f16", False, "80", 81, 32, 8, 640)
    assert _faults(one) == ["spills", "a stack", "static shared memory", "registers"]
    assert one.empty
    good = replace(one, registers=80, spills=0, stack=0, shared=0, target="100")
    assert _faults(good) == []
    assert not good.empty
    assert _faults(replace(good, divergence="jsd", registers=128)) == []
    with pytest.raises(RuntimeError, match="not a kernel of ours: _Z1fv"):
        parse_log(LOG.replace("{}", "_Z1fv"))
