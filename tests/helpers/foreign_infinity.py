"""A small model with the structure of Infinity's classes, in our own words: what `swap` recognises.

Attributes, signatures, layouts, dtypes and the order of random numbers are theirs; the code is ours and plain PyTorch.
Cross-attention, which is not swapped, doesn't round to bf16 as theirs does, so that results can be compared with fp64.
"""

from __future__ import annotations

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.foreign_var import FFN, DropPath

slow_attn = F.scaled_dot_product_attention


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, VAR_visible_kvlen=None, VAR_invisible_qlen=None):
    """The private fork of flash-attn, for tensors (B, L, H, D)."""
    mask = None
    if VAR_visible_kvlen is not None:
        mask = torch.arange(k.shape[1]) < VAR_visible_kvlen[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = slow_attn(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2).contiguous()


def rope_table(schedule, dim):
    """Angles of rows and columns, (2, 1, 1, 1, L, dim / 2)."""
    places = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) / max(h, w) for _, h, w in schedule])
    angles = (16 * places[:, :, None] / 100 ** torch.linspace(0, 1, dim // 4)).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))[:, None, None, None]


def apply_rotary_emb(q, k, scale_schedule, rope2d_freqs_grid, pad_to_multiplier, rope2d_normalized_by_hw, scale_ind):
    qk = torch.stack((q, k))
    start = sum(t * h * w for t, h, w in scale_schedule[:scale_ind])
    cos, sin = rope2d_freqs_grid[str(tuple(scale_schedule))][:, :, :, :, start : start + qk.shape[3]].to(qk.device)
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    qk = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)
    return qk[0], qk[1]


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads, cos_attn, customized_flash_attn, use_flex_attn, pad_to_multiplier, drop):
        super().__init__()
        self.using_flash, self.use_flex_attn, self.pad_to_multiplier = customized_flash_attn, use_flex_attn, 1
        self.num_heads, self.head_dim, self.cos_attn = num_heads, embed_dim // num_heads, cos_attn
        self.scale = 1 if cos_attn else self.head_dim**-0.5
        if cos_attn:
            size = (1, 1, num_heads, 1) if self.using_flash else (1, num_heads, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(torch.linspace(1, 3, num_heads).view(size))
            self.max_scale_mul = 2.5  # less than one of them
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(embed_dim)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj, self.proj_drop = nn.Linear(embed_dim, embed_dim), nn.Dropout(drop, True) if drop else nn.Identity()
        self.rope2d_normalized_by_hw, self.pad_to_multiplier = 2, pad_to_multiplier
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0
    ):
        qkv = F.linear(x, self.mat_qkv.weight, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        qkv = qkv.view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        L_dim = 1 if self.using_flash else 2
        q, k, v = qkv.unbind(2) if self.using_flash else qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.cos_attn:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1).mul(factor), F.normalize(k, dim=-1)
        if rope2d_freqs_grid is not None:
            q, k = apply_rotary_emb(
                q, k, scale_schedule, rope2d_freqs_grid, self.pad_to_multiplier, self.rope2d_normalized_by_hw, scale_ind
            )
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), dim=L_dim), torch.cat((self.cached_v, v), dim=L_dim)
            self.cached_k, self.cached_v = k, v
        if self.using_flash:
            kw = {}
            if attn_bias_or_two_vector is not None:
                visible, invisible = attn_bias_or_two_vector
                kw = dict(VAR_visible_kvlen=visible, VAR_invisible_qlen=invisible)
            out = flash_attn_func(q.to(v.dtype), k.to(v.dtype), v, softmax_scale=self.scale, **kw)
        elif self.use_flex_attn and attn_fn is not None:
            out = attn_fn(q, k, v, scale=self.scale).transpose(1, 2)
        else:
            out = slow_attn(q, k, v, attn_mask=attn_bias_or_two_vector, scale=self.scale).transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(x.shape)))


class CrossAttention(nn.Module):
    """To the text of each sample, of which the lengths differ; or one query of its own for each sample."""

    def __init__(self, embed_dim, kv_dim, num_heads, pool=False):
        super().__init__()
        self.num_heads = num_heads
        self.mat_q = nn.Parameter(torch.randn(1, embed_dim)) if pool else nn.Linear(embed_dim, embed_dim)
        self.mat_kv, self.proj = nn.Linear(kv_dim, 2 * embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, q, ca_kv):
        kv, ends, _ = ca_kv
        pool = isinstance(self.mat_q, nn.Parameter)
        q = self.mat_q.expand(len(ends) - 1, 1, -1) if pool else self.mat_q(q)
        texts = self.mat_kv(kv).split(ends.diff().tolist())
        heads = [[x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for x in t.chunk(2, dim=-1)] for t in texts]
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = torch.stack([slow_attn(x.to(k.dtype), k, v) for x, (k, v) in zip(q, heads, strict=True)])
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttnBlock(nn.Module):
    def __init__(self, embed_dim, num_heads, shared_aln, drop_path, layer_scale, fused_norm_func, checkpointing, **sa):
        super().__init__()
        self.C, self.D, self.shared_aln, self.norm_eps = embed_dim, embed_dim, shared_aln, 1e-6
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.sa, self.ca = (
            SelfAttention(embed_dim, num_heads, **sa), CrossAttention(embed_dim, embed_dim, num_heads)
        )  # fmt: skip
        self.ffn, self.ca_norm = FFN(embed_dim), nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=1e-6, elementwise_affine=False)
        self.fused_norm_func, self.checkpointing_sa_only = fused_norm_func, checkpointing
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 6 * embed_dim))
        self.ca_gamma = nn.Parameter(torch.rand(embed_dim) * layer_scale) if layer_scale >= 0 else 1

    def forward(
        self, x, cond_BD, ca_kv, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None,
        scale_ind=0,
    ):  # fmt: skip
        with torch.amp.autocast("cuda", enabled=False):
            modulation = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        options = attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid
        if self.fused_norm_func is None:
            h = self.ln_wo_grad(x.float()).mul(scale1.add(1)).add_(shift1)
        else:
            h = self.fused_norm_func(C=self.C, eps=self.norm_eps, x=x, scale=scale1, shift=shift1)
        if self.checkpointing_sa_only and self.training:
            x_sa = checkpoint(self.sa, h, *options, use_reentrant=False)
        elif self.fused_norm_func is None:
            x_sa = self.sa(h, *options)
        else:
            x_sa = self.sa(h, *options, scale_ind=scale_ind)
        x = x + self.drop_path(x_sa.mul_(gamma1))
        x = x + self.ca(self.ca_norm(x), ca_kv).float().mul_(self.ca_gamma)
        if self.fused_norm_func is None:
            h = self.ln_wo_grad(x.float()).mul(scale2.add(1)).add_(shift2)
        else:
            h = self.fused_norm_func(C=self.C, eps=self.norm_eps, x=x, scale=scale2, shift=shift2)
        return x + self.drop_path(self.ffn(h).mul(gamma2))


class AdaLNBeforeHead(nn.Module):
    def __init__(self, channels, fused_norm_func):
        super().__init__()
        self.C, self.D, self.norm_eps, self.fused_norm_func = channels, channels, 1e-6, fused_norm_func
        self.ln_wo_grad = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x_BLC, cond_BD):
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        if self.fused_norm_func is None:
            return self.ln_wo_grad(x_BLC).mul(scale.add(1)).add_(shift)
        return self.fused_norm_func(C=self.C, eps=self.norm_eps, x=x_BLC, scale=scale, shift=shift)


def fused_ada_layer_norm(C, eps, x, scale, shift):
    return F.layer_norm(x.float(), (C,), eps=eps).mul(scale.add(1)).add_(shift)


def fused_ada_rms_norm(C, eps, x, scale, shift):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add_(eps))).mul(scale.add(1)).add_(shift)


def _causal_mask(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def _schedule_mask(lengths):
    document_id = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def var_mask_mod(b, h, q_idx, kv_idx):
        return (document_id[q_idx] == document_id[kv_idx]) | _causal_mask(b, h, q_idx, kv_idx)

    return var_mask_mod


def _cache_mask(keys):
    def var_mask_mod(b, h, q_idx, kv_idx):
        return kv_idx < keys

    return var_mask_mod


def flex_attention(q, k, v, block_mask, scale):
    return slow_attn(q, k, v, attn_mask=block_mask[: q.shape[2], : k.shape[2]], scale=scale)


class FlexAttn(nn.Module):
    def __init__(self, block_scales, mask_type, L, auto_padding=False):
        super().__init__()
        self.block_scales, self.auto_padding, self.flex_attention = block_scales, auto_padding, flex_attention
        self.lengths = [t * h * w for t, h, w in block_scales]
        padded = [*self.lengths, L - sum(self.lengths)] if sum(self.lengths) < L else self.lengths
        self.offsets = torch.tensor([0, *padded]).cumsum(0)
        self.mask_mod = {
            "var": lambda: _schedule_mask(padded), "causal": lambda: _causal_mask,
            "var_infer_mask_with_kv_cache": lambda: _cache_mask(sum(self.lengths)),
        }[mask_type]()  # fmt: skip
        rows = torch.arange(L)
        self.block_mask = self.mask_mod(0, 0, rows[:, None], rows[None]).expand(L, L)

    def forward(self, q, k, v, scale=None):
        q, k = q.to(v.dtype), k.to(v.dtype)
        if not self.auto_padding:
            return self.flex_attention(q, k, v, block_mask=self.block_mask, scale=scale)
        queries = q.shape[2]
        q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % 128)) for x in (q, k, v))
        return self.flex_attention(q, k, v, block_mask=self.block_mask, scale=scale)[:, :, :queries]


class SharedAdaLin(nn.Linear):
    def forward(self, cond_BD):
        return super().forward(cond_BD).unflatten(-1, (1, 6, -1))


class MultipleLayers(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.module = nn.ModuleList(blocks)

    def forward(self, x, checkpointing_full_block=False, **options):
        for block in self.module:
            call = partial(checkpoint, block, use_reentrant=False) if checkpointing_full_block else block
            x = call(x, **options)
        return x


class Infinity(nn.Module):
    """The transformer. `text_channels` are those of the features of the text."""

    def __init__(
        self, vae_local=None, text_channels=24, text_maxlen=16, embed_dim=32, depth=2, num_heads=2, shared_aln=False,
        drop_rate=0.0, drop_path_rate=0.0, cond_drop_rate=0.3, cross_attn_layer_scale=-1.0, cos_attn=True,
        customized_flash_attn=False, fused_norm=False, rms_norm=False, block_chunks=1, checkpointing=None,
        pad_to_multiplier=1, use_flex_attn=False, schedules=(), **others,
    ):  # fmt: skip
        super().__init__()
        self.C, self.d_vae, self.num_heads = embed_dim, vae_local.embed_dim if vae_local else 8, num_heads
        self.customized_flash_attn, self.use_flex_attn = customized_flash_attn, use_flex_attn
        self.pad_to_multiplier, self.checkpointing = pad_to_multiplier, checkpointing
        self.cond_drop_rate, self.num_block_chunks = cond_drop_rate, block_chunks
        self.rope2d_freqs_grid = {}
        self.text_norm, self.norm0_ve = nn.Identity(), nn.Identity()
        self.cfg_uncond = nn.Parameter(torch.randn(text_maxlen, text_channels))
        self.text_proj_for_sos = CrossAttention(embed_dim, text_channels, num_heads, pool=True)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(text_channels, embed_dim), nn.GELU("tanh"))
        self.pos_start = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.lvl_embed, self.word_embed = nn.Embedding(15, embed_dim), nn.Linear(self.d_vae, embed_dim)
        self.shared_ada_lin = nn.Identity()
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        fused = (fused_ada_rms_norm if rms_norm else fused_ada_layer_norm) if fused_norm else None
        self.unregistered_blocks = [
            CrossAttnBlock(
                embed_dim, num_heads, shared_aln, drop_path_rate * i / depth, cross_attn_layer_scale, fused,
                checkpointing == "self-attn", cos_attn=cos_attn, customized_flash_attn=customized_flash_attn,
                use_flex_attn=use_flex_attn, pad_to_multiplier=pad_to_multiplier, drop=drop_rate,
            )
            for i in range(1, depth + 1)
        ]  # fmt: skip
        if block_chunks == 1:
            self.blocks = nn.ModuleList(self.unregistered_blocks)
        else:
            size = depth // block_chunks
            chunks = (self.unregistered_blocks[i : i + size] for i in range(0, depth, size))
            self.block_chunks = nn.ModuleList(MultipleLayers(chunk) for chunk in chunks)
        self.head_nm, self.head = AdaLNBeforeHead(embed_dim, fused), nn.Linear(embed_dim, 2 * self.d_vae)
        self.attn_fn_compile_dict = {}
        for schedule in schedules:
            self.learn(schedule)

    def learn(self, schedule):
        """Prepares a schedule, as theirs does with all that it may meet."""
        length = sum(t * h * w for t, h, w in schedule)
        length += -length % self.pad_to_multiplier
        table = rope_table(schedule, self.C // self.num_heads)
        self.rope2d_freqs_grid[str(tuple(schedule))] = F.pad(table, (0, 0, 0, length - table.shape[4]))
        if self.use_flex_attn:
            self.attn_fn_compile_dict[tuple(schedule)] = FlexAttn(schedule, "var", length)

    def forward(self, label_B_or_BLT, x_BLC_wo_prefix, scale_schedule, cfg_infer=False, **kwargs):
        if cfg_infer:
            return self.autoregressive_infer_cfg(
                label_B_or_BLT=label_B_or_BLT, scale_schedule=scale_schedule, **kwargs
            )
        kv_compact, lens, cu_seqlens_k, max_seqlen_k = label_B_or_BLT
        total = 0
        for le in lens:
            if random.random() < self.cond_drop_rate:
                kv_compact[total : total + le] = self.cfg_uncond[:le]
            total += le
        cond_BD = self.text_proj_for_sos(None, (kv_compact, cu_seqlens_k, max_seqlen_k)).float()[:, 0]
        ca_kv = self.text_proj_for_ca(kv_compact), cu_seqlens_k, max_seqlen_k
        gss = self.shared_ada_lin(cond_BD).contiguous()
        embedded = self.word_embed(self.norm0_ve(x_BLC_wo_prefix.float()))
        x_BLC = torch.cat((cond_BD.unsqueeze(1) + self.pos_start, embedded), dim=1)
        l_end = x_BLC.shape[1]
        need_to_pad = -l_end % self.pad_to_multiplier
        attn_bias, attn_fn = None, None
        if self.customized_flash_attn:
            attn_bias = (self.Infinity_visible_kvlen[:l_end], self.Infinity_invisible_qlen[:l_end])
        else:
            x_BLC = F.pad(x_BLC, (0, 0, 0, need_to_pad))
        if self.use_flex_attn:
            attn_fn = self.attn_fn_compile_dict[tuple(scale_schedule)]
        elif not self.customized_flash_attn:
            d = torch.cat([torch.full((pn[0] * pn[1] * pn[2],), i) for i, pn in enumerate(scale_schedule)])
            attn_bias = torch.where(d.view(1, 1, l_end, 1) >= d, 0.0, -torch.inf)
            if need_to_pad:
                attn_bias = F.pad(attn_bias, (0, need_to_pad, 0, need_to_pad), value=-torch.inf)
                attn_bias[0, 0, l_end:, 0] = 0
            attn_bias = attn_bias.type_as(x_BLC)
        x_BLC = self.add_lvl_embeding_for_x_BLC(x_BLC, scale_schedule, need_to_pad)
        full_block = self.checkpointing == "full-block" and self.training
        rest = (gss, ca_kv, attn_bias, attn_fn, scale_schedule)
        for b in self.blocks if self.num_block_chunks == 1 else self.block_chunks:
            if self.num_block_chunks > 1:
                x_BLC = b(
                    x_BLC, cond_BD=gss, ca_kv=ca_kv, attn_bias_or_two_vector=attn_bias, attn_fn=attn_fn,
                    scale_schedule=scale_schedule, checkpointing_full_block=full_block,
                    rope2d_freqs_grid=self.rope2d_freqs_grid,
                )  # fmt: skip
            elif full_block:
                x_BLC = checkpoint(b, x_BLC, *rest, self.rope2d_freqs_grid, use_reentrant=False)
            else:
                x_BLC = b(x_BLC, *rest, rope2d_freqs_grid=self.rope2d_freqs_grid)
        return self.get_logits(x_BLC[:, :l_end], cond_BD)

    def add_lvl_embeding_for_x_BLC(self, x_BLC, scale_schedule, need_to_pad=0):
        lens = torch.tensor([t * h * w for t, h, w in scale_schedule])
        if x_BLC.shape[1] != lens.sum() + need_to_pad:
            raise AssertionError("the padding is not that of the sequence")
        levels = self.lvl_embed(torch.arange(len(lens)).repeat_interleave(lens))
        return x_BLC + F.pad(levels, (0, 0, 0, need_to_pad))

    def get_logits(self, h, cond_BD):
        return self.head(self.head_nm(h.float(), cond_BD.float()))

    @torch.no_grad()
    def autoregressive_infer_cfg(self, vae, scale_schedule, label_B_or_BLT, B=1, g_seed=0, cfg_list=(), **options):
        """Samples bits, scale by scale with a cache; `vae` makes codes of them. Nothing is returned."""
        kv, lens, ends, longest = label_B_or_BLT
        uncond = torch.cat([self.cfg_uncond[:le] for le in lens])
        kv, ends = torch.cat((kv, uncond)), torch.cat((ends, ends[1:] + ends[-1]))
        cond_BD = self.text_proj_for_sos(None, (kv, ends, longest))[:, 0]
        ca_kv, gss = (self.text_proj_for_ca(kv), ends, longest), self.shared_ada_lin(cond_BD.float())
        rng, codes = torch.Generator().manual_seed(g_seed), 0
        x = cond_BD.unsqueeze(1) + self.pos_start
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        for si, (pn, cfg) in enumerate(zip(scale_schedule, cfg_list, strict=True)):
            x = x + self.lvl_embed.weight[si]
            for block in self.unregistered_blocks:
                x = block(x=x, cond_BD=gss, ca_kv=ca_kv, attn_bias_or_two_vector=None, scale_schedule=scale_schedule,
                          rope2d_freqs_grid=self.rope2d_freqs_grid, scale_ind=si)  # fmt: skip
            logits = self.get_logits(x, cond_BD)
            logits = (cfg * logits[:B] + (1 - cfg) * logits[B:]).unflatten(-1, (-1, 2))
            bits = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=rng).view(B, *pn, -1)
            codes = codes + F.interpolate(
                vae.quantizer.lfq.indices_to_codes(bits, label_type="bit_label"), size=scale_schedule[-1],
                mode=vae.quantizer.z_interplote_up,
            )  # fmt: skip
            if si + 1 < len(scale_schedule):
                x = F.interpolate(codes, size=scale_schedule[si + 1], mode=vae.quantizer.z_interplote_up)
                x = self.word_embed(x.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)


def make(seed=0, **options) -> Infinity:
    """A model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Infinity(**options)
