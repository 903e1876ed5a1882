"""``python -m benchmarks.gpu_check``: build, test, measure and check memory accesses on a GPU.

There are two runs, so that what the first shows can be mended before the second (--run first, --run
second; without the option both). Each runs its PARTS below, the most informative first. A part is a
separate process with a time limit; one that fails, hangs or loses the device does not stop the
next. A part that ends early leaves the rest of its time to the later ones of its run.

Written to --output as it comes: gpu_check.log (all output), and the results of each suite,
<part>.jsonl. The console shows a part's output when it has ended. --device cpu runs all parts at
tiny sizes with the CPU's backend.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "first", "second"
PROCESSORS = os.cpu_count() or 1
#: Triton's cache, relative to the repository; gpu_cache.py fills it beforehand.
CACHE = "out/gpu_cache"
#: Files of tests marked gpu other than the smoke test, the most informative first.
TESTS = ("test_gpu", "test_gpu_topk", "test_gpu_running", "test_gpu_heads")
#: Seconds between the time that a part is given and its being killed; the least that a part gets.
GRACE, LEAST = 6.0, 10.0
#: Beginnings of output lines that the report repeats, and the most lines it repeats of a part.
NOTED, MOST = ("FAILED", "ERROR", "==ERROR==", "========= ERROR", "LEFT OUT", "SKIPPED"), 40
#: A part whose command has one of these words is skipped if no program has that name; none is GPU.
TOOLS = ("GPU", "ncu", "compute-sanitizer", "nvidia-smi")


@dataclass(frozen=True)
class Part:
    """A process; {python}, {device}, {seconds}, {output} and FIELDS are filled into its command."""

    name: str
    run: str  # FIRST, SECOND, or "": before both
    seconds: float  # that it should take, before --minutes scales them
    backend: str  # under test; "" if the command itself chooses
    command: str


_ALONE = "env FUSED_KD_BUILD=0 FUSED_KD_CUDA=1"  # the CUDA module, for this card or from objects
_TIMES = "{python} -m benchmarks.gpu_times"
_PYTEST = "{python} -m pytest -m gpu -p gpu_plugin -p no:cacheprovider --durations=5 -rs --tb=short"
_PYTEST += " -o faulthandler_exit_on_timeout=true -o faulthandler_timeout="
_SMOKE = f"{_PYTEST}20 -v tests/test_gpu_smoke.py"
_TESTS = _PYTEST + " ".join(["45", *(f"tests/{name}.py" for name in TESTS)])
if importlib.util.find_spec("xdist") is not None:
    _TESTS += f" -n {max(1, min(12, 3 * PROCESSORS // 4))} --dist loadgroup"
# time, occupancy, memory, issue slots, instructions and registers; clocks are left alone
_NCU = (
    "ncu --clock-control none --print-kernel-base function --kernel-name regex:rows "
    "--launch-count 4 --metrics gpu__time_duration.sum,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,"
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum.per_second,"
    "sm__inst_issued.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,"
    "launch__registers_per_thread "
)
_SUITE = "{python} -m benchmarks run --in-process --device {device} --seconds {seconds} "
_SUITE += "--output {output} --peers"
_HEADS = "kdloss-heads kdloss-heads-1024"
_OURS = "kdloss kdloss-inplace kdloss-forward kdloss-triton kdloss-heads kdloss-heads-triton eager"
_REAL, _TINY = "--n 8192 --repeats 10 --seconds-each 2", "--n 5 --repeats 2 --dtype bf16 --v 33"
# no racecheck, which does not follow barriers that bulk copies complete: the emulator finds races;
# without torch's cache, which would hide a use after a free
_SANITIZER = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 "
_SANITIZER += "compute-sanitizer --error-exitcode 97 --print-limit 20 --tool"
_SLICES = max(1, PROCESSORS // 2)
_SLICED = f"seq 0 {_SLICES - 1} | xargs -P {_SLICES} -I% env GPU_CHECK_SLICE=%/{_SLICES}"
_SLICED = f"bash -c '{_SLICED} \"$@\"' -"
_PLANTED = "bash -c '\"$@\" {python} tests/gpu_planted.py; test $? = 97' -"
#: Fields of commands that depend on the device; {gpu} skips a part without a GPU.
FIELDS = {
    "cuda": {
        "gpu": "",
        "logits": f"--dtype bf16 fp32 --v 151936 32000 262144 128256 {_REAL}",
        "heads": f"--dtype bf16 --v 151936 --hidden 2048 4096 {_REAL}",
        "compiled": "kdloss kdloss-heads compile liger liger-fused-kl",
        "memcheck": f"{_SANITIZER} memcheck",
    },
    "cpu": {
        "gpu": TOOLS[0],
        "logits": _TINY,
        "heads": f"--hidden 8 12 {_TINY}",
        "compiled": "kdloss kdloss-heads eager",
        "memcheck": "",
    },
}

PARTS = (
    Part("build", FIRST, 70, "cuda", f"{{gpu}} {_ALONE} {{python}} setup.py build_ext --inplace"),
    Part("smoke", FIRST, 30, "cuda", _SMOKE),
    Part("operators", FIRST, 35, "cuda", f"{_TIMES} operators"),
    Part("ncu", FIRST, 30, "cuda", f"{{gpu}} {_NCU}{_TIMES} launch"),
    Part("cuda-tests", FIRST, 55, "cuda", _TESTS),
    Part("heads-times", FIRST, 20, "", f"{_SUITE} {_HEADS} {{heads}} -- heads"),
    # programs that wait for each other: no emulation can vouch for that
    Part("triton", SECOND, 30, "triton", _SMOKE),
    Part("triton-operators", SECOND, 25, "triton", f"{_TIMES} operators"),
    Part("triton-tests", SECOND, 90, "triton", _TESTS),
    Part("logits", SECOND, 35, "", f"{_SUITE} {_OURS} {{logits}} -- logits"),
    Part("heads", SECOND, 20, "", f"{_SUITE} {_OURS} {{heads}} -- heads"),
    # torch.compile and Liger compile for longer than all else takes: one size
    Part("peers", SECOND, 50, "", f"{_SUITE} {{compiled}} {{heads}} -- logits heads"),
    Part("memcheck", SECOND, 22, "cuda", f"{_SLICED} {{memcheck}} {_SMOKE}"),
    Part("synccheck", SECOND, 17, "cuda", f"{{gpu}} {_SLICED} {_SANITIZER} synccheck {_SMOKE}"),
    # a write out of bounds, which shows that the sanitizer works on this machine
    Part("planted", SECOND, 11, "cuda", f"{{gpu}} {_PLANTED} {{memcheck}}"),
)
ENVIRONMENT = (
    Part("environment", "", 20, "", "{python} -m fused_kd.env"),
    Part("card", "", 10, "", "{gpu} nvidia-smi"),
    # a copy of the working tree may have neither .git nor git
    Part("commit", "", 10, "", "bash -c 'git describe --always --dirty || true'"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts; print and log a report; return 0 if none failed, else 1."""
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "gpu_check.log"
    log.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part too
    report = []
    for run in ("", FIRST, SECOND):
        end = time.monotonic()
        for part in (part for part in (*ENVIRONMENT, *options.parts) if part.run == run):
            end += options.stretch * part.seconds
            limit = max(LEAST, end - time.monotonic())
            report.append(run_part(part, options.device, limit, log))
    text = "\n".join(map("\n".join, report))
    print(f"\n{text}")
    log.open("a").write(f"\n{text}\n")
    return 1 if any(": failed" in lines[0] for lines in report) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--run", choices=(FIRST, SECOND), help="only the parts of this run (default: both)")
    add("--part", nargs="+", choices=[part.name for part in PARTS], help="only these parts")
    add("--minutes", type=float, help="for all of it (default: the sum of the parts' seconds)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--output", type=Path, default=Path("out/gpu_check"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu tries everything at tiny sizes")
    options.output = options.output.resolve()
    parts = [part for part in PARTS if options.run in (None, part.run)]
    options.parts = [part for part in parts if not options.part or part.name in options.part]
    planned = sum(part.seconds for part in options.parts)
    options.stretch = 60 * options.minutes / planned if options.minutes and planned else 1.0
    return options


def run_part(part: Part, device: str, limit: float, log: Path) -> list[str]:
    """Run a part for at most `limit` seconds, append its output to `log`; return report lines."""
    seconds, begin = max(1.0, limit - GRACE), time.monotonic()
    results = log.with_name(f"{part.name}.jsonl")
    results.unlink(missing_ok=True)
    python, path = shlex.quote(sys.executable), shlex.quote(str(results))
    fields = {"python": python, "device": device, "seconds": seconds, "output": path}
    command = shlex.split(part.command.format(**fields, **FIELDS[device]))
    environment = _environment(part, device, seconds)
    for tool in TOOLS:
        if tool in command and shutil.which(tool, path=environment["PATH"]) is None:
            return [f"{part.name}: skipped, there is no {tool}"]
    with log.open("a") as file:
        file.write(f"\n===== {part.name}: at most {limit:.0f} s\n{shlex.join(command)}\n")
        file.flush()
        start = file.tell()
        options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": file}
        process = subprocess.Popen(
            command, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()
    output = log.read_bytes()[start:].decode(errors="replace")
    went = {0: "passed", None: "failed, it had to be ended"}.get(status, f"failed with {status}")
    if "ERR_NVGPUCTRPERM" in output:
        went = "skipped, the driver lets no user read the counters"
    summary = f"{part.name}: {went}, {time.monotonic() - begin:.0f} s of {limit:.0f}"
    print(f"\n===== {part.name}\n{output}===== {summary}", flush=True)
    notes = [f"    {x[:400]}" for x in output.splitlines() if x.startswith(NOTED)]
    return [summary, *notes[:MOST]]


def _environment(part: Part, device: str, seconds: float) -> dict[str, str]:
    read, join = os.environ.get, os.pathsep.join
    environment = {
        **os.environ,
        "GPU_CHECK_DEVICE": device,
        "GPU_CHECK_BACKENDS": part.backend,
        "GPU_CHECK_UNTIL": str(time.time() + seconds),
        "PATH": join([read("PATH", os.defpath), f"{read('CUDA_HOME', '/usr/local/cuda')}/bin"]),
        "PYTHONPATH": join([str(ROOT / "tests"), read("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": CACHE,
    }
    if device == "cuda" and "FUSED_KD_CUDA_OBJECTS" not in environment:  # objects have a stamp
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    return environment


if __name__ == "__main__":
    sys.exit(main())
