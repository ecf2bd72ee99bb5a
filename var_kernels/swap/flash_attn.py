"""What repositories import from flash-attn, on our attention: for machines where flash-attn does not install.

    from var_kernels import swap
    swap.provide_flash_attn()      # before the import of a repository that imports flash_attn

Signatures and layouts are those of flash-attn 2 (https://github.com/Dao-AILab/flash-attention). `VAR_visible_kvlen` and
`VAR_invisible_qlen` are the arguments of the fork for which Infinity (https://github.com/FoundationVision/Infinity) was
written, and which was never published.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch
import torch.nn.functional as F

from .._checks import check, check_tensor
from ..block_causal_attention import block_causal_attention
from .block_causal import schedule_of_ends, schedule_of_starts

__all__ = ["flash_attn_func", "flash_attn_varlen_kvpacked_func", "provide_flash_attn"]

_NAME = "flash_attn"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    VAR_visible_kvlen: torch.Tensor | None = None,
    VAR_invisible_qlen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q (B, Lq, H, D) to k and v (B, Lk, Hkv, D), in the layout of flash-attn; (B, Lq, H, D), dense.

    Without a mask every query sees every key. With `causal`, query i sees the keys up to i + Lk - Lq. With
    `VAR_visible_kvlen` (L,), integers, query i sees the first VAR_visible_kvlen[i] keys, which must be those of its own
    scale and of all earlier ones; `VAR_invisible_qlen` (L,) says the same of keys: the first VAR_invisible_qlen[j]
    queries don't see key j.

    float32, bfloat16 and float16, on CPUs and GPUs; differentiable in q, k and v, and always deterministic.

    Raises:
        TypeError, ValueError: for wrong arguments, as `block_causal_attention`; for vectors that don't belong to a
            schedule of scales, or contradict one another.
        NotImplementedError: for what only flash-attn has: dropout beside a mask, window_size, softcap, alibi_slopes,
            return_attn_probs.
    """
    _refuse(window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs)
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(argument, tensor, rank=4)
    # Infinity looks for its fork by a local variable of this name.
    lens_of_Infinity = _scales(VAR_visible_kvlen, VAR_invisible_qlen, q.shape[1], k.shape[1])
    lens = [1] * k.shape[1] if causal else lens_of_Infinity
    if causal and lens_of_Infinity is not None:
        raise ValueError("causal: expected False beside VAR_visible_kvlen, got True")
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    if lens is None and (dropout_p or q.shape[1] > k.shape[1]):
        return _full(*by_heads, dropout_p, softmax_scale).transpose(1, 2).contiguous()
    if dropout_p:
        raise NotImplementedError(f"dropout_p: expected 0 beside a mask, got {dropout_p}")
    lens = [k.shape[1]] if lens is None else lens
    return block_causal_attention(*by_heads, lens, softmax_scale=softmax_scale).transpose(1, 2).contiguous()


# What flash-attn has and these functions have not: the values that ask for nothing.
_WITHOUT = {
    "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "return_attn_probs": False,
}  # fmt: skip


def _refuse(**options: object) -> None:
    """NotImplementedError for the first option that asks for what only flash-attn has."""
    for argument, given in options.items():
        given = tuple(given) if argument == "window_size" else given
        if given != _WITHOUT[argument]:
            raise NotImplementedError(f"{argument}: expected {_WITHOUT[argument]}, got {given}")


def _scales(visible, invisible, queries: int, keys: int) -> list[int] | None:
    """The lengths of the scales that the two vectors of Infinity describe; None without the vectors."""
    if visible is None and invisible is None:
        return None
    for argument, vector in (("VAR_visible_kvlen", visible), ("VAR_invisible_qlen", invisible)):
        _check_integers(argument, vector)
        check(len(vector) == keys == queries, argument, f"as many numbers as queries ({queries}) and keys ({keys})",
              len(vector))  # fmt: skip
    lens = schedule_of_ends(visible)
    check(not isinstance(lens, str), "VAR_visible_kvlen", "for each token the end of its scale", lens)
    starts = schedule_of_starts(invisible)
    check(starts == lens, "VAR_invisible_qlen", f"the starts of scales of {lens} tokens", starts)
    return lens


def _check_integers(argument: str, vector: object) -> None:
    if not isinstance(vector, torch.Tensor) or vector.is_floating_point() or vector.is_complex():
        got = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise TypeError(f"{argument}: expected a tensor of integers, got {got}")
    check(vector.dim() == 1, argument, "one dimension", f"shape {tuple(vector.shape)}")


def _full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, scale: float | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """Attention of packed sequences of different lengths, each to its own keys.

    q: (Lq, H, D) and kv: (Lk, 2, Hkv, D) are the tokens of all samples one after another. Sample b has the queries
    cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] to cu_seqlens_k[b + 1]; max_seqlen_q and
    max_seqlen_k are bounds of their numbers. Returns (Lq, H, D). A sample without keys gets zeros.

    This is PyTorch's scaled_dot_product_attention for each sample: text has a few hundred keys.

    Raises:
        TypeError, ValueError: for wrong arguments, and lengths that don't add up.
        NotImplementedError: for causal, window_size, softcap, alibi_slopes, return_attn_probs.
    """
    _refuse(
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )  # fmt: skip
    check_tensor("q", q, rank=3)
    check_tensor("kv", kv, rank=4)
    check(kv.shape[1] == 2, "kv", "shape (Lk, 2, Hkv, D)", tuple(kv.shape))
    ends_q = _offsets("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen_q, "max_seqlen_q")
    ends_k = _offsets("cu_seqlens_k", cu_seqlens_k, len(kv), max_seqlen_k, "max_seqlen_k")
    if len(ends_q) != len(ends_k):
        raise ValueError(f"cu_seqlens_k: expected {len(ends_q)} offsets like cu_seqlens_q, got {len(ends_k)}")
    k, v = kv.unbind(1)
    samples = []
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        if keys.start == keys.stop:
            samples.append(torch.zeros_like(q[rows]))
            continue
        by_heads = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys]))
        samples.append(_full(*by_heads, dropout_p, softmax_scale)[0].transpose(0, 1))
    return torch.cat(samples) if samples else torch.zeros_like(q)


def _offsets(argument: str, offsets: torch.Tensor, total: int, longest: int, bound: str) -> list[int]:
    """The offsets as a list; ValueError unless they rise from 0 to `total` in steps of at most `longest`."""
    _check_integers(argument, offsets)
    found = offsets.tolist()
    if not found or found[0] != 0 or found[-1] != total or any(a > b for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"{argument}: expected offsets that rise from 0 to {total}, got {found}")
    if any(b - a > longest for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"{bound}: expected at least the longest sequence of {argument}, {found}, got {longest}")
    return found


def provide_flash_attn() -> ModuleType:
    """Makes `import flash_attn` find these functions in this process, if flash-attn is not installed.

    Only what Infinity and VAR need is there: `flash_attn_func` and `flash_attn_varlen_kvpacked_func`. Returns the
    module. A second call returns the same module.

    Raises:
        RuntimeError: if flash-attn is installed; it is not replaced.
    """
    present = sys.modules.get(_NAME)
    if getattr(present, "flash_attn_func", None) is flash_attn_func:
        return present
    if present is not None or importlib.util.find_spec(_NAME) is not None:
        raise RuntimeError(f"provide_flash_attn: expected no {_NAME} on this machine, found an installed one")
    module = ModuleType(_NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, loader=None)
    module.flash_attn_func, module.flash_attn_varlen_kvpacked_func = flash_attn_func, flash_attn_varlen_kvpacked_func
    sys.modules[_NAME] = module
    return module
