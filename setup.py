"""Builds the native library, and puts its sources into the wheel for a build at first use. The rest of the packaging
is in pyproject.toml."""

import importlib.util
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# Loaded by its path, because importing the package imports torch, which pip's isolated build does not have.
_spec = importlib.util.spec_from_file_location("var_kernels_build", ROOT / "var_kernels" / "native" / "build.py")
native_build = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


def target_torch():
    """The torch of the environment that the package is installed into. pip's isolated build hides it from imports."""
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    return native_build.find_torch(directories) or torch_without_pythonpath()


def torch_without_pythonpath():
    """The torch that this interpreter finds without PYTHONPATH, by which pip hides it. In a venv with the system's
    packages, for example, it is the system's torch."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    answer = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True)
    origin = answer.stdout.strip()
    return native_build.read_torch(Path(origin).parent) if answer.returncode == 0 and origin else None


def say(message):
    print(f"[var_kernels] {message}", file=sys.stderr)


def native_extensions():
    """The native library, if it can be built now. In mode "auto" a missing tool postpones the build to first use."""
    try:
        mode = native_build.build_mode()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if mode == "none":
        return []
    try:
        native_build.require_torch(target_torch())
        native_build.find_compiler()
        native_build.find_ninja()
    except native_build.BuildUnavailable as reason:
        if mode != "auto":
            raise SystemExit(f"VAR_KERNELS_BUILD={mode}: {reason}") from None
        say(f"the native kernels are not built now, but at their first use: {reason}")
        return []
    return [Extension("var_kernels._C", sources=[], py_limited_api=True, optional=mode == "auto")]


class BuildLibrary(build_ext):
    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            info = native_build.build(
                library.resolve(), Path(self.build_temp).resolve(), mode=native_build.build_mode(), torch=target_torch()
            )
        except (native_build.BuildUnavailable, native_build.BuildFailed) as error:
            raise CompileError(str(error)) from error
        say(f"built {library.name} with {info['compiler']}, torch {info['torch']}, CUDA {info['cuda']}")

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_name(native_build.LIBRARY_NAME))

    def copy_extensions_to_source(self):
        # Atomic, unlike setuptools' own copy, because another process may load the old library at this moment.
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                native_build.install_library(built, native_build.AHEAD_OF_TIME_LIBRARY)


class BuildPython(build_py):
    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            # Emptied first, because users of the wheel would compile a file that was deleted since an earlier build.
            shutil.rmtree(Path(self.build_lib, "var_kernels", "csrc"), ignore_errors=True)
            for source, target in self._native_sources():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(target) for _, target in self._native_sources()]

    def _native_sources(self):
        target = Path(self.build_lib, "var_kernels", "csrc")
        return [(path, target / path.relative_to(native_build.CSRC)) for path in native_build.sources()]


extensions = native_extensions()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython},
    # One library serves every version of Python, because it contains no Python code.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
