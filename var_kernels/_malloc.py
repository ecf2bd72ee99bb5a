"""Settings of the C library's malloc with which page faults of temporaries do not count as speed of kernels.

By default glibc returns large freed blocks to the system, so every call that allocates a large temporary pays for
faulting its pages in again. With large thresholds memory is kept and reused. Malloc reads the thresholds when a process
starts. Other C libraries ignore them.
"""

from __future__ import annotations

import os

TUNABLES = ("glibc.malloc.mmap_threshold=1073741824", "glibc.malloc.trim_threshold=4294967296")
_VARIABLE = "GLIBC_TUNABLES"


def is_fair() -> bool:
    """Whether this process started with the thresholds."""
    return set(TUNABLES) <= set(os.environ.get(_VARIABLE, "").split(":"))


def fair_environment() -> dict[str, str]:
    """This environment with the thresholds added to the tunables that the user has set."""
    others = [item for item in os.environ.get(_VARIABLE, "").split(":") if item and item not in TUNABLES]
    return {**os.environ, _VARIABLE: ":".join([*others, *TUNABLES])}


def plain_environment() -> dict[str, str]:
    """This environment without the thresholds."""
    others = [item for item in os.environ.get(_VARIABLE, "").split(":") if item and item not in TUNABLES]
    environment = {**os.environ, _VARIABLE: ":".join(others)}
    if not others:
        del environment[_VARIABLE]
    return environment
