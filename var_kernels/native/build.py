"""Builds the native library ``_C.abi3.so``.

Three callers share this module: ``setup.py`` (ahead of time), :mod:`.load` (at first use) and its own command line
(``python -m var_kernels.native.build`` compiles in place; ``python var_kernels/native/build.py`` does so without
importing torch). A build needs the standard library and ninja only (the command line also filelock), and finds torch by
path: importing torch takes seconds, and inside pip's isolated build it is not importable at all.

Sources, relative to ``csrc/``:

* ``cpu/*.cpp`` (not ``.isa.cpp``): the entry functions of the ops, which check the arguments and call the kernels. They
  are compiled once against the LibTorch stable ABI of torch 2.10, so that one library serves every later torch, CPU or
  CUDA build;
* ``cpu/*.isa.cpp``: vector code without torch headers, compiled once per level of :data:`ISA_LEVELS`;
* ``cuda/*.cu``: compiled into the same library if nvcc and a CUDA build of torch are present.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries its sources inside the package; a checkout has them beside it.
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
LIBRARY_NAME = "_C.abi3.so"
AHEAD_OF_TIME_LIBRARY = PACKAGE / LIBRARY_NAME

MODES = ("auto", "cpu", "cuda", "none")
MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"
MIN_COMPILER = {"g++": 11, "clang++": 14}
SOURCE_SUFFIXES = (".cpp", ".h", ".cu", ".cuh", ".inc")
INFO_MARKER = b"var_kernels build info: "

# Not -ffast-math: NaN and infinity must propagate as they do in torch.
COMMON_FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi"  # psabi warns about vector types as arguments, which never cross the library's border
)
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
_AVX512_BF16 = _AVX512 + " -mavx512bf16"
ISA_LEVELS = {
    "portable": "",
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": _AVX512_BF16 + " -mamx-tile -mamx-bf16",
}

# sm_80 carries its PTX as well. From it the driver makes code for every later GPU that has no binary here.
CUDA_ARCHS = {
    "80": "arch=compute_80,code=[sm_80,compute_80]",
    "90a": "arch=compute_90a,code=sm_90a",
    "100a": "arch=compute_100a,code=sm_100a",
    "120": "arch=compute_120,code=sm_120",
}


class BuildUnavailable(RuntimeError):
    """Something that the build needs is not installed; the message says what it is and how to get it."""


class BuildFailed(RuntimeError):
    """The compiler refused the sources; the message contains the end of its output."""


@dataclass(frozen=True)
class TorchInstall:
    """A torch found by path: its package directory, its version, and the CUDA it was built with (None: a CPU build)."""

    path: Path
    version: str
    cuda: str | None

    @property
    def major_minor(self) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d+)", self.version).groups()
        return int(major), int(minor)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, "g++" or "clang++", its major version, and whether it targets x86-64."""

    command: str
    family: str
    major: int
    x86_64: bool


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: the command, its toolkit's root, and its (major, minor) release."""

    command: str
    toolkit: Path
    release: tuple[int, int]


def build_mode() -> str:
    """``VAR_KERNELS_BUILD``, one of :data:`MODES`; ValueError for anything else."""
    mode = os.environ.get("VAR_KERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise ValueError(f"VAR_KERNELS_BUILD: expected one of {', '.join(MODES)}; got {mode!r}")
    return mode


def source_hash() -> str:
    """Hexadecimal SHA-256 of every source file and this file: libraries with the same hash have the same code."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sources():
        digest.update(f"\0{path.relative_to(CSRC).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources() -> list[Path]:
    """Every source file of the native library."""
    return sorted(path for path in CSRC.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file())


def find_torch(extra: Iterable[str] = ()) -> TorchInstall | None:
    """The torch on ``sys.path``, else the first one in the site directories `extra`."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return read_torch(Path(spec.origin).parent)
    for directory in extra:
        if found := read_torch(Path(directory) / "torch"):
            return found
    return None


def read_torch(path: Path) -> TorchInstall | None:
    """The torch package in directory `path`, or None if there is none."""
    version_file = path / "version.py"
    if not version_file.is_file():
        return None
    text = version_file.read_text(encoding="utf-8")

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.M)
        return match.group(1) if match else None

    version = value("__version__")
    return TorchInstall(path, version, value("cuda")) if version else None


def require_torch(torch: TorchInstall | None) -> TorchInstall:
    """`torch` if the library can be built against it, else BuildUnavailable."""
    wanted = ".".join(map(str, MIN_TORCH))
    if torch is None:
        raise BuildUnavailable(f"torch (>= {wanted}) is not installed")
    if torch.major_minor < MIN_TORCH:
        raise BuildUnavailable(f"torch {torch.version} is older than {wanted}")
    if not (torch.path / "include/torch/csrc/stable/library.h").is_file():
        raise BuildUnavailable(f"torch {torch.version} in {torch.path} comes without its C++ headers")
    return torch


def find_compiler() -> Compiler:
    """``CXX``, else the first of g++, c++ and clang++ on the path.

    Raises BuildUnavailable if there is none, or if it is too old or does not work.
    """
    advice = "install g++ >= 11 or clang >= 14 (Debian, Ubuntu: apt-get install g++), or set CXX"
    if sys.platform not in ("linux", "darwin"):
        raise BuildUnavailable(f"the native kernels are built on Linux and macOS only, this is {sys.platform}")
    command = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if not command:
        raise BuildUnavailable(f"no C++ compiler found: {advice}")
    try:
        probe = [*shlex.split(command), "-dM", "-E", "-x", "c++", os.devnull]
        answer = subprocess.run(probe, capture_output=True, text=True, errors="replace")
    except (OSError, ValueError) as error:  # ValueError: a quotation without an end
        raise BuildUnavailable(f"the C++ compiler {command!r} does not run ({error}): {advice}") from error
    macros = dict(re.findall(r"^#define (\w+) (\d+)$", answer.stdout, re.M))
    if answer.returncode or "__GNUC__" not in macros:
        message = answer.stderr.strip() or "it is neither g++ nor clang"
        raise BuildUnavailable(f"the C++ compiler {command!r} does not work ({message}): {advice}")
    family, version = ("clang++", "__clang_major__") if "__clang_major__" in macros else ("g++", "__GNUC__")
    major = int(macros[version])
    if major < MIN_COMPILER[family]:
        raise BuildUnavailable(f"{command} is {family} {major}, older than {MIN_COMPILER[family]}: {advice}")
    return Compiler(command, family, major, macros.get("__x86_64__") == "1")


def find_ninja() -> str:
    """The ninja executable: the Python package's, else one on the path; BuildUnavailable if there is neither."""
    directory = None
    if importlib.util.find_spec("ninja"):
        import ninja

        # BIN_DIR is empty if the package does not know it; in pip's isolated build ninja is on the path.
        directory = ninja.BIN_DIR or None
    for command in (shutil.which("ninja", path=directory), shutil.which("ninja"), shutil.which("ninja-build")):
        if command:
            return command
    raise BuildUnavailable("ninja not found: pip install ninja")


def find_nvcc() -> Nvcc | None:
    """nvcc from ``CUDA_HOME``, the path, or /usr/local/cuda; None if there is none that works."""
    home = os.environ.get("CUDA_HOME")
    for command in (home and os.path.join(home, "bin", "nvcc"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if not command or not os.path.exists(command):
            continue
        # nvcc may be a wrapper outside its toolkit, so this asks it where the toolkit is.
        dryrun = [command, "--dryrun", "-x", "cu", "-c", "-o", os.devnull, os.devnull]
        answer = subprocess.run(dryrun, capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", answer.stderr + answer.stdout, re.M)
        version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", version)
        if top and release:
            return Nvcc(command, Path(top.group(1)).resolve(), (int(release.group(1)), int(release.group(2))))
    return None


def nvcc_archs(nvcc: Nvcc) -> tuple[str, ...]:
    """Those of :data:`CUDA_ARCHS` that `nvcc` knows."""
    known = subprocess.run([nvcc.command, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return tuple(arch for arch in CUDA_ARCHS if "compute_" + arch.rstrip("a") in known)


def cuda_compiler(mode: str, torch: TorchInstall) -> Nvcc | None:
    """The nvcc that a build in `mode` uses; None if it compiles no CUDA sources.

    Raises BuildUnavailable in mode "cuda" if there is no nvcc.
    """
    if not any((CSRC / "cuda").glob("*.cu")) or mode == "cpu" or (mode == "auto" and torch.cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None and mode == "cuda":
        raise BuildUnavailable("nvcc not found: install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls `write(temporary path)`, then renames that file to `path`; the folder is created if it is missing.

    Readers see the old file or the complete new one. If writing fails, the old file stays, and no other is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def install_library(library: Path, destination: Path) -> None:
    """Copies `library` to `destination` atomically, because another process may be about to load the old one."""
    write_atomically(destination, lambda temporary: shutil.copyfile(library, temporary))


def build(
    destination: Path,
    work_dir: Path,
    *,
    mode: str = "auto",
    torch: TorchInstall | None = None,
    archs: Sequence[str] | None = None,
    report: bool = False,
    verbose: bool = False,
) -> dict:
    """Compiles ``csrc`` to the library `destination` and returns its build info.

    Object files stay in `work_dir`, and only changed sources are compiled again; two builds must not use one `work_dir`
    at the same time. In mode "auto", if nvcc fails, the library is built without CUDA kernels. `report` adds the
    resource usage of each CUDA kernel to the "log" of the returned dictionary. Raises BuildUnavailable or BuildFailed.
    """
    torch = require_torch(torch or find_torch())
    compiler, ninja, nvcc = find_compiler(), find_ninja(), cuda_compiler(mode, torch)
    if not any((CSRC / "cpu").glob("*.cpp")):
        raise BuildUnavailable(f"there are no C++ sources in {CSRC / 'cpu'}")
    info = {
        "source_hash": source_hash(),
        "torch": torch.version,
        "compiler": f"{compiler.family} {compiler.major}",
        "isa_levels": list(ISA_LEVELS if compiler.x86_64 else ["portable"]),
        "cuda": ".".join(map(str, nvcc.release)) if nvcc else None,
        "cuda_archs": list(archs or nvcc_archs(nvcc)) if nvcc else [],
    }
    work_dir.mkdir(parents=True, exist_ok=True)
    info_source, info_file = _build_info_source(info), work_dir / "build_info.cpp"
    if not info_file.is_file() or info_file.read_text(encoding="utf-8") != info_source:
        info_file.write_text(info_source, encoding="utf-8")
    plan = _ninja_file(compiler, torch, nvcc, info, report, work_dir.resolve())
    (work_dir / "build.ninja").write_text(plan, encoding="utf-8", errors="surrogateescape")
    for compiled in work_dir.glob("*.cu.o") if report else ():
        compiled.unlink()  # the usage is printed only when a kernel is compiled
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja, "-C", str(work_dir), *jobs, *(["-v"] if verbose else [])]
    answer = subprocess.run(command, capture_output=not verbose, text=True, errors="replace")
    if answer.returncode and nvcc and mode == "auto":
        print("[var_kernels] nvcc failed; building the CPU kernels alone\n" + _tail(answer), file=sys.stderr)
        return build(destination, work_dir, mode="cpu", torch=torch, verbose=verbose)
    if answer.returncode:
        raise BuildFailed(f"compiling the kernels with {compiler.command} failed:\n{_tail(answer)}")
    if source_hash() != info["source_hash"]:  # a source was edited meanwhile, so the build info would be wrong
        return build(destination, work_dir, mode=mode, torch=torch, archs=archs, report=report, verbose=verbose)
    install_library(work_dir / LIBRARY_NAME, destination)
    return info | {"log": answer.stdout or ""}


def _tail(answer: subprocess.CompletedProcess) -> str:
    return ((answer.stdout or "")[-6000:] + (answer.stderr or "")[-2000:]).strip()


def _build_info_source(info: dict) -> str:
    text = (INFO_MARKER.decode() + json.dumps(info, sort_keys=True)).replace("\\", "\\\\").replace('"', '\\"')
    return (
        "// Generated. The text is found in the file without loading it; see read_build_info in native/load.py.\n"
        f'extern "C" __attribute__((used, visibility("default"))) const char var_kernels_build_info[] = "{text}";\n'
    )


def _ninja_file(
    compiler: Compiler, torch: TorchInstall, nvcc: Nvcc | None, info: dict, report: bool, work_dir: Path
) -> str:
    """The ninja plan: an object for each file of entry functions, vector file and ISA level, and CUDA file; a link."""
    include = f"-I{shlex.quote(str(CSRC))}"
    stable_abi = stable_abi_flags(torch)
    flags = f"{COMMON_FLAGS} {include} -ffile-prefix-map={shlex.quote(str(CSRC.parent))}=."  # no local paths inside
    rules = {"cxx": f"{compiler.command} -MMD -MF $out.d {flags} {os.environ.get('CXXFLAGS', '')}"}
    if nvcc:
        rules["nvcc"] = _nvcc_rule(nvcc, info["cuda_archs"], f"{include} {stable_abi}", report)
    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        # The key is a shell comment. It makes ninja compile again whenever the content of a file has changed, even if a
        # restored or copied file is older than its object.
        lines += [f"rule {name}", f"  command = {_escape_command(command)} $flags -c $in -o $out # $key"]
        lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {name.upper()} $out"]
    objects = [("cxx", work_dir / "build_info.cpp", "build_info.o", ""), *_objects(compiler, nvcc, info, stable_abi)]
    for rule, source, name, flags in objects:
        contents = b"\0".join(path.read_bytes() for path in _with_includes(source, []))
        key = hashlib.sha256(torch.version.encode() + contents).hexdigest()[:16]
        lines += [f"build {name}: {rule} {_escape_path(source)}", f"  key = {key}"]
        lines += [f"  flags = {_escape_command(flags)}"]
    link = f"{compiler.command} -shared $in -o $out {_link_flags(torch, nvcc)}"
    lines += ["rule link", f"  command = {_escape_command(link)}", "  description = LINK $out"]
    lines += [f"build {LIBRARY_NAME}: link {' '.join(name for _, _, name, _ in objects)}", ""]
    return "\n".join(lines)


def _objects(compiler: Compiler, nvcc: Nvcc | None, info: dict, stable_abi: str) -> Iterable[tuple]:
    """(rule, source, object, flags) of every object, in link order.

    The lowest ISA level comes first: if several objects contain the same inline function, the linker keeps the first
    copy, which must not contain instructions that the processor may lack.
    """
    cpu = sorted((CSRC / "cpu").glob("*.cpp"))
    entry_flags = stable_abi + (" -DVAR_ISA_X86" if compiler.x86_64 else "")
    for source in cpu:
        if not source.name.endswith(".isa.cpp"):
            yield "cxx", source, f"{source.stem}.entry.o", entry_flags
    for level, name in enumerate(info["isa_levels"]):
        for source in cpu:
            if source.name.endswith(".isa.cpp"):
                flags = f"-DVAR_ISA={name} -DVAR_ISA_LEVEL={level} {ISA_LEVELS[name]}"
                yield "cxx", source, f"{source.name.removesuffix('.isa.cpp')}.{name}.o", flags
    if nvcc:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            yield "nvcc", source, f"{source.stem}.cu.o", ""


def _with_includes(source: Path, found: list[Path]) -> list[Path]:
    """`found`, followed in a fixed order by `source` and every file of `csrc` that it includes, directly or not."""
    found.append(source)
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', source.read_text(encoding="utf-8"), re.M):
        for path in ((source.parent / name).resolve(), (CSRC / name).resolve()):
            if path.is_file() and path not in found:
                _with_includes(path, found)
    return found


def stable_abi_flags(torch: TorchInstall) -> str:
    """The flags with which an entry function finds torch's headers, and uses only the stable ABI in them."""
    places = (torch.path / directory for directory in ("include", "include/torch/csrc/api/include"))
    includes = (f"-isystem {shlex.quote(str(place))}" for place in places)
    return " ".join((f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *includes))


def nvcc_command(nvcc: Nvcc) -> str:
    """The nvcc command with the options that determine the generated code."""
    # nvcc picks its own host compiler unless the user has named one.
    host = f" -ccbin {shlex.quote(os.environ['CXX'])}" if os.environ.get("CXX") else ""
    return f"{shlex.quote(nvcc.command)}{host} -O3 -std=c++20"


def _nvcc_rule(nvcc: Nvcc, archs: Iterable[str], flags: str, report: bool) -> str:
    codes = " ".join("-gencode " + shlex.quote(CUDA_ARCHS[arch]) for arch in archs)
    return (
        f"{nvcc_command(nvcc)} -MMD -MF $out.d -lineinfo --threads 2 "
        f"-Xcompiler -fPIC,-fvisibility=hidden {'-Xptxas -v ' if report else ''}{codes} {flags}"
    )


def _link_flags(torch: TorchInstall, nvcc: Nvcc | None) -> str:
    """The flags that link torch's libraries, and the CUDA runtime statically, so that it works with any CUDA torch."""
    search = f"-L{shlex.quote(str(torch.path / 'lib'))}"
    if sys.platform == "darwin":
        return f"{search} -ltorch -ltorch_cpu -lc10"
    # -ltorch must stay although nothing refers to it: through it the loader finds torch's CUDA libraries.
    flags = f"{search} -ltorch_cpu -lc10 -Wl,--push-state,--no-as-needed -ltorch -Wl,--pop-state"
    if nvcc:
        directories = " ".join(f"-L{shlex.quote(str(nvcc.toolkit / d))}" for d in ("lib64", "lib"))
        flags += f" {directories} -l:libcudart_static.a -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
    return flags


def _escape_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _escape_command(command: str) -> str:
    return re.sub(r"\$(?!in\b|out\b)", "$$$$", command)


def object_dir(root: Path, torch: TorchInstall) -> Path:
    """The directory in the cache `root` for the object files of this checkout, flavour of torch and machine."""
    place = hashlib.sha256(os.fsencode(CSRC)).hexdigest()[:8]
    return root / f"objects-{place}-{'cuda' if torch.cuda else 'cpu'}-{platform.machine()}"


def replace_unprintable() -> None:
    """Lets stdout and stderr print a "?" for each character that their encoding lacks, such as "×" in ASCII.

    By default such a character is an error, and it ends a program in the middle of its output.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of another kind are those of a test, or None
            stream.reconfigure(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the library from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m var_kernels.native.build", description="Build the native library.")
    parser.add_argument(
        "--output", type=Path, default=AHEAD_OF_TIME_LIBRARY, help="path of the library (default: inside the package)"
    )
    parser.add_argument("--mode", choices=MODES[:3], help="default: VAR_KERNELS_BUILD, else auto")
    parser.add_argument("--archs", help=f"CUDA architectures, comma-separated, from {','.join(CUDA_ARCHS)}")
    parser.add_argument("--report", action="store_true", help="print the resources that each CUDA kernel uses")
    parser.add_argument("--verbose", action="store_true", help="print every command")
    options = parser.parse_args(arguments)
    archs = options.archs.split(",") if options.archs else None
    if unknown := set(archs or ()) - set(CUDA_ARCHS):
        parser.error(f"--archs: expected some of {','.join(CUDA_ARCHS)}; got {','.join(sorted(unknown))}")
    start = time.perf_counter()
    try:
        mode = options.mode or build_mode()
        if mode == "none":
            raise BuildUnavailable("VAR_KERNELS_BUILD=none asks for no library")
        torch = require_torch(find_torch())
        import filelock

        # As a script, this file belongs to no package.
        cache = importlib.import_module(".cache" if __package__ else "cache", __package__)
        work_dir = object_dir(cache.private_directory(cache.cache_root()), torch)
        cache.private_directory(work_dir)
        with filelock.FileLock(str(work_dir / "lock")):
            settings = {"archs": archs, "report": options.report, "verbose": options.verbose}
            info = build(options.output.resolve(), work_dir, mode=mode, torch=torch, **settings)
    except (BuildUnavailable, BuildFailed, ValueError, OSError) as error:
        print(f"[var_kernels] {error}", file=sys.stderr)
        return 1
    if options.report:
        print(info["log"])
    cuda = f"CUDA {info['cuda']} for {', '.join(info['cuda_archs'])}" if info["cuda"] else "no CUDA kernels"
    with_what = f"{info['compiler']}, torch {info['torch']}, ISA levels {', '.join(info['isa_levels'])}, {cuda}"
    print(f"[var_kernels] built {options.output} in {time.perf_counter() - start:.1f} s with {with_what}")
    return 0


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
