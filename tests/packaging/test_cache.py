"""The directory for compiled libraries: users without a home, and directories that other users can write to."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.checkout import LOAD, ROOT, Checkout, environment, needs_compiler
from var_kernels.native import cache

# What Python finds for a user id that has no entry in the list of users, as with `docker run -u 12345`.
UNKNOWN_USER = """
import os, pwd
def unknown(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = unknown
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "VAR_KERNELS_CACHE"):
    os.environ.pop(name, None)
"""
needs_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files to other users")


@pytest.fixture
def tiny(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def temporary(tmp_path):
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def own(temporary):
    return temporary / f"var_kernels-{os.getuid()}"


def load_as_unknown_user(tiny, temporary, **changes):
    return tiny.answer(tiny.start("-c", UNKNOWN_USER + LOAD, TMPDIR=str(temporary), **changes))


@needs_compiler
def test_a_user_without_a_home_builds_in_a_temporary_directory_of_its_own(tiny, temporary):
    answers = [load_as_unknown_user(tiny, temporary) for _ in range(2)]
    assert answers[0]["origin"].startswith("built on first use") and answers[1]["origin"] == "cached"
    assert not answers[0]["warnings"] and Path(answers[0]["path"]).is_relative_to(own(temporary))
    assert stat.S_IMODE(own(temporary).stat().st_mode) == 0o700


def test_a_user_without_a_home_and_a_compiler_gets_one_warning(tiny, temporary, no_compiler):
    answer = load_as_unknown_user(tiny, temporary, PATH=no_compiler, CXX="")
    assert not answer["available"] and "no C++ compiler found" in answer["reason"] and len(answer["warnings"]) == 1


def test_a_machine_without_any_directory_to_write_to_gets_one_warning(tiny, temporary):
    code = "import tempfile\ntempfile._candidate_tempdir_list = lambda: []\n"
    answer = tiny.answer(tiny.start("-c", UNKNOWN_USER + code + LOAD))
    assert not answer["available"] and "set VAR_KERNELS_CACHE" in answer["reason"] and len(answer["warnings"]) == 1


def test_a_cache_in_a_home_that_is_unknown_gets_one_warning(tiny, temporary):
    code = "os.environ['VAR_KERNELS_CACHE'] = '~/cache'\n"
    answer = tiny.answer(tiny.start("-c", UNKNOWN_USER + code + LOAD))
    assert not answer["available"] and "'~/cache', and there is no such home" in answer["reason"]
    assert len(answer["warnings"]) == 1 and not list(tiny.root.parent.rglob("~"))


@needs_compiler
def test_a_library_in_a_cache_that_cannot_be_written_is_still_loaded(tiny, temporary):
    """And if it is outdated, the new one is built in the temporary directory."""
    home = tiny.root.parent / "home"
    where = {"HOME": str(home), "XDG_CACHE_HOME": "", "VAR_KERNELS_CACHE": "", "TMPDIR": str(temporary)}
    assert Path(tiny.load(**where)["path"]).is_relative_to(home / ".cache/var_kernels")
    code = "import os\nos.access = lambda path, mode: not str(path).startswith(os.environ['HOME'])\n"
    assert tiny.answer(tiny.start("-c", code + LOAD, **where))["origin"] == "cached"
    tiny.edit(2)
    answer = tiny.answer(tiny.start("-c", code + LOAD, **where))
    assert answer["value"] == 2 and Path(answer["path"]).is_relative_to(own(temporary))


@needs_compiler
@pytest.mark.parametrize("shared", ["root", "directory", "library"])
def test_a_library_that_others_can_replace_is_not_loaded(tiny, shared):
    library = Path(tiny.load()["path"])
    path = {"root": tiny.cache, "directory": library.parent, "library": library}[shared]
    path.chmod(0o777)
    answer = tiny.load()
    assert not answer["available"] and len(answer["warnings"]) == 1
    assert f"other users can write to {path}" in answer["reason"]
    path.chmod(0o755)
    assert tiny.load()["origin"] == "cached"


@needs_compiler
@needs_root
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_a_temporary_directory_that_somebody_else_has_made_is_not_used(tiny, temporary, kind):
    place = own(temporary)
    if kind == "directory":
        place.mkdir(mode=0o755)
    else:
        (temporary / "elsewhere").mkdir(mode=0o755)
        place.symlink_to(temporary / "elsewhere")
    os.chown(place, 12345, 12345, follow_symlinks=False)
    answer = load_as_unknown_user(tiny, temporary)
    assert not answer["available"] and f"other users can write to {place}" in answer["reason"]
    assert len(answer["warnings"]) == 1


@pytest.mark.parametrize(
    ("mode", "refused"), [(0o700, False), (0o755, False), (0o757, True), (0o777, True), (0o1777, False)], ids=str
)
def test_modes_of_a_directory_for_code(tmp_path, mode, refused):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    if refused:
        with pytest.raises(PermissionError, match="other users can write"):
            cache.private_directory(tmp_path / "cache")
    else:
        assert cache.private_directory(tmp_path / "cache") == tmp_path / "cache"


@needs_root
@pytest.mark.parametrize(("group", "refused"), [(0, False), (100, True)])
def test_a_group_that_may_write_counts_unless_it_is_the_users_own(tmp_path, group, refused):
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 0, group)
    (tmp_path / "cache").chmod(0o775)
    if refused:
        with pytest.raises(PermissionError, match="other users can write"):
            cache.refuse_shared(tmp_path / "cache")
    else:
        cache.refuse_shared(tmp_path / "cache")


def test_what_is_made_for_the_cache_is_private_whatever_the_umask_is(tmp_path):
    code = f"""
        import os
        from pathlib import Path
        os.umask(0)
        os.environ["VAR_KERNELS_CACHE"] = {str(tmp_path / "cache")!r}
        from var_kernels.measured import device_file
        from var_kernels.native import cache
        device_file.replace("tuned", "GPU", {{}})
        cache.refuse_shared(cache.cache_root())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment(), check=True, timeout=120)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/var_kernels"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/caches"}, "/caches/var_kernels"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "relative"}, None),
        ({"HOME": "nowhere"}, None),
        ({"HOME": "/home/me", "VAR_KERNELS_CACHE": "~/kernels"}, "/home/me/kernels"),
    ],
)
def test_where_the_cache_is(monkeypatch, settings, expected):
    for name in ("HOME", "XDG_CACHE_HOME", "VAR_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    roots = list(map(str, cache.cache_roots()))
    assert roots[0] == (expected or roots[-1])
    if "VAR_KERNELS_CACHE" not in settings:
        assert roots[-1].endswith(f"var_kernels-{os.getuid()}")


def test_the_reference_serves_where_there_is_no_home_and_no_compiler(tmp_path, no_compiler):
    """The first op raised RuntimeError there."""
    code = """
        import warnings
        import torch, var_kernels, var_kernels.native.build as build
        build.AHEAD_OF_TIME_LIBRARY = build.PACKAGE / "nothing.so"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            var_kernels.nearest_code(torch.randn(2, 3), torch.randn(4, 3))
        assert len(caught) == 1 and "no C++ compiler found" in str(caught[0].message), caught
        import var
        from var.data import DataError, open_dataset
        from var.data import fashion_mnist
        homes = [path for path in fashion_mnist._IDX_SEARCH_PATH if str(path).startswith("~")]
        fashion_mnist._IDX_SEARCH_PATH = homes
        for path in (None, "~/data"):
            try:
                open_dataset(path)
            except DataError:
                pass
        var.load()
        for wrong in (lambda: var.load("d16", path="~/weights"), lambda: var.load(path="~/run")):
            try:
                wrong()
            except (ValueError, OSError) as error:
                print(error)
    """
    answer = subprocess.run(
        [sys.executable, "-c", UNKNOWN_USER + textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True,
        env=environment(PATH=no_compiler, CXX="", TMPDIR=str(tmp_path), HF_HUB_OFFLINE="1"), timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("command", ["'", "g++ '"])
def test_a_compiler_with_half_a_quotation_is_one_warning(tiny, command):
    answer = tiny.load(CXX=command)
    assert not answer["available"] and len(answer["warnings"]) == 1 and "No closing quotation" in answer["reason"]


@needs_compiler
def test_sources_are_read_where_text_is_ascii(tiny):
    (tiny.csrc / "tiny.h").write_text("// φ\n#define TINY_VALUE 7\n", encoding="utf-8")
    answer = tiny.load(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert answer["value"] == 7 and not answer["warnings"]
