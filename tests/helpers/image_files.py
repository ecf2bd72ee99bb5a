"""Image files that Pillow reads but does not write, made byte by byte."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GREY, RGB = 0, 2  # colour types of PNG
_TYPES = {"H": (3, 2), "I": (4, 4)}  # struct code: (TIFF type, bytes)


def write_png(path: Path, pixels: np.ndarray, bits: int = 16, transparent: Sequence[int] = ()) -> Path:
    """A PNG of `pixels` (h, w) or (h, w, 3) with samples of 2, 4, 8 or 16 bits, one colour of which is transparent."""
    height, width = pixels.shape[:2]
    samples = pixels.reshape(height, -1)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        unpacked = (samples[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in unpacked]
    header = struct.pack(">2I5B", width, height, bits, GREY if pixels.ndim == 2 else RGB, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
              (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]  # fmt: skip
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks if body or kind != b"tRNS"
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def write_tiff(path: Path, width: int, height: int, data: bytes, *, bits: Sequence[int] = (16,), colours: int = 1,
               kind: int = 1, extra: Sequence[int] = ()) -> Path:  # fmt: skip
    """An uncompressed little-endian TIFF of `data`, with the tags BitsPerSample, PhotometricInterpretation,
    SampleFormat and ExtraSamples."""
    tags = [
        (256, "I", (width,)), (257, "I", (height,)), (258, "H", tuple(bits)), (259, "H", (1,)), (262, "H", (colours,)),
        (273, "I", (0,)), (277, "H", (len(bits),)), (278, "I", (height,)), (279, "I", (len(data),)),
        *([(338, "H", tuple(extra))] if extra else []), (339, "H", (kind,) * len(bits)),
    ]  # fmt: skip
    after = 8 + 2 + 12 * len(tags) + 4  # the values that do not fit into their entry, and then the pixels
    entries, values = [], b""
    for tag, code, numbers in tags:
        if tag == 273:
            numbers = (after + 64,)
        packed = struct.pack(f"<{len(numbers)}{code}", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack("<I", after + len(values)), values + packed
        entries.append(struct.pack("<2HI", tag, _TYPES[code][0], len(numbers)) + packed.ljust(4, b"\0"))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4)
    path.write_bytes(head + values.ljust(64, b"\0") + data)
    return path
