"""Planted faults: planting one replaces its text and restores it, and each kernel has a representative fault.

A planted fault is a deliberate error in a kernel, which the tests of that kernel must find.
"""

import pytest

from tools.gpu_emulation.planted_faults import Mutant, parameters


def test_a_fault_is_planted_and_taken_out_again(tmp_path):
    file = tmp_path / "kernel"
    file.write_text("a b a")
    with Mutant("kernel", "a", "c", "values", times=2).planted(tmp_path):
        assert file.read_text() == "c b c"
    assert file.read_text() == "a b a"


def test_a_fault_whose_text_is_not_in_the_kernel_is_an_error(tmp_path):
    (tmp_path / "kernel").write_text("a b a")
    for old, times in (("a", 1), ("d", 1)):
        with pytest.raises(ValueError, match=f"kernel: expected 1 times '{old}', got "):
            with Mutant("kernel", old, "c", "values", times).planted(tmp_path):
                pass
    assert (tmp_path / "kernel").read_text() == "a b a"


def test_marks_of_the_representative_fault_and_of_the_others():
    one, other = Mutant("kernel", "a", "b", "values", representative=True), Mutant("kernel", "b", "c", "values")
    first, second = parameters({"one fault": one, "other": other}, others=pytest.mark.evidence)
    assert (first.values, first.id, first.marks) == (("one fault",), "one-fault", ())
    assert [mark.name for mark in second.marks] == ["evidence"]
    with pytest.raises(ValueError, match="expected a representative one, got none among other"):
        parameters({"other": other})
