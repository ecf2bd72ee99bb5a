"""Fixtures that the tests of all ops share."""

import pytest
import torch
from hypothesis import settings

from var_kernels.backends import unavailable_reason

# Of the randomised tests; `--hypothesis-profile=long` for ten minutes of test_cpu_differential.py.
settings.register_profile("brief", max_examples=15, derandomize=True)
settings.register_profile("long", max_examples=2000)
settings.load_profile("brief")


@pytest.fixture
def cpu():
    """Skips where the native library, which serves all ops together, is not available."""
    reason = unavailable_reason("cpu", "cpu", "block_causal_attention")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def selected(request):
    """The values of one parameter of the test with which this run calls it: what is slow to make, compiled code say, is
    made for all of them together."""

    def values(parameter):
        items = (item for item in request.session.items if getattr(item, "function", None) is request.function)
        return tuple(dict.fromkeys(item.callspec.params[parameter] for item in items))

    return values


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu")
    return request.param


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
