"""Decoding of image files: orientation, colours and depths of all kinds, and what cannot be known is refused."""


import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.image_files import write_png, write_tiff
from var.data import images
from var.data.folders import ImageFolder
from var.data.interface import DataError

# How a camera that is held in this orientation stores an upright picture: the inverse of what viewers do.
STORED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
ORIENTATION = 0x0112


def upright(width=96, height=64):
    """A picture of four quarters of different colours, whose sides differ."""
    picture = Image.new("RGB", (width, height), (200, 30, 30))
    picture.paste((30, 200, 30), (width // 2, 0, width, height // 2))
    picture.paste((30, 30, 200), (0, height // 2, width // 2, height))
    picture.paste((220, 220, 30), (width // 2, height // 2, width, height))
    return picture


def save_turned(path, picture, orientation, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = picture if STORED[orientation] is None else picture.transpose(STORED[orientation])
    stored.save(path, exif=exif, **options)
    return path


def pixels_of(path):
    """The decoded pixels (h, w, 3)."""
    return np.asarray(images.decode(path, 8).rgb).astype(int)


# ----------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_of_a_turned_camera_are_used_upright(tmp_path, suffix, orientation):
    path = save_turned(tmp_path / f"a.{suffix}", upright(), orientation, lossless=True, quality=95)
    picture = images.decode(path, 64)
    assert picture.size == picture.rgb.size == (96, 64)
    difference = np.abs(np.asarray(picture.rgb).astype(int) - np.asarray(upright()).astype(int))
    # JPEG blurs the borders of the quarters.
    assert np.quantile(difference, 0.9) <= 4 if suffix == "jpg" else not difference.any()


def test_a_turned_image_is_upright_in_a_batch(tmp_path):
    (tmp_path / "a").mkdir()
    save_turned(tmp_path / "a" / "1.png", upright(), 6)
    upright().save(tmp_path / "a" / "2.png")
    for options in ({}, {"random_crop": True}):
        turned, straight = ImageFolder(tmp_path, 32, **options).batch(torch.arange(2))[0]
        assert torch.equal(turned, straight)


def test_a_large_turned_jpeg_is_decoded_small(tmp_path):
    picture = images.decode(save_turned(tmp_path / "a.jpg", upright(1600, 1200), 8), 64)
    assert picture.size == (1600, 1200) and picture.rgb.size == (200, 150)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", b"\xff" * 40])
def test_malformed_metadata_do_not_spoil_the_pixels(tmp_path, exif):
    upright().save(tmp_path / "a.png", exif=exif)
    assert (pixels_of(tmp_path / "a.png") == np.asarray(upright())).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright().save(tmp_path / "a.png", exif=exif)
    assert (pixels_of(tmp_path / "a.png") == np.asarray(upright())).all()


# -------------------------------------------------------------------------------------------------- 16 bits and other

RAMP = np.array([[0, 0x1000, 0x8000, 0xFFFF]], np.uint16)
EXPECTED = [0, 16, 128, 255]


def write_pgm(path, values, largest, plain=False):
    text = f"{'P2' if plain else 'P5'}\n{values.shape[1]} {values.shape[0]}\n{largest}\n"
    body = " ".join(map(str, values.reshape(-1))) if plain else ""
    raw = b"" if plain else values.astype(">u2" if largest > 255 else np.uint8).tobytes()
    path.write_bytes(text.encode() + body.encode() + raw)
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_pgm(folder / "a.pgm", RAMP, 65535),
        lambda folder: write_pgm(folder / "a.pgm", RAMP, 65535, plain=True),
        lambda folder: write_pgm(folder / "a.pgm", RAMP // 16, 4095),
        lambda folder: write_pgm(folder / "a.pgm", (RAMP / 65535 * 100).round().astype(np.uint16), 100),
        lambda folder: write_png(folder / "a.png", RAMP),
        lambda folder: write_tiff(folder / "a.tif", 4, 1, RAMP.astype("<u2").tobytes()),
        lambda folder: write_tiff(folder / "a.tif", 4, 1, (65535 - RAMP).astype("<u2").tobytes(), colours=0),
        lambda folder: write_tiff(folder / "a.tif", 4, 1, bytes((0x00, 0x01, 0x00, 0x80, 0x0F, 0xFF)), bits=(12,)),
    ],
    ids=["PGM", "plain PGM", "PGM of 12 bits", "PGM up to 100", "PNG", "TIFF", "inverted TIFF", "TIFF of 12 bits"],
)
def test_more_or_fewer_bits_than_eight_are_scaled(tmp_path, write):
    pixels = pixels_of(write(tmp_path))
    assert np.abs(pixels - np.array(EXPECTED)[None, :, None]).max() <= 1
    assert pixels.max() == 255 and pixels.min() == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_both_byte_orders_of_sixteen_bits(tmp_path, mode):
    picture = Image.frombytes(mode, (4, 1), RAMP.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    picture.save(tmp_path / "a.tif")
    assert pixels_of(tmp_path / "a.tif")[0, :, 0].tolist() == EXPECTED


@pytest.mark.parametrize(("bits", "values"), [(2, (0, 1, 2, 3)), (4, (0, 5, 10, 15)), (8, (0, 85, 170, 255)),
                                              (16, (0, 21845, 43690, 65535))])  # fmt: skip
def test_a_transparent_grey_becomes_white_at_every_depth(tmp_path, bits, values):
    row = np.array([values], np.uint16)
    assert pixels_of(write_png(tmp_path / "a.png", row, bits))[0, :, 0].tolist() == [0, 85, 170, 255]
    pixels = pixels_of(write_png(tmp_path / "a.png", row, bits, transparent=(values[1],)))
    assert pixels[0, :, 0].tolist() == [0, 255, 170, 255]


def test_a_transparent_colour_becomes_white(tmp_path):
    colours = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint16)
    pixels = pixels_of(write_png(tmp_path / "a.png", colours, 8, transparent=(1, 2, 3)))
    assert pixels.tolist() == [[[255, 255, 255], [1, 2, 4]]]


FLOATS, INTEGERS = np.linspace(0, 1, 4, dtype="<f4"), np.arange(4, dtype="<i4")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.tif", lambda path: write_tiff(path, 4, 1, FLOATS.tobytes(), bits=(32,), kind=3), "mode F in a TIFF"),
        ("a.tif", lambda path: write_tiff(path, 4, 1, INTEGERS.tobytes(), bits=(32,)), "mode I in a TIFF"),
        ("a.tif", lambda path: write_tiff(path, 4, 1, RAMP.astype("<u2").tobytes(), kind=2), "mode I in a TIFF"),
        ("a.tif", lambda path: write_tiff(path, 4, 1, bytes(4), bits=(8,), kind=2), "signed pixels"),
        ("a.pfm", lambda path: path.write_bytes(b"Pf\n4 1\n-1.0\n" + FLOATS.tobytes()), "mode F in a PPM"),
        ("a.png", lambda path: write_png(path, np.full((1, 4, 3), 258, np.uint16), transparent=(258, 258, 258)),
         "a transparent colour of 16 bits"),
    ],
    ids=["floats", "32 bits", "signed 16 bits", "signed 8 bits", "PFM", "transparent 16-bit colour"],
)  # fmt: skip
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, name, write, message):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / name
    write(path)
    for read in (lambda: images.decode(path, 8), lambda: ImageFolder(tmp_path, 8)):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


def test_sixteen_bits_in_a_format_that_does_not_say_what_is_white_are_refused(tmp_path):
    cards = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 1", "END")
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "a.fits").write_bytes(header + RAMP.astype(">u2").tobytes().ljust(2880, b"\0"))
    with pytest.raises(DataError, match="in a FITS file, which does not say what is white"):
        images.decode(tmp_path / "a.fits", 8)


def test_a_palette_that_gets_lost_is_named(tmp_path):
    red("P").save(tmp_path / "a.icns")  # of which Pillow reads the pixels without the palette
    with pytest.raises(DataError, match="a.icns: not a readable image: colours of a palette that is missing"):
        images.decode(tmp_path / "a.icns", 8)


@pytest.mark.parametrize("suffix", ["avif", "jpg", "png", "webp", "gif", "tif", "bmp", "ppm", "jp2", "blp", "tga"])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, suffix):
    if f".{suffix}" not in images.image_suffixes():
        pytest.skip(f"this Pillow does not read .{suffix}")
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    (picture.quantize() if suffix in ("gif", "blp") else picture).save(path)
    whole, broken = path.read_bytes(), 0
    for size in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:size])
        try:
            images.decode(path, 8)
        except DataError as error:
            assert str(error).startswith(f"{path}: not a readable image: ")
            broken += 1
    assert broken >= 39


# ------------------------------------------------------------------------------------------------------------- modes


def red(mode):
    """A red picture of this mode, or a grey one."""
    return Image.new("RGB", (16, 16), (254, 0, 0)).convert(mode)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("a.png", lambda: Image.new("1", (16, 16), 1), (255, 255, 255)),
        ("a.png", lambda: Image.new("L", (16, 16), 77), (77, 77, 77)),
        ("a.png", lambda: Image.new("LA", (16, 16), (0, 128)), (127, 127, 127)),
        ("a.png", lambda: red("P"), (254, 0, 0)),
        ("a.png", lambda: red("RGBA"), (254, 0, 0)),
        ("a.png", lambda: Image.new("RGBA", (16, 16), (200, 0, 0, 0)), (255, 255, 255)),
        ("a.tif", lambda: red("RGBX"), (254, 0, 0)),
        ("a.tif", lambda: red("CMYK"), (254, 0, 0)),
        ("a.jpg", lambda: red("CMYK"), (254, 0, 0)),
        ("a.tif", lambda: red("YCbCr"), (254, 0, 0)),
        ("a.jpg", lambda: red("YCbCr"), (254, 0, 0)),
        ("a.tif", lambda: red("LAB"), (254, 0, 0)),
        ("a.gif", lambda: red("P"), (254, 0, 0)),
        ("a.jfif", lambda: red("RGB"), (254, 0, 0)),
        ("a.avif", lambda: red("RGB"), (254, 0, 0)),
        ("a.jp2", lambda: red("RGB"), (254, 0, 0)),
        ("a.ico", lambda: red("RGBA"), (254, 0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_every_mode(tmp_path, name, make, expected):
    path = tmp_path / name
    if path.suffix not in images.image_suffixes():
        pytest.skip(f"this Pillow does not read {path.suffix}")
    make().save(path)
    assert np.abs(pixels_of(path) - np.array(expected)).max() <= 6


def test_transparency_of_palettes(tmp_path):
    picture = Image.new("P", (4, 1))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putdata([0, 1, 0, 1])
    for name, transparent in (("a.png", 0), ("b.png", bytes((0, 255))), ("c.gif", 0)):
        picture.save(tmp_path / name, transparency=transparent)
        assert pixels_of(tmp_path / name)[0].tolist() == [[255, 255, 255], [200, 0, 0]] * 2, name


def test_premultiplied_grey(tmp_path):
    path = write_tiff(tmp_path / "a.tif", 2, 1, bytes((64, 128, 0, 0)), bits=(8, 8), extra=(1,))
    assert np.abs(pixels_of(path)[0, :, 0] - np.array([191, 255])).max() <= 1


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.webp", "a.apng", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (pixels_of(tmp_path / name) == [255, 0, 0]).all(), name


def test_programs_are_not_run_for_files_of_other_kinds(tmp_path):
    assert not images.image_suffixes() & {".eps", ".ps", ".mpg", ".wmf", ".h5", ".pdf"}
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a readable image"):
        images.decode(tmp_path / "a.png", 8)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 61), (7, 5), (2, 60), (32, 32)])
def test_a_square_is_that_of_the_whole_image_resized(size):
    # Without overshoot: Pillow resizes rows or columns first, whatever is less work, and clips what lies between.
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(96, 160, (size[1], size[0], 3), dtype=np.uint8))
    whole = images.resized(picture, 36)
    height, width = whole.shape[:2]
    assert images.resized_size(size, 36) == (width, height) and min(width, height) == 36
    for x, y in ((0, 0), (width - 32, height - 32), ((width - 32) // 2, (height - 32) // 2)):
        cut = images.square(picture, 36, 32, (x, y)).astype(int)
        assert np.abs(cut - whole[y : y + 32, x : x + 32]).max() <= 1
    assert np.array_equal(images.square(picture, 36, 32), cut)


@pytest.mark.parametrize("options", ["", ", random_crop=True"])
def test_a_narrow_image_takes_no_gigabytes(tmp_path, peak_growth, options):
    (tmp_path / "a").mkdir()
    for number, size in enumerate([(2, 6000), (6000, 2), (1, 20_000)]):
        Image.new("RGB", size, "red").save(tmp_path / "a" / f"{number}.{'jpg' if number else 'png'}")
    prepare = f"""
import torch
from var.data import ImageFolder
from var.data.interface import step_generator
data = ImageFolder({str(tmp_path)!r}, 256{options})
"""
    use = "for step in range(4): data.batch(torch.arange(3), step_generator(0, step))"
    assert peak_growth(prepare, use) < 64 << 20


def test_random_squares_of_a_narrow_image_come_from_all_of_it(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 255, 600).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[:, None], (600, 4)).copy()).save(tmp_path / "a" / "ramp.png")
    data = ImageFolder(tmp_path, 8, random_crop=True)
    generator = torch.Generator().manual_seed(0)
    means = [float(data.batch(torch.tensor([0]), generator)[0].mean()) for _ in range(60)]
    assert min(means) < -0.8 and max(means) > 0.8
    assert abs(float(data.batch(torch.tensor([0]))[0].mean())) < 0.05  # the centre
