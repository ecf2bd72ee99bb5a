"""The transformer prepared for inference: weights packed once, a KV cache allocated once, without gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import (
    PackedLinear,
    adaln_layer_norm,
    backends,
    block_causal_attention,
    gated_residual_adaln,
    qk_norm_cache,
)
from var_kernels.inference import huge_pages

from ..model.transformer import VAR
from . import memory


class _Layer(NamedTuple):
    """One block: its projections, and the KV cache (rows, H, L, D) with the keys and values of all tokens so far."""

    qkv: PackedLinear
    proj: PackedLinear
    fc1: PackedLinear  # with GELU
    fc2: PackedLinear
    q_factor: Tensor | None  # (H,); None if queries and keys are not normalised
    k: Tensor
    v: Tensor


class InferenceTransformer:
    """The transformer of `var`, computed scale by scale for up to `rows` sequences at a time.

    `dtype` is the dtype of the projections, of attention and of the KV cache. The residual stream, the norms, the
    embeddings and the head are fp32. Weights are copied as they are now. `backend` serves every op; None means the
    backend of `var`. With `pack=False` the reference computes the projections.
    """

    def __init__(
        self, var: VAR, rows: int, dtype: torch.dtype = torch.float32, *, backend: str | None = None, pack: bool = True
    ) -> None:
        self.config, self.dtype, self.rows = var.config, dtype, rows
        self.backend = var.backend if backend is None else backend
        config, device = var.config, var.pos_1LC.device
        linear_backend = backends.for_op("packed_linear", self.backend) if pack else "reference"

        def linear(module: nn.Linear, bias: Tensor | None = None, kind: torch.dtype = dtype, gelu: bool = False):
            bias = module.bias if bias is None else bias
            return PackedLinear(module.weight, bias, dtype=kind, gelu=gelu, backend=linear_backend)

        def layer(block: nn.Module) -> _Layer:
            attn, ffn = block.attn, block.ffn
            cache = memory.cache_shape(config, rows)
            return _Layer(
                qkv=linear(attn.mat_qkv, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))),
                proj=linear(attn.proj), fc1=linear(ffn.fc1, gelu=True), fc2=linear(ffn.fc2),
                q_factor=attn.scale_mul_1H11.detach().clamp_max(math.log(100.0)).exp().flatten().float()
                if config.attn_l2_norm else None,
                k=huge_pages.zeros(*cache, dtype=dtype, device=device),
                v=huge_pages.zeros(*cache, dtype=dtype, device=device),
            )  # fmt: skip

        self._layers = [layer(block) for block in var.blocks]
        if config.shared_aln:
            self._modulate = [linear(var.shared_ada_lin[1])]
            self._offsets = torch.stack([block.ada_gss.detach().view(6, -1) for block in var.blocks])
        else:
            self._modulate = [linear(block.ada_lin[1]) for block in var.blocks]
        self._modulate_head = linear(var.head_nm.ada_lin[1])
        self._head = linear(var.head, kind=torch.float32)
        self._class_emb, self._pos_start = var.class_emb.weight.detach(), var.pos_start.detach()
        self._word_embed = var.word_embed.weight.detach(), var.word_embed.bias.detach()
        self._positions = var.positions().detach()
        # `_modulation` (depth, rows, 6, C) holds gamma1, gamma2, scale1, scale2, shift1, shift2 of every block; the
        # kernels read it in place. `_head_modulation` (rows, 2, C) holds scale and shift of the head.
        self._modulation = torch.zeros(config.depth, rows, 6, config.width, device=device)
        self._head_modulation = torch.zeros(rows, 2, config.width, device=device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return memory.cache_bytes(self.config, self.rows, self.dtype.itemsize)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed or converted copies of weights, in addition to the weights of the model."""
        layers = [linear for layer in self._layers for linear in layer if isinstance(linear, PackedLinear)]
        return sum(linear.nbytes for linear in (*layers, *self._modulate, self._modulate_head, self._head))

    def begin(self, labels: Tensor) -> Tensor:
        """Compute the modulation of all blocks for these classes: it is the same at all scales.

        Returns the input (rows, l_1, C) of the first scale.
        """
        rows, width = len(labels), self.config.width
        cond = F.embedding(labels, self._class_emb)
        activated = F.silu(cond).to(self.dtype)
        if self.config.shared_aln:
            shared = self._modulate[0](activated).view(rows, 6, width)
            torch.add(self._offsets[:, None], shared, out=self._modulation[:, :rows])
        else:
            for i, linear in enumerate(self._modulate):
                self._modulation[i, :rows] = linear(activated).view(rows, 6, width)
        self._head_modulation[:rows] = self._modulate_head(activated).view(rows, 2, width)
        return cond.unsqueeze(1) + self._pos_start + self._positions[:, : self.config.schedule.lengths[0]]

    def embed(self, map_BLC: Tensor, k: int, guided: bool) -> Tensor:
        """The input of scale k, (rows, l_k, C). `map_BLC` is the sum of the coarser scales, pooled to scale k.

        With `guided` the rows are there twice, for the conditional and the unconditional half.
        """
        start, length = self.config.schedule.starts[k], self.config.schedule.lengths[k]
        x_BLC = F.linear(map_BLC, *self._word_embed) + self._positions[:, start : start + length]
        return torch.cat((x_BLC, x_BLC)) if guided else x_BLC

    def step(self, x_BLC: Tensor, k: int, guidance: float | None = None) -> Tensor:
        """Logits (rows, l_k, V) of scale k in fp32. The keys and values of this scale are added to the KV cache.

        With `guidance` t the second half of the rows is unconditional, and the result has half as many rows:
        (1 + t)·conditional − t·unconditional. The halves are combined in front of the head: the head is linear, so the
        result is the same for half of its products.
        """
        rows, length, width = x_BLC.shape
        config, start = self.config, self.config.schedule.starts[k]
        lens, end = config.schedule.lengths[: k + 1], start + length
        parameters = self._modulation[:, :rows].unbind(0)  # (rows, 6, C) of each block
        following = [*((p[:, 2:3], p[:, 4:5]) for p in parameters[1:]), self._head_modulation[:rows].split(1, dim=1)]
        y_BLC = adaln_layer_norm(x_BLC, parameters[0][:, 2:3], parameters[0][:, 4:5], backend=self.backend)
        y_BLC = y_BLC.to(self.dtype)
        for layer, p, (scale, shift) in zip(self._layers, parameters, following, strict=True):
            qkv = layer.qkv(y_BLC).view(rows, length, 3, config.heads, config.head_dim)
            q_BHLD = self._extend_cache(layer, qkv, start)
            out_BHLD = block_causal_attention(
                q_BHLD, layer.k[:rows, :, :end], layer.v[:rows, :, :end], lens, softmax_scale=config.softmax_scale,
                backend=self.backend,
            )
            branch = layer.proj(out_BHLD.transpose(1, 2).reshape(rows, length, width))
            x_BLC, y_BLC = gated_residual_adaln(
                x_BLC, branch, p[:, 0:1], p[:, 3:4], p[:, 5:6], backend=self.backend
            )
            branch = layer.fc2(layer.fc1(y_BLC))
            if layer is self._layers[-1]:  # its result goes to the head, which is fp32
                branch = branch.to(x_BLC.dtype)
            x_BLC, y_BLC = gated_residual_adaln(x_BLC, branch, p[:, 1:2], scale, shift, backend=self.backend)
        if guidance is not None:
            conditional, unconditional = y_BLC.chunk(2)
            y_BLC = torch.lerp(unconditional, conditional, 1 + guidance)
        return self._head(y_BLC)

    def _extend_cache(self, layer: _Layer, qkv: Tensor, start: int) -> Tensor:
        rows, length = qkv.shape[:2]
        k_cache, v_cache = layer.k[:rows], layer.v[:rows]
        if layer.q_factor is not None:
            return qk_norm_cache(qkv, k_cache, v_cache, start, q_factor=layer.q_factor, backend=self.backend)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        k_cache[:, :, start : start + length] = k
        v_cache[:, :, start : start + length] = v
        return q
