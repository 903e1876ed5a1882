"""Report versions, backends and frameworks: ``python -m fused_kd.env [--json]``.

Only the standard library is imported with this module, and every probe catches exceptions: the
report is printed even if an installation is broken or torch is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

DESCRIPTION = (
    "Print the versions, the backends that can run here with the reason for each that cannot, and "
    "the installed frameworks with the versions that the integrations were tested with."
)

#: Name and meaning of every environment variable that the package reads.
VARIABLES = (
    ("FUSED_KD_BACKEND", "the backend if the argument is 'auto'"),
    (
        "FUSED_KD_CPU",
        "generic, avx2, avx512, avx512_bf16 or amx: the instruction set of the cpu backend",
    ),
    ("FUSED_KD_DEBUG", "1: check the values of labels and weights on a GPU too (synchronises)"),
    ("FUSED_KD_AUTOTUNE", "1: the triton backend times configurations and keeps the fastest"),
    ("FUSED_KD_SLICE_BYTES", "bytes of a row per program of the triton backend"),
    ("TRITON_INTERPRET", "1: the triton backend runs on CPU tensors"),
    ("FUSED_KD_BUILD", "read by setup.py: 0 leaves the compiled modules out"),
    ("FUSED_KD_CUDA", "read by setup.py: 0 leaves the CUDA module out"),
    ("FUSED_KD_CUDA_OBJECTS", "read by setup.py: a folder of precompiled CUDA kernels"),
)


def report() -> dict[str, Any]:
    """Return the report as a dict of JSON-serialisable values, one entry per section.

    A value that cannot be read is the text of the exception.
    """
    return {
        "versions": {
            "fused_kd": _probe(lambda: importlib.import_module("fused_kd").__version__),
            "python": platform.python_version(),
            "torch": _probe(lambda: str(_torch().__version__)),
            "cuda": _probe(lambda: _torch().version.cuda or "none: torch was built without CUDA"),
            "triton": _probe(lambda: importlib.import_module("triton").__version__),
            "platform": platform.platform(),
        },
        "processor": {
            "name": _probe(_processor),
            "threads": _probe(lambda: _torch().get_num_threads()),
        },
        "backends": _probe(_backends),
        "frameworks": _probe(_frameworks),
        "compiled_module": _probe(lambda: _compiled_module("cpu")),
        "compiled_module_cuda": _probe(lambda: _compiled_module("cuda")),
        "variables": {name: os.environ.get(name) for name, _ in VARIABLES},
        "refused_variables": {
            name: why
            for name, refusal in REFUSALS.items()
            if os.environ.get(name) and (why := _probe(refusal)) is not None
        },
    }


def _probe(read: Callable[[], Any]) -> Any:
    """Return the result of `read`; if it raises, the exception as text."""
    try:
        return read()
    except Exception as error:  # a broken installation is what this report is for
        return f"not available: {type(error).__name__}: {error}"


def _torch() -> Any:
    return importlib.import_module("torch")


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _backends() -> dict[str, str]:
    backends = importlib.import_module("fused_kd.backends")
    names = importlib.import_module("fused_kd.options").BACKENDS
    reasons = {name: backends.why_not(name) for name in names}
    return {name: "available" if why is None else str(why) for name, why in reasons.items()}


def _frameworks() -> dict[str, str]:
    frameworks = importlib.import_module("fused_kd.integrations._common.frameworks").FRAMEWORKS
    return {framework.distribution: framework.status for framework in frameworks.values()}


def _compiled_module(name: str) -> Any:
    module = getattr(importlib.import_module("fused_kd.extension"), name)
    info = module.build_info()
    return module.why_not() if info is None else info


def _refused_backend() -> str | None:
    """Return why every call raises for this FUSED_KD_BACKEND; None if it is not set or can run."""
    name = os.environ.get("FUSED_KD_BACKEND") or "auto"
    known = importlib.import_module("fused_kd.options").BACKENDS
    if name not in ("auto", *known):
        return f"must be 'auto' or one of {', '.join(map(repr, known))}"
    if name == "auto":
        return None
    why: str | None = importlib.import_module("fused_kd.backends").why_not(name)
    return why


def _refused_instruction_set() -> str | None:
    """Return why the cpu backend raises for this FUSED_KD_CPU; None if it does not."""
    try:
        importlib.import_module("fused_kd.extension").cpu.build_info()
    except RuntimeError as error:
        return str(error)
    return None


#: Variables whose wrong value makes calls raise, and the functions that return the reason.
REFUSALS = {"FUSED_KD_BACKEND": _refused_backend, "FUSED_KD_CPU": _refused_instruction_set}


def _lines(sections: dict[str, Any]) -> list[str]:
    lines = []
    for title, content in sections.items():
        if title == "refused_variables":
            continue  # shown with the variables
        lines.append(title.replace("_", " "))
        if title == "variables":
            for name, meaning in VARIABLES:
                value = content[name]
                shown = "(not set)" if value is None else repr(value)
                lines.append(f"  {name:<22} {shown:<12} {meaning}")
                if name in sections["refused_variables"]:
                    which = "every call" if name == "FUSED_KD_BACKEND" else "the cpu backend"
                    lines.append(
                        f"  {'':<22} {which} raises: {sections['refused_variables'][name]}"
                    )
        elif isinstance(content, dict):
            lines.extend(f"  {name:<18} {value}" for name, value in content.items())
        else:
            lines.append(f"  {content}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit status, 0. Exit with 2 for wrong arguments.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_kd.env", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    sections = report()
    text = (
        json.dumps(sections, indent=2, default=str) if options.json else "\n".join(_lines(sections))
    )
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` closed the pipe; the flush at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
