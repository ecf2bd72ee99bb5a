"""Records the kernels that a call of the Triton backend launches, without executing them."""

from collections.abc import Callable

from var_kernels.triton.launch import Launch, executor
from var_kernels.triton.targets import TARGETS, assume


def recorded(function: Callable[[], object], target: str = "sm_80") -> list[Launch]:
    """The launches that `function` makes when the GPU is `target`, in their order."""
    launches = []
    with assume(TARGETS[target]), executor(launches.append):
        function()
    return launches
