"""What programs print where the console cannot show every character, or is not there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT, environment

C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def start(*arguments, **changes):
    """A program that has ended. What it prints goes into pipes and stays bytes."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, timeout=120,
        env=environment(VAR_KERNELS_BUILD="none", **changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def described():
    """What `python -m var info` prints in UTF-8."""
    return start("-m", "var", "info", PYTHONIOENCODING="utf-8").stdout.decode()


@pytest.mark.parametrize(
    "changes", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, C_LOCALE], ids=lambda c: next(iter(c))
)
def test_a_console_without_a_character_cuts_nothing_off(described, changes):
    assert "×" in described and "φ" in described
    answer = start("-m", "var", "info", **changes)
    assert answer.returncode == 0, answer.stderr
    printed = answer.stdout.decode("cp1252")
    assert "codebook and ?" in printed
    assert _words(printed) == _words(described)


def _words(text):
    """What is left of a table without its lines, which are others in ASCII, and without what is not in ASCII."""
    return re.findall(r"[A-Za-z0-9_.,:]+", text)


def test_an_error_with_such_a_character_is_still_one_line():
    answer = start("-m", "var", "generate", "-l", "×", PYTHONIOENCODING="ascii")
    assert answer.returncode == 2 and answer.stderr.count(b"\n") == 1 and b"got '?'" in answer.stderr


def test_a_file_name_that_is_no_text_is_printed_with_replaced_characters(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    answer = start("-m", "var", "info", "-m", folder, PYTHONIOENCODING="utf-8")
    assert answer.returncode == 2 and answer.stderr.count(b"\n") == 1 and b"Traceback" not in answer.stderr


def test_the_report_of_the_kernels_is_complete_in_ascii():
    code = """
import runpy
from var_kernels import _self_check
_self_check.run = lambda: iter(())
runpy.run_module("var_kernels", run_name="__main__")
"""
    answer = start("-c", code, PYTHONIOENCODING="ascii")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.rstrip().endswith(b"result") or b"Self-check against" in answer.stdout


def test_a_program_without_stdout_ends_without_a_traceback():
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'var', 'info'])"
    answer = start("-c", code)
    assert answer.returncode == 0 and b"Traceback" not in answer.stderr


def test_every_program_replaces_what_its_console_cannot_show():
    programs = []
    for top in ("var", "var_kernels", "tools"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                    programs.append(str(path.relative_to(ROOT)))
                    # This one needs no package, and prints paths on stderr only, which always replaces characters.
                    if path != ROOT / "tools/check_cuda_torch.py":
                        assert "replace_unprintable()" in ast.unparse(node.body[0]), path
    assert len(programs) >= 7 and str(Path("var_kernels/triton/tune.py")) in programs
