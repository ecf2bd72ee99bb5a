"""The pictures that the command line writes: sheets of images with labels, as PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from var_kernels.native.build import write_atomically

from .interface import to_uint8

_CELL = 96  # pixels; smaller images are enlarged by a whole factor to about this side
_GAP = 4
_MARGIN = 8
_FONT_SIZE = 15
_LONGEST_ROW = 10
_LARGEST_SIDE = 30_000  # pixels of a sheet; viewers, and the limit in Pillow, refuse much larger pictures


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [−1, 1] as RGB pictures of the same size."""
    return [Image.fromarray(pixels.numpy()) for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu()]


def enlarged(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [−1, 1] as RGB pictures. Small ones are enlarged by repeating pixels, not smoothed."""
    factor = max(1, round(_CELL / max(images.shape[-2:])))
    return to_pictures(images.repeat_interleave(factor, -1).repeat_interleave(factor, -2))


def sheet(
    rows: Sequence[Sequence[Image.Image]], *, row_labels: Sequence[str] = (), column_labels: Sequence[str] = (),
) -> Image.Image:
    """Pictures of equal size in rows on white. Labels are to the left of the rows and above the columns.

    Raises ValueError if the sheet would be too large for viewers.
    """
    if not rows or not rows[0]:
        raise ValueError("rows: expected at least one picture, got none")
    width, height = rows[0][0].size
    font = ImageFont.load_default(_FONT_SIZE)
    columns = max(map(len, rows))
    # A label wider than its picture widens the column.
    step = max([width, *(round(font.getlength(label)) for label in column_labels)]) + _GAP
    left = _MARGIN + (round(max(map(font.getlength, row_labels))) + 2 * _GAP if row_labels else 0)
    top = _MARGIN + (_FONT_SIZE + 2 * _GAP if column_labels else 0)
    size = (left + columns * step - _GAP + _MARGIN, top + len(rows) * (height + _GAP) - _GAP + _MARGIN)
    if max(size) > _LARGEST_SIDE:
        raise ValueError(f"output: {sum(map(len, rows))} images make a sheet of {size[0]}×{size[1]} pixels: "
                         "name a folder or a .npz file instead")
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        middle = left + column * step + (step - _GAP) // 2
        draw.text((middle, top - _GAP), label, fill="black", font=font, anchor="ms")
    for row, pictures in enumerate(rows):
        y = top + row * (height + _GAP)
        if row < len(row_labels):
            draw.text((_MARGIN, y + height // 2), row_labels[row], fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (left + column * step + (step - _GAP - width) // 2, y))
    return canvas


def grid_by_label(images: Tensor, labels: Sequence[int], class_names: Sequence[str], per_row: int = 16) -> Image.Image:
    """A sheet of generated images. Classes are in the order of first appearance, and each begins a new row."""
    rows, row_labels = [], []
    for label in dict.fromkeys(labels):
        members = torch.tensor([i for i, other in enumerate(labels) if other == label])
        pictures = enlarged(images[members])
        for start in range(0, len(pictures), per_row):
            rows.append(pictures[start : start + per_row])
            row_labels.append(class_names[label] if start == 0 else "")
    return sheet(rows, row_labels=row_labels)


def scale_strip(steps: Sequence[Tensor], names: Sequence[str], patch_nums: Sequence[int]) -> Image.Image:
    """A sheet with a row per image and a column per scale. `steps` holds K batches (B, 3, H, W), one decoded after
    each scale."""
    columns = [enlarged(images) for images in steps]
    return sheet(
        [list(row) for row in zip(*columns, strict=True)],
        row_labels=names,
        column_labels=[f"{side} x {side}" for side in patch_nums],  # Pillow's font has no multiplication sign
    )


def comparison(originals: Tensor, reconstructions: Tensor, names: Sequence[str]) -> Image.Image:
    """A sheet of images (B, 3, H, W) above their reconstructions, with a column per name. If there are many names, or
    long ones, each has a row instead."""
    halves, titles = [enlarged(originals), enlarged(reconstructions)], ("original", "reconstruction")
    font = ImageFont.load_default(_FONT_SIZE)
    if len(names) <= _LONGEST_ROW and max(map(font.getlength, names)) <= halves[0][0].width:
        return sheet(halves, row_labels=titles, column_labels=names)
    return sheet(list(zip(*halves, strict=True)), row_labels=names, column_labels=titles)


def write_png(path: str | os.PathLike, picture: Image.Image, description: str = "") -> Path:
    """Write `picture` atomically, with `description` as its PNG text, and return the path."""
    text = PngInfo()
    if description:
        text.add_itxt("Description", description)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=text))
    return Path(path)
