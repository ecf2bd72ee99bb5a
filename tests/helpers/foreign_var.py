"""A small model with the structure of VAR's classes in other repositories, in our own words: what `swap` recognises.

Attributes, signatures, layouts and the order of random numbers are theirs; the code is ours and plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from var_kernels.multi_scale_quantize import phi_index


def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):
    """The attention of a library with tensors (B, L, H, D)."""
    mask = None if attn_bias is None else attn_bias
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, dropout_p=p, scale=scale
    ).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads, attn_drop, attn_l2_norm, using_xform):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.attn_l2_norm, self.scale = attn_l2_norm, 1 if attn_l2_norm else 0.25 / self.head_dim**0.5
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.randn(1, num_heads, 1, 1) + 2)
            self.max_scale_mul = 4.6
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(embed_dim)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj, self.proj_drop = nn.Linear(embed_dim, embed_dim), nn.Identity()
        self.attn_drop, self.using_flash, self.using_xform = attn_drop, False, using_xform
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias):
        qkv = F.linear(x, self.mat_qkv.weight, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        main_type, (batch, length, channels) = qkv.dtype, x.shape
        q, k, v = qkv.view(batch, length, 3, self.num_heads, self.head_dim).unbind(2)
        if self.attn_l2_norm:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1).mul(factor.transpose(1, 2)), F.normalize(k, dim=-1)
        if not self.using_xform:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.caching:
            if self.cached_k is not None:
                dim = 1 if self.using_xform else 2
                k, v = torch.cat((self.cached_k, k), dim), torch.cat((self.cached_v, v), dim)
            self.cached_k, self.cached_v = k, v
        dropout = self.attn_drop if self.training else 0.0
        if self.using_xform:
            bias = None if attn_bias is None else attn_bias.to(main_type).expand(batch, self.num_heads, -1, -1)
            q, k, v = q.to(main_type), k.to(main_type), v.to(main_type)
            out = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=self.scale)
        else:
            out = slow_attn(q, k, v, attn_mask=attn_bias, dropout_p=dropout, scale=self.scale).transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(batch, length, channels)))


slow_attn = F.scaled_dot_product_attention


class FFN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.act = nn.GELU("tanh")

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: a branch of a sample is left out with probability drop_prob."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, True

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty((len(x), 1, 1)).bernoulli_(1 - self.drop_prob)
        return x * (kept / (1 - self.drop_prob))


class AdaLNSelfAttn(nn.Module):
    def __init__(self, channels, heads, shared_aln, drop_path, **attention):
        super().__init__()
        self.C, self.D, self.shared_aln = channels, channels, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.attn, self.ffn = SelfAttention(channels, heads, **attention), FFN(channels)
        self.ln_wo_grad = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, channels) / channels**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x, cond_BD, attn_bias):
        modulation = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        branch = self.attn(self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1), attn_bias=attn_bias)
        x = x + self.drop_path(branch.mul_(gamma1))
        branch = self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2))
        return x + self.drop_path(branch.mul(gamma2))


class AdaLNBeforeHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.C, self.D = channels, channels
        self.ln_wo_grad = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x_BLC, cond_BD):
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x_BLC).mul(scale.add(1)).add_(shift)


class Phi(nn.Conv2d):
    def __init__(self, channels, ratio=0.5):
        super().__init__(channels, channels, 3, padding=1)
        self.resi_ratio = ratio

    def forward(self, h):
        return h * (1 - self.resi_ratio) + super().forward(h) * self.resi_ratio


class PhiPartiallyShared(nn.Module):
    def __init__(self, phis, scales):
        super().__init__()
        self.qresi_ls, self.scales = nn.ModuleList(phis), scales

    def __getitem__(self, ratio):
        return self.qresi_ls[phi_index(round(ratio * (self.scales - 1)), self.scales, len(self.qresi_ls))]


class VectorQuantizer2(nn.Module):
    def __init__(self, vocab_size, channels, patch_nums, using_znorm):
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.v_patch_nums = vocab_size, channels, using_znorm, patch_nums
        self.quant_resi = PhiPartiallyShared([Phi(channels) for _ in range(4)], len(patch_nums))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), vocab_size))
        self.record_hit, self.beta, self.prog_si = 0, 0.25, -1
        self.embedding = nn.Embedding(vocab_size, channels)

    def forward(self, f_BChw, ret_usages=False):
        f, codes, scales = f_BChw.float(), self.embedding.weight.data, len(self.v_patch_nums)
        rest, f_hat, loss = f.detach().clone(), torch.zeros_like(f), 0.0
        for si, pn in enumerate(self.v_patch_nums):
            z = F.interpolate(rest, size=(pn, pn), mode="area").permute(0, 2, 3, 1).reshape(-1, f.shape[1])
            if self.using_znorm:
                tokens = torch.argmax(F.normalize(z, dim=1) @ F.normalize(codes, dim=1).T, dim=1)
            else:
                tokens = torch.argmin(codes.square().sum(1) - 2 * (z @ codes.T), dim=1)
            h = self.embedding(tokens.view(-1, pn, pn)).permute(0, 3, 1, 2)
            h = F.interpolate(h, size=f.shape[-2:], mode="bicubic") if si + 1 < scales else h
            h = self.quant_resi[si / (scales - 1)](h)
            f_hat, rest = f_hat + h, rest - h.detach()
            loss = loss + F.mse_loss(f_hat.detach(), f) * self.beta + F.mse_loss(f_hat, f.detach())
        return (f_hat.detach() - f.detach()).add_(f), None, loss / scales

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        sizes = [(pn, pn) if isinstance(pn, int) else pn for pn in v_patch_nums or self.v_patch_nums]
        rest, f_hat, found, codes = f_BChw.detach().clone(), torch.zeros_like(f_BChw), [], self.embedding.weight.data
        for si, size in enumerate(sizes):
            if 0 <= self.prog_si < si:
                break
            z = F.interpolate(rest, size=size, mode="area").permute(0, 2, 3, 1).reshape(-1, rest.shape[1])
            if self.using_znorm:
                tokens = torch.argmax(F.normalize(z, dim=1) @ F.normalize(codes, dim=1).T, dim=1)
            else:
                tokens = torch.argmin(codes.square().sum(1) - 2 * (z @ codes.T), dim=1)
            h = self.embedding(tokens.view(-1, *size)).permute(0, 3, 1, 2)
            h = F.interpolate(h, size=rest.shape[-2:], mode="bicubic") if si + 1 < len(sizes) else h
            h = self.quant_resi[si / (len(sizes) - 1)](h)
            f_hat, rest = f_hat + h, rest - h
            found.append(f_hat if to_fhat else tokens.view(rest.shape[0], -1))
        return found

    def embed_to_fhat(self, ms_h_BChw, all_to_max_scale=True, last_one=False):
        f_hat, found, scales, last = 0, [], len(self.v_patch_nums), self.v_patch_nums[-1]
        for si, h in enumerate(ms_h_BChw):
            pn = last if all_to_max_scale else self.v_patch_nums[si]
            h = F.interpolate(h, size=(pn, pn), mode="bicubic") if h.shape[-1] != pn else h
            if not all_to_max_scale and si:
                f_hat = F.interpolate(f_hat, size=(pn, pn), mode="bicubic")
            f_hat = f_hat + self.quant_resi[si / (scales - 1)](h)
            found.append(f_hat)
        return found[-1] if last_one else found

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        pns, f_hat, inputs = self.v_patch_nums, 0, []
        for si in range(len(pns) - 1):
            if self.prog_si == 0 or 0 <= self.prog_si - 1 < si:
                break
            h = self.embedding(gt_ms_idx_Bl[si]).transpose(1, 2).view(-1, self.Cvae, pns[si], pns[si])
            h = F.interpolate(h, size=(pns[-1], pns[-1]), mode="bicubic")
            f_hat = f_hat + self.quant_resi[si / (len(pns) - 1)](h)
            pooled = F.interpolate(f_hat, size=(pns[si + 1], pns[si + 1]), mode="area")
            inputs.append(pooled.view(-1, self.Cvae, pns[si + 1] ** 2).transpose(1, 2))
        return torch.cat(inputs, dim=1) if len(inputs) else None

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        pns = self.v_patch_nums
        if si + 1 < SN:
            h_BChw = F.interpolate(h_BChw, size=(pns[-1], pns[-1]), mode="bicubic")
        f_hat.add_(self.quant_resi[si / (SN - 1)](h_BChw))
        return f_hat, F.interpolate(f_hat, size=(pns[si + 1], pns[si + 1]), mode="area") if si + 1 < SN else f_hat


class VAR(nn.Module):
    """The blocks, the head and the mask of training, with the quantizer in a tuple, out of the state dict."""

    def __init__(
        self, quantizer, channels=32, heads=2, depth=2, shared_aln=False, attn_l2_norm=True, attn_drop=0.0,
        drop_path=0.0, using_xform=False, num_classes=10,
    ):  # fmt: skip
        super().__init__()
        self.patch_nums, self.vae_quant_proxy, self.prog_si, self.C = quantizer.v_patch_nums, (quantizer,), -1, channels
        lens = [pn * pn for pn in self.patch_nums]
        ends = [sum(lens[: i + 1]) for i in range(len(lens))]
        self.begin_ends = [(end - length, end) for end, length in zip(ends, lens, strict=True)]
        self.word_embed = nn.Linear(quantizer.Cvae, channels)
        self.class_emb = nn.Embedding(num_classes + 1, channels)
        self.pos_start = nn.Parameter(torch.randn(1, lens[0], channels))
        self.shared_ada_lin = nn.Identity()
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.Linear(channels, 6 * channels), nn.Unflatten(1, (1, 6, channels)))
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(channels, heads, shared_aln, drop_path, attn_drop=attn_drop, attn_l2_norm=attn_l2_norm,
                          using_xform=using_xform)
            for _ in range(depth)
        )  # fmt: skip
        level = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
        mask = torch.where(level[:, None] >= level, 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None].contiguous())
        self.head_nm, self.head = AdaLNBeforeHead(channels), nn.Linear(channels, quantizer.vocab_size)

    def forward(self, label_B, x_BLCv_wo_first_l):
        end = self.begin_ends[self.prog_si][1]
        cond_BD = self.class_emb(label_B)
        x = cond_BD.unsqueeze(1) + self.pos_start
        if self.prog_si != 0:
            x = torch.cat((x, self.word_embed(x_BLCv_wo_first_l.to(self.word_embed.weight.dtype))), dim=1)
        ones = x.new_ones(8, 8)
        main_type = torch.matmul(ones, ones).dtype
        bias = self.attn_bias_for_masking[:, :, :end, :end].to(dtype=main_type)
        cond, x = self.shared_ada_lin(cond_BD).to(dtype=main_type), x.to(dtype=main_type)
        for block in self.blocks:
            x = block(x=x, cond_BD=cond, attn_bias=bias)
        return self.get_logits(x, cond_BD)

    def get_logits(self, x, cond_BD):
        wide = self.head.weight.dtype
        return self.head(self.head_nm(x.to(wide), cond_BD).to(wide)).to(wide)

    def autoregressive_infer_cfg(self, B, label_B, **options):
        """Greedy images of one class, in [0, 1]; the options of sampling have no effect."""
        _, f_hat = self.sample(torch.full((B,), label_B))
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)

    @torch.no_grad()
    def sample(self, label_B):
        """Greedy tokens (B, L), scale by scale with a cache, and f_hat."""
        quantizer, scales = self.vae_quant_proxy[0], len(self.patch_nums)
        cond_BD = self.class_emb(label_B)
        cond, x, found = self.shared_ada_lin(cond_BD), cond_BD.unsqueeze(1) + self.pos_start, []
        f_hat = torch.zeros(len(x), quantizer.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        for block in self.blocks:
            block.attn.kv_caching(True)
        for si, pn in enumerate(self.patch_nums):
            for block in self.blocks:
                x = block(x=x, cond_BD=cond, attn_bias=None)
            found.append(self.get_logits(x, cond_BD).argmax(-1))
            h = quantizer.embedding(found[-1]).transpose(1, 2).reshape(len(x), -1, pn, pn)
            f_hat, x = quantizer.get_next_autoregressive_input(si, scales, f_hat, h)
            x = self.word_embed(x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(found, dim=1), f_hat


def make(patch_nums=(1, 2, 3, 4, 6), using_znorm=False, seed=0, **options) -> VAR:
    """A model with random weights; its quantizer's parameters need no gradient, as in a training of VAR."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        quantizer = VectorQuantizer2(64, 8, tuple(patch_nums), using_znorm)
        model = VAR(quantizer, **options)
    quantizer.requires_grad_(False)
    return model


class VQVAE(nn.Module):
    """The quantizer as `quantize`, and a decoder."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantize, self.decoder = quantizer, nn.Conv2d(quantizer.Cvae, 3, 1)

    def fhat_to_img(self, f_hat):
        return self.decoder(f_hat).clamp(-1, 1)


def build_vae_var(V, Cvae, patch_nums, depth, attn_l2_norm, shared_aln, **others):
    """Both networks, by the function and the arguments of the original; a checkout of tests exports it."""
    quantizer = VectorQuantizer2(V, Cvae, tuple(patch_nums), using_znorm=False)
    model = VAR(quantizer, depth=depth, attn_l2_norm=attn_l2_norm, shared_aln=shared_aln, num_classes=1000)
    model.vae_proxy = (VQVAE(quantizer),)
    return model.vae_proxy[0], model
