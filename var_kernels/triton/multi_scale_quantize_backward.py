"""The gradients of E = sum over images and scales of derrors · |f_hat_k - f|², for known tokens.

With f_hat_k = h_0 + … + h_k, the gradient of h_k is S_k = sum over j >= k of 2 · derrors_j · (f_hat_j - f), that of f
is -S_0, and from S_k each scale has its own gradients through h = (1 - ratio) · u + ratio · (conv(u) + bias)::

    dweight[tap] = ratio · sum over pixels of u[pixel + tap] S[pixel]ᵀ        dbias = ratio · sum over pixels of S
    du = (1 - ratio) · S + ratio · conv(S), with the weights mirrored and transposed
    dcodes = the adjoint of bicubic upsampling, applied to du;   dcodebook[v] = sum of dcodes over the tokens equal to v

In backward no scale depends on another one, so every kernel takes all scales of all images and reads their sizes from a
table on the device. Two maps per image and scale are stored, u and h, which become du and S. All sums have a fixed
order: weight gradients have one partial sum per scale and slice of the batch, and each code adds its tokens in order.
"""

import math

import torch
import triton
import triton.language as tl

from .configs import Config, choose
from .launch import launch
from .multi_scale_quantize_map import convolved, cubic_position, cubic_weight, upsampled
from .targets import target_of

# The number of scales per launch of write_schedule, and the place of each number in its arguments.
_SCALES = 16
_HEIGHT, _WIDTH = 42, 21
_SLICES = 16  # parts of the batch: enough programs for the weight gradients, and not too many partial sums

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[f"s{i}" for i in range(_SCALES)] + ["first", "scales", "tokens_before"])
def write_schedule(
    table, first, scales, tokens_before, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes rows first … first + 16 of the table (scales, 4): height, width, index of phi, first token.

    They are passed as arguments, because a copy from the host waits for the GPU and cannot be part of a CUDA graph.
    """
    lane = tl.arange(0, 16)
    # Written as sums: LLVM would turn nested choices into one load from the chosen parameter.
    packed = tl.where(lane == 0, s0, 0) + tl.where(lane == 1, s1, 0) + tl.where(lane == 2, s2, 0)
    packed += tl.where(lane == 3, s3, 0) + tl.where(lane == 4, s4, 0) + tl.where(lane == 5, s5, 0)
    packed += tl.where(lane == 6, s6, 0) + tl.where(lane == 7, s7, 0) + tl.where(lane == 8, s8, 0)
    packed += tl.where(lane == 9, s9, 0) + tl.where(lane == 10, s10, 0) + tl.where(lane == 11, s11, 0)
    packed += tl.where(lane == 12, s12, 0) + tl.where(lane == 13, s13, 0) + tl.where(lane == 14, s14, 0)
    packed += tl.where(lane == 15, s15, 0)
    height = (packed >> HEIGHT).to(tl.int32)
    width = ((packed >> WIDTH) & ((1 << WIDTH) - 1)).to(tl.int32)
    pointers, inside = table + (first + lane) * 4, first + lane < scales
    tl.store(pointers, height, mask=inside)
    tl.store(pointers + 1, width, mask=inside)
    tl.store(pointers + 2, (packed & ((1 << WIDTH) - 1)).to(tl.int32), mask=inside)
    tl.store(pointers + 3, tokens_before + tl.cumsum(height * width, axis=0) - height * width, mask=inside)


@triton.jit(do_not_specialize=["scales", "length"])
def upsample(
    codes, tokens, table, maps, scales, length, channels, full_height, full_width,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes u of every image and scale; maps is (images, scales, pixels, channels)."""
    map_index = tl.program_id(1).to(tl.int64)
    row = table + tl.program_id(1) % scales * 4
    height, width, offset = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = full_height * full_width
    values = upsampled(
        codes, tokens + map_index // scales * length + offset, p, p < pixels, c, channels, height, width,
        full_height, full_width, True, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    pointers = maps + (map_index * pixels + p[:, None]) * channels + c[None, :]
    tl.store(pointers, values, mask=(p[:, None] < pixels) & (c[None, :] < channels))


@triton.jit(do_not_specialize=["scales"])
def convolve(
    source, weight, bias, table, out, ratio, scales, channels, full_height, full_width,
    BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Computes (1 - ratio) · map + ratio · (conv(map) + bias) of every map, with the weights of its scale."""
    map_index = tl.program_id(1).to(tl.int64)
    convolution = tl.load(table + tl.program_id(1) % scales * 4 + 2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixels = full_height * full_width
    source += map_index * pixels * channels
    result = convolved(
        source, source, weight + convolution * 9 * channels * channels, p, o, channels, full_height, full_width,
        False, BLOCK_P, BLOCK_I, BLOCK_O,
    )  # fmt: skip
    if BIAS:
        result += tl.load(bias + convolution * channels + o, mask=o < channels, other=0.0)[None, :]
    at, inside = p[:, None] * channels + o[None, :], (p[:, None] < pixels) & (o[None, :] < channels)
    result = (1.0 - ratio) * tl.load(source + at, mask=inside, other=0.0) + ratio * result
    tl.store(out + map_index * pixels * channels + at, result, mask=inside)


@triton.jit(do_not_specialize=["scales"])
def suffix_sums(maps, f, factors, df, scales, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Replaces h_k in `maps` by S_k, and writes df (images, channels, pixels) = -S_0. factors is (images, scales)."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p[:, None] < pixels) & (c[None, :] < channels)
    at, map_size = p[:, None] * channels + c[None, :], tl.cast(pixels, tl.int64) * channels
    maps += image * scales * map_size
    difference = -tl.load(f + image * map_size + at, mask=inside, other=0.0)
    for k in tl.range(0, scales):
        difference += tl.load(maps + k * map_size + at, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in tl.range(0, scales):
        k = scales - 1 - step
        h = tl.load(maps + k * map_size + at, mask=inside, other=0.0)
        total += tl.load(factors + image * scales + k) * difference
        tl.store(maps + k * map_size + at, total, mask=inside)
        difference -= h
    tl.store(df + (image * channels + c[None, :]) * pixels + p[:, None], -total, mask=inside)


@triton.jit(do_not_specialize=["images", "scales", "slice_images"])
def phi_gradients(
    u, s, partials, images, scales, slice_images, channels, full_height, full_width,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of a slice of the images, for one tap, scale and tile of the matrix.

    partials (slices, scales, 9 · in · out + out) has the sums of u[pixel + tap] S[pixel]ᵀ, then the sums of S.
    """
    blocks = tl.cdiv(channels, BLOCK_I)
    tap, tile = tl.program_id(0) % 9, tl.program_id(0) // 9
    i = (tile % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    o = (tile // blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    k, first = tl.program_id(1), tl.program_id(2) * slice_images
    pixels = full_height * full_width
    tiles = tl.cdiv(pixels, BLOCK_P)
    steps = (tl.minimum(first + slice_images, images) - first) * tiles
    matrix = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    sums = tl.zeros((BLOCK_O,), tl.float32)
    for step in tl.range(0, steps):
        start = (tl.cast(first + step // tiles, tl.int64) * scales + k) * pixels * channels
        p = (step % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        near_y, near_x = p // full_width + tap // 3 - 1, p % full_width + tap % 3 - 1
        inside = (p < pixels) & (near_y >= 0) & (near_y < full_height) & (near_x >= 0) & (near_x < full_width)
        pointers = u + start + (near_y * full_width + near_x)[None, :] * channels + i[:, None]
        values = tl.load(pointers, mask=inside[None, :] & (i[:, None] < channels), other=0.0)
        pointers = s + start + p[:, None] * channels + o[None, :]
        gradient = tl.load(pointers, mask=(p[:, None] < pixels) & (o[None, :] < channels), other=0.0)
        matrix = tl.dot(values, gradient, matrix, input_precision="ieee")
        sums += tl.sum(gradient, axis=0)
    row = partials + (tl.program_id(2) * scales + k).to(tl.int64) * (9 * channels + 1) * channels
    pointers = row + (tap * channels + i[:, None]) * channels + o[None, :]
    tl.store(pointers, matrix, mask=(i[:, None] < channels) & (o[None, :] < channels))
    if tap + tile % blocks == 0:
        tl.store(row + 9 * channels * channels + o, sums, mask=o < channels)


@triton.jit(do_not_specialize=["slices", "scales"])
def reduce_phi(partials, table, dweight, dbias, ratio, slices, scales, channels, BLOCK: tl.constexpr):
    """Computes dweight (n, out, in, 9) and dbias (n, out): ratio times the sum over the scales that a phi serves."""
    convolution = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = 9 * channels * channels
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, scales):
        if tl.load(table + k * 4 + 2) == convolution:
            for part in tl.range(0, slices):
                row = partials + tl.cast(part * scales + k, tl.int64) * (weights + channels)
                total += tl.load(row + entry, mask=entry < weights + channels, other=0.0)
    tap, i, o = entry // (channels * channels), entry // channels % channels, entry % channels
    at = ((convolution * channels + o) * channels + i) * 9 + tap
    tl.store(dweight + at, ratio * total, mask=entry < weights)
    inside = (entry >= weights) & (entry < weights + channels)
    tl.store(dbias + convolution * channels + o, ratio * total, mask=inside)


@triton.jit
def cubic_weights(at, pixels, size, full):
    """The weight of pixel `at` of the small axis in each of `pixels` of the full axis, (at, pixels)."""
    below, t = cubic_position(pixels, size, full)
    result = tl.zeros_like(at[:, None] * pixels[None, :]).to(tl.float32)
    for tap in tl.static_range(4):
        index = tl.minimum(tl.maximum(below - 1 + tap, 0), size - 1)
        result += tl.where(index[None, :] == at[:, None], cubic_weight(t, tap)[None, :], 0.0)
    return result


@triton.jit(do_not_specialize=["scales", "length"])
def downsample(
    maps, table, dcodes, scales, length, channels, full_height, full_width,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The adjoint of `upsample`. It writes dcodes (images, length, channels), for a tile of tokens of one image and
    scale.

    It multiplies by the matrix of bicubic weights, (tokens, pixels), over the rows of pixels that the tokens reach.
    """
    map_index = tl.program_id(1).to(tl.int64)
    row = table + tl.program_id(1) % scales * 4
    height, width, offset = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    count, t0 = height * width, tl.program_id(0) * BLOCK_T
    if t0 < count:
        token = t0 + tl.arange(0, BLOCK_T)
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        pixels = full_height * full_width
        maps += map_index * pixels * channels
        inside = (token[:, None] < count) & (c[None, :] < channels)
        if tl.abs(height - full_height) + tl.abs(width - full_width) == 0:
            result = tl.load(maps + token[:, None] * channels + c[None, :], mask=inside, other=0.0)
        else:
            i, j = token // width, token % width
            # Row y reaches the four rows around (y + 1/2) · height / full_height - 1/2, plus one for rounding.
            top, bottom = t0 // width, (tl.minimum(t0 + BLOCK_T, count) - 1) // width
            begin = tl.maximum(tl.maximum(2 * top - 3, 0) * full_height // (2 * height) - 1, 0)
            end = tl.minimum(((2 * bottom + 5) * full_height + 2 * height - 1) // (2 * height) + 1, full_height)
            result = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for p0 in tl.range(begin * full_width, end * full_width, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                weights = cubic_weights(i, p // full_width, height, full_height)
                weights *= cubic_weights(j, p % full_width, width, full_width)
                mask = (p[:, None] < pixels) & (c[None, :] < channels)
                values = tl.load(maps + p[:, None] * channels + c[None, :], mask=mask, other=0.0)
                result = tl.dot(weights, values, result, input_precision="ieee")
        at = (map_index // scales * length + offset + token[:, None]) * channels + c[None, :]
        tl.store(dcodes + at, result, mask=inside)


@triton.jit
def sum_tokens(dcodes, order, starts, dcodebook, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes dcodebook (codes, channels). A program sums one code's tokens, order[starts[v]] … order[starts[v + 1] -
    1]."""
    code = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(starts + code), tl.load(starts + code + 1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for t0 in tl.range(begin, end, BLOCK_T):
        at = t0 + tl.arange(0, BLOCK_T)
        token = tl.load(order + at, mask=at < end, other=0)
        mask = (at[:, None] < end) & (c[None, :] < channels)
        total += tl.sum(tl.load(dcodes + token[:, None] * channels + c[None, :], mask=mask, other=0.0), axis=0)
    tl.store(dcodebook + code.to(tl.int64) * channels + c, total, mask=c < channels)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Backward:
    """The launches of one call; maps (B, K, H · W, C) are dense."""

    def __init__(self, shape, sizes, phi_index, device):
        self.images, self.channels, self.height, self.width = shape
        self.pixels, self.scales = self.height * self.width, len(sizes)
        self.lengths = [height * width for height, width in sizes]
        self.target = target_of(device)
        self.full = {"full_height": self.height, "full_width": self.width, "channels": self.channels}
        self.full["scales"] = self.scales
        self.table = torch.empty(self.scales, 4, dtype=torch.int32, device=device)
        packed = [(h << _HEIGHT) | (w << _WIDTH) | phi for (h, w), phi in zip(sizes, phi_index, strict=True)]
        for first in range(0, self.scales, _SCALES):
            part = packed[first : first + _SCALES]
            part += [packed[0]] * (_SCALES - len(part))  # not 0, which would have another type
            arguments = {"table": self.table, "first": first, "scales": self.scales}
            arguments |= {"tokens_before": sum(self.lengths[:first])}
            arguments |= {f"s{i}": value for i, value in enumerate(part)} | {"HEIGHT": _HEIGHT, "WIDTH": _WIDTH}
            launch(write_schedule, (1,), arguments, Config({}, num_warps=1))  # there is nothing to choose

    def config(self, kernel: str, size: int):
        return choose(f"multi_scale_quantize_backward.{kernel}", self.target, size, 4)

    def run(self, kernel, per_program: str, arguments: dict, *, count: int, rows: int) -> None:
        """Starts `kernel` over tiles of `count` pixels or tokens, `rows` images or maps, and tiles of the channels."""
        config = self.config(kernel.fn.__name__, count * rows)
        channel_tile = config.tiles["BLOCK_C" if "BLOCK_C" in config.tiles else "BLOCK_O"]
        grid = (triton.cdiv(count, config.tiles[per_program]), rows, triton.cdiv(self.channels, channel_tile))
        launch(kernel, grid, arguments, config)

    def upsample(self, codebook: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        u = codebook.new_empty(self.images, self.scales, self.pixels, self.channels)
        arguments = self.full | {"codes": codebook, "tokens": tokens, "table": self.table, "maps": u}
        arguments |= {"length": tokens.shape[1]}
        self.run(upsample, "BLOCK_P", arguments, count=self.pixels, rows=self.images * self.scales)
        return u

    def convolve(self, source, weight, bias, ratio: float, out) -> None:
        arguments = self.full | {"source": source, "weight": weight, "bias": weight if bias is None else bias}
        arguments |= {"table": self.table, "out": out, "ratio": ratio, "BIAS": bias is not None}
        self.run(convolve, "BLOCK_P", arguments, count=self.pixels, rows=self.images * self.scales)

    def suffix_sums(self, maps, f, factors) -> torch.Tensor:
        df = f.new_empty(self.images, self.channels, self.height, self.width)
        arguments = {"maps": maps, "f": f, "factors": factors, "df": df, "scales": self.scales}
        arguments |= {"pixels": self.pixels, "channels": self.channels}
        self.run(suffix_sums, "BLOCK_P", arguments, count=self.pixels, rows=self.images)
        return df

    def phi_gradients(self, u, s, ratio: float, dweight, dbias) -> None:
        entries = (9 * self.channels + 1) * self.channels
        slice_images = triton.cdiv(self.images, _SLICES)
        slices = triton.cdiv(self.images, slice_images)
        partials = u.new_empty(slices, self.scales, entries)
        config = self.config("phi_gradients", self.images * self.pixels)
        tiles = math.prod(triton.cdiv(self.channels, config.tiles[name]) for name in ("BLOCK_I", "BLOCK_O"))
        arguments = {"u": u, "s": s, "partials": partials, "images": self.images, "slice_images": slice_images}
        launch(phi_gradients, (9 * tiles, self.scales, slices), self.full | arguments, config)
        config = self.config("reduce_phi", entries)
        arguments = {"partials": partials, "table": self.table, "dweight": dweight, "dbias": dbias, "ratio": ratio}
        arguments |= {"slices": slices, "scales": self.scales, "channels": self.channels}
        launch(reduce_phi, (triton.cdiv(entries, config.tiles["BLOCK"]), dbias.shape[0]), arguments, config)

    def downsample(self, du) -> torch.Tensor:
        length = sum(self.lengths)
        dcodes = du.new_empty(self.images, length, self.channels)
        arguments = self.full | {"maps": du, "table": self.table, "dcodes": dcodes, "length": length}
        self.run(downsample, "BLOCK_T", arguments, count=max(self.lengths), rows=self.images * self.scales)
        return dcodes

    def sum_tokens(self, dcodes, tokens, codes: int) -> torch.Tensor:
        dcodebook = dcodes.new_empty(codes, self.channels)
        ordered, order = torch.sort(tokens.flatten(), stable=True)
        starts = torch.searchsorted(ordered, torch.arange(codes + 1, device=tokens.device))
        arguments = {"dcodes": dcodes, "order": order, "starts": starts, "dcodebook": dcodebook}
        config = self.config("sum_tokens", tokens.numel())
        grid = (codes, triton.cdiv(self.channels, config.tiles["BLOCK_C"]))
        launch(sum_tokens, grid, arguments | {"channels": self.channels}, config)
        return dcodebook


def quantize_backward(
    maps_of_f: torch.Tensor, codebook: torch.Tensor, phi_weight: torch.Tensor, phi_bias: torch.Tensor,
    tokens: torch.Tensor, derrors: torch.Tensor, full: tuple[int, int], sizes: list[tuple[int, int]],
    phi_index: list[int], phi_ratio: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """df, dcodebook, dphi_weight, dphi_bias; f comes as dense maps (B, H · W, C)."""
    images, _, channels = maps_of_f.shape
    backward = _Backward((images, channels, *full), sizes, phi_index, maps_of_f.device)
    tokens, codebook = tokens.contiguous(), codebook.contiguous()
    taps = phi_weight.flatten(3)
    u = backward.upsample(codebook, tokens)
    h = torch.empty_like(u)
    backward.convolve(u, taps.permute(0, 3, 2, 1).contiguous(), phi_bias.contiguous(), phi_ratio, h)
    df = backward.suffix_sums(h, maps_of_f, (2 * derrors).contiguous())
    s, dweight, dbias = h, phi_weight.new_empty(phi_weight.shape), phi_bias.new_empty(phi_bias.shape)
    backward.phi_gradients(u, s, phi_ratio, dweight, dbias)
    du = u  # no longer needed
    backward.convolve(s, taps.flip(3).permute(0, 3, 1, 2).contiguous(), None, phi_ratio, du)
    dcodes = backward.downsample(du)
    return df, backward.sum_tokens(dcodes, tokens, codebook.shape[0]), dweight, dbias
