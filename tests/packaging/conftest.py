"""A fixture that the tests of installations and of the build share."""

import pytest


@pytest.fixture
def no_compiler(tmp_path):
    """A value of PATH with which no compiler is found."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")
