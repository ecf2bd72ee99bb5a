"""Fashion-MNIST and deterministic batches; an error names every malformed input."""

import gzip
import struct

import numpy as np
import pytest
import torch

from tests.helpers.training import idx_bytes, write_fashion_mnist
from var.data import fashion_mnist
from var.data.datasets import (
    DataError,
    FashionMNIST,
    batch_indices,
    default_held_out,
    find_fashion_mnist,
    open_dataset,
    read_idx,
    split_indices,
    step_generator,
    to_uint8,
    to_unit_range,
)

# ------------------------------------------------------------------------------------------------------------- IDX


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_round_trip(tmp_path, compressed):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    data = idx_bytes(array)
    path = tmp_path / "a-ubyte"  # recognised by its content, since the name does not tell that it is gzip
    path.write_bytes(gzip.compress(data) if compressed else data)
    np.testing.assert_array_equal(read_idx(path), array)


def test_idx_elements_are_big_endian(tmp_path):
    path = tmp_path / "ints"
    path.write_bytes(bytes((0, 0, 0x0C, 1)) + struct.pack(">I2i", 2, 1, -70_000))
    values = read_idx(path)
    assert values.tolist() == [1, -70_000] and values.dtype == np.int32


GOOD = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG" + bytes(20), "expected a magic number like 0x00000803, got 0x89504e47"),
        (b"\0\0\x08\0", "not an IDX file"),  # rank 0
        (b"\0\0\x77\x01" + bytes(8), "not an IDX file"),  # unknown element type
        (GOOD[:7], "truncated IDX header: expected 12 bytes, got 7"),
        (GOOD[:-1], "truncated IDX file: expected 6 data bytes for shape .2, 3., got 5"),
        (GOOD + b"!", "oversized IDX file"),
        (gzip.compress(GOOD)[:-9], "truncated or corrupt gzip"),
        (b"\x1f\x8b" + bytes(30), "truncated or corrupt gzip"),
    ],
    # The content is no name for a test, because a gzip header contains the time.
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_malformed_idx_is_named(tmp_path, content, message):
    path = tmp_path / "bad-idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_huge_promised_shape_is_refused_without_allocating(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *(2**32 - 1,) * 3))
    with pytest.raises(DataError, match="truncated IDX file"):
        read_idx(path)


# --------------------------------------------------------------------------------------------------- Fashion-MNIST


def test_fashion_mnist_is_padded_with_background(tmp_path):
    write_fashion_mnist(tmp_path)
    data = FashionMNIST(tmp_path)
    images, labels = data.batch(torch.tensor([0, 11]))
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == [0, 1] and labels.dtype == torch.int64
    border = images.clone()
    border[:, :, 2:30, 2:30] = -1
    assert (border == -1).all()
    original = torch.from_numpy(read_idx(tmp_path / "train-images-idx3-ubyte.gz")[11])
    for channel in images[1, :, 2:30, 2:30]:
        torch.testing.assert_close(channel, original / 127.5 - 1)


@pytest.mark.parametrize("below", ["", "usr/share/datasets/fashion-mnist", "fashion-mnist"])
def test_fashion_mnist_is_found_below_a_directory(tmp_path, below):
    write_fashion_mnist(tmp_path / below, compressed=below == "")
    assert find_fashion_mnist(tmp_path) == tmp_path / below
    assert len(open_dataset(tmp_path)) == 40
    assert len(open_dataset(tmp_path, "test")) == 12


def test_fashion_mnist_search_order_and_help(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_IDX_SEARCH_PATH", (tmp_path / "debian", tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        open_dataset()
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "pass DIR as the data folder" in message and "\n" not in message
    write_fashion_mnist(tmp_path / "cache")
    assert find_fashion_mnist() == tmp_path / "cache"
    write_fashion_mnist(tmp_path / "debian")
    assert find_fashion_mnist() == tmp_path / "debian"
    with pytest.raises(DataError, match=f"below {tmp_path / 'elsewhere'}"):
        find_fashion_mnist(tmp_path / "elsewhere")


def test_inconsistent_fashion_mnist(tmp_path):
    write_fashion_mnist(tmp_path, compressed=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(39, np.uint8)))
    with pytest.raises(DataError, match="40 images but 39 labels"):
        FashionMNIST(tmp_path)
    labels.write_bytes(idx_bytes(np.full(40, 10, np.uint8)))
    with pytest.raises(DataError, match=r"labels: expected 0..9, got 10"):
        FashionMNIST(tmp_path)
    labels.write_bytes(idx_bytes(np.zeros((40, 1), np.uint8)))
    with pytest.raises(DataError, match="labels: expected uint8 of rank 1"):
        FashionMNIST(tmp_path)
    labels.unlink()
    with pytest.raises(DataError, match="missing train-labels-idx1-ubyte"):
        FashionMNIST(tmp_path)
    with pytest.raises(DataError, match="image_size: expected at least 28"):
        FashionMNIST(tmp_path, "test", 16)
    with pytest.raises(DataError, match="split: expected one of"):
        FashionMNIST(tmp_path, "validation")


# ---------------------------------------------------------------------------------------------- ranges and batches


def test_pixel_values_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(pixels)
    assert unit[0] == -1 and unit[255] == 1
    assert torch.equal(to_uint8(unit), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_every_epoch_visits_each_image_once_in_another_order():
    pool = torch.arange(100, 112)
    epochs = [torch.cat([batch_indices(pool, 4, seed=1, step=3 * e + s) for s in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, pool)
    assert not torch.equal(*epochs)
    assert not torch.equal(batch_indices(pool, 4, seed=2, step=0), epochs[0][:4])


def test_a_partial_batch_is_left_out():
    pool = torch.arange(10)
    first_epoch = torch.cat([batch_indices(pool, 4, 0, step) for step in range(2)])
    assert len(first_epoch.unique()) == 8
    assert len(batch_indices(pool, 4, 0, 2)) == 4


def test_batches_depend_on_the_step_alone():
    pool = torch.arange(50)
    assert torch.equal(batch_indices(pool, 8, 0, 1234), batch_indices(pool, 8, 0, 1234))


@pytest.mark.parametrize("batch_size", [0, 6])
def test_impossible_batch_sizes(batch_size):
    with pytest.raises(DataError, match=r"batch_size: expected 1..5"):
        batch_indices(torch.arange(5), batch_size, 0, 0)


def test_split_is_fixed_and_disjoint():
    train, held_out = split_indices(20, 5)
    assert len(held_out) == 5 and torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(20))
    assert torch.equal(split_indices(20, 5)[1], held_out)
    for name in ("held_out", "val_images"):
        with pytest.raises(DataError, match=rf"{name}: expected 0..19 of 20 images, got 20"):
            split_indices(20, 20, name)


def test_a_tenth_is_held_out_by_default():
    assert [default_held_out(count) for count in (1, 9, 10, 300, 60_000)] == [0, 0, 1, 30, 2000]
    assert [default_held_out(count, least=2) for count in (3, 300)] == [2, 30]


def test_the_fingerprint_of_fashion_mnist_is_that_of_its_pixels_and_labels(tmp_path):
    write_fashion_mnist(tmp_path / "a")
    write_fashion_mnist(tmp_path / "b", compressed=False)
    assert FashionMNIST(tmp_path / "a").fingerprint() == FashionMNIST(tmp_path / "b").fingerprint()
    assert FashionMNIST(tmp_path / "a", image_size=64).fingerprint() != FashionMNIST(tmp_path / "a").fingerprint()
    for kind in ("images-idx3", "labels-idx1"):
        write_fashion_mnist(tmp_path / "b", compressed=False)
        path = tmp_path / "b" / f"train-{kind}-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert FashionMNIST(tmp_path / "a").fingerprint() != FashionMNIST(tmp_path / "b").fingerprint(), kind


def test_step_generators_of_streams_and_steps_differ():
    draws = {float(torch.rand(1, generator=step_generator(*key))) for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))}
    assert len(draws) == 4
