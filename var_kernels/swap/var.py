"""VAR (FoundationVision/VAR) and repositories that carry its classes: attention, AdaLN blocks, head, mask, quantizer.

Facts about the foreign classes (attributes, signatures, layouts, the order of random numbers) are read from
`models/basic_var.py`, `models/var.py` and `models/quant.py` of https://github.com/FoundationVision/VAR.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..adaln_layer_norm import adaln_layer_norm, gated_residual_adaln
from ..block_causal_attention import block_causal_attention
from ..multi_scale_quantize import multi_scale_quantize, next_scale_input, phi_index
from ..qk_norm_cache import qk_norm_cache
from .block_causal import BlockCausalBias, schedule_of
from .gated_sum import gated_sum
from .kv_cache import append, keep, rows_with_room
from .parts import drop_path_refusal, head_dim_refusal, modulations, norm_refusal, with_drop_path
from .structure import Target, exactly, left_to_the_original, must_be_called

# ---- attention ---------------------------------------------------------------------------------------------------


def _attention(self: nn.Module, x: torch.Tensor, attn_bias: torch.Tensor | BlockCausalBias | None) -> torch.Tensor:
    """`SelfAttention.forward`: x (B, L, C), attn_bias the float mask of a schedule, or None if all keys are visible."""
    batch, length, channels = x.shape
    reason, lens = None, [length]
    if isinstance(attn_bias, BlockCausalBias):
        lens = attn_bias.lens
    elif attn_bias is not None:
        lens = schedule_of(attn_bias, length)
        reason = lens if isinstance(lens, str) else None
    if self.caching and attn_bias is not None:
        reason = "a mask beside a cache"
    if self.training and self.attn_drop > 0:
        reason = "dropout of attention"
    if reason:
        bias = attn_bias.tensor() if isinstance(attn_bias, BlockCausalBias) else attn_bias
        return left_to_the_original(self, "forward", reason, x, bias)
    qkv_bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
    qkv = F.linear(x, self.mat_qkv.weight, qkv_bias).view(batch, length, 3, self.num_heads, self.head_dim)
    factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp() if self.attn_l2_norm else None
    if self.caching:
        q, k, v = _append(self, qkv, factor)
        lens = [k.shape[2] - length, length] if k.shape[2] > length else [length]
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _normalised(q, k, factor)
    out = block_causal_attention(q, k, v, lens, softmax_scale=self.scale)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, channels)))


def _normalised(q: torch.Tensor, k: torch.Tensor, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit queries times `factor` and unit keys, (B, H, L, D), in the dtype of q; as they are without a factor."""
    if factor is None:
        return q, k
    return (F.normalize(q, dim=-1) * factor).to(q.dtype), F.normalize(k, dim=-1).to(q.dtype)


def _append(self: nn.Module, qkv: torch.Tensor, factor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Appends keys and values to the cache of the module. Returns q of the new tokens, and all k and v, (B, H, ·, D).

    `cached_k` and `cached_v` keep the layout of the original, (B, L, H, D) for flash-attn and xformers, else
    (B, H, L, D).
    """
    tokens_first = self.using_xform or (self.using_flash and qkv.dtype != torch.float32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    old_k, old_v = self.cached_k, self.cached_v
    needs_grad = torch.is_grad_enabled() and qkv.requires_grad
    if factor is None or needs_grad or any(old is not None and old.dtype != qkv.dtype for old in (old_k, old_v)):
        q, k = _normalised(q, k, factor)
        return q, *append(self, k, v, tokens_first)
    (k_rows, start), (v_rows, _) = (rows_with_room(old, new, tokens_first) for old, new in ((old_k, k), (old_v, v)))
    q = qk_norm_cache(qkv.detach(), k_rows, v_rows, start, q_factor=factor.detach().flatten().float())
    end = start + q.shape[2]
    return q, *(keep(self, *cache, end, tokens_first) for cache in (("cached_k", k_rows), ("cached_v", v_rows)))


ATTENTION = Target(
    name="attention of VAR",
    part="attention",
    attributes=(
        "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop", "attn_drop", "attn_l2_norm", "scale",
        "num_heads", "head_dim", "using_flash", "using_xform", "caching", "cached_k", "cached_v", "kv_caching",
    ),
    methods={
        "forward": exactly(
            "x attn_bias",
            "F attn_drop attn_l2_norm cached_k cached_v caching cat clamp_max exp head_dim linear mat_qkv "
            "max_scale_mul mul normalize num_heads proj proj_drop q_bias scale scale_mul_1H11 training v_bias weight "
            "zero_k_bias",
            "qkv q k v",
            # The last line is that of FlexVAR, whose masks may be larger than the sequence.
            "dtype expand flash_attn_func float32 memory_efficient_attention permute reshape shape slow_attn to torch "
            "transpose unbind using_flash using_xform view "
            "ones device",
        ),
        "kv_caching": exactly("enable", "cached_k cached_v caching"),
    },
    refusal=head_dim_refusal,
    replacements={"forward": _attention},
)  # fmt: skip

# ---- AdaLN -------------------------------------------------------------------------------------------------------


def _block(self: nn.Module, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias) -> torch.Tensor:
    """`AdaLNSelfAttn.forward`: the gate of attention, the residual sum and the second norm are one op."""
    if reason := _block_refusal(self):  # since the swap
        return left_to_the_original(self, "forward", reason, x, cond_BD, attn_bias)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulations(self, cond_BD)
    eps = self.ln_wo_grad.eps
    h = adaln_layer_norm(x, scale1.to(x.dtype), shift1.to(x.dtype), eps=eps)
    branch = self.attn(h, attn_bias=attn_bias)
    gate = with_drop_path(self, gamma1, len(x), branch.dtype)
    with torch.autocast(x.device.type, enabled=False):  # it would convert the branch to the dtype of x
        residual, h = gated_residual_adaln(x, branch, *(part.to(x.dtype) for part in (gate, scale2, shift2)), eps=eps)
    branch = self.ffn(h)
    gate = with_drop_path(self, gamma2, len(x), torch.promote_types(branch.dtype, gamma2.dtype))
    return gated_sum(residual, branch, gate)


def _head_norm(self: nn.Module, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
    """`AdaLNBeforeHead.forward`."""
    if reason := norm_refusal(self):  # since the swap
        return left_to_the_original(self, "forward", reason, x_BLC, cond_BD)
    scale, shift = (part.to(x_BLC.dtype) for part in self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2))
    return adaln_layer_norm(x_BLC, scale, shift, eps=self.ln_wo_grad.eps)


def _block_refusal(module: nn.Module) -> str | None:
    return norm_refusal(module) or drop_path_refusal(module)


BLOCK = Target(
    name="AdaLN block of VAR",
    part="adaln",
    attributes=("attn", "ffn", "ln_wo_grad", "shared_aln", "drop_path", "C"),
    methods={
        "forward": exactly(
            "x cond_BD attn_bias",
            "ada_gss ada_lin add attn drop_path ffn ln_wo_grad mul shared_aln",
            "gamma1 gamma2 scale1 scale2 shift1 shift2",
            "C add_ mul_ unbind view",
        )
    },
    refusal=_block_refusal,
    replacements={"forward": _block},
)
HEAD = Target(
    name="AdaLN before the head of VAR",
    part="adaln",
    attributes=("ln_wo_grad", "ada_lin", "C", "D"),
    methods={
        "forward": exactly("x_BLC cond_BD", "ada_lin add ln_wo_grad mul", "scale shift", "C add_ unbind view"),
    },
    refusal=norm_refusal,
    replacements={"forward": _head_norm},
    others=(*BLOCK.attributes[:2], "fused_norm_func"),  # the last is that of Infinity
)

# ---- the mask of training ----------------------------------------------------------------------------------------

_MASK = "attn_bias_for_masking"


def _model(self: nn.Module, *args, **kwargs) -> torch.Tensor:
    """`VAR.forward`. Its code finds an object that stands for the mask, of which no converted copy is made."""
    if _model_refusal(self):  # since the swap
        return type(self).forward(self, *args, **kwargs)
    mask = self._buffers[_MASK]
    vars(self)[_MASK] = BlockCausalBias(schedule_of(mask, mask.shape[-1]), mask)
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        del vars(self)[_MASK]


def _model_refusal(module: nn.Module) -> str | None:
    mask = module._buffers.get(_MASK)
    if mask is None:
        return f"{_MASK} is not a buffer"
    lens = schedule_of(mask, mask.shape[-1])
    if isinstance(lens, str):
        return f"{_MASK}: {lens}"
    if not all(hasattr(block, "attn") and ATTENTION.is_swapped(block.attn) for block in module.blocks):
        return "the attention of its blocks is not swapped"
    return None


MODEL = Target(
    name="mask of VAR",
    part="attention",
    attributes=("blocks", "begin_ends", "prog_si", _MASK),
    methods={
        "forward": exactly(
            "label_B x_BLCv_wo_first_l",
            "attn_bias_for_masking begin_ends blocks class_emb get_logits pos_start prog_si shared_ada_lin word_embed",
            optional="AdaLNSelfAttn L Linear amp autocast bias cat cond_drop_rate cuda device dtype enumerate expand "
            "first_l float forward isinstance lvl_1L lvl_embed matmul new_ones nn num_classes parameters pos_1LC rand "
            "requires_grad shape to torch unsqueeze view weight where",
        )
    },
    refusal=_model_refusal,
    replacements={"forward": _model},
)

# ---- the quantizer -----------------------------------------------------------------------------------------------


def _phis(module: nn.Module) -> list[nn.Module]:
    """The convolutions of `quant_resi`: one for each scale, or some that the scales share, or a single one."""
    resi = module.quant_resi
    if isinstance(resi, nn.ModuleList):
        return list(resi)
    return list(resi.qresi_ls) if hasattr(resi, "qresi_ls") else [resi.qresi]


def _phi_arguments(self: nn.Module) -> dict[str, object]:
    phis = _phis(self)
    return {
        "phi_weight": torch.stack([phi.weight for phi in phis]),
        "phi_bias": torch.stack([phi.bias for phi in phis]),
        "phi_ratio": phis[0].resi_ratio,
    }


def _needs_grad(self: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())


def _sizes(patch_nums: Sequence) -> list[tuple[int, int]]:
    return [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in patch_nums]


def _quantize(self: nn.Module, f_BChw: torch.Tensor, ret_usages: bool = False):
    """`VectorQuantizer2.forward`: (f_hat with a straight-through gradient, percentages of used codes, loss)."""
    quantized = multi_scale_quantize(
        f_BChw.float(), self.embedding.weight, patch_nums=self.v_patch_nums, beta=self.beta,
        metric="cosine" if self.using_znorm else "l2", **_phi_arguments(self),
    )  # fmt: skip
    world = torch.distributed
    distributed = world.is_available() and world.is_initialized()
    if self.training and distributed:
        sizes = torch.tensor([h * w for h, w in _sizes(self.v_patch_nums)], device=f_BChw.device)
        first = torch.arange(len(sizes), device=f_BChw.device).mul_(self.vocab_size).repeat_interleave(sizes)
        hits = (quantized.tokens + first).flatten().bincount(minlength=len(sizes) * self.vocab_size)
        hits = hits.view(len(sizes), self.vocab_size).float()
        world.all_reduce(hits)
        for average, hit in zip(self.ema_vocab_hit_SV, hits, strict=True):
            kept = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
            average.mul_(kept).add_(hit, alpha=1 - kept)
            self.record_hit += 1
    usages = None
    if ret_usages:
        margin = (world.get_world_size() if distributed else 1) * (f_BChw.numel() / f_BChw.shape[1])
        margin *= 0.08 / self.vocab_size
        usages = [float((average >= margin).float().mean()) * 100 for average in self.ema_vocab_hit_SV]
    return quantized.f_hat, usages, quantized.vq_loss


def _encode(self: nn.Module, f_BChw: torch.Tensor, to_fhat: bool, v_patch_nums: Sequence | None = None):
    """`VectorQuantizer2.f_to_idxBl_or_fhat`: for each scale its tokens (B, l), or f_hat after it."""
    if to_fhat and _needs_grad(self):
        return left_to_the_original(
            self, "f_to_idxBl_or_fhat", "gradients of f_hat by scale", f_BChw, to_fhat, v_patch_nums
        )
    sizes = _sizes(v_patch_nums or self.v_patch_nums)
    with torch.no_grad():
        tokens = multi_scale_quantize(
            f_BChw.detach(), self.embedding.weight, patch_nums=sizes,
            metric="cosine" if self.using_znorm else "l2", **_phi_arguments(self),
        ).tokens  # fmt: skip
        scales = list(tokens.split([h * w for h, w in sizes], dim=1))
        if to_fhat:
            f_hat = torch.zeros_like(f_BChw)
            codes = (self.embedding(scale) for scale in scales)
            scales = [f_hat for f_hat, _ in _steps(self, f_hat, codes, sizes)]
    return scales[: self.prog_si + 1] if self.prog_si >= 0 else scales


def _steps(self: nn.Module, f_hat: torch.Tensor, codes, sizes):
    """Adds the scales to f_hat, one by one: for each the new f_hat, and the input of the next scale or None."""
    phi = _phi_arguments(self)
    for k, scale in enumerate(codes):
        f_hat, next_map = next_scale_input(f_hat, scale, patch_nums=sizes, k=k, **phi)
        yield f_hat, next_map


def _teacher_forcing(self: nn.Module, gt_ms_idx_Bl: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """`VectorQuantizer2.idxBl_to_var_input`: the inputs of scales 2 … K, (B, L - l_1, C), or None if there are none."""
    if _needs_grad(self):
        return left_to_the_original(self, "idxBl_to_var_input", "gradients of the inputs", gt_ms_idx_Bl)
    sizes = _sizes(self.v_patch_nums)
    scales = len(sizes) - 1 if self.prog_si < 0 else min(len(sizes) - 1, self.prog_si)
    f_hat = self.embedding.weight.new_zeros((gt_ms_idx_Bl[0].shape[0], self.Cvae, *sizes[-1]), dtype=torch.float32)
    codes = (self.embedding(tokens) for tokens in gt_ms_idx_Bl[:scales])
    inputs = [next_map for _, next_map in _steps(self, f_hat, codes, sizes)]
    return torch.cat(inputs, dim=1) if inputs else None


def _decode(self: nn.Module, ms_h_BChw: Sequence[torch.Tensor], all_to_max_scale: bool = True, last_one: bool = False):
    """`VectorQuantizer2.embed_to_fhat`: f_hat after each scale, or after the last one, from the embeddings of all."""
    if _needs_grad(self) or not all_to_max_scale:
        reason = "gradients of f_hat by scale" if all_to_max_scale else "f_hat at the size of each scale"
        return left_to_the_original(self, "embed_to_fhat", reason, ms_h_BChw, all_to_max_scale, last_one)
    maps = ms_h_BChw[: len(self.v_patch_nums)]
    sizes = [tuple(h.shape[-2:]) for h in maps]
    f_hat = maps[0].new_zeros((maps[0].shape[0], self.Cvae, *sizes[-1]), dtype=torch.float32)
    codes = (h.flatten(2).transpose(1, 2).float() for h in maps)
    steps = [f_hat for f_hat, _ in _steps(self, f_hat, codes, sizes)]
    return steps[-1] if last_one else steps


def _next_input(self: nn.Module, si: int, SN: int, f_hat: torch.Tensor, h_BChw: torch.Tensor):
    """`VectorQuantizer2.get_next_autoregressive_input`: adds scale si to f_hat, in place, and makes the next input."""
    sizes = _sizes(self.v_patch_nums)
    if _needs_grad(self) or len(sizes) != SN:
        reason = "gradients of f_hat by scale" if len(sizes) == SN else f"{SN} scales, {len(sizes)} in v_patch_nums"
        return left_to_the_original(self, "get_next_autoregressive_input", reason, si, SN, f_hat, h_BChw)
    codes = h_BChw.flatten(2).transpose(1, 2).to(f_hat.dtype)
    new, next_map = next_scale_input(f_hat, codes, patch_nums=sizes, k=si, **_phi_arguments(self))
    f_hat.copy_(new)
    if next_map is None:
        return f_hat, f_hat
    return f_hat, next_map.transpose(1, 2).reshape(*f_hat.shape[:2], *sizes[si + 1])


def _quantizer_refusal(module: nn.Module) -> str | None:
    try:
        phis = _phis(module)
    except AttributeError:
        return f"quant_resi is of an unknown class, {type(module.quant_resi).__name__}"
    for phi in phis:
        if not isinstance(phi, nn.Conv2d) or not hasattr(phi, "resi_ratio"):
            return f"quant_resi: expected 3 x 3 convolutions, got {type(phi).__name__}"
        if phi.kernel_size != (3, 3) or phi.bias is None or phi.resi_ratio != phis[0].resi_ratio:
            return "quant_resi: expected 3 x 3 convolutions with a bias and one ratio"
    if any(map(must_be_called, (*phis, module.embedding))):
        return "quant_resi or embedding has hooks, which would not be called"
    scales = len(module.v_patch_nums)
    for k in range(scales if scales > 1 else 0):
        if module.quant_resi[k / (scales - 1)] is not phis[phi_index(k, scales, len(phis))]:
            return f"quant_resi: another convolution for scale {k} than that of VAR"
    return None


QUANTIZER = Target(
    name="quantizer of VAR",
    part="quantizer",
    attributes=("vocab_size", "Cvae", "using_znorm", "v_patch_nums", "quant_resi", "ema_vocab_hit_SV", "record_hit",
                "beta", "embedding", "prog_si"),
    methods={
        "forward": exactly(
            "f_BChw ret_usages",
            "F argmax argmin beta embedding interpolate mse_loss normalize quant_resi square using_znorm v_patch_nums",
            optional="T add_ addmm_ all_reduce amp autocast bincount clone contiguous copy_ cuda data detach device "
            "dist dtype ema_vocab_hit_SV enumerate float float32 get_world_size initialized item len mean mul mul_ "
            "numel permute record_hit reshape shape sum tdist torch training view vocab_size wait weight zeros "
            "zeros_like",
        ),
        "embed_to_fhat": exactly(
            "ms_h_BChw all_to_max_scale last_one",
            "F interpolate quant_resi v_patch_nums",
            optional="Cvae add_ append clone enumerate float32 len new_zeros shape torch",
        ),
        "f_to_idxBl_or_fhat": exactly(
            "f_BChw to_fhat v_patch_nums",
            "F argmax argmin embedding interpolate normalize prog_si quant_resi square using_znorm v_patch_nums",
            optional="T add_ addmm_ append clone contiguous data detach enumerate int isinstance len permute reshape "
            "shape sub_ sum torch view weight zeros_like",
        ),
        "idxBl_to_var_input": exactly(
            "gt_ms_idx_Bl",
            "Cvae F cat embedding interpolate prog_si quant_resi v_patch_nums",
            optional="add_ append float32 len new_zeros range shape torch transpose transpose_ view",
        ),
        "get_next_autoregressive_input": exactly("si SN f_hat h_BChw", "F add_ interpolate quant_resi v_patch_nums"),
    },
    refusal=_quantizer_refusal,
    replacements={
        "forward": _quantize,
        "embed_to_fhat": _decode,
        "f_to_idxBl_or_fhat": _encode,
        "idxBl_to_var_input": _teacher_forcing,
        "get_next_autoregressive_input": _next_input,
    },
)  # fmt: skip

TARGETS = (ATTENTION, BLOCK, HEAD, MODEL, QUANTIZER)
