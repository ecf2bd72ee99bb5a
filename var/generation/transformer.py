"""The transformer prepared for inference: weights packed once, a KV cache allocated once, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import (
    PackedLinear,
    backends,
    block_causal_attention,
    qk_norm_cache,
)
from var_kernels.inference import huge_pages, packing

from ..model.modules import dtype_of, is_plain, unwrapped
from ..model.transformer import (
    FFN,
    VAR,
    AdaLNBeforeHead,
    Block,
    GatedBranch,
    KVCache,
    SelfAttention,
    add_and_norm,
)
from . import memory

Function = Callable[[Tensor], Tensor]


class Preparation:
    """Turns the modules of a transformer into the functions that generation calls, on packed weights.

    A module that is not what the model was built with (see `is_plain`) is called as it is.
    """

    def __init__(self, dtype: torch.dtype, backend: str, pack: bool) -> None:
        self.dtype, self.backend = dtype, backend
        self._linear_backend = backends.for_op("packed_linear", backend) if pack else "reference"
        self.nbytes = 0  # of the packed or converted copies of weights

    def linear(
        self, module: nn.Module, bias: Tensor | None = None, dtype: torch.dtype | None = None, gelu: bool = False
    ) -> Function:
        """`module`, plus `bias` if it is given, then tanh-GELU with `gelu`: in `dtype`, by default that of all."""
        dtype, module = dtype or self.dtype, unwrapped(module)
        if not is_plain(module, nn.Linear) or (bias is not None and module.bias is not None):
            return CalledModule(module, dtype, bias, gelu)
        packed = PackedLinear(
            module.weight, module.bias if bias is None else bias, dtype=dtype, gelu=gelu, backend=self._linear_backend
        )
        self.nbytes += packed.nbytes
        return packed

    def modulation(self, ada_lin: nn.Module) -> Function:
        """SiLU and a linear layer: from class embeddings (rows, C) fp32."""
        if is_plain(ada_lin, nn.Sequential) and len(ada_lin) == 2 and is_plain(ada_lin[0], nn.SiLU):
            linear = self.linear(ada_lin[1])
            return lambda cond: linear(F.silu(cond).to(self.dtype))
        return CalledModule(ada_lin, torch.float32)


class CalledModule:
    """A module that is called as it is: a layer, attention or FFN. Its input and its result are converted."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, bias: Tensor | None = None, gelu: bool = False) -> None:
        self._module, self._dtype = module, dtype
        self._bias, self._gelu = None if bias is None else bias.detach(), gelu

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        y = self._module(x.to(dtype_of(self._module)), *arguments)
        if self._bias is not None:
            y = y + self._bias.to(y.dtype)
        return (F.gelu(y, approximate="tanh") if self._gelu else y).to(self._dtype)


class PreparedBlock(Protocol):
    """Computes what `Block.forward` computes, with x in fp32 and branches in the dtype of the projections."""

    def modulation(self, condition: Tensor) -> Tensor | None:
        """The AdaLN parameters (rows, 6, C) of these conditions; None if the block computes them in every call."""

    def __call__(
        self, x_BLC: Tensor, branch: GatedBranch | None, condition: Tensor, scale_lens: tuple[int, ...], cache: KVCache
    ) -> tuple[Tensor, GatedBranch]:
        """`condition` is the result of `modulation`, or that of `VAR.condition` if it is None."""


class FusedBlock:
    """A block of our ops. Its modulation is the same in all scales, so it is computed once for a generation."""

    def __init__(self, block: Block, prepare: Preparation) -> None:
        self._backend, self._dtype = prepare.backend, prepare.dtype
        self._offset = self._ada_lin = None
        if hasattr(block, "ada_gss"):
            self._offset = block.ada_gss.detach().float().clone()
        else:
            self._ada_lin = prepare.modulation(block.ada_lin)
        attn, ffn = unwrapped(block.attn), unwrapped(block.ffn)
        plain = is_plain(attn, SelfAttention)
        self._attn = FusedAttention(attn, prepare) if plain else CalledModule(attn, prepare.dtype)
        if is_plain(ffn, FFN):
            fc1, fc2 = prepare.linear(ffn.fc1, gelu=True), prepare.linear(ffn.fc2)
            self._ffn: Function = lambda y: fc2(fc1(y))
        else:
            self._ffn = CalledModule(ffn, prepare.dtype)

    def modulation(self, condition: Tensor) -> Tensor:
        parameters = condition + self._offset if self._ada_lin is None else self._ada_lin(condition)
        return parameters.view(len(condition), 6, -1)

    def __call__(
        self, x_BLC: Tensor, branch: GatedBranch | None, condition: Tensor, scale_lens: tuple[int, ...], cache: KVCache
    ) -> tuple[Tensor, GatedBranch]:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = condition.split(1, dim=1)  # the kernels read them in place
        x_BLC, y_BLC = add_and_norm(x_BLC, branch, scale1, shift1, self._backend)
        attended = GatedBranch(self._attn(y_BLC.to(self._dtype), scale_lens, cache), gamma1)
        x_BLC, y_BLC = add_and_norm(x_BLC, attended, scale2, shift2, self._backend)
        return x_BLC, GatedBranch(self._ffn(y_BLC), gamma2)


class FusedAttention:
    """`SelfAttention.forward` with a cache, of our ops."""

    def __init__(self, attn: SelfAttention, prepare: Preparation) -> None:
        self._config, self._backend = attn.config, prepare.backend
        self._qkv = prepare.linear(attn.mat_qkv, attn.qkv_bias())
        self._proj = prepare.linear(attn.proj)
        normalised = attn.config.attn_l2_norm
        self._q_factor = attn.q_factor().detach().flatten().float() if normalised else None  # (H,)

    def __call__(self, y_BLC: Tensor, scale_lens: tuple[int, ...], cache: KVCache) -> Tensor:
        rows, length, width = y_BLC.shape
        qkv = self._qkv(y_BLC).view(rows, length, 3, self._config.heads, self._config.head_dim)
        if self._q_factor is None:
            q_BHLD, k, v = qkv.transpose(1, 3).unbind(2)
            cache.extended(k, v)
        else:
            q_BHLD = qk_norm_cache(
                qkv, cache.k, cache.v, cache.start, q_factor=self._q_factor, backend=self._backend
            )
        end = cache.start + length
        out_BHLD = block_causal_attention(
            q_BHLD, cache.k[:, :, :end], cache.v[:, :, :end], scale_lens, softmax_scale=self._config.softmax_scale,
            backend=self._backend,
        )
        return self._proj(out_BHLD.transpose(1, 2).reshape(rows, length, width))


class CalledBlock:
    """A block that is called as it is. Its inputs and its results are converted."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def modulation(self, condition: Tensor) -> None:
        return None

    def __call__(
        self, x_BLC: Tensor, branch: GatedBranch | None, condition: Tensor, scale_lens: tuple[int, ...], cache: KVCache
    ) -> tuple[Tensor, GatedBranch]:
        dtype = dtype_of(self._module)
        if branch is not None:
            branch = GatedBranch(*(tensor.to(dtype) for tensor in branch))
        x_BLC, branch = self._module(x_BLC.to(dtype), branch, condition.to(dtype), scale_lens, cache)
        return x_BLC.float(), GatedBranch(branch.output.to(self._dtype), branch.gate.float())


class TransformerWeights:
    """The weights of `var` as they are now, packed for generation in `dtype`. Generators of a model share them.

    `dtype` is the dtype of the projections, of attention and of the KV cache. The residual stream, the norms, the
    embeddings and the head are fp32. `backend` serves every op; None means the backend of `var`. With `pack=False` the
    reference computes the projections. A module that is not what the model was built with is called as it is, in the
    dtype of its parameters.
    """

    def __init__(
        self, var: VAR, dtype: torch.dtype = torch.float32, *, backend: str | None = None, pack: bool = True
    ) -> None:
        self.config, self.dtype, self.device = var.config, dtype, var.pos_1LC.device
        self.backend = var.backend if backend is None else backend
        with packing.reused_memory():
            self._prepare(var, Preparation(dtype, self.backend, pack))

    def _prepare(self, var: VAR, prepare: Preparation) -> None:
        self.blocks: list[PreparedBlock] = [
            FusedBlock(block, prepare) if is_plain(block, Block) else CalledBlock(block, prepare.dtype)
            for block in map(unwrapped, var.blocks)
        ]
        self.shared_modulation = prepare.modulation(var.shared_ada_lin) if var.config.shared_aln else None
        head_norm = var.head_nm
        if is_plain(head_norm, AdaLNBeforeHead):
            self.head_modulation = prepare.modulation(head_norm.ada_lin)  # scale and shift (rows, 2C)
        else:
            self.head_modulation = lambda cond: torch.cat(head_norm(cond.to(dtype_of(head_norm))), dim=1).float()
        self.head = prepare.linear(var.head, dtype=torch.float32)
        self.class_emb = _copied(var.class_emb, nn.Embedding, F.embedding)
        self.word_embed = _copied(var.word_embed, nn.Linear, F.linear)
        self.pos_start, self.positions = (t.detach().float().clone() for t in (var.pos_start, var.positions()))
        self.nbytes = prepare.nbytes


def _copied(module: nn.Module, kind: type[nn.Module], function: Callable[..., Tensor]) -> Function:
    """`function`, which computes a module of type `kind` from its parameters, with copies of these in fp32."""
    if not is_plain(module, kind):
        own = dtype_of(module)
        return lambda x: module(x.to(own) if x.is_floating_point() else x).float()
    parameters = [parameter.detach().float().clone() for parameter in module.parameters()]
    return lambda x: function(x, *parameters)


class InferenceTransformer:
    """A transformer, computed scale by scale for up to `rows` sequences at a time, on a KV cache of its own."""

    def __init__(self, weights: TransformerWeights, rows: int) -> None:
        self.weights, self.config, self.rows = weights, weights.config, rows
        config, cache = self.config, memory.cache_shape(weights.config, rows)
        self._caches = [
            tuple(huge_pages.zeros(*cache, dtype=weights.dtype, device=weights.device) for _ in range(2))
            for _ in weights.blocks
        ]
        # `_modulation` (depth, rows, 6, C) holds gamma1, gamma2, scale1, scale2, shift1, shift2 of every block; the
        # kernels read it in place. `_head_modulation` (rows, 2, C) holds scale and shift of the head. A block that
        # computes its modulation itself reads `_condition`.
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=weights.device)

        self._modulation = zeros(config.depth, rows, 6, config.width)
        self._head_modulation = zeros(rows, 2, config.width)
        self._condition = zeros(rows, 1, 6, config.width) if config.shared_aln else zeros(rows, config.width)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return memory.cache_bytes(self.config, self.rows, self.weights.dtype.itemsize)

    def begin(self, labels: Tensor) -> Tensor:
        """Compute the modulation of all blocks for these classes: it is the same at all scales.

        Returns the input (rows, l_1, C) of the first scale.
        """
        rows, weights = len(labels), self.weights
        cond = weights.class_emb(labels)
        if weights.shared_modulation is None:
            condition = cond
        else:
            condition = weights.shared_modulation(cond).view(rows, 1, 6, self.config.width)
        self._condition[:rows] = condition
        for block, memory_of_block in zip(weights.blocks, self._modulation, strict=True):
            if (modulation := block.modulation(condition)) is not None:
                memory_of_block[:rows] = modulation
        self._head_modulation[:rows] = weights.head_modulation(cond).view(rows, 2, self.config.width)
        first = self.config.schedule.lengths[0]
        return cond.unsqueeze(1) + weights.pos_start + weights.positions[:, :first]

    def embed(self, map_BLC: Tensor, k: int, guided: bool) -> Tensor:
        """The input of scale k, (rows, l_k, C). `map_BLC` is the sum of the coarser scales, pooled to scale k.

        With `guided` the rows are there twice, for the conditional and the unconditional half.
        """
        start, length = self.config.schedule.starts[k], self.config.schedule.lengths[k]
        x_BLC = self.weights.word_embed(map_BLC) + self.weights.positions[:, start : start + length]
        return torch.cat((x_BLC, x_BLC)) if guided else x_BLC

    def step(self, x_BLC: Tensor, k: int, guidance: float | None = None) -> Tensor:
        """Logits (rows, l_k, V) of scale k in fp32. The keys and values of this scale are added to the KV cache.

        With `guidance` t the second half of the rows is unconditional, and the result has half as many rows:
        (1 + t)·conditional − t·unconditional. The halves are combined in front of the head: the head is linear, so the
        result is the same for half of its products.
        """
        rows, weights, schedule = len(x_BLC), self.weights, self.config.schedule
        lens, branch = schedule.lengths[: k + 1], None
        for i, (block, cache) in enumerate(zip(weights.blocks, self._caches, strict=True)):
            condition = self._modulation[i] if isinstance(block, FusedBlock) else self._condition
            keys, values = (part[:rows] for part in cache)
            x_BLC, branch = block(x_BLC, branch, condition[:rows], lens, KVCache(keys, values, schedule.starts[k]))
        branch = GatedBranch(branch.output.float(), branch.gate)  # the head is fp32
        scale, shift = self._head_modulation[:rows].split(1, dim=1)
        _, y_BLC = add_and_norm(x_BLC, branch, scale, shift, weights.backend)
        if guidance is not None:
            conditional, unconditional = y_BLC.chunk(2)
            y_BLC = torch.lerp(unconditional, conditional, 1 + guidance)
        return weights.head(y_BLC)
