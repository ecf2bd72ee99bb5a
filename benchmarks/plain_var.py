"""VAR in plain PyTorch, as it is written without our ops: the baseline for whole generations.

The architecture and the parameters are those of `var.VAR` and `var.VQVAE`, and no op of var_kernels runs in it. The
queries of a scale see all keys so far, so no mask is needed. The KV cache grows by `torch.cat`, the modulation of a
block is computed in every scale where it is used, projections are `F.linear`, and top-p sorts the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import var
from var.model.transformer import scale_of_token

BlockCache = tuple[Tensor, Tensor] | None


def block_parameters(transformer: var.VAR) -> list[dict[str, Tensor]]:
    """The parameters of every block by name, so that one compiled function serves all blocks."""
    return [dict(block.named_parameters()) for block in transformer.blocks]


def block_forward(
    x: Tensor, cond: Tensor, cache: BlockCache, p: dict[str, Tensor], heads: int, softmax_scale: float | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One block on the tokens of one scale; `cond` is the class embedding, or the shared modulation."""
    batch, length, width = x.shape
    if "ada_gss" in p:
        modulation = p["ada_gss"] + cond
    else:
        modulation = F.linear(F.silu(cond), p["ada_lin.1.weight"], p["ada_lin.1.bias"]).view(batch, 1, 6, width)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)

    h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1
    bias = torch.cat((p["attn.q_bias"], torch.zeros_like(p["attn.q_bias"]), p["attn.v_bias"]))
    qkv = F.linear(h, p["attn.mat_qkv.weight"], bias).view(batch, length, 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if "attn.scale_mul_1H11" in p:
        factor = p["attn.scale_mul_1H11"].clamp_max(torch.log(torch.tensor(100.0))).exp()
        q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
    if cache is not None:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2).reshape(batch, length, width)
    x = x + gamma1 * F.linear(out, p["attn.proj.weight"], p["attn.proj.bias"])

    h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
    h = F.gelu(F.linear(h, p["ffn.fc1.weight"], p["ffn.fc1.bias"]), approximate="tanh")
    return x + gamma2 * F.linear(h, p["ffn.fc2.weight"], p["ffn.fc2.bias"]), (k, v)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The (B, l, V) logits after top-k, and after top-p by sorting."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        unlikely[..., -1:] = False
        logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return logits


class NearTies(NamedTuple):
    """For every token (B, L): the token with the second-best score in the draw, and how much lower its score is.

    `margin` is relative to the best score.
    """

    runner_up: Tensor
    margin: Tensor


def near_ties(probabilities: Tensor, generator: torch.Generator) -> NearTies:
    """The second-best tokens of the draw that `torch.multinomial` will make with this generator.

    The state of the generator is restored.
    """
    state = generator.get_state()
    scores = probabilities / torch.empty_like(probabilities).exponential_(generator=generator)
    generator.set_state(state)
    best, tokens = scores.topk(2, dim=-1)
    return NearTies(tokens[..., 1], 1 - best[..., 1] / best[..., 0])


class PlainVAR:
    """Generation from the parameters of a pipeline. `compiled` compiles the blocks and the decoder."""

    def __init__(self, pipeline: var.Pipeline, compiled: bool = False) -> None:
        self.vqvae, self.transformer = pipeline
        self.blocks = block_parameters(self.transformer)
        self.block: Callable = block_forward
        self.decode: Callable = self.vqvae.decode_features
        if compiled:
            # There is one graph for each scale, more than the default limit against accidental recompilation allows.
            torch._dynamo.config.recompile_limit = 64
            self.block = torch.compile(block_forward, dynamic=False)
            self.decode = torch.compile(self.vqvae.decode_features)

    @torch.inference_mode()
    def __call__(
        self, labels: Tensor, *, cfg: float, top_k: int, top_p: float, seed: int, ties: list[NearTies] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and images of the labels, with guidance; `ties` gets the near ties of each scale."""
        transformer, config = self.transformer, self.transformer.config
        batch, generator = len(labels), torch.Generator(labels.device).manual_seed(seed)
        cond = transformer.class_emb(torch.cat((labels, torch.full_like(labels, config.num_classes))))
        shared = transformer.shared_ada_lin(cond).view(-1, 1, 6, config.width) if config.shared_aln else cond
        positions = transformer.lvl_embed(scale_of_token(config.schedule).to(labels.device)) + transformer.pos_1LC
        x = cond.unsqueeze(1) + transformer.pos_start
        f_hat = self.vqvae.quantize.empty_features(batch)
        caches: list[BlockCache] = [None] * config.depth
        tokens, last = [], config.schedule.num_scales - 1
        for k, (start, length) in enumerate(zip(config.schedule.starts, config.schedule.lengths, strict=True)):
            x = x + positions[:, start : start + length]
            for i, parameters in enumerate(self.blocks):
                x, caches[i] = self.block(x, shared, caches[i], parameters, config.heads, config.softmax_scale)
            logits = self._head(x, cond)
            t = cfg * k / last
            conditional, unconditional = logits.chunk(2)
            probabilities = restrict((1 + t) * conditional - t * unconditional, top_k, top_p).softmax(dim=-1)
            if ties is not None:
                ties.append(near_ties(probabilities, generator))
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1, replacement=True, generator=generator)
            tokens.append(drawn.view(batch, length))
            f_hat, following = self._next_scale(f_hat, tokens[-1], k)
            if following is not None:
                x = transformer.word_embed(following)
                x = torch.cat((x, x))
        return torch.cat(tokens, dim=1), self.decode(f_hat)

    def _head(self, x: Tensor, cond: Tensor) -> Tensor:
        width = self.transformer.config.width
        scale, shift = self.transformer.head_nm.ada_lin(cond).view(len(cond), 1, 2, width).unbind(2)
        h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
        with torch.autocast(x.device.type, enabled=False):
            return self.transformer.head(h.float())

    def _next_scale(self, f_hat: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """f_hat with scale k added, and the input of the next scale (None after the last)."""
        config, quantize = self.vqvae.config, self.vqvae.quantize
        sides = config.patch_nums
        codes = quantize.embedding(tokens).transpose(1, 2).unflatten(2, (sides[k], sides[k]))
        if k < len(sides) - 1:
            codes = F.interpolate(codes, size=(sides[-1], sides[-1]), mode="bicubic")
        phi = quantize.quant_resi.qresi_ls[self._phi_of(k)]
        ratio = config.phi_ratio
        f_hat = f_hat + (1 - ratio) * codes + ratio * phi(codes)
        if k == len(sides) - 1:
            return f_hat, None
        pooled = F.interpolate(f_hat, size=(sides[k + 1], sides[k + 1]), mode="area")
        return f_hat, pooled.flatten(2).transpose(1, 2)

    def _phi_of(self, k: int) -> int:
        """The index of the φ whose tick is nearest to k / (K − 1)."""
        count, scales = self.vqvae.config.num_phi, len(self.vqvae.config.patch_nums)
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = torch.linspace(edge, 1 - edge, count, dtype=torch.float64)
        return int((ticks - k / (scales - 1)).abs().argmin())
