"""Tools to test a kernel: a comparison with a derived tolerance, seeded inputs, the named shapes of the model family.

The tests and benchmarks of this package use them, and so can anyone who tests another kernel against its references.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._stated_order import stated_order as stated_order

# The side of each square token map, from coarse to fine.
SCHEDULES: dict[str, tuple[int, ...]] = {
    "embedded": (1, 2, 3, 4, 6, 8),  # 130 tokens, the model in var/weights
    "256px": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 680, VAR d16 - d30
    "512px": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 2240, VAR d36
    "1024px": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),  # 9451
    "infinity-256px": (1, 2, 4, 6, 8, 12, 16),  # 521
    "infinity-512px": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32),  # 2521
    "infinity-1024px": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),  # 10521
}


def scale_lens(patch_nums: tuple[int, ...] | str) -> tuple[int, ...]:
    """Tokens per scale of a schedule, given as its sides or by its name in :data:`SCHEDULES`."""
    if isinstance(patch_nums, str):
        if patch_nums not in SCHEDULES:
            raise ValueError(f"patch_nums: expected one of {', '.join(SCHEDULES)}, got {patch_nums!r}")
        patch_nums = SCHEDULES[patch_nums]
    return tuple(side * side for side in patch_nums)


@dataclass(frozen=True)
class Shape:
    """The sizes of one model: channels, attention heads, and the schedule's sides."""

    width: int
    heads: int
    patch_nums: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def scale_lens(self) -> tuple[int, ...]:
        return scale_lens(self.patch_nums)

    @property
    def length(self) -> int:
        return sum(self.scale_lens)


SHAPES: dict[str, Shape] = {
    "d16": Shape(1024, 16, SCHEDULES["256px"]),
    "d20": Shape(1280, 20, SCHEDULES["256px"]),
    "d24": Shape(1536, 24, SCHEDULES["256px"]),
    "d30": Shape(1920, 30, SCHEDULES["256px"]),
    "d36": Shape(2304, 36, SCHEDULES["512px"]),
}

# Rows shorter than this are compared only with the whole tensor: the largest of so few elements may be small by chance.
_ROW = 8
_ROW_SLACK = 8


def assert_accurate(
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    *,
    name: str = "",
    may_vanish: bool = False,
) -> None:
    r"""Raise AssertionError unless `actual` is as accurate as plain PyTorch in the same dtype, up to a factor of two.

    `actual` is the kernel's result. `same_dtype` is the result of plain PyTorch in the dtype under test, computed
    inside :func:`stated_order`, so that the bound is the same on every host. `exact` is the result of the float64
    reference on the same (already rounded) inputs. All three have the same shape; `actual` and `same_dtype` have the
    same dtype.

    With :math:`E = \max|\text{same\_dtype} - \text{exact}|`, :math:`M = \max|\text{exact}|` and ``eps`` the spacing of
    the dtype at 1, every element must satisfy

    .. math:: |\text{actual} - \text{exact}| \le 2\,(E + \text{eps}\cdot M) + \text{tiny}.

    No number in this bound is chosen by hand for an op. A kernel that sums in another order makes errors of the same
    distribution as plain PyTorch, and the factor two allows for the spread of their maximum. ``eps`` times ``M`` is one
    rounding: two correct results may be neighbours in the dtype. Where a sum cancels, its rounding is that of its
    terms, which have the size of the large elements, not of the small result. The same term also serves if `E` happens
    to be zero. ``tiny`` (the smallest normal number) allows for instructions that flush subnormals.

    One large element must not excuse all others: late rows of an attention over hundreds of keys are twenty times
    smaller than the first row, so that in bf16 zeros would pass. If the last dimension has 8 elements or more, the
    errors are therefore bounded a second time row by row, relative to each row's own largest element:
    :math:`|\text{actual}-\text{exact}| \le 8\,(e + \text{eps})\,M_{row} + \text{tiny}`, with `e` the largest of
    :math:`E_{row}/M_{row}` over the rows; the smaller bound counts. This second bound finds forgotten and misplaced
    rows and is wide enough for any order of summation: n terms added one after another are off by about sqrt(n)
    roundings, n terms added by halves by sqrt(log2 n), which is eight times less at n = 680. Rows that plain PyTorch
    does not resolve (:math:`E_{row} \ge M_{row}/2`: a gradient that is zero but for rounding) have the first bound
    only.

    Non-finite values: wherever `exact`, rounded to the dtype, is NaN or infinite, `actual` must be the same; everywhere
    else it must be finite. Non-finite elements take no part in the maxima.

    If the first bound would let a tensor of zeros pass, the comparison could not fail, and an AssertionError says so,
    unless `may_vanish` is true or `exact` is zero but for rounding. Mistakes of the test, not of the kernel, raise
    TypeError (a tensor is not floating point, or `exact` is not float64) or ValueError (`same_dtype` and `exact` differ
    in shape).
    """
    label = name or "actual"
    _check_operands(label, actual, same_dtype, exact)
    if actual.shape != exact.shape:
        raise AssertionError(f"{label}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{label}: expected dtype {same_dtype.dtype}, got {actual.dtype}")
    if actual.numel() == 0:
        return
    info = torch.finfo(actual.dtype)
    rounded = exact.detach().to(actual.dtype).double().cpu()  # overflows where the dtype does
    exact, actual, same = (t.detach().double().cpu() for t in (exact, actual, same_dtype))
    finite = rounded.isfinite()
    _check_non_finite(label, actual, rounded, finite)

    error = (actual - exact).abs().where(finite, 0)
    plain_error = (same - exact).abs().where(finite & same.isfinite(), 0)
    magnitude = exact.abs().where(finite, 0)
    largest, largest_error = magnitude.max().item(), plain_error.max().item()
    if not may_vanish and info.eps * largest_error < largest <= 2 * largest_error:
        raise AssertionError(
            f"{label}: the error of plain PyTorch is {largest_error:.3g} and the largest value {largest:.3g}, so a "
            "tensor of zeros would pass; compare with a more accurate result in the same dtype, or pass may_vanish=True"
        )
    bound = torch.full_like(error, 2 * (largest_error + info.eps * largest))
    if error.dim() and error.shape[-1] >= _ROW:
        bound = torch.minimum(bound, _row_bound(plain_error, magnitude, info.eps))
    _check_bound(label, actual, exact, error, bound + info.tiny)


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute difference, in float64; 0 for empty tensors, NaN where one side is NaN."""
    if actual.numel() == 0:
        return 0.0
    return (actual.detach().double().cpu() - exact.detach().double().cpu()).abs().max().item()


def _check_operands(label: str, *tensors: torch.Tensor) -> None:
    names = ("actual", "same_dtype", "exact")
    for argument, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{label}: {argument}: expected a floating-point tensor, got {got}")
    _, same_dtype, exact = tensors
    if exact.dtype != torch.float64:
        raise TypeError(f"{label}: exact: expected torch.float64, got {exact.dtype}")
    if same_dtype.shape != exact.shape:
        raise ValueError(f"{label}: same_dtype: expected shape {tuple(exact.shape)}, got {tuple(same_dtype.shape)}")


def _check_non_finite(label: str, actual: torch.Tensor, expected: torch.Tensor, finite: torch.Tensor) -> None:
    same_kind = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = torch.where(finite, ~actual.isfinite(), ~same_kind)
    if wrong.any():
        index = _index(wrong.flatten().int().argmax(), wrong)
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} elements are non-finite in the wrong place or kind, first "
            f"at {index}: expected {expected[index].item():.6g}, got {actual[index].item():.6g}"
        )


def _row_bound(plain_error: torch.Tensor, magnitude: torch.Tensor, eps: float) -> torch.Tensor:
    """The bound of each row, (..., 1), relative to the row's largest element; infinite for unresolved rows."""
    row_error, row_largest = plain_error.amax(-1, keepdim=True), magnitude.amax(-1, keepdim=True)
    resolved = (2 * row_error < row_largest) & (row_largest > 0)
    relative = (row_error / row_largest).where(resolved, 0).max()
    return (_ROW_SLACK * (relative + eps) * row_largest).where(resolved, torch.inf)


def _check_bound(
    label: str, actual: torch.Tensor, exact: torch.Tensor, error: torch.Tensor, bound: torch.Tensor
) -> None:
    wrong = error > bound
    if wrong.any():
        index = _index((error / bound).flatten().argmax(), error)
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} elements are off by more than the derived bound, worst at "
            f"{index}: expected {exact[index].item():.8g}, got {actual[index].item():.8g}, error "
            f"{error[index].item():.3g}, bound {bound[index].item():.3g}"
        )


def _index(flat: torch.Tensor, tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat.cpu(), tensor.shape))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    """Normal numbers that depend on `seed` and `shape` only: drawn in float64, then rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def attention_inputs(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    query_length: int | None = None,
    logit_std: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B,H,Lq,D), k and v (B,Hkv,Lk,D), such that ``q @ k.mT / sqrt(D)`` has the standard deviation `logit_std`.

    `kv_heads` is Hkv, by default H; `query_length` is Lq, by default Lk.
    """
    keys = (batch, heads if kv_heads is None else kv_heads, length, head_dim)
    queries = (batch, heads, length if query_length is None else query_length, head_dim)
    q = randn(*queries, seed=seed, dtype=dtype, std=logit_std)
    k, v = (randn(*keys, seed=seed + i, dtype=dtype) for i in (1, 2))
    return q, k, v


def modulation(
    batch: int,
    channels: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    parts: int = 3,
    length: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """`parts` vectors of modulation, (B,1,C), or (B,L,C) with `length`, as ``chunk`` views of one tensor.

    They have unit inner stride but are not contiguous, as in models. Each has another nonzero mean, so that a kernel
    that ignores, swaps or confuses them fails.
    """
    rows = 1 if length is None else length
    packed = randn(batch, rows, parts * channels, seed=seed, dtype=torch.float64, std=0.5)
    offset = torch.arange(1, parts + 1, dtype=torch.float64).repeat_interleave(channels) * 0.25
    return (packed + offset).to(dtype).chunk(parts, dim=-1)


def poison(*like: torch.Tensor) -> None:
    """Fills memory that the next outputs will use, so that elements which a kernel forgets to write are wrong.

    Without it they may hold the right values of an earlier call. On glibc, from now on and for the whole process,
    malloc fills every block of memory that it hands out with the byte 0x7F (``M_PERTURB``): 3.4e38 in float32 and
    bfloat16, NaN in float16, a huge integer. Elsewhere, memory of the sizes of `like` (by default of many sizes up to 8
    MiB) is filled with NaN and freed, and the next allocations probably use it.
    """
    if _perturb_malloc():
        return
    sizes = [tensor.numel() * tensor.element_size() for tensor in like] or [2**power for power in range(6, 24)]
    blocks = [torch.empty(size, dtype=torch.uint8) for size in sizes for _ in range(4)]
    for block in blocks:
        block.fill_(0xFF)  # a NaN in every IEEE format


@functools.cache
def _perturb_malloc() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    m_perturb = -6  # from <malloc.h>; new blocks get the complement of the byte, freed ones the byte itself
    return ctypes.CDLL(None).mallopt(m_perturb, 0x80) == 1


GPU_CACHE_BYTES = 512 << 20  # larger than the last cache of any GPU so far (B200: 126 MB, MI300X: 256 MB)


def gpu_seconds(call: Callable[[], object], flush: torch.Tensor) -> float:
    """Seconds of one call, measured between events on the current stream.

    Before it `flush`, a tensor of GPU_CACHE_BYTES, is written to, which evicts the inputs of the call from the caches.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def isa_levels() -> tuple[str, ...]:
    """The ISA levels that ``VAR_KERNELS_ISA`` can choose on this machine, up to the one in use.

    Empty if the native library is not available. The level is fixed when the library is loaded, so tests of another
    level run in a subprocess with the variable set.
    """
    from .native import build, load

    status = load.native_library()
    if not status.available or status.isa is None:
        return ()
    levels = tuple(build.ISA_LEVELS)
    return levels[: levels.index(status.isa) + 1]
