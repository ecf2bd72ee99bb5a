"""Which pixels of an image file `python -m var reconstruct` uses."""

import numpy as np
import pytest
import torch
from PIL import Image

from var.cli.reconstruct import read_image
from var.data.interface import DataError


def test_a_photograph_of_a_turned_camera_is_reconstructed_upright(tmp_path, capsys):
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[16:32] = 255  # the upper half of the centre
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "a.jpg", 32).image
    assert "32×64 pixels, cropped to its central 32×32" in " ".join(capsys.readouterr().err.split())
    assert image[:, :15].min() > 0.9 and image[:, 17:].max() < -0.9


def test_sixteen_bit_grey_is_not_white(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + np.full((8, 8), 0x4000, ">u2").tobytes())
    torch.testing.assert_close(read_image(tmp_path / "a.pgm", 8).image, torch.full((3, 8, 8), 64 / 127.5 - 1))


def test_a_large_jpeg_is_described_by_its_own_size(tmp_path, capsys):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg", 32).image.shape == (3, 32, 32)
    assert "640×480 pixels, resized to 43×32 and cropped" in " ".join(capsys.readouterr().err.split())


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: not a readable image: pixels of mode F in a TIFF file"):
        read_image(tmp_path / "a.tif", 8)
