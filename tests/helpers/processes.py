"""Processes that a test starts."""

import os


def child_environment(*without: str, **changes: str) -> dict[str, str]:
    """This process's environment for another pytest: without the variables named, with the changes.

    A worker of pytest-xdist says so in its environment, and pytest-benchmark measures nothing in a worker.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name not in without}
    return kept | changes
