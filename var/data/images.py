"""Decodes image files to upright RGB pixels, and cuts squares out of them.

Of a file with several pictures, such as an animation, the first one is used. Pixels whose value of white the file does
not state (floats, 32-bit and signed integers) are refused, because any guess would silently change the image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, features

from .interface import DataError

# Pillow recognises these formats, but it cannot decode the first one, and it runs Ghostscript for the second one.
_NOT_DECODED = frozenset({"MPEG", "EPS"})
# Formats that Pillow registers even where its build lacks the decoder, by the name of the feature.
_FEATURES = {"JPEG": "jpg", "JPEG2000": "jpg_2000"}
# Formats that are read by the decoder of another one.
_DECODED_AS = {"MPO": "JPEG"}

# How the pixels of an image must be moved to show it upright, by the value of its EXIF orientation. `exif_transpose` of
# Pillow also rewrites the other metadata, and fails where they are malformed.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)

# Pillow opens images of more than 8 bits in these modes. In the formats listed, white is the largest number of 16 bits.
_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_SIXTEEN_BITS = frozenset({"PNG", "PPM", "JPEG2000", "ICO", "ICNS"})  # the last two contain PNG files
_TIFF_BITS, _TIFF_COLOURS, _TIFF_SIGNS = 258, 262, 339  # tags: BitsPerSample, PhotometricInterpretation, SampleFormat
_WHITE_IS_ZERO, _SIGNED = 0, 2


class Picture(NamedTuple):
    """A decoded image."""

    rgb: Image.Image  # upright; a large JPEG is decoded at a fraction of its size
    size: tuple[int, int]  # (width, height) of the whole image, upright


def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and with their dot, of the files that this installation of Pillow can decode."""
    formats = _readable_formats()
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if _DECODED_AS.get(name, name) in formats
    )


def _readable_formats() -> tuple[str, ...]:
    Image.preinit()  # the usual formats are tried first
    Image.init()
    return _readable_of(tuple(Image.ID))


@functools.cache
def _readable_of(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the formats whose pixels can be decoded. The result is kept, because every image that is opened needs
    it."""
    return tuple(
        name for name in formats
        if name not in _NOT_DECODED
        and not _is_stub(Image.OPEN[name][0])
        and (name not in _FEATURES or features.check(_FEATURES[name]))
    )


def _is_stub(opener: object) -> bool:
    """Whether Pillow only identifies a format, and leaves the decoding to a handler that nobody has installed."""
    return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet. Raises DataError, naming `path`, also for errors within the context."""
    try:
        with Image.open(path, formats=_readable_formats()) as image:
            _check_range(image)
            yield image
    except MemoryError:
        raise
    except Exception as error:
        # Each of Pillow's decoders has its own errors for broken files: OSError, SyntaxError, RuntimeError and others.
        raise DataError(f"{path}: not a readable image: {str(error) or type(error).__name__}") from error


def check_header(path: Path) -> None:
    """Raise DataError, naming `path`, if the header shows that the file is no image, or one that would be refused."""
    with _opened(path):
        pass


def decode(path: Path, shorter_side: int) -> Picture:
    """The image of a file, turned upright as its EXIF data say, with transparent pixels laid over white.

    It is meant to be resized so that its shorter side has `shorter_side` pixels. Raises DataError, naming `path`, if
    the file is no complete image or if it does not state how bright its pixels are.
    """
    with _opened(path) as image:
        size = image.size
        raw_mode = _raw_mode(image)
        reduced = image.draft("RGB", (2 * shorter_side, 2 * shorter_side))
        image.load()
        if reduced is None:
            size = image.size  # TIFF files are turned upright when they are loaded
        orientation = _orientation(image)
        rgb = _to_rgb(image, raw_mode)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return Picture(rgb, (size[1], size[0]) if orientation in _SIDEWAYS else size)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Malformed metadata of any kind are no fault of the pixels. Without an orientation they are shown as stored.
        return None


# ------------------------------------------------------------------------------------------------------------ colours


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are stored in the file, in Pillow's words such as "L;4"; known only before they are decoded."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _check_range(image: Image.Image) -> None:
    """Raise ValueError for pixels of which the file does not say what is white, or what is transparent."""
    if image.mode in _WIDE_MODES:
        _white(image)
    if image.format == "TIFF" and _SIGNED in image.tag_v2.get(_TIFF_SIGNS, ()):
        raise ValueError("signed pixels, of which the file does not say what is black and what is white")
    if isinstance(image.info.get("transparency"), tuple) and _raw_mode(image).endswith(";16B"):
        raise ValueError("a transparent colour of 16 bits, of which Pillow keeps 8")


def _white(image: Image.Image) -> int:
    """The number that means white in an image of more than 8 bits."""
    if image.format in _SIXTEEN_BITS and image.mode != "F":
        return 2**16 - 1
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        return 2 ** max(image.tag_v2.get(_TIFF_BITS, (16,))) - 1  # 12 bits also have this mode
    raise ValueError(f"pixels of mode {image.mode} in a {image.format} file, which does not say what is white")


def _to_rgb(image: Image.Image, raw_mode: str) -> Image.Image:
    """The decoded image as RGB, with transparent pixels laid over white."""
    if image.mode in _WIDE_MODES:
        return _wide_to_rgb(image)
    if image.format == "PNG" and raw_mode in ("L;2", "L;4"):
        # Pillow widens these pixels to 8 bits, but not the number of the transparent ones.
        largest, transparent = 2 ** int(raw_mode[-1]) - 1, image.info.get("transparency")
        if isinstance(transparent, int) and transparent <= largest:
            image.info["transparency"] = transparent * 255 // largest
    if image.mode == "P" and image.palette is None:
        raise ValueError("colours of a palette that is missing")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode to which Pillow converts it
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits. Pillow's own conversion clips at 255 instead of scaling."""
    white = _white(image)
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(_TIFF_COLOURS) == _WHITE_IS_ZERO:
        grey = 255 - grey  # which Pillow does for 8 bits only
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


# --------------------------------------------------------------------------------------------------------------- sizes


def resized_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """(width, height) of an image of `size`, resized so that its shorter side has `shorter_side` pixels."""
    factor = shorter_side / min(size)
    width, height = (max(shorter_side, round(side * factor)) for side in size)
    return width, height


def resized(rgb: Image.Image, shorter_side: int) -> np.ndarray:
    """The whole image, resized, as (h, w, 3) uint8."""
    return np.asarray(rgb.resize(resized_size(rgb.size, shorter_side), Image.Resampling.LANCZOS))


def square(rgb: Image.Image, shorter_side: int, side: int, corner: tuple[int, int] | None = None) -> np.ndarray:
    """A square of the resized image as (side, side, 3) uint8: at `corner` (x, y), by default in the centre.

    Only the pixels of the square are computed. The whole of a narrow image can be a thousand times as large.
    """
    width, height = resized_size(rgb.size, shorter_side)
    x, y = corner if corner is not None else ((width - side) // 2, (height - side) // 2)
    scale_x, scale_y = rgb.size[0], rgb.size[1]
    # The products come first, so that the box of a square at the border ends exactly there.
    box = (x * scale_x / width, y * scale_y / height, (x + side) * scale_x / width, (y + side) * scale_y / height)
    return np.asarray(rgb.resize((side, side), Image.Resampling.LANCZOS, box=box))
