"""``python -m var_kernels``: what is installed, which backend serves each op, why others do not, and a self-check."""

import argparse
import os
import platform
import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, _self_check, backends
from .inference import packing
from .measured import speeds
from .native import build, load


def main() -> int:
    """Prints the report; returns 1 if the self-check of an op fails or the environment is invalid, else 0."""
    argparse.ArgumentParser(
        prog="python -m var_kernels",
        description="Print what is installed, which backend serves each op on each device and why the others do not, "
        "and check every op against its reference. Exit status 1 if a check fails.",
    ).parse_args()
    console = Console(highlight=False)
    try:
        _print_installation(console, load.native_library())
        _print_backends(console)
        _print_gpu_order(console)
    except ValueError as error:  # an invalid setting, or a damaged file of measurements
        print(error, file=sys.stderr)
        return 1
    return _print_self_check(console)


def _print_installation(console: Console, status: load.NativeStatus) -> None:
    flavour = next((f"{kind} {v}" for kind in ("cuda", "hip") if (v := getattr(torch.version, kind))), "a CPU build")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "var-kernels": f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {flavour}",
        "GPUs": ", ".join(gpus) or "none",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }
    if status.available:
        info = status.build_info
        archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"])
        level = f"{status.isa}, {status.vector_width} floats a vector"
        rows |= {
            "native library": f"{status.path} ({status.origin})",
            "built from": f"sources {info['source_hash'][:16]}, by {info['compiler']}, against torch {info['torch']}",
            "ISA level": f"{level if status.isa else 'none'} (built: {', '.join(info['isa_levels'])})",
            "CUDA kernels": f"toolkit {info['cuda']}, for {archs}" if info["cuda"] else "not in the library",
        }
    else:
        rows["native library"] = f"not available: {status.reason}"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows["packed linear"] = "; ".join(f"{name}: {packing.packer(dtype)}" for name, dtype in dtypes.items())
    toolkit = build.find_nvcc()
    rows["CUDA toolkit"] = f"{'.'.join(map(str, toolkit.release))} in {toolkit.toolkit}" if toolkit else "none found"
    for name, value in rows.items():
        # These lines are no table, because a path must stay on one line to be copied.
        console.print(Text(f"{name:<16}", style="bold") + Text(value), soft_wrap=True)


def _print_backends(console: Console) -> None:
    """Prints the backend that "auto" takes for each op on each device, and below the table why others do not serve.

    Each reason is printed once, with all the ops that it concerns.
    """
    devices = {"cpu": "on cpu", "cuda": "on cuda" if torch.cuda.is_available() else "on cuda (no GPU here)"}
    table = _table("Backend that serves each op", "op", *devices.values())
    refused: dict[tuple[str, str, str], list[str]] = {}
    for op in backends.OPS:
        serving = []
        for device in devices:
            order = backends.auto_order(op, device)
            reasons = {name: backends.unavailable_reason(name, device, op) for name in order}
            serving.append(next((name for name, reason in reasons.items() if reason is None), "none"))
            for name, reason in reasons.items():
                if reason is not None:
                    refused.setdefault((name, device, reason), []).append(op)
        table.add_row(op, *serving)
    console.print(table)
    for (name, device, reason), ops in refused.items():
        whole = {tuple(backends.SERVES[name]): "any of its ops", tuple(backends.OPS): "any op"}
        which = whole.get(tuple(ops), ", ".join(ops))
        console.print(Text(f"{name} does not serve {which} on {device}: {reason}"), soft_wrap=True)


def _print_gpu_order(console: Console) -> None:
    """Prints which GPU backend "auto" tries first and why: on this GPU or, if there is none, on every kind of GPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    choices: dict[tuple[str, backends.Choice], list[str]] = {}
    for op in backends.GPU_OPS:
        shipped = backends.GPU_ORDER[op]
        for choice in (backends.gpu_choice(op),) if device else shipped:
            where = f" on compute capability {', '.join(map(str, choice.majors))}" if choice.majors else ""
            if not device and not choice.majors and len(shipped) > 1:
                where = " on others"
            choices.setdefault((where, choice), []).append(op)
    console.print("")
    for (where, choice), ops in choices.items():
        line = f"auto on cuda tries {choice.first} first for {', '.join(ops)}{where}: {choice.why}"
        console.print(Text(line), soft_wrap=True)
    into = f", into {speeds.path_of(device)}" if device else ""
    line = (
        "(a reason is measured only if it says so; pytest benchmarks/ --benchmark-only --device cuda "
        f"measures{into})"
    )
    console.print(Text(line), soft_wrap=True)


def _print_self_check(console: Console) -> int:
    table = _table(
        "Self-check against the float64 reference", "op", "backend", "device", "dtype", "max error", "result"
    )
    failures = []
    for check in _self_check.run():
        dtype = str(check.dtype).removeprefix("torch.")
        result = Text("ok", style="green")
        if check.failure is not None:
            result = Text("FAILED", style="red")
            failures.append(f"{check.op}, {check.backend} on {check.device}, {dtype}: {check.failure}")
        elif check.backward:
            result += Text(", fwd + bwd")
        table.add_row(check.op, check.backend, check.device, dtype, f"{check.error:.1e}", result)
    console.print(table)
    for failure in failures:
        console.print(Text(failure, style="red"), soft_wrap=True)
    return 1 if failures else 0


def _table(title: str, *columns: str) -> Table:
    table = Table(title="\n" + title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


if __name__ == "__main__":
    build.replace_unprintable()
    sys.exit(main())
