"""Installs this package beside a CUDA build of torch in a fresh environment, and checks its library there.

    python tools/check_cuda_torch.py [--torch torch==2.14.1] [--archs 80] [--keep DIRECTORY]

Needs nvcc, the package index (a CUDA build of torch is about 5 GB), some minutes (most for compiling, fewer with
`--archs`), and no GPU. Exit status 1 if a check of `tools/check_cuda_library.py` fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Runs a command and shows its output. CalledProcessError if it fails."""
    print("+", *command, flush=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VAR_KERNELS_", "PYTHON"))}
    subprocess.run(command, cwd=cwd, env=kept | environment, check=True)


def check(directory: Path, torch: str, archs: str | None) -> None:
    """Creates the environment in `directory`, installs everything there and runs the checks."""
    cache = {"VAR_KERNELS_CACHE": str(directory / "cache")}
    run(sys.executable, "-m", "venv", "venv", cwd=directory)
    python = directory / "venv/bin/python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir")
    run(*pip, torch, cwd=directory)
    run(python, "-c", "import torch; assert torch.version.cuda, f'{torch.__version__} is no CUDA build'", cwd=directory)
    # Mode cuda: a missing or failing nvcc is an error.
    run(*pip, ROOT, cwd=directory, VAR_KERNELS_BUILD="none" if archs else "cuda")
    if archs:
        run(python, "-m", "var_kernels.native.build", "--mode", "cuda", "--archs", archs, cwd=directory, **cache)
    for arguments in ((ROOT / "tools/check_cuda_library.py",), ("-m", "var_kernels")):
        run(python, *arguments, cwd=directory, **cache)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="what pip installs (default: the newest torch)")
    parser.add_argument("--archs", help="compile for these only, as in python -m var_kernels.native.build")
    parser.add_argument("--keep", type=Path, help="a directory to work in, which stays (default: a temporary one)")
    options = parser.parse_args()
    try:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            check(options.keep.resolve(), options.torch, options.archs)
        else:
            with tempfile.TemporaryDirectory() as directory:
                check(Path(directory), options.torch, options.archs)
    except subprocess.CalledProcessError as error:
        print(f"failed with status {error.returncode}: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
