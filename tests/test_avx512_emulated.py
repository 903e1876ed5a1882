"""The AVX-512 and AMX sources on a processor without these: intrinsics emulated in scalar loops.

check_kernels compares every block kernel with double arithmetic, and the instruction sets with
each other to the bit; check_rows does the same for whole rows, check_product for matrix products.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import native_build

#: So one worker builds the programs, which all of these tests use.
pytestmark = pytest.mark.xdist_group("check programs")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    native_build.need_compiler()
    native_build.need_avx2()
    # with hardware bfloat16: without it the stores are the generic path's (the slow test has both)
    tables = ["generic", "avx2", "avx512_bf16", "amx"]
    return native_build.build(tmp_path_factory.mktemp("emulated"), tables)


def test_block_kernels(programs: tuple[Path, ...]) -> None:
    native_build.run(programs[0])


def test_rows(programs: tuple[Path, ...]) -> None:
    native_build.run(programs[1], "generic", "avx512_bf16")


def test_products(programs: tuple[Path, ...]) -> None:
    native_build.run(programs[2], "generic", "avx2", "avx512_bf16", "amx")


def test_amx_that_the_system_refuses(programs: tuple[Path, ...]) -> None:
    native_build.run(programs[2], "refusal")


def test_every_intrinsic_is_emulated() -> None:
    headers = ("avx512_emulated.h", "amx_emulated.h")
    emulated = "".join((native_build.ROOT / "tests/native" / name).read_text() for name in headers)
    for path in (native_build.ROOT / "csrc/cpu").iterdir():
        for name in re.findall(r"\b(?:_mm512|_tile)_\w+", path.read_text()):
            assert re.search(rf"#define {name}\b", emulated), (path.name, name)
