"""Builds the folder of a kernel repository, in the layout that the `kernels` package of Hugging Face loads.

    FOLDER/build/torch-stable-abi210-cpu-x86_64-linux/   this package with its native library
    FOLDER/build/torch-cuda/                             this package without it: Triton serves GPUs

Both contain the whole package, because such a repository may import nothing but itself and torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

from .. import __version__
from ..native import build, load
from . import layers

NAME = "var-kernels"
LICENCE = "MIT"


def variant() -> str:
    """The name of the variant for the CPUs and the system of this machine, with the oldest torch that it serves."""
    major, minor = build.MIN_TORCH
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi{major}{minor}-cpu-{machine}-{platform.system().lower()}"


def build_repository(folder: Path) -> list[Path]:
    """Writes the repository into `folder`, which is made if it does not exist. Returns the folders of the variants.

    Variants that are there are replaced, each as a whole.

    Raises:
        RuntimeError: if the native library is not available, with the reason.
    """
    status = load.native_library()
    if not status.available:
        raise RuntimeError(f"the native library: expected one on this machine, got none ({status.reason})")
    written = []
    for name, backend, library in ((variant(), "cpu", status.path), ("torch-cuda", "cuda", None)):
        target = folder / "build" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
            made = Path(temporary, name)
            _write_variant(made, backend, library)
            if target.exists():
                target.rename(Path(temporary, "old"))
            made.rename(target)
        written.append(target)
    build.write_atomically(folder / "README.md", lambda path: Path(path).write_text(_card(), encoding="utf-8"))
    return written


def _write_variant(target: Path, backend: str, library: Path | None) -> None:
    shutil.copytree(build.PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "csrc"))
    if library is not None:
        shutil.copyfile(library, target / build.LIBRARY_NAME)
        shutil.copytree(build.CSRC, target / "csrc")  # the library is accepted if it was built from these sources
    with (target / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom .swap import layers  # noqa: E402, F401\n")
    digest = hashlib.sha256()
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        digest.update(path.relative_to(target).as_posix().encode() + b"\0" + path.read_bytes())
    metadata = {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest.hexdigest()[:12]}", "name": NAME, "version": 1,
        "license": LICENCE, "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _card() -> str:
    rows = "\n".join(f"- `{name}`: {getattr(layers, name).__doc__}" for name in layers.__all__)
    return (
        f"---\nlicense: {LICENCE.lower()}\ntags:\n- kernels\n---\n\n# {NAME} {__version__}\n\n"
        "Kernels for next-scale image generation: block-causal attention, AdaLN with gate and residual, nearest\n"
        f"codes, the multi-scale residual quantizer.\n\nLayers for `kernelize`:\n\n{rows}\n"
    )
