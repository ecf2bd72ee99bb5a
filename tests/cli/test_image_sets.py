"""Sets of generated images on disk: after a stop, finished images stay, and the same command makes the others."""

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

import var
from tests.helpers.cli import REFERENCE, files_below, invoke, refused, run, save_model
from var.cli import image_sets, images
from var.data import pictures
from var.generation import batches, memory
from var.generation.generator import Generator

COUNT = 10
ARGUMENTS = (*REFERENCE, "-l", "all", "--seed", 3, "--batch-size", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder and a .npz of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("images", "set.npz"):
        run("generate", "-m", model, *ARGUMENTS, "-o", folder / name)
    return folder


def stop_after(monkeypatch, calls, error):
    """Makes a Generator raise `error` after `calls` batches; the returned list receives the size of each batch."""
    original, sizes = Generator.__call__, []

    def call(self, labels, **options):
        if len(sizes) == calls:
            raise error
        sizes.append(len(labels))
        return original(self, labels, **options)

    monkeypatch.setattr(Generator, "__call__", call)
    return sizes


def assert_same_files(folder, whole):
    names = files_below(whole)
    assert files_below(folder) == names
    for name in names:
        with Image.open(folder / name) as one, Image.open(whole / name) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
            assert one.info["Description"] == other.info["Description"]


def assert_same_arrays(file, whole):
    with np.load(file) as one, np.load(whole) as other:
        assert list(one) == list(other) == ["arr_0", "labels", "tokens"]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=repr)
@pytest.mark.parametrize("done", [1, 3])
@pytest.mark.parametrize("kind", ["images", "set.npz"])
def test_the_same_command_continues_a_stopped_run(model, whole, tmp_path, monkeypatch, kind, done, error):
    output = tmp_path / kind
    with monkeypatch.context() as patches:
        stop_after(patches, done, error)
        result = invoke("generate", "-m", model, *ARGUMENTS, "-o", output)
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert f"{2 * done} of {COUNT} images are finished and kept; the same command goes on" in result.stderr
    assert not (tmp_path / "set.npz").exists()
    with monkeypatch.context() as patches:
        sizes = stop_after(patches, -1, None)
        result = invoke("generate", "-m", model, *ARGUMENTS, "-o", output)
    assert result.exit_code == 0 and f"{2 * done} of {COUNT} images are there from an earlier run" in result.stderr
    assert sum(sizes) == COUNT - 2 * done, "no image is generated twice"
    if kind == "images":
        assert_same_files(output, whole / kind)
    else:
        assert_same_arrays(output, whole / kind)
        assert files_below(tmp_path) == ["set.npz"]


def test_a_finished_set_is_not_generated_again(model, whole, monkeypatch):
    sizes = stop_after(monkeypatch, -1, None)
    result = invoke("generate", "-m", model, *ARGUMENTS, "-o", whole / "images")
    assert result.exit_code == 0 and not sizes and f"{COUNT} of {COUNT} images are there" in result.stderr


def test_a_missing_and_a_damaged_image_are_generated_again(model, whole, tmp_path):
    folder = tmp_path / "images"
    run("generate", "-m", model, *ARGUMENTS, "-o", folder)
    names = files_below(folder)
    (folder / names[4]).unlink()
    (folder / names[7]).write_bytes((folder / names[7]).read_bytes()[:40])  # as after a crash of the machine
    run("generate", "-m", model, *ARGUMENTS, "-o", folder)
    assert_same_files(folder, whole / "images")


@pytest.mark.parametrize("change", [("--seed", 4), ("--cfg", 0.5), ("--precision", "bf16")], ids=str)
@pytest.mark.parametrize("kind", ["images", "set.npz"])
def test_images_of_another_request_are_not_reused(model, tmp_path, monkeypatch, kind, change):
    with monkeypatch.context() as patches:
        stop_after(patches, 2, KeyboardInterrupt())
        invoke("generate", "-m", model, *ARGUMENTS, "-o", tmp_path / kind)
    sizes = stop_after(monkeypatch, -1, None)
    run("generate", "-m", model, *ARGUMENTS, *change, "-o", tmp_path / kind)
    assert sum(sizes) == COUNT


def test_images_of_another_class_with_the_same_name_are_not_reused(model, tmp_path, monkeypatch):
    pipeline = var.load(path=model)
    names = tuple("crane" if label in (3, 7) else name for label, name in enumerate(pipeline.class_names))
    same = tmp_path / "model"
    pipeline.var.config = dataclasses.replace(pipeline.var.config, class_names=names)
    var.save(same / "var.safetensors", pipeline.var)
    var.save(same / "vqvae.safetensors", pipeline.vqvae)
    run("generate", "-m", same, *REFERENCE, "-l", 3, "-o", tmp_path / "images")
    sizes = stop_after(monkeypatch, -1, None)
    run("generate", "-m", same, *REFERENCE, "-l", 7, "-o", tmp_path / "images")
    assert sizes == [1] and files_below(tmp_path / "images") == ["000-crane.png"]


def test_images_of_other_weights_are_not_reused(model, tmp_path, monkeypatch):
    run("generate", "-m", model, *ARGUMENTS, "-o", tmp_path / "images")
    monkeypatch.setattr(images, "_fingerprint", lambda pipeline: "00000000")
    sizes = stop_after(monkeypatch, -1, None)
    run("generate", "-m", model, *ARGUMENTS, "-o", tmp_path / "images")
    assert sum(sizes) == COUNT


def test_an_incomplete_record_is_generated_again(model, whole, tmp_path, monkeypatch):
    output, partial = tmp_path / "set.npz", tmp_path / "set.npz.partial"
    with monkeypatch.context() as patches:
        stop_after(patches, 2, KeyboardInterrupt())
        invoke("generate", "-m", model, *ARGUMENTS, "-o", output)
    partial.write_bytes(partial.read_bytes()[:-100])
    assert "3 of 10 images are there" in invoke("generate", "-m", model, *ARGUMENTS, "-o", output).stderr
    assert_same_arrays(output, whole / "set.npz")


def test_the_batch_size_changes_no_image(model, whole, tmp_path):
    for size in (1, 7):
        run("generate", "-m", model, *ARGUMENTS, "--batch-size", size, "-o", tmp_path / f"{size}.npz")
        with np.load(tmp_path / f"{size}.npz") as one, np.load(whole / "set.npz") as other:
            np.testing.assert_array_equal(one["tokens"], other["tokens"])
            difference = one["arr_0"].astype(int) - other["arr_0"]
            assert np.abs(difference).max() <= 1, "another algorithm of a convolution may differ by a rounding"


def test_a_full_disk_in_the_middle_of_an_image_leaves_no_half_file(model, tmp_path, monkeypatch):
    written, original = [], pictures.write_png

    def write(path, picture, description=""):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)
        return original(path, picture, description)

    monkeypatch.setattr(image_sets, "write_png", write)
    message = invoke("generate", "-m", model, *ARGUMENTS, "-o", tmp_path / "images").stderr
    assert "3 of 10 images are finished and kept" in message and "No space left on device" in message
    assert files_below(tmp_path / "images") == written


def test_a_batch_that_does_not_fit_is_refused_with_advice(model, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 30 << 20)
    message = refused("generate", "-m", model, *REFERENCE, "-l", "0*2000", "--batch-size", 2000, "-o", tmp_path / "x")
    assert "--batch-size: expected a batch of at most" in message and "GiB are free" in message
    assert not files_below(tmp_path)


def test_the_seed_of_an_image_depends_on_the_request_and_its_index():
    seeds = batches.image_seeds(2**32 - 1, [0, 1, 2**32 - 1]) + batches.image_seeds(0, range(3))
    assert len(set(seeds)) == 6 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert torch.tensor(seeds).dtype == torch.int64
