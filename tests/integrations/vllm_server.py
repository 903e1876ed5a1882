"""A real vLLM server on this machine, in an environment of its own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from needs import missing

ROOT = Path(__file__).resolve().parents[2]
#: The environment that `make test-peers` builds.
BIN = Path(os.environ.get("FUSED_KD_VLLM_VENV", ROOT / ".venv-vllm")) / "bin"
#: Seconds; it takes about half a minute on two cores that do nothing else.
DEADLINE = 300
#: On a CPU; without a compiler, and without a look into the network.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def served(command: str, model: Path, log: Path, *options: str) -> Iterator[str]:
    """Run the command of the page for a model, and yield the server's address.

    The command's path and port are replaced. Without vLLM the test is skipped, or fails as needs.py
    says. The server and its children are killed in any case.
    """
    _check_that_it_imports()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", "path/to/teacher"]
    words[words.index("--port") + 1] = str(port)
    # the command `vllm` looks for a distribution of that name; this one is vllm-cpu
    program = [str(BIN / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    arguments = [*program, str(model), *words[3:], "--host", "127.0.0.1", *options]
    environment = {**os.environ, **SETTINGS, "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as output:
        server = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            _wait_for(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _kill(server)


def module(name: str) -> Any:
    """Return a module of the server's vLLM, from its file, which must import nothing of vLLM."""
    (path,) = BIN.parent.glob(f"lib/python*/site-packages/vllm/{name}.py")
    spec = spec_from_file_location(f"vllm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def _check_that_it_imports() -> None:
    """Skip the test if vLLM cannot be imported, or raise."""
    python = BIN / "python"
    if not python.exists():
        reason = f"no {python}: make {BIN.parent.name}/.built"
    else:
        done = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True)
        if done.returncode == 0:
            return
        reason = f"{python} cannot import vllm: {done.stderr[-500:]}"
    error = ImportError(reason)
    missing(error)
    raise error


def _wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Return when the server answers; an assertion fails if it ends, or after DEADLINE."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        try:
            server.wait(0.2)  # between two questions; it returns at once if the server has ended
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def _kill(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its children."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
        except ProcessLookupError:
            break
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            continue
    server.wait()
