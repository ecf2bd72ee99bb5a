"""pip installs the project with a tiny ``csrc``: editable and as a wheel, with and without torch or a compiler.

Nothing needs the network: fresh environments see the packages of the one that runs the tests.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.checkout import LOAD, ROOT, Checkout, environment, needs_compiler
from var_kernels.native import build

pytestmark = pytest.mark.evidence


class Environment:
    """A fresh virtual environment with setuptools and ninja, or with all packages of the one that runs the tests."""

    def __init__(self, root: Path, *, torch: bool):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=120)
        self.python, self.root = root / "bin/python", root
        self.site = next(root.glob("lib/python3*/site-packages"))
        here = Path(sysconfig.get_path("purelib"))
        if torch:
            (self.site / "all.pth").write_text(str(here))
        else:
            for pattern in ("setuptools*", "_distutils_hack", "ninja*"):
                for package in here.glob(pattern):
                    (self.site / package.name).symlink_to(package)
        (root / "bin/ninja").symlink_to(build.find_ninja())

    def pip(self, *arguments: str | Path, status: int = 0, **changes: str) -> str:
        """Runs the pip of the tests on this environment, without the network; returns all that it prints."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        answer = subprocess.run(
            [str(part) for part in command], env=environment(PIP_NO_INDEX="1", **changes), cwd=self.root, timeout=180,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert answer.returncode == status, answer.stdout
        return answer.stdout

    def load(self, cache: Path, **changes: str) -> dict:
        """What ``load.native_library()`` returns in this environment."""
        process = subprocess.Popen(
            [str(self.python), "-c", LOAD], env=environment(VAR_KERNELS_CACHE=str(cache), **changes), cwd=self.root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return Checkout.answer(process)


PIP_FLAGS = ("--no-build-isolation", "--no-deps", "-v")


@pytest.fixture
def project(tmp_path):
    """A copy of the project as pip needs it, with the tiny ``csrc`` instead of the real one."""
    target = tmp_path / "project"
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    (target / "README.md").write_text("# var-kernels\n")
    for name in ("var", "var_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(Checkout(tmp_path / "tiny").csrc, target / "csrc")
    return target


def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@needs_compiler
def test_editable_install_builds_ahead_of_time(project, tmp_path):
    target = Environment(tmp_path / "venv", torch=True)
    assert "[var_kernels] built _C.abi3.so" in target.pip("install", *PIP_FLAGS, "-e", project)
    answer = target.load(tmp_path / "cache")
    assert (answer["origin"], answer["value"]) == ("ahead of time", 1)
    assert Path(answer["path"]) == project / "var_kernels/_C.abi3.so"
    (project / "csrc/tiny.h").write_text("#define TINY_VALUE 5\n")
    answer = target.load(tmp_path / "cache")
    assert answer["origin"].startswith("built on first use in ") and answer["value"] == 5
    target.pip("install", *PIP_FLAGS, "-e", project)
    answer = target.load(tmp_path / "cache")
    assert (answer["origin"], answer["value"]) == ("ahead of time", 5)


def test_an_editable_install_is_found_before_a_directory_of_the_same_name(project, tmp_path):
    """A program starts in / in many containers, and /var is a directory there."""
    target = Environment(tmp_path / "venv", torch=True)
    target.pip("install", *PIP_FLAGS, "-e", project, VAR_KERNELS_BUILD="none")
    for name in ("var", "var_kernels"):
        (tmp_path / "here" / name).mkdir(parents=True)
    code = "import var, var_kernels; print(var.load.__module__, var.__file__, var_kernels.__file__)"
    for directory in (tmp_path / "here", "/"):
        for arguments in (["-c", code], ["-m", "var", "--help"]):
            answer = subprocess.run(
                [str(target.python), *arguments], env=environment(), cwd=directory, timeout=120, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert answer.returncode == 0, answer.stdout
            if "-c" in arguments:
                files = [str(project / name / "__init__.py") for name in ("var", "var_kernels")]
                assert answer.stdout.split() == ["var.model.opening", *files]


@needs_compiler
def test_wheel_installs_elsewhere(project, tmp_path, no_compiler):
    builder, user = (Environment(tmp_path / name, torch=True) for name in ("builder", "user"))
    builder.pip("wheel", *PIP_FLAGS, "-w", tmp_path, project)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("var_kernels-0.1.0-cp310-abi3-")
    weights = {f"var/weights/{path.name}" for path in (ROOT / "var/weights").glob("*") if path.is_file()}
    sources = {f"var_kernels/csrc/{name}" for name in ("tiny.h", "cpu/tiny.isa.cpp", "cpu/dispatch.cpp")}
    assert wheel_names(wheel) >= weights | sources | {"var_kernels/_C.abi3.so", "var/__init__.py"}
    assert not {name for name in wheel_names(wheel) if name.startswith(("tests", "csrc", "benchmarks", "build"))}
    shutil.rmtree(project)
    user.pip("install", *PIP_FLAGS, wheel)
    answer = user.load(tmp_path / "cache", PATH=no_compiler)
    assert (answer["origin"], answer["value"]) == ("ahead of time", 1)
    assert Path(answer["path"]).is_relative_to(user.site)
    user.pip("uninstall", "-y", "var-kernels")
    assert not (user.site / "var_kernels/csrc").exists() and not (user.site / "var_kernels/_C.abi3.so").exists()


@needs_compiler
def test_without_torch_the_wheel_builds_at_first_use(project, tmp_path):
    builder, user = Environment(tmp_path / "builder", torch=False), Environment(tmp_path / "user", torch=True)
    printed = builder.pip("wheel", *PIP_FLAGS, "-w", tmp_path, project)
    assert "at their first use: torch (>= 2.10) is not installed" in printed
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "var_kernels-0.1.0-py3-none-any.whl"
    user.pip("install", *PIP_FLAGS, wheel)
    origins = [user.load(tmp_path / "cache")["origin"] for _ in range(2)]
    assert origins[0].startswith("built on first use in ") and origins[1] == "cached"


def test_install_without_a_compiler(project, tmp_path, no_compiler):
    target = Environment(tmp_path / "venv", torch=True)
    missing = {"PATH": no_compiler, "CXX": ""}
    assert "at their first use: no C++ compiler found" in target.pip("install", *PIP_FLAGS, "-e", project, **missing)
    assert target.load(tmp_path / "cache", **missing)["warnings"]
    target.pip("install", *PIP_FLAGS, "-e", project, VAR_KERNELS_BUILD="none", **missing)
    for mode in ("cpu", "cuda"):
        printed = target.pip("install", *PIP_FLAGS, "-e", project, status=1, VAR_KERNELS_BUILD=mode, **missing)
        assert f"VAR_KERNELS_BUILD={mode}: no C++ compiler found" in printed


@needs_compiler
def test_a_compile_error_stops_only_an_explicit_build(project, tmp_path):
    target = Environment(tmp_path / "venv", torch=True)
    (project / "csrc/cpu/dispatch.cpp").write_text("nonsense;\n")
    target.pip("install", *PIP_FLAGS, "-e", project)
    assert not (project / "var_kernels/_C.abi3.so").exists()
    assert "nonsense" in target.pip("install", *PIP_FLAGS, "-e", project, status=1, VAR_KERNELS_BUILD="cpu")
