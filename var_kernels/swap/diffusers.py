"""diffusers: the blocks of DiT, PixArt, SD3, Flux and Sana, and its adaptive norms.

A block's gate, residual sum and second norm are one op; its attention and feed-forward are called as they are. Facts
about the foreign classes (attributes, signatures, the order of chunks) are read from `models/attention.py`,
`models/transformers/transformer_flux.py` and `sana_transformer.py` of https://github.com/huggingface/diffusers.
"""

from __future__ import annotations

import torch
from torch import nn

from . import diffusers_norms
from .diffusers_norms import gated_sum_and_norm, modulated, norm_difference
from .gated_sum import gated_sum
from .structure import Target, exactly, left_to_the_original


def _flux(
    self: nn.Module, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """`FluxTransformerBlock.forward`."""
    h, gate, shift, scale, gate_ff = self.norm1(hidden_states, emb=temb)
    context, c_gate, c_shift, c_scale, c_gate_ff = self.norm1_context(encoder_hidden_states, emb=temb)
    outputs = self.attn(
        hidden_states=h, encoder_hidden_states=context, image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )  # fmt: skip
    branch, c_branch, *of_images = outputs  # there is a third one with an image adapter (IP-Adapter)
    residual, h = gated_sum_and_norm(
        self, "norm2", hidden_states, branch, gate[:, None], scale[:, None], shift[:, None]
    )
    hidden_states = gated_sum(residual, self.ff(h), gate_ff[:, None])
    for output in of_images:
        hidden_states = hidden_states + output
    residual, context = gated_sum_and_norm(
        self, "norm2_context", encoder_hidden_states, c_branch, c_gate[:, None], c_scale[:, None], c_shift[:, None]
    )
    return _clipped(gated_sum(residual, self.ff_context(context), c_gate_ff[:, None])), hidden_states


def _clipped(x: torch.Tensor) -> torch.Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _flux_single(
    self: nn.Module, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """`FluxSingleTransformerBlock.forward`."""
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    h, gate = self.norm(x, emb=temb)
    feed_forward = self.act_mlp(self.proj_mlp(h))
    attention = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    branch = self.proj_out(torch.cat([attention, feed_forward], dim=2))
    x = _clipped(gated_sum(x, branch, gate[:, None]))
    return x[:, :length], x[:, length:]


def _joint(self: nn.Module, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    """`JointTransformerBlock.forward`, the block of SD3 and SD3.5."""
    kwargs = joint_attention_kwargs or {}
    if self._chunk_size is not None:
        return left_to_the_original(
            self, "forward", "feed-forward in chunks", hidden_states, encoder_hidden_states, temb, kwargs
        )
    h, gate, shift, scale, gate_ff, *second = self.norm1(hidden_states, emb=temb)
    if self.context_pre_only:
        context = self.norm1_context(encoder_hidden_states, temb)
    else:
        context, c_gate, c_shift, c_scale, c_gate_ff = self.norm1_context(encoder_hidden_states, emb=temb)
    branch, c_branch = self.attn(hidden_states=h, encoder_hidden_states=context, **kwargs)
    if self.use_dual_attention:
        h, gate2 = second
        hidden_states = gated_sum(hidden_states, branch, gate[:, None])
        branch, gate = self.attn2(hidden_states=h, **kwargs), gate2
    residual, h = gated_sum_and_norm(
        self, "norm2", hidden_states, branch, gate[:, None], scale[:, None], shift[:, None]
    )
    hidden_states = gated_sum(residual, self.ff(h), gate_ff[:, None])
    if self.context_pre_only:
        return None, hidden_states
    residual, context = gated_sum_and_norm(
        self, "norm2_context", encoder_hidden_states, c_branch, c_gate[:, None], c_scale[:, None], c_shift[:, None]
    )
    return gated_sum(residual, self.ff_context(context), c_gate_ff[:, None]), hidden_states


def _basic(
    self: nn.Module, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
    timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
):  # fmt: skip
    """`BasicTransformerBlock.forward`, the block of DiT (norm_type ada_norm_zero) and PixArt (ada_norm_single)."""
    kwargs = cross_attention_kwargs or {}
    reasons = {
        "feed-forward in chunks": self._chunk_size is not None,
        "GLIGEN": kwargs.get("gligen") is not None,
        "a deprecated scale of LoRA layers": kwargs.get("scale") is not None,
        f"hidden states of {hidden_states.dim()} dimensions": hidden_states.dim() != 3,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        return left_to_the_original(
            self, "forward", reason, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    kwargs = {name: value for name, value in kwargs.items() if name != "gligen"}
    if self.norm_type == "ada_norm_zero":
        h, *parts = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        gate, shift, scale, gate_ff = (part[:, None] for part in parts)
    else:
        shift1, scale1, gate, shift, scale, gate_ff = _from_table(self, hidden_states, timestep)
        h = modulated(self, "norm1", hidden_states, scale1, shift1)
    if self.pos_embed is not None:
        h = self.pos_embed(h)
    branch = self.attn1(
        h, encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    last_norm = _last_norm(self)
    if self.attn2 is None:
        residual, h = gated_sum_and_norm(self, last_norm, hidden_states, branch, gate, scale, shift)
    else:
        residual = gated_sum(hidden_states, branch, gate)
        residual = residual + self.attn2(
            residual, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **kwargs
        )
        h = modulated(self, last_norm, residual, scale, shift)
    return gated_sum(residual, self.ff(h), gate_ff)


def _from_table(self: nn.Module, hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The six modulations (B, 1, C) of a block that adds its table to those of the whole model."""
    return (self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)).chunk(6, dim=1)


def _last_norm(module: nn.Module) -> str:
    """The norm before the feed-forward. PixArt has none before its second attention, and the last one is norm2."""
    return "norm3" if module.norm_type == "ada_norm_zero" else "norm2"


def _sana(
    self: nn.Module, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
    timestep=None, height=None, width=None,
):  # fmt: skip
    """`SanaTransformerBlock.forward`."""
    shift1, scale1, gate, shift, scale, gate_ff = _from_table(self, hidden_states, timestep)
    h = modulated(self, "norm1", hidden_states, scale1, shift1).to(hidden_states.dtype)
    branch = self.attn1(h)
    if self.attn2 is None:
        residual, h = gated_sum_and_norm(self, "norm2", hidden_states, branch, gate, scale, shift)
    else:
        residual = gated_sum(hidden_states, branch, gate)
        residual = residual + self.attn2(
            residual, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        h = modulated(self, "norm2", residual, scale, shift)
    branch = self.ff(h.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return gated_sum(residual, branch.flatten(2, 3).permute(0, 2, 1), gate_ff)


def _basic_refusal(module: nn.Module) -> str | None:
    if module.norm_type == "ada_norm_single":
        return norm_difference(module, "norm1", "norm2")
    if module.attn2 is not None:
        return "a second attention with norm_type ada_norm_zero"
    return norm_difference(module, "norm3")


def _joint_refusal(module: nn.Module) -> str | None:
    return norm_difference(module, "norm2", *(() if module.context_pre_only else ("norm2_context",)))


_TWO_STREAMS = ("norm1", "norm1_context", "attn", "norm2", "norm2_context", "ff", "ff_context")

FLUX = Target(
    name="block of Flux",
    part="adaln",
    attributes=_TWO_STREAMS,
    others=("use_dual_attention", "attn2"),
    methods={
        "forward": exactly(
            "hidden_states encoder_hidden_states temb image_rotary_emb joint_attention_kwargs",
            "attn clip dtype ff ff_context float16 norm1 norm1_context norm2 norm2_context torch unsqueeze",
            "gate_msa shift_mlp scale_mlp gate_mlp c_gate_msa c_shift_mlp c_scale_mlp c_gate_mlp",
            optional="len",  # where there are image adapters
        )
    },
    refusal=lambda module: norm_difference(module, "norm2", "norm2_context"),
    replacements={"forward": _flux},
)
FLUX_SINGLE = Target(
    name="single-stream block of Flux",
    part="adaln",
    attributes=("norm", "proj_mlp", "act_mlp", "proj_out", "attn"),
    methods={
        "forward": exactly(
            "hidden_states encoder_hidden_states temb image_rotary_emb joint_attention_kwargs",
            "act_mlp attn cat clip dtype float16 norm proj_mlp proj_out shape torch unsqueeze",
            "residual gate mlp_hidden_states attn_output",
        )
    },
    replacements={"forward": _flux_single},
)
JOINT = Target(
    name="block of SD3",
    part="adaln",
    attributes=(*_TWO_STREAMS, "use_dual_attention", "context_pre_only", "attn2", "_chunk_size"),
    methods={
        "forward": exactly(
            "hidden_states encoder_hidden_states temb joint_attention_kwargs",
            "_chunk_dim _chunk_size _chunked_feed_forward attn attn2 context_pre_only ff ff_context norm1 "
            "norm1_context norm2 norm2_context unsqueeze use_dual_attention",
            "gate_msa shift_mlp scale_mlp gate_mlp gate_msa2 c_gate_msa c_shift_mlp c_scale_mlp c_gate_mlp",
        )
    },
    refusal=_joint_refusal,
    replacements={"forward": _joint},
)
BASIC = Target(
    name="block of DiT and PixArt",
    part="adaln",
    attributes=("norm1", "attn1", "norm2", "attn2", "ff", "norm_type", "pos_embed", "only_cross_attention",
                "_chunk_size"),
    condition=lambda module: module.norm_type in ("ada_norm_zero", "ada_norm_single"),
    methods={
        "forward": exactly(
            "hidden_states attention_mask encoder_hidden_states encoder_attention_mask timestep "
            "cross_attention_kwargs class_labels added_cond_kwargs",
            "ValueError _chunk_dim _chunk_size _chunked_feed_forward attn1 attn2 chunk copy dtype ff fuser get logger "
            "ndim norm1 norm2 norm3 norm_type only_cross_attention pop pos_embed reshape scale_shift_table shape "
            "squeeze unsqueeze warning",
            "gate_msa shift_mlp scale_mlp gate_mlp shift_msa scale_msa",
        )
    },
    refusal=_basic_refusal,
    replacements={"forward": _basic},
)  # fmt: skip
SANA = Target(
    name="block of Sana",
    part="adaln",
    attributes=("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table"),
    others=("norm_type",),
    methods={
        "forward": exactly(
            "hidden_states attention_mask encoder_hidden_states encoder_attention_mask timestep height width",
            "attn1 attn2 chunk dtype ff flatten norm1 norm2 permute reshape scale_shift_table shape to unflatten",
            "shift_msa scale_msa gate_msa shift_mlp scale_mlp gate_mlp",
        )
    },
    refusal=lambda module: norm_difference(module, "norm1", "norm2"),
    replacements={"forward": _sana},
)

TARGETS = (*diffusers_norms.TARGETS, FLUX, FLUX_SINGLE, JOINT, BASIC, SANA)
