"""The environment of pytest processes that a test starts."""

import os


def child_environment(*without: str, **changes: str) -> dict[str, str]:
    """This process's environment for another pytest, without the variables in `without` and with `changes`.

    Variables that mark this process as a worker of pytest-xdist are left out, because the other one is no worker, and
    pytest-benchmark measures nothing in a worker.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name not in without}
    return kept | changes
