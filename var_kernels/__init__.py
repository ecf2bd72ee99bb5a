"""Kernels for next-scale image generation: attention, AdaLN, vector quantization, sampling, and layers for inference.

Importing this package is inert: no kernel is loaded, built or run until the first call of an op.
"""

from .adaln_layer_norm import adaln_layer_norm, gated_residual_adaln
from .block_causal_attention import block_causal_attention
from .inference import packed_linear, winograd_conv
from .inference.group_norm_silu import group_norm_silu
from .inference.packed_linear import PackedLinear
from .inference.winograd_conv import PackedConv3x3
from .multi_scale_quantize import multi_scale_quantize, next_scale_input
from .nearest_code import nearest_code
from .qk_norm_cache import qk_norm_cache
from .sample_tokens import sample_tokens

__version__ = "0.1.0"
__all__ = [
    "PackedConv3x3",
    "PackedLinear",
    "adaln_layer_norm",
    "block_causal_attention",
    "gated_residual_adaln",
    "group_norm_silu",
    "multi_scale_quantize",
    "nearest_code",
    "next_scale_input",
    "packed_linear",
    "qk_norm_cache",
    "sample_tokens",
    "winograd_conv",
]
