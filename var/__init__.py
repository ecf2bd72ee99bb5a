"""A thin VAR: multi-scale VQ-VAE and next-scale transformer on the ops of var_kernels."""

from .checkpoints import Pipeline, load, save
from .config import PRESETS, ScaleSchedule, VARConfig, VQVAEConfig
from .editing import edit
from .request import Generated
from .sampler import Generator, generate
from .transformer import VAR
from .vqvae import VQVAE

__all__ = [
    "PRESETS", "VAR", "VQVAE", "Generated", "Generator", "Pipeline", "ScaleSchedule", "VARConfig", "VQVAEConfig",
    "edit", "generate", "load", "save",
]
