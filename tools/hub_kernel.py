"""Lay out fused_kd as a kernel of the Hugging Face Hub: ``python tools/hub_kernel.py FOLDER``.

The ``kernels`` package loads it with ``get_local_kernel(FOLDER)``, and from a repository of the Hub
with ``get_kernel``. A kernel in Python has a folder for each backend of torch; here each holds the
package without compiled modules, integrations and command-line tools. One process may load several
versions of a kernel, and fused_kd: module and operators have a name that is unique to the contents,
and all imports are relative.
"""

import argparse
import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fused_kd"
LEFT_OUT = {"integrations", "plan", "testing", "env.py"}
#: On a CPU the Triton kernels run if TRITON_INTERPRET=1.
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
METADATA = {
    "name": "fused-kd",
    "version": 0,  # by convention: the interface may still change
    "kernels-minver": "0.17.0",
    "license": "Apache-2.0",
    "python-depends": [],
}


def lay_out(folder: Path) -> None:
    """Write the kernel's repository into a folder, which is created; other files in it stay.

    Raises:
        SystemExit: The folder has a build already, whose other files would fail the digest.
    """
    if (folder / "build").exists():
        raise SystemExit(f"FOLDER must be without a build; got {folder}: remove {folder}/build")
    paths = [x.relative_to(PACKAGE) for x in sorted(PACKAGE.rglob("*.py"))]
    sources = {x: (PACKAGE / x).read_text("utf-8") for x in paths if x.parts[0] not in LEFT_OUT}
    digest = hashlib.sha256(repr(sources).encode()).hexdigest()
    identifier = f"_fused_kd_{digest[:8]}"
    files = {x.as_posix(): _renamed(x, text, identifier) for x, text in sources.items()}
    digests = {name: b64encode(hashlib.sha256(x).digest()).decode() for name, x in files.items()}
    for backend in BACKENDS:
        metadata = {
            **METADATA,
            "id": identifier,
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        files["metadata.json"] = json.dumps(metadata, indent=1).encode()
        for name, content in files.items():
            path = folder / "build" / f"torch-{backend}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _renamed(path: Path, text: str, identifier: str) -> bytes:
    """Return a source file with relative imports, and its operators in the namespace `identifier`.

    `path` is relative to the package.
    """
    dots = "." * len(path.parts)
    for pattern, replacement in (
        (r"(?m)^from fused_kd\.?", f"from {dots}"),
        (r"\btorch\.ops\.fused_kd\b", f"torch.ops.{identifier}"),
        (r'"fused_kd(?=::|\.\{|", "DEF"\))', f'"{identifier}'),
    ):
        text = re.sub(pattern, replacement, text)
    return text.encode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder for the kernel's repository")
    lay_out(parser.parse_args().folder)
