"""Infinity (FoundationVision/Infinity) and copies of its classes: attention, AdaLN blocks, head, masks of training.

Facts about the foreign classes (attributes, signatures, layouts, dtypes, the order of random numbers) are read from
`infinity/models/{basic,infinity,fused_op}.py` of https://github.com/FoundationVision/Infinity.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .._checks import check
from ..adaln_layer_norm import adaln_layer_norm, gated_residual_adaln
from ..block_causal_attention import block_causal_attention
from . import flex_attn
from .block_causal import padded_schedule_of, schedule_of_ends, schedule_of_starts
from .gated_sum import gated_sum
from .kv_cache import append
from .parts import drop_path_refusal, head_dim_refusal, modulations, norm_refusal, with_drop_path
from .structure import Target, known, left_to_the_original

# ---- attention ---------------------------------------------------------------------------------------------------


def _attention(
    self: nn.Module, x: torch.Tensor, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None,
    rope2d_freqs_grid=None, scale_ind: int = 0,
) -> torch.Tensor:  # fmt: skip
    """`SelfAttention.forward`: x (B, L, C), beside a mask (1, 1, L, L), two vectors (L,), or None if all is visible."""
    batch, length, channels = x.shape
    flex = not self.using_flash and self.use_flex_attn and attn_fn is not None
    visible = ([length], 0) if flex else _visible(self, attn_bias_or_two_vector, length)
    if isinstance(visible, str):
        return left_to_the_original(
            self, "forward", visible, x, _as_theirs(self, attn_bias_or_two_vector), attn_fn, scale_schedule,
            rope2d_freqs_grid, scale_ind,
        )  # fmt: skip
    qkv_bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
    qkv = F.linear(x, self.mat_qkv.weight, qkv_bias).view(batch, length, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.unbind(2) if self.using_flash else qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if self.cos_attn:
        factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        q, k = F.normalize(q, dim=-1).mul(factor), F.normalize(k, dim=-1)
    if rope2d_freqs_grid is not None:
        rotate = type(self).forward.__globals__["apply_rotary_emb"]  # theirs, in their layout
        options = (self.pad_to_multiplier, self.rope2d_normalized_by_hw, scale_ind)
        q, k = rotate(q, k, scale_schedule, rope2d_freqs_grid, *options)
    if self.using_flash:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if self.caching:
        k, v = append(self, k, v, tokens_first=self.using_flash)
    if flex:
        out = attn_fn(q.contiguous(), k.contiguous(), v.contiguous(), scale=self.scale)
    elif attn_bias_or_two_vector is None:
        out = block_causal_attention(q.to(v.dtype), k.to(v.dtype), v, [k.shape[2]], softmax_scale=self.scale)
    else:
        out = _block_causal_and_padding(q.to(v.dtype), k.to(v.dtype), v, *visible, self.scale)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, channels)))


def _visible(self: nn.Module, mask, length: int) -> tuple[list[int], int] | str:
    """The lengths of the scales and the number of rows of padding that `mask` describes, or why it is another mask."""
    if mask is None:
        return [length], 0
    if self.caching:
        return "a mask beside a cache"
    if isinstance(mask, tuple) and len(mask) == 2:
        lens, starts = schedule_of_ends(mask[0]), schedule_of_starts(mask[1])
        if isinstance(lens, str):
            return lens
        if lens != starts or sum(lens) != length:
            return f"vectors that contradict one another, or the {length} tokens"
        return lens, 0
    if self.using_flash or not isinstance(mask, torch.Tensor):
        return f"a mask of type {type(mask).__name__}"
    if mask.dim() < 2 or mask.shape[-1] != length:
        return f"a mask of shape {tuple(mask.shape)} for {length} tokens"
    return padded_schedule_of(mask, length)


def _as_theirs(self: nn.Module, mask):
    """The mask for the code of the original, which takes vectors only with flash-attn."""
    if self.using_flash or not isinstance(mask, tuple):
        return mask
    ends, keys = mask[0], torch.arange(len(mask[0]), device=mask[0].device)
    return torch.where(keys < ends[:, None], 0.0, -torch.inf)[None, None]


def _block_causal_and_padding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: Sequence[int], padding: int, scale: float
) -> torch.Tensor:
    """Block-causal attention of (B, H, L, D), with rows of padding at the end, which see key 0 and nothing else."""
    if not padding:
        return block_causal_attention(q, k, v, lens, softmax_scale=scale)
    tokens = q.shape[2] - padding
    out = block_causal_attention(*(x[:, :, :tokens] for x in (q, k, v)), lens, softmax_scale=scale)
    return torch.cat((out, v[:, :, :1].to(out.dtype).expand(-1, -1, padding, -1)), dim=2)


_OPTIONS = "attn_bias_or_two_vector attn_fn scale_schedule rope2d_freqs_grid scale_ind"

ATTENTION = Target(
    name="attention of Infinity",
    part="attention",
    attributes=(
        "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop", "cos_attn", "scale", "num_heads", "head_dim",
        "using_flash", "use_flex_attn", "pad_to_multiplier", "rope2d_normalized_by_hw", "caching", "cached_k",
        "cached_v", "kv_caching",
    ),
    methods={
        "forward": known(
            f"x {_OPTIONS}",
            "F apply_rotary_emb cached_k cached_v caching cat clamp_max contiguous cos_attn dict dtype exp "
            "flash_attn_func head_dim linear mat_qkv max_scale_mul mul normalize num_heads pad_to_multiplier permute "
            "proj proj_drop q_bias reshape rope2d_normalized_by_hw scale scale_mul_1H11 shape slow_attn to torch "
            "transpose unbind use_flex_attn using_flash v_bias view weight zero_k_bias",
            "qkv q k v",
        ),
        "kv_caching": known("enable", "cached_k cached_v caching"),
    },
    refusal=head_dim_refusal,
    replacements={"forward": _attention},
)  # fmt: skip

# ---- AdaLN -------------------------------------------------------------------------------------------------------


def fused_ada_layer_norm(
    C: int, eps: float, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """`LN(x) * (1 + scale) + shift` over the C channels of x (B, L, C), computed and returned in fp32.

    It has the signature of the function of this name in Infinity's `models/fused_op.py`, and can be put in its place.
    scale and shift are (B, 1, C), or another shape that `adaln_layer_norm` takes. float64 stays float64.

    Raises:
        TypeError, ValueError: as `adaln_layer_norm`; ValueError if x has another number of channels than C.
    """
    check(x.shape[-1] == C, "x", f"{C} channels", tuple(x.shape))
    x = _wide(x)
    return adaln_layer_norm(x, scale.to(x.dtype), shift.to(x.dtype), eps=eps)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _block(
    self: nn.Module, x: torch.Tensor, cond_BD: torch.Tensor, ca_kv, attn_bias_or_two_vector, attn_fn=None,
    scale_schedule=None, rope2d_freqs_grid=None, scale_ind: int = 0,
) -> torch.Tensor:  # fmt: skip
    """`CrossAttnBlock.forward`: the gate of cross-attention, the residual sum and the last norm are one op."""
    options = (attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid)
    if reason := _block_refusal(self):  # since the swap
        return left_to_the_original(self, "forward", reason, x, cond_BD, ca_kv, *options, scale_ind)
    with torch.autocast("cuda", enabled=False):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulations(self, cond_BD)
    eps = self.ln_wo_grad.eps if self.fused_norm_func is None else self.norm_eps
    h = fused_ada_layer_norm(self.C, eps, x, scale1, shift1)
    if self.checkpointing_sa_only and self.training:
        branch = checkpoint(self.sa, h, *options, use_reentrant=False)
    elif self.fused_norm_func is None:  # the original hands scale_ind on in the other case only
        branch = self.sa(h, *options)
    else:
        branch = self.sa(h, *options, scale_ind=scale_ind)
    x = _plus(x, branch, with_drop_path(self, gamma1, len(x), branch.dtype), torch.promote_types(x.dtype, branch.dtype))
    branch = _wide(self.ca(self.ca_norm(x), ca_kv))
    x = x.to(torch.promote_types(x.dtype, branch.dtype))
    if isinstance(self.ca_gamma, torch.Tensor):
        gate = self.ca_gamma.expand(1, 1, self.C)
    else:
        gate = x.new_full((1, 1, self.C), self.ca_gamma)
    x, h = gated_residual_adaln(x, *(part.to(x.dtype) for part in (branch, gate, scale2, shift2)), eps=eps)
    branch = self.ffn(h)
    dtype = torch.promote_types(branch.dtype, gamma2.dtype)
    return _plus(x, branch, with_drop_path(self, gamma2, len(x), dtype), torch.promote_types(x.dtype, dtype))


def _plus(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return gated_sum(x, branch, gate).to(dtype)


def _head_norm(self: nn.Module, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
    """`AdaLNBeforeHead.forward`."""
    reason = _norm_refusal(self)  # since the swap
    if self.fused_norm_func is None and x_BLC.dtype in (torch.bfloat16, torch.float16):
        reason = f"a norm in {x_BLC.dtype}"
    if reason:
        return left_to_the_original(self, "forward", reason, x_BLC, cond_BD)
    scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
    eps = self.ln_wo_grad.eps if self.fused_norm_func is None else self.norm_eps
    return fused_ada_layer_norm(self.C, eps, x_BLC, scale, shift)


# The name of the first argument, C, is not checked, like that of `self` elsewhere.
_FUSED_NORM = known("eps x scale shift", "F add add_ float layer_norm mul")


def _norm_refusal(module: nn.Module) -> str | None:
    function = module.fused_norm_func
    if function is None:
        return norm_refusal(module)
    if function is fused_ada_layer_norm:
        return None
    return _FUSED_NORM.difference("fused_norm_func", inspect.unwrap(function))


def _block_refusal(module: nn.Module) -> str | None:
    return _norm_refusal(module) or drop_path_refusal(module)


BLOCK = Target(
    name="AdaLN block of Infinity",
    part="adaln",
    attributes=(
        "sa", "ca", "ffn", "ln_wo_grad", "ca_norm", "ca_gamma", "fused_norm_func", "norm_eps", "shared_aln",
        "drop_path", "checkpointing_sa_only", "C",
    ),
    methods={
        "forward": known(
            f"x cond_BD ca_kv {_OPTIONS}",
            "C ada_gss ada_lin add add_ amp autocast ca ca_gamma ca_norm checkpoint checkpointing_sa_only cuda "
            "drop_path ffn float fused_norm_func ln_wo_grad mul mul_ norm_eps sa shared_aln torch training unbind view",
            "gamma1 gamma2 scale1 scale2 shift1 shift2",
        )
    },
    refusal=_block_refusal,
    replacements={"forward": _block},
)  # fmt: skip
HEAD = Target(
    name="AdaLN before the head of Infinity",
    part="adaln",
    attributes=("ln_wo_grad", "ada_lin", "fused_norm_func", "norm_eps", "C", "D"),
    methods={
        "forward": known(
            "x_BLC cond_BD", "C ada_lin add add_ fused_norm_func ln_wo_grad mul norm_eps unbind view", "scale shift"
        )
    },
    refusal=_norm_refusal,
    replacements={"forward": _head_norm},
    others=("sa", "attn", "ffn"),
)

# ---- the masks of training ---------------------------------------------------------------------------------------

_VISIBLE, _INVISIBLE = "Infinity_visible_kvlen", "Infinity_invisible_qlen"


class _Vector:
    """Stands for a vector. All of its numbers are the tensor itself, of which it is known what it means."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index):
        return self.tensor if index == slice(None, len(self.tensor)) else self.tensor[index]


@lru_cache(maxsize=256)
def vectors_of(lens: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many keys each token sees, and how many queries don't see its key; int32 (L,)."""
    with torch.inference_mode(False):
        repeats = torch.tensor(lens, device=device)
        ends = repeats.cumsum(0)
        return tuple(numbers.int().repeat_interleave(repeats) for numbers in (ends, ends - repeats))


def _model(
    self: nn.Module, label_B_or_BLT, x_BLC_wo_prefix: torch.Tensor, scale_schedule, cfg_infer: bool = False, **kwargs
) -> torch.Tensor:
    """`Infinity.forward`. Its code finds two vectors for this schedule, beside which it makes no mask (L, L)."""
    arguments = (label_B_or_BLT, x_BLC_wo_prefix, scale_schedule, cfg_infer)
    vectors = None if cfg_infer else _vectors(self, x_BLC_wo_prefix, scale_schedule)
    if vectors is None:
        return type(self).forward(self, *arguments, **kwargs)
    own, flash = vars(self), self.customized_flash_attn
    own.update(zip((_VISIBLE, _INVISIBLE), map(_Vector, vectors), strict=True), customized_flash_attn=True)
    try:
        return type(self).forward(self, *arguments, **kwargs)
    finally:
        own["customized_flash_attn"] = flash
        for name in (_VISIBLE, _INVISIBLE):
            del own[name]


def _vectors(self: nn.Module, x: torch.Tensor, schedule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two vectors of a schedule, unless the sequence can't go through that branch of the original's code."""
    lens = tuple(int(t) * int(h) * int(w) for t, h, w in schedule)
    length = x.shape[1] + 1
    if hasattr(self, _VISIBLE) or sum(lens) != length:
        return None
    # That branch can't pad. Attention that isn't swapped takes vectors only with flash-attn.
    takes_vectors = self.customized_flash_attn or (
        not self.use_flex_attn
        and length % self.pad_to_multiplier == 0
        and all(ATTENTION.is_swapped(attention) for attention in _attentions(self))
    )
    return vectors_of(lens, x.device) if takes_vectors else None


def _attentions(module: nn.Module) -> list[nn.Module]:
    return [getattr(block, "sa", None) or block.attn for block in module.unregistered_blocks]


MODEL = Target(
    name="mask of Infinity",
    part="attention",
    attributes=(
        "unregistered_blocks", "num_block_chunks", "customized_flash_attn", "use_flex_attn", "attn_fn_compile_dict",
        "pad_to_multiplier", "rope2d_freqs_grid", "add_lvl_embeding_for_x_BLC", "autoregressive_infer_cfg",
    ),
    methods={
        "forward": known(
            "label_B_or_BLT x_BLC_wo_prefix scale_schedule cfg_infer",
            "CrossAttnBlock F Infinity_invisible_qlen Infinity_visible_kvlen SelfAttnBlock add_lvl_embeding_for_x_BLC "
            "add_lvl_embeding_only_first_block amp attn_fn_compile_dict autocast autoregressive_infer_cfg block_chunks "
            "blocks cat cfg_uncond checkpoint checkpointing cond_drop_rate contiguous customized_flash_attn device "
            "enumerate expand float forward full get_logits inf norm0_ve num_block_chunks pad pad_to_multiplier "
            "pos_start random reshape rope2d_freqs_grid shape shared_ada_lin text_norm text_proj_for_ca "
            "text_proj_for_sos to torch training transpose tuple type_as unsqueeze use_flex_attn utils view where "
            "word_embed",
        )
    },
    replacements={"forward": _model},
)  # fmt: skip

TARGETS = (ATTENTION, BLOCK, HEAD, MODEL, *flex_attn.TARGETS)
