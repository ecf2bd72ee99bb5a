"""The documents agree with the code: Python examples run, linked files and names exist, commands have CI's form."""

import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("**/*.md"))
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_linked_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    targets += re.findall(r'src="([^"]+)"', text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_names_of_the_packages_are_reachable(page):
    """`var_kernels.multi_scale_quantize.phi_index` was documented, but `multi_scale_quantize` is a function there."""
    names = re.findall(r"`((?:var|var_kernels)(?:\.\w+)+)[`(]", (ROOT / page).read_text(encoding="utf-8"))
    assert not [name for name in dict.fromkeys(names) if not reachable(name)]


def reachable(name):
    """Whether each part of `name` is an attribute or a submodule of the object that the parts before it name."""
    root, *parts = name.split(".")
    found = importlib.import_module(root)
    for part in parts:
        if not hasattr(found, part) and isinstance(found, types.ModuleType):
            submodule = f"{found.__name__}.{part}"
            if importlib.util.find_spec(submodule) is None:
                return False
            importlib.import_module(submodule)
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_the_first_two_commands_are_single_lines():
    commands = re.findall(r"^```bash\n(.*?)\n```$", README, re.M | re.S)[:2]
    assert len(commands) == 2 and not any("\n" in command for command in commands)
    assert "var demo" in commands[0] and "pytest" in commands[1]
