"""Two processes that write to the same place: the second stops with one line, and a killed one blocks nobody."""

import signal
import subprocess
import sys

import pytest

from tests.helpers.checkout import ROOT, environment
from tests.helpers.cli import REFERENCE, files_below, invoke, refused, run, save_model
from tests.helpers.training import write_image_folder
from var_kernels import _only_writer
from var_kernels._only_writer import only_writer
from var_kernels.measured import device_file

HOLD = """
import sys
from pathlib import Path
from var_kernels._only_writer import only_writer
with only_writer(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that writes to `path`."""

    def __init__(self, path, kind):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), kind], cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.communicate(timeout=60)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("name", "kind"), [("set.npz", "file"), ("images", "folder"), ("sheet.png", "file")])
def test_two_writers_do_not_mix_their_images(model, tmp_path, name, kind):
    arguments = ("generate", "-m", model, *REFERENCE, "-l", "0", "-o", tmp_path / name)
    with Holder(tmp_path / name, kind) as other:
        message = refused(*arguments)
        assert f"--output: cannot write {tmp_path / name}: another process is writing to it" in message
        other.kill()
        assert len(files_below(tmp_path)) == 1  # the file of the lock, which now locks nobody out
        run(*arguments)
    assert not [file for file in files_below(tmp_path) if "lock" in file]
    run(*arguments)


def test_another_output_in_the_same_folder_is_no_conflict(model, tmp_path):
    with only_writer(tmp_path / "a.npz"), only_writer(tmp_path / "b.npz"), only_writer(tmp_path, folder=True):
        run("generate", "-m", model, *REFERENCE, "-l", "0", "-o", tmp_path / "c.npz")
        assert "another process" in refused("demo", "-m", model, *REFERENCE, "-o", tmp_path)
    assert files_below(tmp_path) == ["c.npz"]


def test_two_trainings_do_not_share_a_run_folder(model, tmp_path):
    write_image_folder(tmp_path / "data", {"cats": 8, "dogs": 8})
    common = (*REFERENCE, "-d", tmp_path / "data", "--max-steps", 1, "-o", tmp_path / "run")
    with Holder(tmp_path / "run", "folder"):
        for command in (("train-tokenizer",), ("train-tokenizer", "--resume"), ("train", "-t", model)):
            message = refused(*command, *common)
            assert f"--output: another process is writing to {tmp_path / 'run'}" in message
        assert files_below(tmp_path / "run") == [".lock"]
        assert "another process" in refused("generate", "-m", model, *REFERENCE, "-l", "0", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_lock_is_given_back_after_an_error_and_an_interruption(model, tmp_path, monkeypatch):
    for error in (ValueError("labels: wrong"), KeyboardInterrupt()):
        with monkeypatch.context() as patches:
            patches.setattr("var.cli.images._write_images", _raising(error))
            assert invoke("generate", "-m", model, *REFERENCE, "-l", "0", "-o", tmp_path / "a.npz").exit_code != 0
    assert files_below(tmp_path) == []
    run("generate", "-m", model, *REFERENCE, "-l", "0", "-o", tmp_path / "a.npz")


def _raising(error):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


def test_a_lock_file_that_its_holder_removes_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """Between opening and locking the file, its holder may remove it and end. Then a new file is locked."""
    import filelock

    acquire, removed = filelock.FileLock.acquire, []

    def slowly(self, *arguments, **options):
        proxy = acquire(self, *arguments, **options)
        if not removed:
            removed.append((tmp_path / ".a.lock").unlink())
        return proxy

    monkeypatch.setattr(filelock.FileLock, "acquire", slowly)
    with only_writer(tmp_path / "a"):
        assert removed and (tmp_path / ".a.lock").exists()
        with pytest.raises(BlockingIOError, match="another process"), only_writer(tmp_path / "a"):
            pass
    assert files_below(tmp_path) == []


def test_a_file_system_without_locks_is_written_without_one(tmp_path, monkeypatch):
    import filelock

    monkeypatch.setattr(filelock.FileLock, "acquire", _raising(NotImplementedError("no flock here")))
    with _only_writer.only_writer(tmp_path / "a"):
        (tmp_path / "a").touch()
    assert files_below(tmp_path) == ["a"]


def test_a_folder_where_nothing_can_be_made_is_not_taken_for_one_that_another_process_writes(model):
    message = refused("generate", "-m", model, *REFERENCE, "-l", "0", "-o", "/proc/set.npz")
    assert "cannot write /proc/set.npz" in message and "another process" not in message


def test_measurements_of_one_gpu_are_written_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    with device_file.only_measuring("tuned", "GPU"), device_file.only_measuring("backends", "GPU"):
        with pytest.raises(BlockingIOError), device_file.only_measuring("tuned", "GPU"):
            pass
    assert files_below(tmp_path) == []
