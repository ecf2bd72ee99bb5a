"""The next-scale transformer of VAR. Parameters have the names of the released files; every hot spot is one op."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import adaln_layer_norm, block_causal_attention, gated_residual_adaln

from .config import ScaleSchedule, VARConfig


class Modulation(NamedTuple):
    """The six AdaLN parameters of a block, each (B, 1, C), in the order of the checkpoints."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class SelfAttention(nn.Module):
    """Block-causal multi-head attention. With attn_l2_norm, q and k are unit vectors, and q has a learned factor per
    head."""

    def __init__(self, config: VARConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BLC: Tensor, scale_lens: tuple[int, ...]) -> Tensor:
        B, L, C = x_BLC.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))  # k has no bias
        qkv = F.linear(x_BLC, self.mat_qkv.weight, bias)
        q, k, v = qkv.view(B, L, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.config.attn_l2_norm:
            factor = self.scale_mul_1H11.clamp_max(math.log(100.0)).exp()
            q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        out_BHLD = block_causal_attention(
            q, k, v, scale_lens, softmax_scale=self.config.softmax_scale, backend=self.backend
        )
        return self.proj(out_BHLD.transpose(1, 2).reshape(B, L, C))


class FFN(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, FFN and the source of the six AdaLN parameters. `VAR._blocks` fuses the norms between them."""

    def __init__(self, config: VARConfig, backend: str) -> None:
        super().__init__()
        self.attn = SelfAttention(config, backend)
        self.ffn = FFN(config)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / math.sqrt(config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, cond_BD: Tensor, shared_B16C: Tensor | None) -> Modulation:
        """The AdaLN parameters: computed from the class embedding, or the shared ones plus this block's offset."""
        if shared_B16C is not None:
            parameters = self.ada_gss + shared_B16C
        else:
            parameters = self.ada_lin(cond_BD).view(len(cond_BD), 1, 6, -1)
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
        self.register_buffer("levels", scale_of_token(schedule), persistent=False)
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
        cond_BD = self.condition(labels)
        x_BLC = torch.cat((self.start(cond_BD), self.word_embed(teacher_forcing_input).to(cond_BD.dtype)), dim=1)
        return self._blocks(x_BLC + self.positions(), self.modulations(cond_BD), schedule.lengths)

    def condition(self, labels: Tensor) -> Tensor:
        """Class embeddings (B, C) of the labels, which are checked."""
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels: expected a 1-D integer tensor, got shape {tuple(labels.shape)} {labels.dtype}")
        if not torch.compiler.is_compiling() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > self.config.num_classes:
                raise ValueError(f"labels: expected values in [0, {self.config.num_classes}], got [{low}, {high}]")
        return self.class_emb(labels)

    def start(self, cond_BD: Tensor) -> Tensor:
        """Input of the first scale, without positions: the class embedding at every token of the map."""
        return cond_BD.unsqueeze(1) + self.pos_start

    def positions(self) -> Tensor:
        """Level and position embeddings (1, L, C)."""
        return self.lvl_embed(self.levels) + self.pos_1LC

    def modulations(self, cond_BD: Tensor) -> tuple[list[Modulation], tuple[Tensor, Tensor]]:
        """AdaLN parameters of all blocks and of the head. They depend on the class, not on the scale."""
        shared = None
        if self.config.shared_aln:
            shared = self.shared_ada_lin(cond_BD).view(len(cond_BD), 1, 6, -1)
        return [block.modulation(cond_BD, shared) for block in self.blocks], self.head_nm(cond_BD)

    def _blocks(self, x_BLC: Tensor, modulations, scale_lens: tuple[int, ...]) -> Tensor:
        """The blocks and the head. Each gate, residual sum and following norm is one op, also between two blocks."""
        blocks, (head_scale, head_shift) = modulations
        following = [*((m.scale1, m.shift1) for m in blocks[1:]), (head_scale, head_shift)]
        y_BLC = adaln_layer_norm(x_BLC, blocks[0].scale1, blocks[0].shift1, backend=self.backend)
        for block, m, (scale, shift) in zip(self.blocks, blocks, following, strict=True):
            branch = block.attn(y_BLC, scale_lens)
            x_BLC, y_BLC = gated_residual_adaln(x_BLC, branch, m.gamma1, m.scale2, m.shift2, backend=self.backend)
            x_BLC, y_BLC = gated_residual_adaln(x_BLC, block.ffn(y_BLC), m.gamma2, scale, shift, backend=self.backend)
        with torch.autocast(y_BLC.device.type, enabled=False):  # the head is fp32 in every released model
            return F.linear(y_BLC.float(), self.head.weight.float(), self.head.bias.float())

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
        if name == "lvl_1L" and not buffer.is_meta and not module.levels.is_meta:
            if not torch.equal(buffer[0].cpu(), module.levels.cpu()):
                raise ValueError(f"{prefix + name}: the file was made for another schedule than {schedule.patch_nums}")
