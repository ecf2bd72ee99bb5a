"""Modulated LayerNorm, y = (x - mean)·rstd·(1 + scale) + shift. The gated form adds a gated residual sum before it.

Memory bandwidth is the limit. With N = B·L·C elements, forward has to move 2 N (x in, y out), and 4 N in the gated
form; backward has to move 3 N (dy, x in, dx out), and 6 N in the gated form. These kernels move that, and nothing else
that grows with N: a row is read once and stays in registers between the passes over it. So the plain two-pass variance
(the mean first, then the squares of the centred values) costs no traffic, and it is accurate where E[x²] - E[x]² would
cancel.

Backward, with h = (x - mean)·rstd, g = dy·(1 + scale) and means over the row:
  dx = rstd·(g - mean(g) - h·mean(g·h)) [+ dresidual],   dscale = Σ dy·h,   dshift = Σ dy,
and in the gated form dbranch = dx·gate, dgate = Σ dx·branch.

The sums run over tokens, that is across the rows that programs work on. Such a backward can be slow for two reasons. If
each multiprocessor has only one program, too few bytes are in flight. If each partial sum covers few rows, the partial
sums themselves are much traffic. Here a program keeps its sums in registers over a contiguous range of rows and writes
them once, in fp32. With P programs, writing and reading them moves 8·P·C bytes for each sum, and P is as many as fill
the GPU, for every N. One short kernel adds the P rows in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import configs
from .adaln_layer_norm_rows import (
    columns,
    exists,
    load,
    load_factors,
    mean_of_products,
    mean_of_row,
    rows_at,
    store,
    zeros,
)
from .launch import launch
from .targets import Target, target_of

# ---- which rows a program works on -----------------------------------------------------------------------------------


@triton.jit
def _range(rows, rows_per_program, programs):
    """This program's group of rows (a sample, or all tokens of all samples), and its range in the group."""
    group = tl.program_id(0) // programs
    begin = tl.program_id(0) % programs * rows_per_program
    return group, begin, tl.minimum(begin + rows_per_program, rows)


@triton.jit
def _tile_of_rows(group, start, rows, length, BY_SAMPLE: tl.constexpr, ROWS: tl.constexpr):
    """The row's index in its group and in the output, and its sample and token; (ROWS, 1) each."""
    row = (start + tl.arange(0, ROWS))[:, None]
    sample = group if BY_SAMPLE else row // length
    token = row if BY_SAMPLE else row % length
    return row, group.to(tl.int64) * rows + row, sample, token


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["length", "rows", "rows_per_program", "programs"])
def adaln_forward(
    x, branch, gate, scale, shift, residual, y, mean, rstd,
    x_b, x_l, branch_b, branch_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
    length, rows, rows_per_program, programs, eps,
    BY_SAMPLE: tl.constexpr, GATE_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr,
    C: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (C + CHUNK - 1) // CHUNK
    group, begin, end = _range(rows, rows_per_program, programs)
    first = tl.zeros((ROWS, 1), tl.int32)  # as many rows as the tiles have, so that they share a layout
    if not SCALE_PER_TOKEN:
        factors = load_factors(rows_at(scale, group, first, scale_b, scale_l), None, C, CHUNK, TAIL)
    if not SHIFT_PER_TOKEN:
        shifts = load(rows_at(shift, group, first, shift_b, shift_l), None, C, CHUNK, TAIL)
    if branch is not None and not GATE_PER_TOKEN:
        gates = load(rows_at(gate, group, first, gate_b, gate_l), None, C, CHUNK, TAIL)

    for start in range(begin, end, ROWS):
        in_group, row, sample, token = _tile_of_rows(group, start, rows, length, BY_SAMPLE, ROWS)
        present = None if ROWS == 1 else in_group < end
        values = load(rows_at(x, sample, token, x_b, x_l), present, C, CHUNK, TAIL)
        if branch is not None:
            branches = load(rows_at(branch, sample, token, branch_b, branch_l), present, C, CHUNK, TAIL)
            if GATE_PER_TOKEN:
                gates = load(rows_at(gate, sample, token, gate_b, gate_l), present, C, CHUNK, TAIL)
            sums = ()
            for i in tl.static_range(PIECES):
                # The LayerNorm is taken of the rounded residual.
                total = (values[i] + gates[i] * branches[i]).to(residual.dtype.element_ty)
                sums = sums + (total.to(tl.float32),)
            values = sums
            store(residual + row * C, values, present, C, CHUNK, TAIL)

        row_mean = mean_of_row(values, C, CHUNK, TAIL)
        centred = ()
        for i in tl.static_range(PIECES):
            difference = values[i] - row_mean
            if i == C // CHUNK and C % CHUNK != TAIL:
                difference = tl.where(columns(i, C, CHUNK, TAIL) < C, difference, 0.0)
            centred = centred + (difference,)
        row_rstd = tl.rsqrt(mean_of_products(centred, centred, C, CHUNK, TAIL) + eps)

        if SCALE_PER_TOKEN:
            factors = load_factors(rows_at(scale, sample, token, scale_b, scale_l), present, C, CHUNK, TAIL)
        if SHIFT_PER_TOKEN:
            shifts = load(rows_at(shift, sample, token, shift_b, shift_l), present, C, CHUNK, TAIL)
        results = ()
        for i in tl.static_range(PIECES):
            results = results + (centred[i] * row_rstd * factors[i] + shifts[i],)
        store(y + row * C, results, present, C, CHUNK, TAIL)
        tl.store(mean + row, row_mean, mask=present)
        tl.store(rstd + row, row_rstd, mask=present)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _add(sums, tiles, C: tl.constexpr, CHUNK: tl.constexpr):
    new = ()
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        new = new + (sums[i] + tiles[i],)
    return new


@triton.jit
def _store_sums(base, sums, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """Adds up the sums of the warps of a program and stores them as one row of partial sums."""
    row = base + tl.program_id(0).to(tl.int64) * C
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        pointers = row + columns(i, C, CHUNK, TAIL)
        tl.store(pointers, tl.sum(sums[i], axis=0, keep_dims=True), mask=exists(None, i, C, CHUNK, TAIL))


@triton.jit(do_not_specialize=["length", "rows", "rows_per_program", "programs"])
def adaln_backward(
    dresidual, dy, x, branch, gate, scale, mean, rstd, dx, dbranch, dgate, dscale, dshift,
    dresidual_b, dresidual_l, dy_b, dy_l, x_b, x_l, branch_b, branch_l, gate_b, gate_l, scale_b, scale_l,
    length, rows, rows_per_program, programs,
    BY_SAMPLE: tl.constexpr, GATE_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr,
    C: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # If PER_TOKEN, dgate, dscale and dshift are gradients, (tokens, C); else partial sums, (programs of all groups, C).
    PIECES: tl.constexpr = (C + CHUNK - 1) // CHUNK
    group, begin, end = _range(rows, rows_per_program, programs)
    first = tl.zeros((ROWS, 1), tl.int32)  # as many rows as the tiles have, so that they share a layout
    if not SCALE_PER_TOKEN:
        factors = load_factors(rows_at(scale, group, first, scale_b, scale_l), None, C, CHUNK, TAIL)
    if branch is not None and not GATE_PER_TOKEN:
        gates = load(rows_at(gate, group, first, gate_b, gate_l), None, C, CHUNK, TAIL)
    dgates = zeros(ROWS, C, CHUNK, TAIL)
    dscales = zeros(ROWS, C, CHUNK, TAIL)
    dshifts = zeros(ROWS, C, CHUNK, TAIL)

    for start in range(begin, end, ROWS):
        in_group, row, sample, token = _tile_of_rows(group, start, rows, length, BY_SAMPLE, ROWS)
        present = None if ROWS == 1 else in_group < end
        values = load(rows_at(x, sample, token, x_b, x_l), present, C, CHUNK, TAIL)
        dys = load(rows_at(dy, sample, token, dy_b, dy_l), present, C, CHUNK, TAIL)
        if present is None:
            row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
        else:
            row_mean = tl.load(mean + row, mask=present, other=0.0)
            row_rstd = tl.load(rstd + row, mask=present, other=0.0)
        if branch is not None:  # loaded early: the sums below have to be waited for
            upstream = load(rows_at(dresidual, sample, token, dresidual_b, dresidual_l), present, C, CHUNK, TAIL)
            branches = load(rows_at(branch, sample, token, branch_b, branch_l), present, C, CHUNK, TAIL)
            if GATE_PER_TOKEN:
                gates = load(rows_at(gate, sample, token, gate_b, gate_l), present, C, CHUNK, TAIL)
        if SCALE_PER_TOKEN:
            factors = load_factors(rows_at(scale, sample, token, scale_b, scale_l), present, C, CHUNK, TAIL)

        # dy is added to the sums before the sums of the row are waited for, so that it needs no registers afterwards.
        normalised, gradients, dscale_terms = (), (), ()
        for i in tl.static_range(PIECES):
            h = (values[i] - row_mean) * row_rstd
            normalised, gradients = normalised + (h,), gradients + (dys[i] * factors[i],)
            dscale_terms = dscale_terms + (dys[i] * h,)
        if SCALE_PER_TOKEN:
            store(dscale + row * C, dscale_terms, present, C, CHUNK, TAIL)
        else:
            dscales = _add(dscales, dscale_terms, C, CHUNK)
        if SHIFT_PER_TOKEN:
            store(dshift + row * C, dys, present, C, CHUNK, TAIL)
        else:
            dshifts = _add(dshifts, dys, C, CHUNK)
        mean_g = mean_of_products(dys, factors, C, CHUNK, TAIL)
        mean_gh = mean_of_products(gradients, normalised, C, CHUNK, TAIL)

        dxs = ()
        for i in tl.static_range(PIECES):
            d = row_rstd * (gradients[i] - mean_g - normalised[i] * mean_gh)
            dxs = dxs + (d if branch is None else d + upstream[i],)
        store(dx + row * C, dxs, present, C, CHUNK, TAIL)
        if branch is not None:
            dbranches, dgate_terms = (), ()
            for i in tl.static_range(PIECES):
                dbranches, dgate_terms = dbranches + (dxs[i] * gates[i],), dgate_terms + (dxs[i] * branches[i],)
            store(dbranch + row * C, dbranches, present, C, CHUNK, TAIL)
            if GATE_PER_TOKEN:
                store(dgate + row * C, dgate_terms, present, C, CHUNK, TAIL)
            else:
                dgates = _add(dgates, dgate_terms, C, CHUNK)

    if not SCALE_PER_TOKEN:
        _store_sums(dscale, dscales, C, CHUNK, TAIL)
    if not SHIFT_PER_TOKEN:
        _store_sums(dshift, dshifts, C, CHUNK, TAIL)
    if branch is not None and not GATE_PER_TOKEN:
        _store_sums(dgate, dgates, C, CHUNK, TAIL)


@triton.jit
def _sum_rows(partials, out, all_programs, count, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    if sample * count < all_programs:
        rows = partials + (tl.program_id(2).to(tl.int64) * all_programs + sample * count) * C
        total = tl.zeros((ROWS, CHUNK), tl.float32)
        for start in range(0, count, ROWS):
            row = (start + tl.arange(0, ROWS))[:, None]
            total += tl.load(rows + row * C + column[None, :], mask=(row < count) & (column < C)[None, :], other=0.0)
        tl.store(out + sample * C + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=["all_programs", "count0", "count1", "count2"])
def sum_partials(
    partials, out0, out1, out2, all_programs, count0, count1, count2,
    C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Row s of output k becomes the sum of rows [s·count, (s+1)·count) of partials[k], (all_programs, C)."""
    if tl.program_id(2) == 0:
        _sum_rows(partials, out0, all_programs, count0, C, ROWS, CHUNK)
    elif tl.program_id(2) == 1:
        _sum_rows(partials, out1, all_programs, count1, C, ROWS, CHUNK)
    else:
        _sum_rows(partials, out2, all_programs, count2, C, ROWS, CHUNK)


# ---- launchers -------------------------------------------------------------------------------------------------------

# How many fp32 values a program keeps for each channel of its rows. Forward: x, scale and shift, in the gated form also
# gate. Backward: h, g, scale and two sums, in the gated form also gate, dresidual, branch and another sum.
_MAX_CHANNELS = 16384  # the backward of the gated form has no configuration for more
_FORWARD_VALUES, _GATED_FORWARD_VALUES = 3, 4
_BACKWARD_VALUES, _GATED_BACKWARD_VALUES = 5, 9


@functools.lru_cache(maxsize=1024)
def _programs(groups: int, tiles: int, resident: int) -> int:
    """How many programs share the `tiles` of one group, if the GPU holds `resident` programs at a time.

    The estimated time is that of all waves of programs, and a program costs one tile more than it has. The number
    depends on the shape and the GPU only, so the sums depend on nothing else either.
    """

    def time(programs: int) -> int:
        return triton.cdiv(groups * programs, resident) * (triton.cdiv(tiles, programs) + 1)

    candidates = [max(1, min(tiles, waves * resident // groups)) for waves in (1, 2, 3, 4)]
    return min(candidates, key=time)


def _partition(x: torch.Tensor, by_sample: bool, config: configs.Config, target: Target) -> dict[str, int]:
    """The kernels' arguments that say which rows a program works on."""
    batch, length, _ = x.shape
    groups, rows = (batch, length) if by_sample else (1, batch * length)
    tiles = triton.cdiv(rows, config.tiles["ROWS"])
    # A multiprocessor of NVIDIA has 65536 registers; one of AMD has twice as many, for warps that are twice as wide.
    resident_warps = 65536 // 32 // config.options.get("maxnreg", 128)
    resident = target.multiprocessors * max(1, resident_warps // config.num_warps)
    tiles_per_program = triton.cdiv(tiles, _programs(groups, tiles, resident))
    return {
        "length": length,
        "rows": rows,
        "rows_per_program": tiles_per_program * config.tiles["ROWS"],
        "programs": triton.cdiv(tiles, tiles_per_program),
        "BY_SAMPLE": by_sample,
    }


def _row_view(tensor: torch.Tensor, swap: bool) -> torch.Tensor:
    """(B, L, C) with a dense last dimension.

    `swap` turns B samples of one token into one sample of B tokens, so that a program has more than one row to work on.
    """
    dense = tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()
    return dense.transpose(0, 1) if swap else dense


def _strides(**tensors: torch.Tensor | None) -> dict[str, int]:
    strides = {}
    for name, tensor in tensors.items():
        for suffix, dim in (("b", 0), ("l", 1)):
            broadcast = tensor is None or tensor.shape[dim] == 1
            strides[f"{name}_{suffix}"] = 0 if broadcast else tensor.stride(dim)
    return strides


def _per_token(modulation: torch.Tensor | None, x: torch.Tensor) -> bool:
    return modulation is not None and modulation.shape[1] == x.shape[1] != 1


def _by_sample(x: torch.Tensor, *modulation: torch.Tensor | None) -> bool:
    """Whether a program has to stay inside one sample, because it loads and sums the modulation once per sample."""
    shapes = [tensor.shape for tensor in modulation if tensor is not None]
    return x.shape[0] == 1 or any(shape[0] != 1 and shape[1] == 1 for shape in shapes)


def _channel_tiles(channels: int, config: configs.Config) -> dict[str, int]:
    rest = channels % config.tiles["CHUNK"]
    return {"C": channels, "TAIL": triton.next_power_of_2(rest) if rest else 0}


def _forward(x, branch, gate, scale, shift, residual, y, eps):
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.shape[2] > _MAX_CHANNELS:
        raise ValueError(f"x: expected at most {_MAX_CHANNELS} channels in Triton, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        return mean, rstd
    swap = x.shape[1] == 1
    x, branch, gate, scale, shift = (
        None if tensor is None else _row_view(tensor, swap) for tensor in (x, branch, gate, scale, shift)
    )
    target = target_of(x.device)
    values = _FORWARD_VALUES if branch is None else _GATED_FORWARD_VALUES
    config = configs.choose("adaln_layer_norm.adaln_forward", target, values * x.shape[2], x.itemsize)
    partition = _partition(x, _by_sample(x, gate, scale, shift), config, target)
    arguments = {
        "x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift,
        "residual": residual, "y": y, "mean": mean, "rstd": rstd,
        **_strides(x=x, branch=branch, gate=gate, scale=scale, shift=shift), **partition, "eps": float(eps),
        "GATE_PER_TOKEN": _per_token(gate, x), "SCALE_PER_TOKEN": _per_token(scale, x),
        "SHIFT_PER_TOKEN": _per_token(shift, x), **_channel_tiles(x.shape[2], config),
    }  # fmt: skip
    groups = x.shape[0] if partition["BY_SAMPLE"] else 1
    launch(adaln_forward, (groups * partition["programs"],), arguments, config)
    return mean, rstd


def adaln_layer_norm(x, scale, shift, eps):
    y = x.new_empty(x.shape)
    return y, *_forward(x, None, None, scale, shift, None, y, eps)


def gated_residual_adaln(x, branch, gate, scale, shift, eps):
    residual, y = x.new_empty(x.shape), branch.new_empty(x.shape)
    return residual, y, *_forward(x, branch, gate, scale, shift, residual, y, eps)


def _backward(dresidual, dy, x, branch, gate, scale, mean, rstd, dx, dbranch, gradients: dict[str, torch.Tensor]):
    """Fills dx, dbranch and the gradients of modulation. `gradients` has the latter by the name of the kernel's
    argument."""
    if x.numel() == 0:
        for gradient in gradients.values():
            gradient.zero_()
        return
    swap = x.shape[1] == 1
    dresidual, dy, x, branch, gate, scale, *views = (
        None if tensor is None else _row_view(tensor, swap)
        for tensor in (dresidual, dy, x, branch, gate, scale, *gradients.values())
    )
    target = target_of(x.device)
    channels = x.shape[2]
    values = _BACKWARD_VALUES if branch is None else _GATED_BACKWARD_VALUES
    config = configs.choose("adaln_layer_norm.adaln_backward", target, values * channels, x.itemsize)
    partition = _partition(x, _by_sample(x, *views), config, target)
    programs = (x.shape[0] if partition["BY_SAMPLE"] else 1) * partition["programs"]

    per_token = {name: _per_token(view, x) for name, view in zip(gradients, views, strict=True)}
    reduced = [gradients[name] for name in gradients if not per_token[name]]
    partials = x.new_empty((len(reduced), programs, channels), dtype=torch.float32)
    rows = iter(partials)
    sums = {name: gradients[name] if per_token[name] else next(rows) for name in gradients}
    arguments = {
        "dresidual": dresidual, "dy": dy, "x": x, "branch": branch, "gate": gate, "scale": scale,
        "mean": mean.contiguous(), "rstd": rstd.contiguous(), "dx": dx, "dbranch": dbranch, "dgate": None, **sums,
        **_strides(dresidual=dresidual, dy=dy, x=x, branch=branch, gate=gate, scale=scale), **partition,
        "GATE_PER_TOKEN": per_token.get("dgate", False), "SCALE_PER_TOKEN": per_token["dscale"],
        "SHIFT_PER_TOKEN": per_token["dshift"], **_channel_tiles(channels, config),
    }  # fmt: skip
    launch(adaln_backward, (programs,), arguments, config)
    if reduced:
        _sum_partials(partials, reduced, target)


def _sum_partials(partials: torch.Tensor, outputs: list[torch.Tensor], target: Target) -> None:
    """Adds partials (outputs, programs, C) up to the outputs, each (B, 1, C) or (1, 1, C)."""
    count, programs, channels = partials.shape
    config = configs.choose("adaln_layer_norm.sum_partials", target, channels, partials.itemsize)
    padded = outputs + outputs[:1] * (3 - count)
    samples = [output.shape[0] for output in padded]
    arguments = {
        "partials": partials, **{f"out{i}": output for i, output in enumerate(padded)}, "all_programs": programs,
        **{f"count{i}": programs // sample for i, sample in enumerate(samples)}, "C": channels,
    }  # fmt: skip
    grid = (max(samples), triton.cdiv(channels, config.tiles["CHUNK"]), count)
    launch(sum_partials, grid, arguments, config)


def _gradient(x: torch.Tensor, per_sample: bool, per_token: bool) -> torch.Tensor:
    return x.new_empty((x.shape[0] if per_sample else 1, x.shape[1] if per_token else 1, x.shape[2]))


def adaln_layer_norm_backward(dy, x, scale, mean, rstd, shift_per_sample, shift_per_token):
    dx, dscale, dshift = x.new_empty(x.shape), x.new_empty(scale.shape), _gradient(x, shift_per_sample, shift_per_token)
    _backward(None, dy, x, None, None, scale, mean, rstd, dx, None, {"dscale": dscale, "dshift": dshift})
    return dx, dscale, dshift


def gated_residual_adaln_backward(
    dresidual, dy, residual, branch, gate, scale, mean, rstd, shift_per_sample, shift_per_token
):
    # An absent gradient is zero: one row of zeros, which every token reads.
    zeros = residual.new_zeros((1, 1, residual.shape[2])).expand(residual.shape)
    dresidual = zeros if dresidual is None else dresidual
    dy = zeros if dy is None else dy
    dx, dbranch = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    dgate, dscale = residual.new_empty(gate.shape), residual.new_empty(scale.shape)
    dshift = _gradient(residual, shift_per_sample, shift_per_token)
    gradients = {"dgate": dgate, "dscale": dscale, "dshift": dshift}
    _backward(dresidual, dy, residual, branch, gate, scale, mean, rstd, dx, dbranch, gradients)
    return dx, dbranch, dgate, dscale, dshift
