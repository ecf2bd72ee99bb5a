"""Two ways to execute Triton launches on CPU tensors, each a function for `var_kernels.triton.launch.executor`.

`interpret` uses Triton's own interpreter, in a separate process, because Triton decides at its import whether its
functions are interpreted or compiled. It refuses bfloat16, because Triton's interpreter computes on the bits of
bfloat16 and gives wrong results without an error.

`run_ptx` executes the PTX that Triton's compiler writes for compute capability 8.0, in the interpreter `ptx`.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os

import pytest
import torch
import triton

from tools.gpu_emulation import ptx
from var_kernels.triton.launch import Launch, executor
from var_kernels.triton.offline import compile_for
from var_kernels.triton.targets import TARGETS, assume

# ---- Triton's interpreter


def _describe(value, storages):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter computes bfloat16 wrongly: execute the compiled code (run_ptx) instead")
    storage = value.untyped_storage()
    storages.setdefault(storage.data_ptr(), storage)
    return _View(storage.data_ptr(), value.dtype, value.storage_offset(), tuple(value.shape), value.stride())


class _View(tuple):
    """A tensor as it is sent to the other process: address of its storage, dtype, offset, shape and strides."""

    def __new__(cls, *fields):
        return super().__new__(cls, fields)

    def __getnewargs__(self):
        return tuple(self)


def interpret(launch: Launch) -> None:
    """Executes a launch in Triton's interpreter."""
    storages: dict[int, torch.UntypedStorage] = {}
    arguments = {name: _describe(value, storages) for name, value in launch.arguments.items()}
    contents = {address: bytes(storage) for address, storage in storages.items()}
    connection = _interpreter()
    connection.send((launch.kernel.fn.__module__, launch.kernel.fn.__name__, launch.grid, arguments, contents))
    outcome = connection.recv()
    if isinstance(outcome, Exception):
        raise outcome
    for address, changed in outcome.items():
        tensor = torch.empty(0, dtype=torch.uint8).set_(storages[address])
        tensor.copy_(torch.frombuffer(bytearray(changed), dtype=torch.uint8))


@functools.cache
def _interpreter():
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import, which happens in the new process
    try:
        process.start()
    finally:
        del os.environ["TRITON_INTERPRET"]
    atexit.register(process.terminate)
    return ours


def _serve(connection) -> None:
    torch.set_num_threads(1)
    while True:
        module, name, grid, arguments, contents = connection.recv()
        try:
            storages = {a: torch.frombuffer(bytearray(c), dtype=torch.uint8) for a, c in contents.items() if c}
            empty = torch.empty(0, dtype=torch.uint8)

            def rebuild(value, storages=storages, empty=empty):
                if not isinstance(value, _View):
                    return value
                address, dtype, offset, shape, stride = value
                storage = storages.get(address, empty).untyped_storage()
                return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)

            kernel = getattr(importlib.import_module(module), name)
            kernel[grid](**{key: rebuild(value) for key, value in arguments.items()})
            connection.send({address: storage.numpy().tobytes() for address, storage in storages.items()})
        except Exception as problem:
            connection.send(RuntimeError(f"{module}.{name} in Triton's interpreter: {problem!r}"))


# ---- The PTX interpreter


def run_ptx(launch: Launch) -> None:
    """Compiles a launch for sm_80 and executes its PTX."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
        # The code of 3.6 shuffles registers that only some lanes have loaded, and stores only those lanes. This is
        # right, but the interpreter refuses it.
        pytest.skip(f"the PTX of Triton {triton.__version__}: this interpreter is for 3.9 and newer")
    compiled = compile_for(launch, TARGETS["sm_80"])
    memory = ptx.Memory()
    added, arguments = set(), []
    for name, kind in compiled.src.signature.items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            arguments.append(value.data_ptr())
            storage = value.untyped_storage()
            if storage.data_ptr() not in added and storage.nbytes():
                added.add(storage.data_ptr())
                memory.add(name, torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        else:
            arguments.append(value)
    (kernel,) = ptx.parse(compiled.asm["ptx"]).kernels.values()
    arguments += [0] * (len(kernel.parameters) - len(arguments))  # Triton's scratch memory, which no kernel uses
    grid = tuple(itertools.islice(itertools.chain(launch.grid, itertools.repeat(1)), 3))
    threads = (32 * compiled.metadata.num_warps, 1, 1)
    shared = compiled.metadata.shared
    ptx.run(kernel, arguments, grid=grid, threads=threads, shared_bytes=shared, memory=memory)


@contextlib.contextmanager
def executing(function, target: str = "sm_80"):
    """Inside this context, Triton launches go to `function`, with the configurations of `target`."""
    with assume(TARGETS[target]), executor(function):
        yield
