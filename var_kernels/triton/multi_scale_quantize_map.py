"""Functions on maps, which the forward and the backward kernels of multi_scale_quantize share.

A map of an image is pixel-major and dense, (height · width, channels). So a code (a row of the codebook) is one pixel,
and a tile of pixels is an operand of a matrix product. `p` is a tile of pixels of the full map, `c`, `i` and `o`
are tiles of channels.
"""

import triton
import triton.language as tl


@triton.jit
def cubic_position(at, size, full):
    """Where pixel `at` of an axis of length `full` lies on an axis of length `size`: the pixel below, and the fraction.

    The same as in PyTorch's bicubic interpolation with align_corners=False.
    """
    scale = tl.div_rn(tl.cast(size, tl.float32), tl.cast(full, tl.float32))
    position = scale * (at.to(tl.float32) + 0.5) - 0.5
    below = tl.minimum(tl.floor(position).to(tl.int32), size - 1)
    rest = position - below.to(tl.float32)
    return below, tl.minimum(tl.maximum(rest, 0.0), 1.0)


@triton.jit
def cubic_weight(t, TAP: tl.constexpr):
    """The weight of pixel `below - 1 + TAP` in cubic convolution with A = -0.75."""
    if TAP == 0:
        x = t + 1.0
    elif TAP == 1:
        x = t
    elif TAP == 2:
        x = 1.0 - t
    else:
        x = 2.0 - t
    if TAP == 1 or TAP == 2:
        weight = (1.25 * x - 2.25) * x * x + 1.0
    else:
        weight = ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0
    return weight


@triton.jit
def upsampled(
    codes, tokens, p, inside, c, channels, height, width, full_height, full_width,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pixels p and channels c of the code map (height, width), upsampled bicubically to full size, (BLOCK_P, BLOCK_C).

    Code q of the map is row tokens[q] of `codes`, or row q without TOKENS.
    """
    # At full size the other taps have weight zero, and a NaN in them must not count. The condition is a vector, because
    # Triton's interpreter does not broadcast a scalar condition.
    resized = tl.abs(height - full_height) + tl.abs(width - full_width) + tl.zeros((BLOCK_P,), tl.int32) > 0
    below_y, t_y = cubic_position(p // full_width, height, full_height)
    below_x, t_x = cubic_position(p % full_width, width, full_width)
    result = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap_y in tl.static_range(4):
        row = tl.minimum(tl.maximum(below_y - 1 + tap_y, 0), height - 1)
        line = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for tap_x in tl.static_range(4):
            column = tl.minimum(tl.maximum(below_x - 1 + tap_x, 0), width - 1)
            code = row * width + column
            if tap_y == 1 and tap_x == 1:
                needed = inside
            else:
                needed = inside & resized
            if TOKENS:
                code = tl.load(tokens + code, mask=needed, other=0)
            pointers = codes + code.to(tl.int64)[:, None] * channels + c[None, :]
            value = tl.load(pointers, mask=needed[:, None] & (c[None, :] < channels), other=0.0)
            line += cubic_weight(t_x, tap_x)[:, None] * value
        result += cubic_weight(t_y, tap_y)[:, None] * line
    return result


@triton.jit
def convolved(
    source, tokens, weight, p, o, channels, full_height, full_width,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Pixels p and channels o of the 3×3 convolution of a map, which is zero outside, with weight (9, in, out).

    Pixel q of the map is row tokens[q] of `source`, or row q without TOKENS. These are nine matrix products in fp32
    over chunks of channels, written as one loop, so that the loads of a step overlap the products of the step before.
    """
    chunks = tl.cdiv(channels, BLOCK_I)
    y, x = p // full_width, p % full_width
    result = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for step in tl.range(0, 9 * chunks):
        tap = step // chunks
        i = (step % chunks) * BLOCK_I + tl.arange(0, BLOCK_I)
        near_y, near_x = y + tap // 3 - 1, x + tap % 3 - 1
        inside = (near_y >= 0) & (near_y < full_height) & (near_x >= 0) & (near_x < full_width)
        pixel = near_y * full_width + near_x
        if TOKENS:
            pixel = tl.load(tokens + pixel, mask=inside, other=0)
        pointers = source + pixel.to(tl.int64)[:, None] * channels + i[None, :]
        values = tl.load(pointers, mask=inside[:, None] & (i[None, :] < channels), other=0.0)
        pointers = weight + (tap * channels + i[:, None]) * channels + o[None, :]
        weights = tl.load(pointers, mask=(i[:, None] < channels) & (o[None, :] < channels), other=0.0)
        result = tl.dot(values, weights, result, input_precision="ieee")
    return result


@triton.jit
def pooled(
    source, rows, num_rows, c, channels, height, width, full_height, full_width, window,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Area-pools maps to (height, width). The rows are tokens, image after image, (BLOCK_N, BLOCK_C).

    `window`: the number of pixels of the largest window.
    """
    image, token = rows // (height * width), rows % (height * width)
    i, j = token // width, token % width
    y0, x0 = i * full_height // height, j * full_width // width
    tall = ((i + 1) * full_height + height - 1) // height - y0
    wide = ((j + 1) * full_width + width - 1) // width - x0
    starts = source + (image.to(tl.int64) * full_height * full_width * channels)[:, None, None] + c[None, None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for q0 in tl.range(0, window, BLOCK_Q):
        q = q0 + tl.arange(0, BLOCK_Q)[None, :]
        pixel = (y0[:, None] + q // wide[:, None]) * full_width + x0[:, None] + q % wide[:, None]
        inside = (rows < num_rows)[:, None] & (q < (tall * wide)[:, None])
        mask = inside[:, :, None] & (c < channels)[None, None, :]
        total += tl.sum(tl.load(starts + pixel[:, :, None] * channels, mask=mask, other=0.0), axis=1)
    return total * (1.0 / (tall * wide).to(tl.float32))[:, None]


def largest_window(size: tuple[int, int], full: tuple[int, int]) -> int:
    """The number of pixels of the largest window of a map of size `full` pooled to `size`."""
    spans = [
        max(-(-(i + 1) * total // parts) - i * total // parts for i in range(parts))
        for parts, total in zip(size, full, strict=True)
    ]
    return spans[0] * spans[1]
