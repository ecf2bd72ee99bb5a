"""Finds the fastest configurations on the GPU of this machine: ``python -m var_kernels.triton.tune``.

Tuning never starts by itself. The shipped table is used until this command has written its file. Later processes on the
same kind of GPU read the file at their first launch. Deleting the file restores the table.

Each problem of :mod:`.problems` is run with the table's configurations first. Then, kernel by kernel, one number at a
time is halved, doubled, or moved by one. A change is kept if the whole problem gets faster by more than :data:`MARGIN`
and its results are those of the table's configurations within rounding. A configuration that does not compile or does
not fit is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from ..measured import device_file, tuned_tiles
from ..measured.tuned_tiles import Key
from ..native.build import replace_unprintable
from ..testing import GPU_CACHE_BYTES, gpu_seconds
from . import configs
from .configs import Config
from .targets import target_of

MARGIN = 0.02
_ROUNDS = 15
# Tiles in another order round differently, which is allowed; the errors of a wrong kernel are as large as its results.
_ROUNDINGS = 64


def neighbours(config: Config) -> Iterator[Config]:
    """`config` with one number changed."""
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= 16:
            yield dataclasses.replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield dataclasses.replace(config, num_stages=stages)
    for name, size in config.tiles.items():
        for changed in (size // 2, size * 2):
            if changed >= 1:
                yield dataclasses.replace(config, tiles={**config.tiles, name: changed})


def improve(
    key: Key,
    start: Config,
    chosen: dict[Key, Config],
    run: Callable[[], tuple],
    seconds: Callable[[Callable[[], tuple]], float],
) -> tuple[Config, float, float]:
    """Moves from `start` to a faster neighbour as long as there is one. Returns the best configuration, and the seconds
    before and after.

    `run` is one call of the problem, and `seconds` times a call. Launches take their configurations from `chosen`,
    which holds the best one at the end.
    """
    expected = run()
    best, first = start, seconds(run)
    fastest, tried = first, {repr(start)}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if repr(candidate) in tried:
                continue
            tried.add(repr(candidate))
            chosen[key] = candidate
            time = _seconds_if_right(run, expected, seconds)
            if time is not None and time < fastest * (1 - MARGIN):
                best, fastest, improved = candidate, time, True
    chosen[key] = best
    return best, first, fastest


def _seconds_if_right(run, expected, seconds) -> float | None:
    try:
        results = run()
        return seconds(run) if _same(results, expected) else None
    except Exception as problem:  # a configuration that the compiler or the driver refuses is no candidate
        torch.cuda.synchronize()  # raises, and ends the search, if the context is lost
        print(f"    passed over: {type(problem).__name__}: {str(problem).splitlines()[:1]}", file=sys.stderr)
        return None


def _same(results, expected) -> bool:
    for found, reference in zip(results, expected, strict=True):
        if not reference.is_floating_point():
            if not torch.equal(found, reference):
                return False
            continue
        band = _ROUNDINGS * torch.finfo(reference.dtype).eps * reference.abs().nan_to_num(0, 0, 0).max()
        if not torch.allclose(found, reference, rtol=0, atol=band.item(), equal_nan=True):
            return False
    return True


def _timer() -> Callable[[Callable[[], object]], float]:
    """Returns a timer: the median seconds between events, with the L2 cache flushed before each call."""
    flush = torch.empty(GPU_CACHE_BYTES, dtype=torch.uint8, device="cuda")
    return lambda call: statistics.median(gpu_seconds(call, flush) for _ in range(_ROUNDS))


def _call(problem) -> Callable[[], tuple]:
    arguments = problem.arguments("cuda")
    for value in arguments:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.normal_(std=0.5)
    raw = getattr(torch.ops.var_kernels_triton, problem.raw)

    def run():
        results = raw(*arguments)
        return results if isinstance(results, tuple) else (results,)

    return run


def tune(calls, device: str, seconds, report: Callable[[str], None] = print) -> dict[Key, Config]:
    """The configurations that beat those in use on `device`; `calls` yields the name of each problem and its call."""
    found: dict[Key, Config] = {}
    settled: set[Key] = set()
    for name, run in calls:
        with configs.recorded() as used:
            run()
        report(name)
        for key, config in used.items():
            if key in settled:
                continue
            settled.add(key)
            known = key in configs.tuned_on(device)
            best, before, after = improve(key, config, configs.tuned_on(device), run, seconds)
            report(f"  {key.kernel}: {before * 1e6:.1f} -> {after * 1e6:.1f} µs, {_text(best)}")
            if best is not config:
                found[key] = best
            elif not known:
                del configs.tuned_on(device)[key]  # it is the table's choice, and a later table may have a better one
    return found


def _text(config: Config) -> str:
    return ", ".join([*(f"{k} {v}" for k, v in config.tiles.items()), f"{config.num_warps} warps",
                      f"{config.num_stages} stages"])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Tunes and writes the file. Returns 2 if it cannot."""
    from .problems import PROBLEMS

    ops = sorted({problem.op for problem in PROBLEMS})
    parser = argparse.ArgumentParser(prog="python -m var_kernels.triton.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=ops, action="append", help="only this op; may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: expected a GPU that this torch can use, found none", file=sys.stderr)
        return 2
    device = target_of(torch.device("cuda")).device
    try:
        with device_file.only_measuring("tuned", device):
            return _tune_and_write(device, options.op)
    except BlockingIOError:
        print("tune: expected to be the only one that tunes this GPU, found another process", file=sys.stderr)
        return 2


def _tune_and_write(device: str, ops: list[str] | None) -> int:
    from .problems import PROBLEMS

    problems = (problem for problem in PROBLEMS if ops is None or problem.op in ops)
    found = tune(((f"{p.op}, {p.name}", _call(p)) for p in problems), device, _timer())
    entries = {
        key: {**dataclasses.asdict(config), "table": configs.fingerprint(key.kernel)}
        for key, config in configs.tuned_on(device).items()
    }
    path = tuned_tiles.write(device, entries)
    print(f"{len(found)} configurations became faster on {device}; all that were measured are in {path}")
    return 0


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
