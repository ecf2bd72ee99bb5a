"""The named problems that are compiled, tuned and reported, with the bytes and operations that each needs at least.

Shapes are those of the models (`var_kernels.testing.SHAPES`). Operations count only what is visible. They count each
product of a backward once, although kernels compute some products twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..multi_scale_quantize import phi_index
from ..testing import SCHEDULES, SHAPES, scale_lens
from .targets import TARGETS

BATCH = 8
# sm_89 has the configurations of sm_86 and gets the same code except for the order of some instructions; the same is
# true of gfx90a and gfx942. Problems that vary only the head dimension or the dtype are not compiled for sm_89 and
# gfx90a.
DISTINCT_TARGETS = tuple(name for name in TARGETS if name not in ("sm_89", "gfx90a"))
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """One call of a raw operator; `arguments(device)` makes its arguments, whose values do not matter."""

    op: str
    name: str
    raw: str
    arguments: Callable[[str], tuple]
    operations: int
    exponentials: int = 0
    tensor_cores: bool = False  # whether the operations are products of 16-bit matrices
    targets: tuple[str, ...] = tuple(TARGETS)  # for which the report compiles it

    @property
    def key(self) -> tuple[str, str]:
        """The key by which a problem is looked up."""
        return self.op, self.name

    @property
    def bytes(self) -> int:
        """The bytes of all inputs and outputs, each counted once."""
        arguments = self.arguments("meta")
        results = getattr(torch.ops.var_kernels_triton, self.raw)(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return sum(t.numel() * t.element_size() for t in (*arguments, *results) if isinstance(t, torch.Tensor))

    def launch(self, namespace: str) -> None:
        """Calls the op of a namespace on CPU tensors; to be called inside an executor, which takes the launches."""
        getattr(getattr(torch.ops, namespace), self.raw)(*self.arguments("cpu"))


def _attention(
    name: str,
    heads: int,
    schedule: str,
    dim: int,
    dtype=torch.bfloat16,
    batch: int = BATCH,
    backward: bool = False,
    last_scales: int | None = None,
    targets: tuple[str, ...] = tuple(TARGETS),
) -> Problem:
    """With `last_scales` the queries are the tokens of these scales only, and the keys are a cache of all scales."""
    lens = list(scale_lens(schedule))
    keys = sum(lens)
    ends = [sum(lens[: i + 1]) for i in range(len(lens))]
    first = 0 if last_scales is None else len(lens) - last_scales
    offset = ends[first] - lens[first]
    pairs = batch * heads * sum(length * end for length, end in list(zip(lens, ends, strict=True))[first:])

    def arguments(device):
        def tensor(length):  # heads are interleaved in memory, as in the models
            return torch.empty(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)

        q, k, v = tensor(keys - offset), tensor(keys), tensor(keys)
        options = (lens, dim**-0.5, offset)
        if not backward:
            return q, k, v, *options
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
        return tensor(keys - offset), q, k, v, tensor(keys - offset), lse, None, *options

    products = 5 if backward else 2
    return Problem(
        "block_causal_attention",
        f"{name} {_NAMES[dtype]} {'backward' if backward else 'forward'}",
        "_block_causal_attention_backward" if backward else "_block_causal_attention",
        arguments,
        operations=products * 2 * dim * pairs,
        exponentials=pairs,
        tensor_cores=dtype != torch.float32,
        targets=targets,
    )


def _adaln(
    name: str, dtype=torch.bfloat16, backward: bool = False, gated: bool = False, branch: torch.dtype | None = None
) -> Problem:
    """`branch`: the dtype of the branch and of y, if it is not that of the rest."""
    shape = SHAPES[name]
    size = (BATCH, shape.length, shape.width)

    def arguments(device):
        def tokens(dtype=dtype):
            return torch.empty(size, dtype=dtype, device=device)

        # Views of the six modulation vectors of a block.
        packed = torch.empty(BATCH, 1, 6 * shape.width, dtype=dtype, device=device)
        gate, scale, shift = packed.chunk(6, dim=-1)[:3]
        mean, rstd = torch.empty(2, *size[:2], device=device)
        if not backward:
            streams = (tokens(), tokens(branch or dtype), gate) if gated else (tokens(),)
            return (*streams, scale, shift, 1e-6)
        given = (scale, mean, rstd, True, False)  # shift is one per sample, not one per token
        return (tokens(), tokens(), tokens(), tokens(), gate, *given) if gated else (tokens(), tokens(), *given)

    raw = "_gated_residual_adaln" if gated else "_adaln_layer_norm"
    # Sums of x and of squares: 4, normalising: 2, modulating: 2. Backward has three more sums. Gating is one fma each
    # way.
    per_element = (16 if backward else 8) + (4 if backward else 2) * gated
    elements = size[0] * size[1] * size[2]
    dtypes = _NAMES[dtype] if branch is None else f"{_NAMES[dtype]}, branch {_NAMES[branch]},"
    return Problem(
        "gated_residual_adaln" if gated else "adaln_layer_norm",
        f"{name} {dtypes} {'backward' if backward else 'forward'}",
        raw + "_backward" if backward else raw,
        arguments,
        operations=per_element * elements,
    )


_CODES, _CHANNELS = 4096, 32  # VAR's tokenizer


def _nearest(name: str, rows: int, dtype=torch.float32) -> Problem:
    def arguments(device):
        z, codebook = (torch.empty(n, _CHANNELS, dtype=dtype, device=device) for n in (rows, _CODES))
        return z, codebook, False

    # products are in float32 for every dtype: 16-bit vectors are converted
    operations = 2 * rows * _CODES * _CHANNELS
    return Problem("nearest_code", f"{name} {_NAMES[dtype]}", "_nearest_code", arguments, operations)


@dataclass(frozen=True)
class _Tokenizer:
    schedule: str
    codes: int
    channels: int


_VAR, _EMBEDDED = _Tokenizer("256px", _CODES, _CHANNELS), _Tokenizer("embedded", 512, 16)


def _quantizer(name: str, raw: str, k: int | None = None, tokenizer: _Tokenizer = _VAR) -> Problem:
    """All scales of a tokenizer; for a single step, `k` is the scale."""
    sides, channels = SCHEDULES[tokenizer.schedule], tokenizer.channels
    plan = (list(sides), list(sides), [phi_index(i, len(sides), 4) for i in range(len(sides))])
    cells = sides[-1] ** 2
    # For one image and scale: area pooling, nearest code, bicubic (16 taps), 3x3 convolution.
    phi = 2 * cells * channels * (16 + 9 * channels)
    pool = cells * channels
    nearest = sum(2 * side**2 * tokenizer.codes * channels for side in sides)
    operations = {
        "_multi_scale_quantize": len(sides) * (pool + phi) + nearest,
        "_multi_scale_quantize_backward": len(sides) * 3 * phi,  # recomputed, plus its two gradients
        "_next_scale_input": pool + phi,
    }[raw]

    def arguments(device):
        def tensor(*size):
            return torch.empty(*size, device=device)

        full = tensor(BATCH, channels, sides[-1], sides[-1])
        phis = (tensor(4, channels, channels, 3, 3), tensor(4, channels))
        if k is not None:
            codes = tensor(BATCH, sides[k] ** 2, channels)
            return full, codes, *phis, plan[2][k], sides[k], sides[k], sides[k + 1], sides[k + 1], 0.5
        codebook = tensor(tokenizer.codes, channels)
        if raw == "_multi_scale_quantize":
            return full, codebook, *phis, *plan, 0.5, False
        tokens = torch.zeros(BATCH, sum(scale_lens(tokenizer.schedule)), dtype=torch.int64, device=device)
        return full, codebook, *phis, tokens, tensor(BATCH, len(sides)), *plan, 0.5

    return Problem("multi_scale_quantize", name, raw, arguments, BATCH * operations)


def _qk_norm(name: str, scale: int = -1) -> Problem:
    """The new tokens of one scale, with and without the class; only those rows of the caches count that are written."""
    shape, length = SHAPES[name], SCHEDULES["256px"][scale] ** 2
    dim = shape.width // shape.heads

    def arguments(device):
        qkv = torch.empty(2 * BATCH, length, 3, shape.heads, dim, dtype=torch.bfloat16, device=device)
        caches = torch.empty(2, 2 * BATCH, shape.heads, length, dim, dtype=torch.bfloat16, device=device)
        return qkv, torch.empty(shape.heads, device=device), *caches, 0

    # For each element of queries and keys: a square, a sum and a product.
    operations = 2 * 3 * 2 * BATCH * length * shape.width
    return Problem("qk_norm_cache", f"{name} last scale bf16", "_qk_norm_cache", arguments, operations)


def _sample(name: str, dtype=torch.float32) -> Problem:
    length = SCHEDULES["256px"][-1] ** 2

    def arguments(device):
        conditional, unconditional = torch.empty(2, BATCH, length, _CODES, dtype=dtype, device=device)
        seeds = torch.zeros(BATCH, dtype=torch.int64, device=device)
        return conditional, unconditional, 1.5, 900, 0.96, None, seeds, 424

    logits = BATCH * length * _CODES
    # Guidance; at least a comparison and an addition for each threshold; ten rounds of two products for four tokens.
    return Problem("sample_tokens", f"{name} {_NAMES[dtype]}", "_sample_tokens", arguments, 12 * logits, logits)


def _both(make: Callable[..., Problem], *args, **kwargs) -> tuple[Problem, Problem]:
    return make(*args, **kwargs), make(*args, **kwargs, backward=True)


_FP32, _FP16 = torch.float32, torch.float16

PROBLEMS: tuple[Problem, ...] = (
    *_both(_attention, "d16", 16, "256px", 64),
    *_both(_attention, "d36", 36, "512px", 64),
    *_both(_attention, "d16", 16, "256px", 64, _FP32),
    *_both(_attention, "d16", 16, "256px", 64, _FP16, targets=("sm_80", "sm_90", "gfx942")),
    _attention("d16 last scale on a cache", 16, "256px", 64, last_scales=1),
    *_both(_attention, "D 72", 16, "256px", 72, targets=DISTINCT_TARGETS),
    *_both(_attention, "D 126, 2 of infinity-256px", 16, "infinity-256px", 126, batch=2, targets=DISTINCT_TARGETS),
    *_both(_attention, "D 128, 2 of infinity-512px", 16, "infinity-512px", 128, batch=2, targets=DISTINCT_TARGETS),
    *_both(_attention, "D 128, 2 of infinity-256px", 16, "infinity-256px", 128, _FP32, 2, targets=DISTINCT_TARGETS),
    *_both(_attention, "D 256, 2 of infinity-256px", 8, "infinity-256px", 256, batch=2, targets=DISTINCT_TARGETS),
    *(p for name in ("d16", "d36") for dtype in (torch.bfloat16, _FP32) for gated in (False, True)
      for p in _both(_adaln, name, dtype, gated=gated)),
    _adaln("d16", _FP32, gated=True, branch=torch.bfloat16),
    _nearest("tokens of 8 images", BATCH * sum(scale_lens("256px"))),
    _nearest("tokens of 8 images", BATCH * sum(scale_lens("256px")), torch.bfloat16),
    _quantizer("encode 8 images", "_multi_scale_quantize"),
    _quantizer("encode 8 images, embedded model", "_multi_scale_quantize", tokenizer=_EMBEDDED),
    _quantizer("encode 8 images backward", "_multi_scale_quantize_backward"),
    _quantizer("next scale input, scale 4 of 10", "_next_scale_input", k=3),
    _quantizer("next scale input, scale 9 of 10", "_next_scale_input", k=8),
    _qk_norm("d16"),
    _sample("last scale of 8 images"),
)  # fmt: skip
