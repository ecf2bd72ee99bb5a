"""The residual quantizer of VAR on a GPU: for each scale a search, an upsampling and an update of the residual.

With f_hat = 0 and rest = f, for each scale k::

    search     tokens_k = nearest_code(area_pool(rest), codebook): each program pools the rows it searches for
    upsample   u = bicubic(codebook[tokens_k]), the code map at full size (the last scale has it already)
    update     h = (1 - ratio) * u + ratio * (conv3x3(u) + bias);  f_hat += h;  rest -= h;  sum of rest²

u is written to memory, because the convolution reads each of its pixels nine times, and computing a pixel takes sixteen
codes. All maps are pixel-major (`multi_scale_quantize_map`) until the last update, which writes f_hat in the layout
that is returned. Each tile stores its sum of squares, and these are added in a fixed order.

Each scale depends on the previous one, and each step of a scale on the step before, because it needs all tokens of an
image. At small batches the chain of launches takes most of the time, and a CUDA graph of the call removes most of that.
Nothing here waits for the GPU or copies from the host.
"""

import torch
import triton
import triton.language as tl

from .configs import choose
from .launch import launch
from .multi_scale_quantize_backward import quantize_backward
from .multi_scale_quantize_map import convolved, largest_window, pooled, upsampled
from .nearest_code import Codebook, scan_codes, store_choice
from .targets import target_of

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["num_rows", "image_tokens", "image_stride", "token_offset", "height", "width", "window"]
)
def search(
    source, centre, codes, code_terms, scores, candidates, tokens, num_rows, num_codes, channels, split_codes,
    height, width, full_height, full_width, window, image_tokens, image_stride, token_offset,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """`nearest_code.search` for rows that this kernel pools from the maps `source`."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * split_codes
    end = tl.minimum(begin + split_codes, num_codes)
    c = tl.arange(0, BLOCK_C)
    z = pooled(
        source, rows, num_rows, c, channels, height, width, full_height, full_width, window,
        BLOCK_N, BLOCK_C, BLOCK_Q,
    )  # fmt: skip
    z -= tl.load(centre + c, mask=c < channels, other=0.0)[None, :]
    best, index = scan_codes(z, codes, code_terms, begin, end, channels, BLOCK_N, BLOCK_V, BLOCK_C)
    store_choice(
        best, index, rows, num_rows, split, scores, candidates, tokens, image_tokens, image_stride, token_offset, SPLIT
    )


@triton.jit(do_not_specialize=["num_rows", "height", "width", "window"])
def pool(
    source, out, num_rows, channels, height, width, full_height, full_width, window,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Area-pools the maps `source` to (height, width); out is (rows, channels)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    means = pooled(
        source, rows, num_rows, c, channels, height, width, full_height, full_width, window,
        BLOCK_N, BLOCK_C, BLOCK_Q,
    )  # fmt: skip
    pointers = out + rows.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(pointers, means, mask=(rows[:, None] < num_rows) & (c[None, :] < channels))


@triton.jit(do_not_specialize=["height", "width", "token_offset", "token_stride"])
def upsample(
    codes, tokens, out, channels, height, width, full_height, full_width, token_offset, token_stride,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes each image's code map at full size; out is (images, pixels, channels)."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = full_height * full_width
    if not TOKENS:
        codes += image * height * width * channels
    values = upsampled(
        codes, tokens + image * token_stride + token_offset, p, p < pixels, c, channels, height, width,
        full_height, full_width, TOKENS, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    pointers = out + (image * pixels + p[:, None]) * channels + c[None, :]
    tl.store(pointers, values, mask=(p[:, None] < pixels) & (c[None, :] < channels))


@triton.jit
def phi(
    source, tokens, weight, bias, ratio, p, o, inside, channels, full_height, full_width,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Pixels p, channels o of phi of a map at full size. The identity part comes last, as in the reference."""
    products = convolved(
        source, tokens, weight, p, o, channels, full_height, full_width, TOKENS, BLOCK_P, BLOCK_I, BLOCK_O
    )
    pixel = p
    if TOKENS:
        pixel = tl.load(tokens + p, mask=p < full_height * full_width, other=0)
    middle = tl.load(source + pixel.to(tl.int64)[:, None] * channels + o[None, :], mask=inside, other=0.0)
    return (1.0 - ratio) * middle + ratio * (products + tl.load(bias + o, mask=o < channels, other=0.0)[None, :])


@triton.jit(do_not_specialize=["token_offset", "token_stride", "partial_offset", "partial_stride"])
def update(
    source, tokens, weight, bias, f, rest, f_hat, out, partials, ratio, channels, full_height, full_width,
    token_offset, token_stride, partial_offset, partial_stride,
    TOKENS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Updates f_hat and rest for a scale, and stores the sum of the squares of the new rest in this tile.

    `source` is the code map at full size, or with TOKENS the codebook. FIRST: rest is f. LAST: f_hat is written to
    `out` (images, channels, pixels), and is NaN where f is not finite.
    """
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixels = full_height * full_width
    inside = (p[:, None] < pixels) & (o[None, :] < channels)
    if not TOKENS:
        source += image * pixels * channels
    h = phi(
        source, tokens + image * token_stride + token_offset, weight, bias, ratio, p, o, inside, channels,
        full_height, full_width, TOKENS, BLOCK_P, BLOCK_I, BLOCK_O,
    )  # fmt: skip
    at = (image * pixels + p[:, None]) * channels + o[None, :]
    if FIRST:
        new_rest = tl.load(f + at, mask=inside, other=0.0) - h
        new_f_hat = h
    else:
        new_rest = tl.load(rest + at, mask=inside, other=0.0) - h
        new_f_hat = tl.load(f_hat + at, mask=inside, other=0.0) + h
    if LAST:
        value = tl.load(f + at, mask=inside, other=0.0)
        new_f_hat += value - value
        tl.store(out + (image * channels + o[None, :]) * pixels + p[:, None], new_f_hat, mask=inside)
    else:
        tl.store(rest + at, new_rest, mask=inside)
        tl.store(f_hat + at, new_f_hat, mask=inside)
    squares = tl.sum(tl.sum(tl.where(inside, new_rest * new_rest, 0.0), axis=1), axis=0)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials + image * partial_stride + partial_offset + tile, squares)


@triton.jit
def add_scale(
    source, weight, bias, f_hat, new_map, out, ratio, channels, full_height, full_width,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """f_hat + phi of a map at full size. It is written as a map and, to `out`, as (images, channels, pixels)."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixels = full_height * full_width
    inside = (p[:, None] < pixels) & (o[None, :] < channels)
    h = phi(
        source + image * pixels * channels, source, weight, bias, ratio, p, o, inside, channels,
        full_height, full_width, False, BLOCK_P, BLOCK_I, BLOCK_O,
    )  # fmt: skip
    at = (image * pixels + p[:, None]) * channels + o[None, :]
    new_f_hat = tl.load(f_hat + at, mask=inside, other=0.0) + h
    tl.store(new_map + at, new_f_hat, mask=inside)
    tl.store(out + (image * channels + o[None, :]) * pixels + p[:, None], new_f_hat, mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def maps_of(f: torch.Tensor) -> torch.Tensor:
    """f (B, C, H, W) as dense maps (B, H · W, C). This is no copy if f is in the channels-last format."""
    return f.flatten(2).mT.contiguous()


def matrices(phi_weight: torch.Tensor) -> torch.Tensor:
    """phi_weight (n, out, in, 3, 3) as nine matrices per convolution, (n, 9, in, out)."""
    return phi_weight.flatten(3).permute(0, 3, 2, 1).contiguous()


def pool_maps(source: torch.Tensor, full: tuple[int, int], size: tuple[int, int], out: torch.Tensor) -> None:
    """Starts `pool` for maps (B, H · W, C); out is (B, height · width, C)."""
    images, tokens, channels = out.shape
    rows = images * tokens
    config = choose("multi_scale_quantize.pool", target_of(out.device), rows, 4)
    grid = (triton.cdiv(rows, config.tiles["BLOCK_N"]), triton.cdiv(channels, config.tiles["BLOCK_C"]))
    arguments = {"source": source, "out": out, "num_rows": rows, "channels": channels}
    arguments |= {"height": size[0], "width": size[1], "full_height": full[0], "full_width": full[1]}
    launch(pool, grid, arguments | {"window": largest_window(size, full)}, config)


def upsample_codes(
    codes: torch.Tensor, size: tuple[int, int], full: tuple[int, int], out: torch.Tensor, places: dict
) -> None:
    """Starts `upsample` to out (B, H · W, C), for codes by the tokens in `places`, or without them for maps of
    codes."""
    images, pixels, channels = out.shape
    config = choose("multi_scale_quantize.upsample", target_of(out.device), images * pixels, 4)
    grid = (triton.cdiv(pixels, config.tiles["BLOCK_P"]), images, triton.cdiv(channels, config.tiles["BLOCK_C"]))
    arguments = {"tokens": codes, "token_offset": 0, "token_stride": 0} | places
    arguments |= {"codes": codes, "out": out, "channels": channels, "height": size[0], "width": size[1]}
    arguments |= {"full_height": full[0], "full_width": full[1], "TOKENS": "tokens" in places}
    launch(upsample, grid, arguments, config)


class _Forward:
    """The launches of one call of multi_scale_quantize."""

    def __init__(self, f, codebook, phi_weight, phi_bias, scales: int, ratio: float, cosine: bool):
        self.images, self.channels, *full = f.shape
        self.full, self.pixels, self.scales = tuple(full), full[0] * full[1], scales
        self.f, self.codebook, self.ratio = maps_of(f), Codebook(codebook, cosine), ratio
        self.weight, self.bias = matrices(phi_weight), phi_bias.contiguous()
        self.rest, self.f_hat, self.u = (torch.empty_like(self.f) for _ in range(3))
        self.out = f.new_empty(f.shape)
        self.target = target_of(f.device)
        self.config = choose("multi_scale_quantize.update", self.target, self.images * self.pixels, 4)
        tiles = self.config.tiles
        self.grid = (
            triton.cdiv(self.pixels, tiles["BLOCK_P"]), self.images, triton.cdiv(self.channels, tiles["BLOCK_O"])
        )  # fmt: skip
        self.partials = f.new_empty(self.images, scales, self.grid[0] * self.grid[2])

    def search(self, k: int, size: tuple[int, int], tokens: torch.Tensor, offset: int) -> None:
        source, length = self.rest if k else self.f, size[0] * size[1]
        rows, image = self.images * length, (length, tokens.stride(0), offset)
        config = choose("multi_scale_quantize.search", self.target, rows, 4)
        if self.channels > config.tiles["BLOCK_C"]:  # else the search pools for every tile of the codebook
            z = source.new_empty(self.images, length, self.channels)
            pool_maps(source, self.full, size, z)
            self.codebook.find(z.flatten(0, 1), tokens, image)
            return
        arguments = {"source": source, "height": size[0], "width": size[1], "full_height": self.full[0]}
        arguments |= {"full_width": self.full[1], "window": largest_window(size, self.full)}
        self.codebook.search(search, "multi_scale_quantize.search", rows, arguments, tokens, image)

    def update(self, k: int, size: tuple[int, int], phi: int, tokens: torch.Tensor, offset: int) -> None:
        codes, resized = self.codebook.codes, size != self.full
        places = {"tokens": tokens, "token_offset": offset, "token_stride": tokens.stride(0)}
        if resized:
            upsample_codes(codes, size, self.full, self.u, places)
        arguments = places | {"source": self.u if resized else codes, "TOKENS": not resized}
        arguments |= {"weight": self.weight[phi], "bias": self.bias[phi], "ratio": self.ratio}
        arguments |= {"f": self.f, "rest": self.rest, "f_hat": self.f_hat, "out": self.out}
        arguments |= {"channels": self.channels, "full_height": self.full[0], "full_width": self.full[1]}
        arguments |= {"partials": self.partials, "partial_stride": self.partials.stride(0)}
        arguments |= {"partial_offset": k * self.partials.stride(1), "FIRST": k == 0, "LAST": k == self.scales - 1}
        launch(update, self.grid, arguments, self.config)


# Maps are the second dimension of grids, which CUDA limits to 65535, so larger batches are divided.
_MOST_MAPS = 65535


def multi_scale_quantize(
    f: torch.Tensor, codebook: torch.Tensor, phi_weight: torch.Tensor, phi_bias: torch.Tensor,
    heights: list[int], widths: list[int], phi_index: list[int], phi_ratio: float, cosine: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The raw operator `_multi_scale_quantize`: tokens (B, L), f_hat (B, C, H, W), errors (B, K)."""
    sizes = list(zip(heights, widths, strict=True))
    tokens = f.new_empty((f.shape[0], sum(height * width for height, width in sizes)), dtype=torch.int64)
    if f.shape[0] == 0:
        return tokens, f.new_empty(f.shape), f.new_empty(0, len(sizes))
    if f.shape[0] > _MOST_MAPS:
        others = (codebook, phi_weight, phi_bias, heights, widths, phi_index, phi_ratio, cosine)
        parts = [multi_scale_quantize(part, *others) for part in f.split(_MOST_MAPS)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    forward = _Forward(f, codebook, phi_weight, phi_bias, len(sizes), phi_ratio, cosine)
    offset = 0
    for k, size in enumerate(sizes):
        forward.search(k, size, tokens, offset)
        forward.update(k, size, phi_index[k], tokens, offset)
        offset += size[0] * size[1]
    return tokens, forward.out, forward.partials.sum(-1)


def multi_scale_quantize_backward(
    f: torch.Tensor, codebook: torch.Tensor, phi_weight: torch.Tensor, phi_bias: torch.Tensor, tokens: torch.Tensor,
    derrors: torch.Tensor, heights: list[int], widths: list[int], phi_index: list[int], phi_ratio: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The raw operator `_multi_scale_quantize_backward`: df, dcodebook, dphi_weight, dphi_bias."""
    parameters = (codebook, phi_weight, phi_bias)
    if f.shape[0] == 0:
        return f.new_empty(f.shape), *(parameter.new_zeros(parameter.shape) for parameter in parameters)
    most = max(1, _MOST_MAPS // len(heights))
    if f.shape[0] > most:
        split = zip(f.split(most), tokens.split(most), derrors.split(most), strict=True)
        others = (heights, widths, phi_index, phi_ratio)
        parts = [multi_scale_quantize_backward(part, *parameters, *rest, *others) for part, *rest in split]
        dfs, *gradients = zip(*parts, strict=True)
        return torch.cat(dfs), *(sum(of_parts) for of_parts in gradients)
    sizes, full = list(zip(heights, widths, strict=True)), (f.shape[2], f.shape[3])
    return quantize_backward(maps_of(f), *parameters, tokens, derrors, full, sizes, phi_index, phi_ratio)


def next_scale_input(
    f_hat: torch.Tensor, codes: torch.Tensor, phi_weight: torch.Tensor, phi_bias: torch.Tensor, phi_index: int,
    height: int, width: int, next_height: int, next_width: int, phi_ratio: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The raw operator `_next_scale_input`: new_f_hat (B, C, H, W), next_map (B, next_height · next_width, C)."""
    images, channels, *full = f_hat.shape
    out = f_hat.new_empty(f_hat.shape)
    next_map = f_hat.new_empty(images, next_height * next_width, channels)
    if images == 0:
        return out, next_map
    size, full, before, source = (height, width), tuple(full), maps_of(f_hat), codes.contiguous()
    if size != full:
        codes, source = source, torch.empty_like(before)
        upsample_codes(codes, size, full, source, {})
    after = torch.empty_like(before)
    config = choose("multi_scale_quantize.add_scale", target_of(f_hat.device), images * full[0] * full[1], 4)
    tiles = config.tiles
    grid = (triton.cdiv(full[0] * full[1], tiles["BLOCK_P"]), images, triton.cdiv(channels, tiles["BLOCK_O"]))
    arguments = {"source": source, "weight": matrices(phi_weight[phi_index : phi_index + 1]), "f_hat": before}
    arguments |= {"bias": phi_bias[phi_index].contiguous(), "new_map": after, "out": out, "ratio": phi_ratio}
    arguments |= {"channels": channels, "full_height": full[0], "full_width": full[1]}
    launch(add_scale, grid, arguments, config)
    if next_map.numel():
        pool_maps(after, full, (next_height, next_width), next_map)
    return out, next_map
