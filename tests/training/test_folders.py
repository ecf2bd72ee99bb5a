"""Folders of images: which files are read and in which order, broken images, processes, what the files are."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tests.helpers.training import write_fashion_mnist, write_image_folder
from var.data import FashionMNIST
from var.data.datasets import DataError, ImageFolder, open_dataset, step_generator
from var.data.folders import natural_key


def test_folder_classes_are_sorted_and_nested_files_found(tmp_path):
    write_image_folder(tmp_path, {"zebra": 2, "ant": 3})
    (tmp_path / "ant" / "more").mkdir()
    Image.new("L", (9, 9), 128).save(tmp_path / "ant" / "more" / "grey.JPG", format="jpeg")
    (tmp_path / "ant" / "notes.txt").write_text("not an image, by its name")
    data = ImageFolder(tmp_path, 8)
    assert data.class_names == ("ant", "zebra")
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    images, labels = data.batch(torch.arange(6))
    assert images.shape == (6, 3, 8, 8) and labels.tolist() == data.labels.tolist()
    assert images.min() >= -1 and images.max() <= 1


def test_folder_centre_crop_keeps_the_middle(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255  # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "a" / "high.png")
    images, _ = ImageFolder(tmp_path, 10).batch(torch.arange(2))
    torch.testing.assert_close(images, torch.ones(2, 3, 10, 10))


def test_folder_augmentation_is_reproducible_and_off_without_a_generator(tmp_path):
    write_image_folder(tmp_path, {"a": 8}, size=(40, 32))
    data = ImageFolder(tmp_path, 16, random_crop=True, flip=True)
    everything = torch.arange(8)
    first, second, other = (data.batch(everything, step_generator(0, step))[0] for step in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(data.batch(everything)[0], data.batch(everything)[0])
    uncached = ImageFolder(tmp_path, 16, random_crop=True, flip=True, cache_bytes=0)
    assert torch.equal(uncached.batch(everything, step_generator(0, 3))[0], first)


def test_folder_flip_mirrors_whole_images(tmp_path):
    write_image_folder(tmp_path, {"a": 16}, size=(8, 8))
    plain = ImageFolder(tmp_path, 8).batch(torch.arange(16))[0]
    flipped = ImageFolder(tmp_path, 8, flip=True).batch(torch.arange(16), step_generator(0, 0))[0]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert any(mirrored) and any(same) and all(m != s for m, s in zip(mirrored, same, strict=True))


def test_folder_converts_transparency_and_16_bit_grey(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a" / "1.png")  # transparent: it becomes white
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "a" / "2.png")
    images, _ = ImageFolder(tmp_path, 8).batch(torch.arange(2))
    assert (images[0] == 1).all()
    torch.testing.assert_close(images[1], torch.full((3, 8, 8), 0x80 / 127.5 - 1))


def test_no_indices_are_an_empty_batch(tmp_path):
    write_image_folder(tmp_path, {"a": 2})
    images, labels = ImageFolder(tmp_path, 8).batch(torch.tensor([], dtype=torch.int64))
    assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)


def test_broken_images_are_named(tmp_path):
    write_image_folder(tmp_path, {"a": 2, "b": 1}, size=(64, 64))
    broken = tmp_path / "a" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image") as caught:
        ImageFolder(tmp_path, 8)
    assert str(broken) in str(caught.value)
    broken.write_bytes(whole[: len(whole) // 2])  # the header is fine, the pixels are cut short
    data = ImageFolder(tmp_path, 8)
    data.batch(torch.tensor([1, 2]))
    with pytest.raises(DataError, match="not a readable image") as caught:
        data.batch(torch.tensor([0]))
    assert str(broken) in str(caught.value)


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    write_image_folder(tmp_path, {"a": 1}, size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="0.png: not a readable image: .*decompression bomb"):
        ImageFolder(tmp_path, 8)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a directory"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="no class directories"):
        open_dataset(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no images of class a"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(DataError, match="not a directory"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="image_size: expected a positive"):
        ImageFolder(tmp_path, 0)


def test_folder_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        write_image_folder(tmp_path / split, {"a": count})
    assert len(open_dataset(tmp_path, "train", 8)) == 3
    assert len(open_dataset(tmp_path, "test", 8)) == 2
    assert len(open_dataset(tmp_path / "val", "train", 8)) == 2


# ------------------------------------------------------------------------------------------- which files, which order


def test_numbered_classes_are_in_natural_order(tmp_path):
    write_image_folder(tmp_path, {str(label): 1 for label in range(12)})
    assert ImageFolder(tmp_path, 8).class_names == tuple(str(label) for label in range(12))


@pytest.mark.parametrize(
    "names",
    [
        ["2", "10"], ["class 2", "class 10", "class 10b"], ["1", "01", "a1", "a01b", "a2"], ["n01440764", "n15075141"],
        ["A", "B", "a"], ["", "1a", "a1"], ["v1.2", "v1.10", "v2.0"], ["-1", "-2"], ["\u0663", "4"],
    ],
)  # fmt: skip
def test_natural_order_of_names(names):
    expected = sorted(names, key=natural_key)
    assert sorted(reversed(names), key=natural_key) == expected
    assert expected == names or names[0] == "1"  # "01" and "1" are equal as numbers


def test_files_of_every_kind_that_pillow_reads_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    formats = {".jfif": "jpeg", ".jpe": "jpeg", ".JPG": "jpeg", ".apng": "png", ".pbm": "ppm", ".tga": "tga",
               ".dib": "dib", ".webp": "webp", ".avif": "avif"}  # fmt: skip
    readable = set(Image.registered_extensions())
    for suffix, name in formats.items():
        if suffix.lower() in readable:
            Image.new("1" if suffix == ".pbm" else "RGB", (9, 9)).save(tmp_path / "a" / f"1{suffix}", format=name)
    data = ImageFolder(tmp_path, 8)
    assert {path.suffix for path in data.paths} == {suffix for suffix in formats if suffix.lower() in readable}
    assert data.batch(torch.arange(len(data)))[0].max() == -1 and data.remarks() == []


def test_what_systems_leave_behind_is_left_out_and_counted(tmp_path):
    write_image_folder(tmp_path, {"cats": 3, "dogs": 2})
    image = (tmp_path / "cats" / "0.png").read_bytes()
    for name in ("__MACOSX/cats/._0.png", ".hidden/0.png", "cats/._0.png", "cats/.thumbs/0.png", "cats/@eaDir/0.png",
                 "dogs/.DS_Store", "dogs/Thumbs.db", "dogs/README", "dogs/more/notes.txt", "dogs/x.heic", ".DS_Store",
                 "labels.csv", "loose.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "dogs" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "dogs" / "loop").symlink_to(tmp_path / "dogs")
    os.mkfifo(tmp_path / "dogs" / "pipe.png")
    data = ImageFolder(tmp_path, 8)
    assert data.class_names == ("cats", "dogs") and len(data) == 5
    (remark,) = data.remarks()
    assert remark.startswith(f"{tmp_path}; left out: ")
    for part in ("5 hidden", "1 __MACOSX", "1 @eaDir", "1 .db", "1 without suffix", "1 .txt", "1 .heic",
                 "2 outside of the class folders", "2 broken links or devices", "1 linked folders"):  # fmt: skip
        assert part in remark, (part, remark)


def test_a_class_of_unreadable_kinds_says_what_was_there(tmp_path):
    write_image_folder(tmp_path, {"cats": 1})
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "1.heic").write_bytes(b"")
    with pytest.raises(DataError, match="no images of class dogs: .*; left out: 1 .heic"):
        ImageFolder(tmp_path, 8)


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    write_image_folder(tmp_path, {"cats": 1})
    closed = tmp_path / "cats" / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(DataError, match=f"{closed}: cannot be read"):
        ImageFolder(tmp_path, 8)
    closed.chmod(0o700)


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_names_of_the_second_split(tmp_path, name):
    write_image_folder(tmp_path / "train", {"a": 3})
    write_image_folder(tmp_path / name, {"a": 2})
    assert [len(open_dataset(tmp_path, split, 8)) for split in ("train", "test")] == [3, 2]
    with pytest.raises(DataError, match="split: expected one of"):
        open_dataset(tmp_path, "validate", 8)


# ----------------------------------------------------------------------------------------------------- broken images


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def test_a_skipped_image_is_replaced_by_the_next_one_of_its_class(tmp_path):
    write_image_folder(tmp_path, {"a": 3, "b": 3}, size=(64, 64))
    whole = ImageFolder(tmp_path, 8).batch(torch.arange(6))[0]
    truncate(tmp_path / "a" / "0.png")
    truncate(tmp_path / "a" / "2.png")
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    data = ImageFolder(tmp_path, 8, skip_broken=True)
    assert len(data) == 6 and list(data.broken) == [4]
    images, labels = data.batch(torch.arange(6))
    assert torch.equal(images, whole[[1, 1, 1, 3, 5, 5]]) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(data.broken) == [0, 2, 4] and "truncated" in data.broken[0]
    (remark,) = data.remarks()
    assert "3 broken of 6 images" in remark
    for index in data.broken:
        assert str(data.paths[index]) in remark


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_what_replaces_an_image_does_not_depend_on_the_order_of_the_batches(tmp_path, order, cache_bytes):
    write_image_folder(tmp_path, {"a": 4}, size=(64, 64))
    truncate(tmp_path / "a" / "1.png")
    truncate(tmp_path / "a" / "2.png")
    options = {"random_crop": True, "flip": True, "skip_broken": True}
    expected = ImageFolder(tmp_path, 8, **options)
    data = ImageFolder(tmp_path, 8, **options, cache_bytes=cache_bytes)
    for index in order:
        pair = [data_.batch(torch.tensor([index]), step_generator(0, index))[0] for data_ in (expected, data)]
        assert torch.equal(*pair)
        expected = ImageFolder(tmp_path, 8, **options)


def test_a_class_of_broken_images_is_an_error(tmp_path):
    write_image_folder(tmp_path, {"a": 2, "b": 2}, size=(64, 64))
    truncate(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    data = ImageFolder(tmp_path, 8, skip_broken=True)
    with pytest.raises(DataError, match="no readable image of class a"):
        data.batch(torch.tensor([1]))


# -------------------------------------------------------------------------------------------------- other processes


class Items(Dataset):
    """Single images of a data set, as the workers of a DataLoader want them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        images, labels = self.data.batch(torch.tensor([index, (index + 1) % len(self)]))
        return images, labels


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["folder", "fashion"])
def test_workers_of_a_data_loader_neither_hang_nor_fail_to_start(tmp_path, monkeypatch, kind, start):
    if kind == "folder":
        monkeypatch.setattr(os, "cpu_count", lambda: 4)  # with threads also on a machine with one processor
        write_image_folder(tmp_path, {"a": 3, "b": 3})
        data = ImageFolder(tmp_path, 8)
    else:
        write_fashion_mnist(tmp_path, train=6)
        data = FashionMNIST(tmp_path)
    expected = data.batch(torch.arange(6))[0]  # before the fork the threads have been at work
    loader = DataLoader(Items(data), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for index, (images, labels) in enumerate(loader):
        assert torch.equal(images[0], expected[index]) and labels[0] == data.labels[index]


def test_a_copy_for_another_process_is_small(tmp_path):
    write_image_folder(tmp_path, {"a": 4}, size=(300, 300))
    data = ImageFolder(tmp_path, 256, random_crop=True)
    expected = data.batch(torch.arange(4), step_generator(0, 0))[0]
    content = pickle.dumps(data)
    assert len(content) < 10_000
    assert torch.equal(pickle.loads(content).batch(torch.arange(4), step_generator(0, 0))[0], expected)
    with pytest.raises(DataError, match="truncated"):
        raise pickle.loads(pickle.dumps(DataError("truncated")))


# ------------------------------------------------------------------------------------------------ what the files are


def touch(path, nanoseconds):
    os.utime(path, ns=(nanoseconds, nanoseconds))


@pytest.mark.parametrize("same_time", [False, True])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_replaced_images_are_other_images(tmp_path, suffix, same_time):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / f"1.{suffix}"
    Image.new("RGB", (64, 64), "red").save(path)
    touch(path, 10**18)
    data = ImageFolder(tmp_path, 8)
    before, pixels = data.fingerprint(), data.batch(torch.tensor([0]))[0]
    assert ImageFolder(tmp_path, 8).fingerprint() == data.fingerprint() == before
    Image.new("RGB", (64, 64), "blue").save(path)
    touch(path, 10**18 if same_time else 10**18 + 1)
    assert ImageFolder(tmp_path, 8).fingerprint() != before
    assert data.fingerprint() != before  # and it forgets the images in memory
    assert not torch.equal(data.batch(torch.tensor([0]))[0], pixels)


def test_a_change_within_a_large_file_shows_in_its_time(tmp_path):
    write_image_folder(tmp_path, {"a": 1}, size=(200, 200))
    path = tmp_path / "a" / "0.png"
    touch(path, 10**18)
    before = ImageFolder(tmp_path, 8).fingerprint()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert ImageFolder(tmp_path, 8).fingerprint() != before


def test_a_moved_folder_has_the_same_images(tmp_path):
    write_image_folder(tmp_path / "here", {"a": 2, "b": 1})
    before = ImageFolder(tmp_path / "here", 8).fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    assert ImageFolder(tmp_path / "there", 8).fingerprint() == before
    (tmp_path / "there" / "b").rename(tmp_path / "there" / "c")
    assert ImageFolder(tmp_path / "there", 8).fingerprint() != before
