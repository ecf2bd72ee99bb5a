"""The next-scale transformer of VAR. Parameters have the names of the released files; every hot spot is one op."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import adaln_layer_norm, block_causal_attention, gated_residual_adaln

from .config import ScaleSchedule, VARConfig
from .modules import dtype_of, is_plain

_INITIAL_FACTOR = math.log(4.0)  # logarithm of the factor of normalised queries, before training


class Modulation(NamedTuple):
    """The six AdaLN parameters of a block, each (B, 1, C), in the order of the checkpoints."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class GatedBranch(NamedTuple):
    """The output (B, L, C) of attention or FFN, and its gate (B, 1, C)."""

    output: Tensor
    gate: Tensor


class KVCache(NamedTuple):
    """Memory for the keys and values (B, H, L, D) of all tokens of one block. Those before `start` are there."""

    k: Tensor
    v: Tensor
    start: int

    def extended(self, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the tokens from `start` on, and return those of all tokens so far."""
        end = self.start + k_BHLD.shape[2]
        for memory, new in ((self.k, k_BHLD), (self.v, v_BHLD)):
            memory[:, :, self.start : end] = new
        return self.k[:, :, :end].to(k_BHLD.dtype), self.v[:, :, :end].to(v_BHLD.dtype)


class SelfAttention(nn.Module):
    """Block-causal multi-head attention. With attn_l2_norm, q and k are unit vectors, and q has a learned factor per
    head.

    With a `cache`, x holds the tokens of the last of the scales `scale_lens`, and sees the earlier ones in the cache.
    """

    def __init__(self, config: VARConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), _INITIAL_FACTOR))
        self.mat_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BLC: Tensor, scale_lens: tuple[int, ...], cache: KVCache | None = None) -> Tensor:
        B, L, C = x_BLC.shape
        qkv = self._projected(x_BLC)
        q, k, v = qkv.view(B, L, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.config.attn_l2_norm:
            q = (F.normalize(q.float(), dim=-1) * self.q_factor()).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if cache is not None:
            k, v = cache.extended(k, v)
        out_BHLD = block_causal_attention(
            q, k, v, scale_lens, softmax_scale=self.config.softmax_scale, backend=self.backend
        )
        return self.proj(out_BHLD.transpose(1, 2).reshape(B, L, C))

    def q_factor(self) -> Tensor:
        """The factor (1, H, 1, 1) of the normalised queries."""
        return self.scale_mul_1H11.float().clamp_max(math.log(100.0)).exp()

    def qkv_bias(self) -> Tensor:
        """The bias (3C,) of queries, keys and values. Keys have none."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def _projected(self, x_BLC: Tensor) -> Tensor:
        if is_plain(self.mat_qkv, nn.Linear) and self.mat_qkv.bias is None:
            return F.linear(x_BLC, self.mat_qkv.weight, self.qkv_bias())
        qkv = self.mat_qkv(x_BLC)
        return qkv + self.qkv_bias().to(qkv.dtype)


class FFN(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def add_and_norm(
    x_BLC: Tensor, branch: GatedBranch | None, scale: Tensor, shift: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """x plus the gated branch, and LayerNorm with AdaLN of that sum."""
    if branch is None:
        return x_BLC, adaln_layer_norm(x_BLC, scale, shift, backend=backend)
    return gated_residual_adaln(x_BLC, *branch, scale, shift, backend=backend)


class Block(nn.Module):
    """Attention and FFN, each between a norm with AdaLN and a gate.

    The sum of x and the last gated branch is left to the norm that follows, in the next block or before the head: gate,
    sum and norm are one op. So x and that branch with its gate go from block to block; before the first block there is
    no branch. `condition` is what the AdaLN parameters are computed from, see `VAR.condition`.
    """

    def __init__(self, config: VARConfig, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.attn = SelfAttention(config, backend)
        self.ffn = FFN(config)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / math.sqrt(config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(
        self, x_BLC: Tensor, branch: GatedBranch | None, condition: Tensor, scale_lens: tuple[int, ...],
        cache: KVCache | None = None,
    ) -> tuple[Tensor, GatedBranch]:  # fmt: skip
        m = self.modulation(condition)
        x_BLC, y_BLC = add_and_norm(x_BLC, branch, m.scale1, m.shift1, self.backend)
        attended = GatedBranch(self.attn(y_BLC, scale_lens, cache), m.gamma1)
        x_BLC, y_BLC = add_and_norm(x_BLC, attended, m.scale2, m.shift2, self.backend)
        return x_BLC, GatedBranch(self.ffn(y_BLC), m.gamma2)

    def modulation(self, condition: Tensor) -> Modulation:
        """The AdaLN parameters: computed from the class embedding (B, C), or the shared ones (B, 1, 6, C) plus this
        block's offset."""
        if condition.dim() == 4:
            parameters = self.ada_gss + condition
        else:
            parameters = self.ada_lin(condition).view(len(condition), 1, 6, -1)
        return Modulation(*parameters.unbind(2))


class AdaLNBeforeHead(nn.Module):
    """Computes scale and shift of the norm before the head from the class embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, cond_BD: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.ada_lin(cond_BD).view(len(cond_BD), 1, 2, -1).unbind(2)
        return scale, shift


class VAR(nn.Module):
    """Visual autoregressive transformer (arXiv 2404.02905). It predicts all tokens of a scale in parallel, given all
    coarser scales.

    labels is (B,) int64 in [0, num_classes], where num_classes is the unconditional class. `backend` is passed to every
    op.
    """

    def __init__(self, config: VARConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        width, schedule = config.width, config.schedule
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, schedule.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, schedule.length, width))
        self.lvl_embed = nn.Embedding(schedule.num_scales, width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(width)
        self.head = nn.Linear(width, config.vocab_size)
        self.backend = backend
        self.register_load_state_dict_pre_hook(_drop_derived_buffers)

    def forward(self, labels: Tensor, teacher_forcing_input: Tensor) -> Tensor:
        """Logits (B, L, V) in fp32.

        `teacher_forcing_input` (B, L − l_1, z_channels) holds, for every scale after the first, the sum of the coarser
        scales.
        """
        schedule = self.config.schedule
        expected = (len(labels), schedule.length - schedule.lengths[0], self.config.z_channels)
        if tuple(teacher_forcing_input.shape) != expected:
            raise ValueError(
                f"teacher_forcing_input: expected shape {expected}, got {tuple(teacher_forcing_input.shape)}"
            )
        cond_BD = self.class_emb(checked_labels(labels, self.config.num_classes))
        first_BLC = cond_BD.unsqueeze(1) + self.pos_start
        x_BLC = torch.cat((first_BLC, self.word_embed(teacher_forcing_input).to(cond_BD.dtype)), dim=1)
        x_BLC, branch, condition = x_BLC + self.positions(), None, self.condition(cond_BD)
        for block in self.blocks:
            x_BLC, branch = block(x_BLC, branch, condition, schedule.lengths)
        _, y_BLC = add_and_norm(x_BLC, branch, *self.head_nm(cond_BD), self.backend)
        return self.logits(y_BLC)

    def condition(self, cond_BD: Tensor) -> Tensor:
        """What the blocks compute their AdaLN parameters from: the class embedding (B, C), or with `shared_aln` the
        parameters (B, 1, 6, C) that all blocks share."""
        if not self.config.shared_aln:
            return cond_BD
        return self.shared_ada_lin(cond_BD).view(len(cond_BD), 1, 6, -1)

    def positions(self) -> Tensor:
        """Level and position embeddings (1, L, C)."""
        lengths = self.config.schedule.lengths
        levels = self.lvl_embed(torch.arange(len(lengths), device=self.pos_1LC.device))
        return torch.cat([level.expand(n, -1) for level, n in zip(levels, lengths, strict=True)]) + self.pos_1LC

    def logits(self, y_BLC: Tensor) -> Tensor:
        """The head, which is fp32 in every released model."""
        with torch.autocast(y_BLC.device.type, enabled=False):
            if is_plain(self.head, nn.Linear) and self.head.bias is not None:
                return F.linear(y_BLC.float(), self.head.weight.float(), self.head.bias.float())
            return self.head(y_BLC.to(dtype_of(self.head))).float()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, *, adaln: float = 0.5, gamma: float = 1e-5,
                     head: float = 0.02) -> None:
        """Initialise for training as in the paper: truncated normals of std sqrt(1/(3C)), small gates and head."""
        width, std = self.config.width, math.sqrt(1 / self.config.width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
        for attn in (block.attn for block in self.blocks):
            nn.init.zeros_(attn.q_bias)
            nn.init.zeros_(attn.v_bias)
            if self.config.attn_l2_norm:
                nn.init.constant_(attn.scale_mul_1H11, _INITIAL_FACTOR)
        self.head.weight.mul_(head)
        self.head_nm.ada_lin[-1].weight.mul_(adaln)
        if self.config.shared_aln:
            _scale_gates(self.shared_ada_lin[-1].weight.view(6, width, width), gamma, adaln)
        for block in self.blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
            if self.config.shared_aln:
                nn.init.normal_(block.ada_gss, std=1 / math.sqrt(width), generator=generator)
                _scale_gates(block.ada_gss.view(6, width), gamma, adaln)
            else:
                _scale_gates(block.ada_lin[-1].weight.view(6, width, width), gamma, adaln)


def checked_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels as int64. Raises ValueError if they are no 1-D integer tensor with values in [0, num_classes]."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected a 1-D integer tensor, got shape {tuple(labels.shape)} {labels.dtype}")
    if not torch.compiler.is_compiling() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(f"labels: expected values in [0, {num_classes}], got [{low}, {high}]")
    return labels.long()


def scale_of_token(schedule: ScaleSchedule) -> Tensor:
    """The index of each token's scale, (L,) int64."""
    lengths = torch.tensor(schedule.lengths)
    return torch.repeat_interleave(torch.arange(schedule.num_scales), lengths, output_size=schedule.length)


def _scale_gates(parameters: Tensor, gamma: float, adaln: float) -> None:
    parameters[:2].mul_(gamma)
    parameters[2:].mul_(adaln)


def _drop_derived_buffers(module: VAR, state_dict: dict, prefix: str, *_: object) -> None:
    """Remove the buffers of released files that follow from the configuration, after comparing them with it."""
    schedule, width = module.config.schedule, module.config.width
    expected = {
        "lvl_1L": (1, schedule.length),
        "attn_bias_for_masking": (1, 1, schedule.length, schedule.length),
        **{f"blocks.{i}.attn.zero_k_bias": (width,) for i in range(module.config.depth)},
    }
    for name, shape in expected.items():
        buffer = state_dict.pop(prefix + name, None)
        if buffer is None:
            continue
        if tuple(buffer.shape) != shape:
            raise ValueError(f"{prefix + name}: expected shape {shape}, got {tuple(buffer.shape)}")
        if name == "lvl_1L" and not buffer.is_meta:
            if not torch.equal(buffer[0].cpu(), scale_of_token(schedule)):
                raise ValueError(f"{prefix + name}: the file was made for another schedule than {schedule.patch_nums}")
